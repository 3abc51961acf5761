"""Error feedback: nothing is lost, and residuals survive disk, checkpoints and non-finite updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedq.errors import FieldError
from fedq.feedback import ErrorFeedback, NoFeedback, ResidualStore, prune_residuals, read_residual
from fedq.layout import Layout


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 4))


def update(layout: Layout, seed: int) -> Tensor:
    return torch.randn(layout.numel, generator=torch.Generator().manual_seed(seed)) * 0.1


def applied(layout: Layout, feedback: ErrorFeedback | NoFeedback, owner: int, flat: Tensor, seed: int) -> Tensor:
    payloads, out = feedback.encode(owner, layout, flat, seed=seed), torch.zeros(layout.numel)
    layout.decode_add([p.data for p in payloads], out, seed=seed)
    return out


@pytest.mark.parametrize(
    "spec", ["sign", "int2", "ternary", "topk:density=0.05", "randk:density=0.1", "threshold:value=0.2"]
)
def test_telescoping(model: nn.Module, spec: str) -> None:
    layout = Layout.of(model, spec)
    feedback = ErrorFeedback(ResidualStore())
    num_params, rounds = layout.num_params, 12
    start = 0.1 * torch.randn(num_params, generator=torch.Generator().manual_seed(99))
    feedback.store.put(3, start.clone())
    sent, true = torch.zeros(num_params, dtype=torch.float64), torch.zeros(num_params, dtype=torch.float64)
    largest = 0.0
    for step in range(rounds):
        flat = update(layout, step)
        out = applied(layout, feedback, 3, flat, seed=step)
        sent += out[:num_params].double()
        true += flat[:num_params].double()
        largest = max(largest, out.abs().max().item(), feedback.store.get(3, num_params).abs().max().item())
    drift = (sent - true) - (start.double() - feedback.store.get(3, num_params).double())
    # Each round rounds twice at float32's precision, at the size of what was decoded or kept.
    assert drift.abs().max().item() <= rounds * 2 * 2.0**-23 * largest


def test_memory_scales_the_old_residual(model: nn.Module) -> None:
    layout, flat = Layout.of(model, "sign"), None
    half, scaled = ErrorFeedback(ResidualStore()), ErrorFeedback(ResidualStore())
    for feedback in (half, scaled):
        applied(layout, feedback, 0, update(layout, 0), seed=0)
    scaled.store.put(0, 0.5 * scaled.store.get(0, layout.num_params))
    flat = update(layout, 1)
    mine = half.encode(0, layout, flat, seed=1, memory=0.5)
    theirs = scaled.encode(0, layout, flat, seed=1)
    assert all(torch.equal(p.data, q.data) for p, q in zip(mine, theirs, strict=True))
    assert torch.equal(half.store.get(0, layout.num_params), scaled.store.get(0, layout.num_params))


def test_statistics_have_no_residual(model: nn.Module) -> None:
    layout = Layout.of(model, "sign")
    feedback = ErrorFeedback(ResidualStore())
    flat = update(layout, 0)
    for step in range(2):
        out = applied(layout, feedback, 0, flat, seed=step)
        for name in ("1.running_mean", "1.running_var"):
            s = layout[name].slice
            assert torch.equal(out[s], flat[s].to(torch.bfloat16).float())
    assert feedback.store.get(0, layout.num_params).numel() == layout.num_params
    assert "1.running_mean" not in feedback.state_dict(layout)[0]


def test_the_update_is_left_alone_and_owners_are_apart(model: nn.Module) -> None:
    layout = Layout.of(model, "sign")
    feedback, alone = ErrorFeedback(ResidualStore()), ErrorFeedback(ResidualStore())
    for step in range(3):
        flat = update(layout, step)
        before = flat.clone()
        mine = applied(layout, feedback, 7, flat, seed=step)
        applied(layout, feedback, 8, update(layout, 50 + step), seed=step)
        assert torch.equal(flat, before)
        assert torch.equal(mine, applied(layout, alone, 7, flat, seed=step))
    assert list(feedback.store.owners()) == [7, 8]


def test_without_feedback_nothing_is_kept(model: nn.Module) -> None:
    layout = Layout.of(model, "sign")
    flat = update(layout, 0)
    payloads = NoFeedback().encode(0, layout, flat, seed=1)
    assert all(torch.equal(p.data, q.data) for p, q in zip(payloads, layout.encode(flat, seed=1), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", ["sign", "int4", "ternary", "topk:density=0.1"])
def test_a_non_finite_value_keeps_its_residual(model: nn.Module, spec: str, value: float) -> None:
    layout = Layout.of(model, spec)
    feedback = ErrorFeedback(ResidualStore())
    applied(layout, feedback, 0, update(layout, 0), seed=0)
    before = feedback.state_dict(layout)[0]
    flat = update(layout, 1)
    flat[layout["0.weight"].offset + 5] = value
    out = layout.views(applied(layout, feedback, 0, flat, seed=1))
    after = feedback.state_dict(layout)[0]
    assert not out["0.weight"].isfinite().all()
    assert after["0.weight"].view(-1)[5] == before["0.weight"].view(-1)[5]
    kept = ~out["0.weight"].isfinite()
    assert torch.equal(after["0.weight"][kept], before["0.weight"][kept])
    assert not torch.equal(after["2.weight"], before["2.weight"])
    assert all(residual.isfinite().all() for residual in after.values())
    assert out["2.weight"].isfinite().all()


def test_spilling_changes_nothing(model: nn.Module, tmp_path: Path) -> None:
    layout = Layout.of(model, "sign")
    nbytes = 4 * layout.num_params
    memory = ErrorFeedback(ResidualStore())
    spilling = ErrorFeedback(ResidualStore(limit_bytes=2 * nbytes, folder=tmp_path / "residuals"))
    for step, owner in enumerate([0, 1, 2, 3, 0, 4, 2, 2, 1, 3, 0]):
        flat = update(layout, step)
        expected = applied(layout, memory, owner, flat, seed=step)
        assert torch.equal(applied(layout, spilling, owner, flat, seed=step), expected)
        assert spilling.store._memory_bytes() <= 2 * nbytes
    assert list(spilling.store.owners()) == list(memory.store.owners()) == [0, 1, 2, 3, 4]
    for owner in range(5):
        assert torch.equal(spilling.store.get(owner, layout.num_params), memory.store.get(owner, layout.num_params))
    files = sorted(path.name for path in (tmp_path / "residuals").iterdir())
    assert all(name.startswith("client-") and name.endswith(".f32") for name in files)
    assert (tmp_path / "residuals" / files[0]).stat().st_size == nbytes + 8  # with mark and checksum


def test_one_residual_always_stays_in_memory(tmp_path: Path) -> None:
    store = ResidualStore(limit_bytes=1, folder=tmp_path / "residuals")
    store.put(0, torch.ones(10))
    assert not (tmp_path / "residuals").exists()
    store.put(1, torch.ones(10))
    assert torch.equal(store.get(0, 10), torch.ones(10))


def test_another_model_is_refused(tmp_path: Path) -> None:
    store = ResidualStore(limit_bytes=1, folder=tmp_path)
    store.put(4, torch.ones(10))
    store.put(5, torch.ones(10))
    for owner in (4, 5):
        with pytest.raises(FieldError, match=f"residual of client {owner}=10 .*allowed: 11 elements"):
            store.get(owner, 11)


def test_state_dict_goes_by_name(model: nn.Module) -> None:
    layout = Layout.of(model, "sign")
    feedback = ErrorFeedback(ResidualStore())
    for owner in (2, 9):
        applied(layout, feedback, owner, update(layout, owner), seed=0)
    state = feedback.state_dict(layout)
    assert {k: list(v) for k, v in state.items()} == {o: [n for n, _ in sorted_params(layout)] for o in (2, 9)}

    restored = ErrorFeedback(ResidualStore())
    restored.load_state_dict(layout, {o: dict(reversed(v.items())) for o, v in state.items()})
    flat = update(layout, 5)
    for owner in (2, 9):
        expected = applied(layout, feedback, owner, flat, seed=3)
        assert torch.equal(applied(layout, restored, owner, flat, seed=3), expected)

    kept = state[2]["0.weight"].clone()
    feedback.store.get(2, layout.num_params).zero_()
    assert torch.equal(state[2]["0.weight"], kept)


def sorted_params(layout: Layout) -> list[tuple[str, int]]:
    return [(s.name, s.offset) for s in layout.spans if s.role != "stats"]


def test_state_of_another_model_is_refused(model: nn.Module) -> None:
    layout, feedback = Layout.of(model, "sign"), ErrorFeedback(ResidualStore())
    with pytest.raises(FieldError, match=r"residual of 0\.weight=\(3, 3\).*\(20, 30\)"):
        feedback.load_state_dict(layout, {0: {"0.weight": torch.zeros(3, 3)}})
    for name in ("0.wieght", "1.running_mean"):
        with pytest.raises(FieldError, match=f"residual of='{name}'.*0.weight"):
            feedback.load_state_dict(layout, {0: {name: torch.zeros(20)}})
    feedback.load_state_dict(layout, {0: {"2.bias": torch.ones(4)}})
    residual = feedback.store.get(0, layout.num_params)
    assert residual.sum() == 4
    assert (residual[layout["2.bias"].slice] == 1).all()


# ---- versions on disk ----


def versions_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_save_writes_only_what_changed(tmp_path: Path) -> None:
    store = ResidualStore(folder=tmp_path)
    for owner in (2, 0):
        store.put(owner, torch.full((10,), float(owner)))
    assert store.save(1) == [0, 2]
    assert store.save(2) == []
    store.put(2, torch.full((10,), 5.0))
    assert store.save(3) == [2]
    assert versions_in(tmp_path) == {
        "client-000000-00000001.f32",
        "client-000002-00000001.f32",
        "client-000002-00000003.f32",
    }
    assert torch.equal(read_residual(store.path(2, 1)), torch.full((10,), 2.0)), "an old version stays as it was"
    assert torch.equal(read_residual(store.path(2, 3)), torch.full((10,), 5.0))


@pytest.mark.parametrize("limit_bytes", [1 << 30, 1])
def test_another_store_goes_on_from_any_saved_versions(tmp_path: Path, limit_bytes: int) -> None:
    """Also when residuals had spilled to disk before they were saved."""
    store = ResidualStore(limit_bytes, tmp_path)
    for number in (1, 2):
        for owner in range(3):
            store.put(owner, torch.full((7,), 10.0 * number + owner))
        assert store.save(number) == [0, 1, 2]
    store.put(1, torch.full((7,), -1.0))
    store.put(0, torch.full((7,), -1.0))

    other = ResidualStore(limit_bytes, tmp_path)
    other.put(9, torch.ones(7))
    other.attach({0: 2, 1: 1})
    assert list(other.owners()) == [0, 1]
    assert torch.equal(other.get(0, 7), torch.full((7,), 20.0))
    assert torch.equal(other.get(1, 7), torch.full((7,), 11.0))
    assert torch.equal(other.get(2, 7), torch.zeros(7))
    assert other.save(3) == [], "nothing has changed since"
    other.get(0, 7).fill_(99.0)
    assert torch.equal(read_residual(other.path(0, 2)), torch.full((7,), 20.0)), "a file is never changed"


def test_a_spilled_residual_is_saved_and_may_change_again(tmp_path: Path) -> None:
    store = ResidualStore(limit_bytes=1, folder=tmp_path)
    store.put(0, torch.ones(5))
    store.put(1, torch.ones(5))  # spills 0
    assert store.save(1) == [0, 1]
    store.put(0, store.get(0, 5) + 1)
    store.put(1, store.get(1, 5) + 1)  # spills 0 again; its version 1 must not change
    assert torch.equal(read_residual(store.path(0, 1)), torch.ones(5))
    assert torch.equal(store.get(0, 5), torch.full((5,), 2.0))
    assert store.save(2) == [0, 1]
    assert [float(read_residual(store.path(owner, 2))[0]) for owner in (0, 1)] == [2.0, 2.0]


def test_any_damage_to_a_residual_is_noticed_and_the_file_named(tmp_path: Path) -> None:
    store = ResidualStore(folder=tmp_path)
    store.put(3, torch.arange(6.0))
    store.save(1)
    path = store.path(3, 1)
    whole = path.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for data in (*flipped, *(whole[:n] for n in range(len(whole))), whole + b"\0"):
        path.write_bytes(data)
        with pytest.raises(FieldError, match=f"residual file='{path}'.*whole file whose checksum matches"):
            read_residual(path)
    store.attach({3: 1})
    with pytest.raises(FieldError, match="checksum"):
        store.get(3, 6)
    path.unlink()
    with pytest.raises(FieldError, match="No such file"):
        store.get(3, 6)


def test_pruning_deletes_saved_versions_alone(tmp_path: Path) -> None:
    store = ResidualStore(limit_bytes=1, folder=tmp_path)
    for number in (1, 2, 3):
        for owner in (0, 1):
            store.put(owner, torch.full((4,), float(number)))
        store.save(number)
    store.put(0, torch.ones(4))
    store.put(1, torch.ones(4))  # spills 0
    kept = {store.path(0, 2), store.path(1, 3)}
    prune_residuals(tmp_path, kept)
    assert versions_in(tmp_path) == {path.name for path in kept} | {"client-000000.spill.f32"}
    prune_residuals(tmp_path / "missing", set())
