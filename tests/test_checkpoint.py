"""Checkpoints: what was saved comes back, a crash leaves the old or the new one, and damage is named."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from fedq.checkpoint import CheckpointError, Checkpoints
from fedq.errors import FieldError
from fedq.federated.optim import server_optimizer
from fedq.federated.server import Server
from fedq.files import replace_file
from fedq.layout import Layout

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
ARRAY_DTYPES = ["float32", "float64", "int64", "int32", "uint8", "bool"]
STATE = {"step": 3, "x": torch.arange(6.0).view(2, 3), "deep": [{"y": torch.ones(2)}, None]}
NEW_STATE = {"step": 4, "x": -torch.arange(6.0).view(2, 3), "deep": [{"y": torch.zeros(2)}, "new"]}


def same(a: Any, b: Any) -> bool:
    """Compare bit for bit, with types, also of NaN, minus zero and the order of keys."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and (a.numel() == 0 or torch.equal(as_bytes(a), as_bytes(b)))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(k) is type(j) and same(a[k], b[j]) for k, j in zip(a, b, strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def drawn_bytes(seed: int, num: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num, dtype=np.uint8)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = torch.zeros(shape, dtype=dtype)
    if tensor.numel():
        data = drawn_bytes(draw(st.integers(0, 99)), tensor.nbytes)
        as_bytes(tensor).copy_(torch.from_numpy(data & 1 if dtype == torch.bool else data))
    return tensor.T if tensor.ndim == 2 and draw(st.booleans()) else tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape, dtype = draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.sampled_from(ARRAY_DTYPES))
    num = int(np.prod(shape, dtype=np.int64))
    return drawn_bytes(draw(st.integers(0, 99)), num).astype(dtype).reshape(shape)


KEYS = st.one_of(st.text(max_size=4), st.integers(-9, 9), st.sampled_from(["a/b", "a", "1", "tensor"]))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), tensors(), arrays())
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
    ),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, NESTED, max_size=4))
@tried(60)
def test_what_was_saved_comes_back(tmp_path_factory: pytest.TempPathFactory, state: dict) -> None:
    checkpoints = Checkpoints(tmp_path_factory.mktemp("round_trip"))
    checkpoints.save(7, state)
    loaded = checkpoints.load(7)
    assert loaded.number == 7
    assert same(loaded.state, state)


def test_paths_that_read_alike_stay_apart(tmp_path: Path) -> None:
    zero, one, two = (torch.full((2,), float(i)) for i in range(3))
    state = {"a/b": zero, "a": {"b": one}, 1: two, "1": zero}
    Checkpoints(tmp_path).save(0, state)
    assert same(Checkpoints(tmp_path).load(0).state, state)


def test_views_and_tied_tensors_are_saved_each_on_its_own(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    state = {"a": flat[:6], "b": flat[3:9], "again": flat, "grad": torch.nn.Parameter(torch.ones(2))}
    Checkpoints(tmp_path).save(0, state)
    loaded = Checkpoints(tmp_path).load(0).state
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert not loaded["grad"].requires_grad


SERVERS = [
    "fedavg",
    "fedavgm:lr=0.5",
    "fedadagrad:lr=0.1",
    "fedadam:lr=0.1",
    "fedyogi:lr=0.1",
    "sgd:lr=0.1,momentum=0.9,nesterov=true",
    "adamw:lr=0.1",
    "adamw:lr=0.1,amsgrad=true",
    "rmsprop:lr=0.1,momentum=0.5,centered=true",
]


@pytest.mark.parametrize("spec", SERVERS)
def test_a_server_goes_on_bit_for_bit(tmp_path: Path, spec: str) -> None:
    layout = Layout.of(torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.BatchNorm1d(5)), "fp32")

    def server() -> Server:
        return Server(torch.zeros(layout.numel), layout, lambda params: server_optimizer(spec, params))

    def steps(of: Server, numbers: range) -> torch.Tensor:
        for number in numbers:
            of.step(torch.randn(layout.numel, generator=torch.Generator().manual_seed(number)))
        return of.master.detach().clone()

    first, again = server(), server()
    steps(first, range(3))
    Checkpoints(tmp_path).save(3, first.state_dict())
    again.load_state_dict(Checkpoints(tmp_path).load(3).state)
    assert torch.equal(steps(again, range(3, 6)), steps(first, range(3, 6)))
    assert same(again.state_dict(), first.state_dict())


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    assert checkpoints.numbers() == []
    for number in (1, 2, 10, 9):
        checkpoints.save(number, STATE | {"step": number})
    assert checkpoints.numbers() == [9, 10]
    assert [checkpoints.load(number).state["step"] for number in (9, 10)] == [9, 10]
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["00000009", "00000010"]
    checkpoints.save(10, NEW_STATE)
    assert same(checkpoints.load(10).state, NEW_STATE)


