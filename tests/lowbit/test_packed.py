"""Packed models: the same outputs, the size that was promised, and files that nobody can trick."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import small_config
from properties import few, tried
from safetensors.torch import load_file
from test_lowbit_quantizers import ALL_BOTH, named, weights
from torch import Tensor, nn

from fedq.errors import FieldError
from fedq.kernels.reference import pack_bits, pack_trits
from fedq.lowbit import (
    PackedModel,
    PackedWeight,
    Quantizer,
    Uniform,
    choose_quantizers,
    deployed_state_dict,
    load_packed,
    pack,
    pack_state,
    quantizer,
    save_packed,
    use_few_bits,
)
from fedq.lowbit.packed import _pack, _unpack
from fedq.lowbit.packed_file import MAGIC, packed_bytes
from fedq.models import build_model
from fedq.trainers.run import run_job


class Net(nn.Module):
    """All kinds of layers, tensors of several types, and shapes that fill no byte."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.body = nn.Sequential(nn.Conv2d(5, 7, 3, bias=False), nn.ReLU(), nn.Conv2d(7, 3, 1))
        self.line = nn.Conv1d(3, 3, 3)
        self.head = nn.Linear(3 * 2, 4)
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.norm(self.stem(x))).flatten(2) * self.mask.view(1, 3, 1)
        return self.head(self.line(x).flatten(1))


def net(spec: str = "float", *, seed: int = 0, activations: str = "float") -> nn.Module:
    torch.manual_seed(seed)
    model = Net()
    if spec != "float":
        use_few_bits(model, spec, activations=activations)
    for parameter in model.parameters():  # learned scales and thresholds too: away from where they start
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model(images()).sum().backward()  # statistics
    return model


def images() -> Tensor:
    return weights(6, 3, 5, 8, seed=9)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed") / "model.fedq"


# ---- the same model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", few(ALL_BOTH, 14), ids=named)
def test_a_loaded_model_computes_what_was_trained(chosen: Quantizer, path: Path) -> None:
    model = net(chosen.spec)
    expected, state = outputs(model), deployed_state_dict(model)
    save_packed(pack(model), path)
    packed = load_packed(path)
    assert list(packed.weights) == ["body.0.weight", "body.2.weight", "line.weight"]
    found = packed.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)
    plain, few_bit = net(seed=1), net(chosen.spec, seed=2)
    for other in (plain, few_bit):
        packed.load_into(other)
        assert torch.equal(outputs(other), expected)
    assert packed_bytes(pack(few_bit))[:-4] == packed_bytes(pack_again(packed))[:-4]
    assert all(torch.equal(deployed_state_dict(few_bit)[name], state[name]) for name in state)


def pack_again(packed: PackedModel) -> PackedModel:
    """Return the model with the errors of one that was loaded: its float weights are the few-bit values."""
    again = {n: PackedWeight(t.quantizer, t.shape, t.codes, t.scales, 0.0) for n, t in packed.weights.items()}
    return PackedModel(packed.tensors | again)


def test_a_loaded_model_can_be_trained_on(path: Path) -> None:
    model, other = net("int4"), net("int4", seed=1)
    packed = pack(model)
    packed.load_into(other)
    other.train()
    other(images()).square().sum().backward()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.sub_(0.1 * parameter.grad)
    state = deployed_state_dict(other)
    name = "body.0.weight"
    layer = other.get_submodule("body.0").parametrizations.weight
    assert torch.equal(state[name], quantizer("int4").quantize(layer.original.detach()))
    assert not torch.equal(state[name], packed.state_dict()[name])


def test_binary_inputs_travel_with_the_model(path: Path) -> None:
    model, other = (net("binary", seed=seed, activations="binary") for seed in (0, 1))
    save_packed(pack(model), path)
    load_packed(path).load_into(other)
    assert torch.equal(outputs(other), outputs(model))
    with pytest.raises(FieldError, match=r"not in the model: body\.0\.binary_input\.threshold"):
        load_packed(path).load_into(net())