# ---- crashes ----


class Crash(BaseException):
    """The process is gone."""


def _half_written(descriptor: int) -> None:
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)


def _half_removed(folder: Path, **_: Any) -> None:
    for path in sorted(Path(folder).glob("*"))[:1]:
        path.unlink()


# An operation that a crash may cut, and what it has done by then: a file half on disk, a folder half deleted, a rename
# not done or done.
CUTS: dict[str, tuple[Any, str, Callable]] = {
    "write": (os, "fsync", _half_written),
    "before rename": (os, "replace", lambda *_: None),
    "after rename": (os, "replace", os.replace),
    "removal": (shutil, "rmtree", _half_removed),
}


def crashes(cut: str, act: Callable[[], None]) -> Iterator[int]:
    """Call ``act`` again and again, cutting its first, second, ... operation of a kind, until it meets no more."""
    module, name, partly = CUTS[cut]
    real, at = getattr(module, name), 0
    while True:
        at += 1
        calls = 0

        def call(*given: Any, at: int = at, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                partly(*given, **options)
                raise Crash
            return real(*given, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, name, call)
            try:
                act()
            except Crash:
                pass
            else:
                return
        yield at


@pytest.mark.parametrize("cut", CUTS)
def test_a_crash_leaves_the_old_state_or_the_new_one(tmp_path: Path, cut: str) -> None:
    folder, num = tmp_path / "checkpoints", 0

    def restart() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for number in (1, 2):
            Checkpoints(folder).save(number, {"older": number})
        Checkpoints(folder).save(3, STATE)

    restart()
    for _ in crashes(cut, lambda: Checkpoints(folder).save(4, NEW_STATE)):
        num += 1
        newest = Checkpoints(folder).numbers()[-1]
        assert same(Checkpoints(folder).load(newest).state, {3: STATE, 4: NEW_STATE}[newest])
        Checkpoints(folder).save(4, NEW_STATE)
        assert same(Checkpoints(folder).load(4).state, NEW_STATE)
        assert sorted(os.listdir(folder)) == ["00000003", "00000004"]
        restart()
    assert num >= 2 or cut == "removal"
    assert num >= 1


@pytest.mark.parametrize("cut", CUTS)
def test_a_crash_while_one_is_written_again_leaves_the_one_before(tmp_path: Path, cut: str) -> None:
    """The number is taken already when a resumed run passed over a damaged checkpoint."""
    folder = tmp_path / "checkpoints"
    Checkpoints(folder).save(3, STATE)
    Checkpoints(folder).save(4, STATE)
    for _ in crashes(cut, lambda: Checkpoints(folder).save(4, NEW_STATE)):
        assert same(Checkpoints(folder).load(3).state, STATE)
        try:
            assert any(same(Checkpoints(folder).load(4).state, state) for state in (STATE, NEW_STATE))
        except CheckpointError:
            assert cut == "removal" or 4 not in Checkpoints(folder).numbers()
    assert same(Checkpoints(folder).load(4).state, NEW_STATE)


@pytest.mark.parametrize("cut", ["write", "before rename", "after rename"])
def test_a_crash_leaves_the_old_file_or_the_new_one(tmp_path: Path, cut: str) -> None:
    path, seen = tmp_path / "file", set()
    path.write_bytes(b"old")
    for _ in crashes(cut, lambda: replace_file(path, b"new", memoryview(b" bytes"))):
        seen.add(path.read_bytes())
        path.write_bytes(b"old")
    assert seen
    assert seen <= {b"old", b"new bytes"}
    assert path.read_bytes() == b"new bytes"
    assert os.listdir(tmp_path) == ["file"]


# ---- damage ----

FILES = ("state.json", "state.safetensors")


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, STATE)
    return checkpoints


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_noticed_and_the_file_named(saved: Checkpoints, name: str) -> None:
    path = saved.folder / "00000005" / name
    whole = path.read_bytes()
    for offset in range(len(whole)):
        for bit in (1, 128):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ bit]) + whole[offset + 1 :])
            with pytest.raises(CheckpointError, match=f"00000005/{name}: its checksum does not match") as refusal:
                saved.load(5)
            assert refusal.value.path == path


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short_or_too_long_is_noticed(saved: Checkpoints, name: str) -> None:
    path = saved.folder / "00000005" / name
    whole = path.read_bytes()
    for data in (*(whole[:n] for n in range(len(whole))), whole + b"\n", whole + whole):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"00000005/{name}: its checksum does not match"):
            saved.load(5)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved: Checkpoints, name: str) -> None:
    (saved.folder / "00000005" / name).unlink()
    with pytest.raises(CheckpointError, match=f"00000005/{name}: it cannot be read .No such file"):
        saved.load(5)