def test_bits_by_layer_and_float_layers(path: Path) -> None:
    model, other = (net("head=8,body=ternary,body.2=32,tail=16", seed=seed) for seed in (0, 1))
    save_packed(pack(model), path)
    packed = load_packed(path)
    assert [w.quantizer.spec for w in packed.weights.values()] == ["int8", "ternary", "ternary", "int16"]
    packed.load_into(other)
    assert torch.equal(outputs(other), outputs(model))


def test_a_model_without_few_bits_is_exact(path: Path) -> None:
    model = net()
    save_packed(pack(model), path)
    packed = load_packed(path)
    assert not packed.weights
    assert all(torch.equal(packed.tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_packing_leaves_the_model_alone() -> None:
    model = net("int4:rounding=stochastic")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = pack(model)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    packed.tensors["mask"][0] = False
    assert model.mask[0]


# ---- what is packed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", few([c for c in ALL_BOTH if c.per == "tensor"], 14), ids=named)
def test_codes_are_the_kernels_bytes(chosen: Quantizer) -> None:
    num = 1003
    codes = torch.randint(chosen.num_levels, (num,), generator=torch.Generator().manual_seed(0))
    bits = int(np.ceil(chosen.bits_per_weight))
    if chosen.spec == "ternary":
        expected = pack_trits(codes)
    else:
        expected = pack_bits(codes.to(torch.uint8) if bits <= 8 else codes, bits)
    packed = _pack(codes.float(), chosen)
    assert torch.equal(packed, expected)
    assert torch.equal(_unpack(packed, chosen, num).long(), codes)


@pytest.mark.parametrize("spec", ["binary", "ternary", "int3", "int13"])
def test_chunks_do_not_show(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = quantizer(spec)
    codes = torch.randint(chosen.num_levels, (999,)).float()
    whole = _pack(codes, chosen)
    monkeypatch.setattr("fedq.lowbit.packed._CHUNK", 40)
    assert torch.equal(_pack(codes, chosen), whole)
    assert torch.equal(_unpack(whole, chosen, 999).float(), codes)


def test_the_error_is_against_the_float_weight() -> None:
    weight = weights(8, 9)
    packed = pack_state({"a.weight": weight}, {"a": Uniform(bits=3)}).weights["a.weight"]
    lost = (packed.values - weight).square().sum() / weight.square().sum()
    assert packed.error == pytest.approx(float(lost), rel=6e-3)  # three digits
    assert PackedWeight.of(torch.zeros(3, 3), Uniform(bits=3), name="a").error == 0.0


@pytest.mark.parametrize(
    ("model", "spec"),
    [*(("resnet20", spec) for spec in ("binary", "binary:per=channel", "ternary", "int4")), ("resnet18", "binary")],
)
def test_the_size_is_that_of_bits_scales_and_exact_tensors(model: str, spec: str) -> None:
    """Within 1 percent, which for ResNet-20 are 490 bytes for the names and shapes of 116 tensors."""
    network = build_model(model)
    quantizers = use_few_bits(network, spec)
    expected = 0.0
    for name, tensor in deployed_state_dict(network).items():
        chosen = quantizers.get(name.removesuffix(".weight"))
        if chosen is None:
            expected += tensor.numel() * tensor.element_size()
        else:
            groups = len(tensor) if chosen.per == "channel" else 1
            expected += tensor.numel() * chosen.bits_per_weight / 8 + 4 * groups
    nbytes = len(packed_bytes(pack(network)))
    assert expected <= nbytes <= 1.01 * expected


@pytest.mark.parametrize(
    ("state", "layer", "says"),
    [
        ({"a.weight": torch.tensor([[1.0, torch.inf]])}, "a", "finite weights"),
        ({"a.weight": torch.tensor([[1.0, torch.nan]])}, "a", "a.weight='int4 of values that are not finite'"),
        ({"a.weight": torch.zeros(0, 3)}, "a", "a shape with elements"),
        ({"a.weight": torch.tensor(1.0)}, "a", "at least one dimension"),
        ({"a.weight": torch.zeros(3, 3, dtype=torch.int32)}, "a", "a float tensor"),
        ({"a.weight": torch.zeros(3, 3)}, "b", "there is no b.weight"),
    ],
)
def test_what_cannot_be_packed_is_named(state: dict[str, Tensor], layer: str, says: str) -> None:
    with pytest.raises(FieldError) as caught:
        pack_state(state, {layer: Uniform(bits=4)})
    assert says in str(caught.value)


def test_half_precision_weights_are_packed_from_their_float_values() -> None:
    weight = weights(4, 6).to(torch.bfloat16)
    packed = pack_state({"a.weight": weight, "b": weight}, {"a": Uniform(bits=5)})
    assert torch.equal(packed.state_dict()["a.weight"], Uniform(bits=5).quantize(weight.float()))
    assert packed.tensors["b"].dtype == torch.bfloat16


# ---- files -------------------------------------------------------------------------------------------------------

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
NAMES = st.text(max_size=12)
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@tried(40)
@given(
    exact=st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=6),
    packed=st.dictionaries(
        NAMES, st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from(ALL_BOTH)), max_size=4
    ),
)
def test_any_tensors_come_back(
    path: Path, exact: dict[str, tuple[list[int], torch.dtype]], packed: dict[str, tuple[list[int], Quantizer]]
) -> None:
    tensors: dict[str, Any] = {name: weights(*shape).mul(9).to(dtype) for name, (shape, dtype) in exact.items()}
    tensors |= {name: PackedWeight.of(weights(*shape), chosen, name=name) for name, (shape, chosen) in packed.items()}
    path.write_bytes(packed_bytes(PackedModel(tensors)))
    found = load_packed(path)
    assert list(found.tensors) == list(tensors)
    for name, tensor in tensors.items():
        back = found.tensors[name]
        assert type(back) is type(tensor)
        if isinstance(back, PackedWeight):
            assert (back.quantizer, back.shape, back.error) == (tensor.quantizer, tensor.shape, tensor.error)
            assert torch.equal(back.codes, tensor.codes)
            assert torch.equal(back.scales, tensor.scales)
        else:
            assert back.dtype == tensor.dtype
            assert torch.equal(back, tensor)


def test_the_bytes_are_those_that_are_documented(path: Path) -> None:
    """Read a file by nothing but the table in `fedq.lowbit.packed_file`."""
    weight, bias = weights(3, 5), torch.tensor([1.5, -2.0, 3.0], dtype=torch.float64)
    save_packed(pack_state({"fc.weight": weight, "fc.bias": bias}, {"fc": quantizer("binary:per=channel")}), path)
    data = path.read_bytes()
    magic, version, header_nbytes, nbytes = struct.unpack_from("<8sHIQ", data)
    assert (magic, version, nbytes) == (b"\x89fedq\r\n\x1a", 1, len(data))
    assert struct.unpack("<I", data[-4:])[0] == zlib.crc32(data[:-4])
    header = json.loads(zlib.decompress(data[22 : 22 + header_nbytes], wbits=-15))
    error = header.pop("errors")
    assert header == {
        "shared": [0, 3],
        "rest": ["fc.weight", "bias"],
        "dtypes": ["float64"],
        "quantizers": ["binary:per=channel"],
        "kind": [1, 0],
        "shapes": [[3, 5], [3]],
    }
    assert len(error) == 1
    body = data[22 + header_nbytes : -4]
    signs = np.unpackbits(np.frombuffer(body[:2], np.uint8), bitorder="little")[:15].reshape(3, 5)
    scales = np.frombuffer(body[2:14], "<f4")
    np.testing.assert_array_equal((2.0 * signs - 1) * scales[:, None], pack_values(weight))
    np.testing.assert_array_equal(np.frombuffer(body[14:], "<f8"), bias.numpy())


def pack_values(weight: Tensor) -> np.ndarray:
    return (weight.sign() * weight.double().abs().mean(dim=1, keepdim=True).float()).numpy()


@pytest.fixture(scope="module")
def data() -> bytes:
    return packed_bytes(pack(net("int3")))


def test_a_file_that_is_cut_short_anywhere_is_refused(data: bytes, path: Path) -> None:
    for length in [*range(64), *range(64, len(data), 97), len(data) - 4, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(FieldError, match=r"cut short, after|does not begin as one"):
            load_packed(path)


def test_a_byte_that_is_changed_anywhere_is_noticed(data: bytes, path: Path) -> None:
    says = "checksum|begin as one|version|cut short|has .* bytes where"
    for place in [*range(64), *range(64, len(data), 41), *range(len(data) - 4, len(data))]:
        changed = bytearray(data)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(FieldError, match=says):
            load_packed(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not begin as one"),
        (b"PK\x03\x04 a pickle", "does not begin as one"),
        (MAGIC, "cut short, after 8 bytes"),
        (struct.pack("<8sHIQ", MAGIC, 2, 0, 26) + bytes(4), "version 2, and this program reads version 1"),
    ],
)
def test_another_file_is_refused(content: bytes, says: str, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(FieldError, match=says):
        load_packed(path)


def test_bytes_behind_the_end_are_noticed(data: bytes, path: Path) -> None:
    path.write_bytes(data + b"\0")
    with pytest.raises(FieldError, match=r"has [\d,]+ bytes where it says"):
        load_packed(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="No such file"):
        load_packed(tmp_path / "none.fedq")
    with pytest.raises(FieldError, match="file that can be written"):
        save_packed(pack_state({}, {}), tmp_path / "none" / "model.fedq")


def forged(header: Any, body: bytes = b"", *, text: bytes | None = None) -> bytes:
    """Return a file with a right checksum around any header."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(json.dumps(header).encode() if text is None else text) + deflate.flush()
    start = struct.pack("<8sHIQ", MAGIC, 1, len(packed), 22 + len(packed) + len(body) + 4) + packed + body
    return start + struct.pack("<I", zlib.crc32(start))


def columns(**changes: Any) -> dict[str, Any]:
    header = {
        **{"shared": [0], "rest": ["a.weight"], "dtypes": ["uint8"], "quantizers": ["int4"]},
        **{"kind": [0], "shapes": [[2]], "errors": []},
    }
    return header | changes


def test_the_forger_can_also_be_honest(path: Path) -> None:
    path.write_bytes(forged(columns(), b"\x01\x02"))
    assert load_packed(path).tensors["a.weight"].tolist() == [1, 2]
    path.write_bytes(forged(columns(kind=[1], errors=[None], shapes=[[1, 2]]), b"\x01\0\0\x80\x3f"))
    assert load_packed(path).state_dict()["a.weight"].shape == (1, 2)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ([], "header of another kind"),
        ({}, "header of another kind"),
        (columns(shapes=None), "header of another kind"),
        (columns(shapes=[[3]]), "does not fit its size"),
        (columns(shapes=[[2**62, 2**62]]), "does not fit its size"),
        (columns(shapes=[[-1, -2]]), "has the shape"),
        (columns(shapes=[[2.0]]), "has the shape"),
        (columns(shapes=[[True, 2]]), "has the shape"),
        (columns(shapes=["2"]), "has the shape"),
        (columns(kind=[1], errors=[None], shapes=[[0, 3]]), "has the shape"),
        (columns(kind=[1], errors=[None], shapes=[[]]), "has the shape"),
        (columns(kind=[1], errors=["much"]), "has the error"),
        (columns(kind=[1], errors=[-1]), "has the error"),
        (columns(kind=[1], errors=[]), "do not fit together"),
        (columns(kind=[2]), "do not fit together"),
        (columns(kind=["0"]), "do not fit together"),
        (columns(kind=[0, 0]), "do not fit together"),
        (columns(rest=[7]), "do not fit together"),
        (columns(shared=["0"]), "do not fit together"),
        (columns(dtypes=["object"]), "kind that is not known"),
        (columns(dtypes=[[]]), "kind that is not known"),
        (columns(quantizers=["int99"]), "kind that is not known"),
        (columns(quantizers=[{}]), "kind that is not known"),
        (
            columns(shared=[0, 8], rest=["a.weight", ""], kind=[0, 0], shapes=[[1], [1]]),
            "two tensors of one name",
        ),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, says: str, path: Path) -> None:
    path.write_bytes(forged(header, b"\x01\x02"))
    with pytest.raises(FieldError, match=says):
        load_packed(path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"shared": NaN}'])
def test_a_header_that_is_no_json_is_refused(text: bytes, path: Path) -> None:
    path.write_bytes(forged(None, text=text))
    with pytest.raises(FieldError, match="header"):
        load_packed(path)


def test_a_header_that_unpacks_without_end_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedq.lowbit.packed_file._MAX_HEADER_NBYTES", 2**10)
    path.write_bytes(forged(None, text=b" " * 2**20))
    with pytest.raises(FieldError, match="header that cannot be read"):
        load_packed(path)


def test_a_type_that_the_format_does_not_have_is_named(path: Path) -> None:
    with pytest.raises(FieldError, match="spectrum='complex64'"):
        save_packed(pack_state({"spectrum": torch.zeros(2, dtype=torch.complex64)}, {}), path)


def test_a_crash_leaves_the_old_file(data: bytes, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(data)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_packed(pack_state({}, {}), path)
    assert path.read_bytes() == data
    assert [file.name for file in path.parent.iterdir()] == ["model.fedq"]


# ---- another model -----------------------------------------------------------------------------------------------


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 9)


class Other(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.norm
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Wider(), [r"of another shape: head.weight [4, 6] (model: [9, 6]), head.bias [4] (model: [9])"]),
        (Other(), ["missing in the file: extra.weight, extra.bias", "not in the model: norm.weight, norm.bias"]),
        (Other(), ["norm.running_mean and 2 more"]),
        (net("int4"), ["of another quantizer: body.0.weight int3 (model: int4)"]),
        (net("head=3,body=3"), ["stem.weight float (model: int3)"]),
    ],
)
def test_another_model_is_refused_and_left_alone(model: nn.Module, says: list[str], data: bytes, path: Path) -> None:
    path.write_bytes(data)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FieldError) as caught:
        load_packed(path).load_into(model)
    assert all(words in str(caught.value) for words in says)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["binary:per=channel,scale=learned", "head=8,body=ternary"])
@pytest.mark.parametrize("exchange", ["round", "none"])
def test_training_leaves_the_packed_model(
    spec: str, exchange: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    of_rounds = {"num_clients": 2, "cohort": 2} if exchange == "round" else {"num_clients": 1, "cohort": 1}
    summary = run_job(small_config(folder, weights=spec, exchange=exchange, rounds=1, **of_rounds))
    packed, floats = load_packed(folder / "model.fedq"), load_file(folder / "model.safetensors")
    assert {n: t.quantizer for n, t in packed.weights.items()} == {
        f"{n}.weight": t for n, t in choose_quantizers(build_model("cnn62k"), spec).items()
    }
    found = packed.state_dict()
    assert found.keys() == floats.keys()
    assert all(torch.equal(found[name], floats[name]) for name in floats)
    assert summary["packed_bytes"] == (folder / "model.fedq").stat().st_size
    assert summary["packed_bytes_fp32"] == sum(tensor.nbytes for tensor in floats.values())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("packed model")]
    assert line.startswith(f"packed model      {spec}: ")
    assert "float32 248 kB" in line


def test_a_float_run_has_no_packed_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    summary = run_job(small_config(folder, rounds=1, num_clients=1, cohort=1))
    assert not (folder / "model.fedq").exists()
    assert "packed_bytes" not in summary
    assert "packed model" not in capsys.readouterr().out