def forge(folder: Path, tensors: bytes, **changes: Any) -> None:
    """Change the files, and make the checksums right again."""
    document = json.loads((folder / "state.json").read_bytes().split(b"\n")[0])
    text = json.dumps(document | {"tensors_crc32": zlib.crc32(tensors)} | changes).encode()
    (folder / "state.json").write_bytes(text + f"\n{zlib.crc32(text):08x}\n".encode())
    (folder / "state.safetensors").write_bytes(tensors)


class Trap:
    """What a pickle would run."""

    def __reduce__(self) -> tuple:
        return (os._exit, (3,))


def test_nothing_is_executed(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was used")

    with monkeypatch.context() as patch:
        for name in ("load", "loads", "Unpickler"):
            patch.setattr(pickle, name, refuse)
        assert same(saved.load(5).state, STATE)
    forge(saved.folder / "00000005", pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        saved.load(5)


def test_another_format_or_number_is_refused(saved: Checkpoints) -> None:
    folder = saved.folder / "00000005"
    tensors = (folder / "state.safetensors").read_bytes()
    forge(folder, tensors, format=2)
    with pytest.raises(CheckpointError, match=r"state\.json: format 2; this version reads 1"):
        saved.load(5)
    forge(folder, tensors, format=1)
    folder.rename(saved.folder / "00000006")
    with pytest.raises(CheckpointError, match="it belongs to checkpoint 5"):
        saved.load(6)


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"a": [1, {"b": object()}]}, "state/a/1/b='object'"),
        ({"a": {2: {1, 2}}}, "state/a/2='set'"),
        ({"a": np.float32(1)}, "state/a='float32'"),
        ({"a": np.array(["x"])}, "state/a='array of <U1'"),
        ({"a": {(1, 2): 3}}, r"key of state/a=\(1, 2\)"),
    ],
)
def test_what_cannot_be_stored_is_named_by_its_path(tmp_path: Path, state: dict, named: str) -> None:
    with pytest.raises(FieldError, match=f"{named}.*allowed"):
        Checkpoints(tmp_path).save(0, state)
    assert Checkpoints(tmp_path).numbers() == []
