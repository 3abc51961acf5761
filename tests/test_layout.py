"""Layouts: the order of spans, flat buffers, and what a model weighs under each codec."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedq import kernels
from fedq.codecs import codec
from fedq.errors import FieldError
from fedq.layout import Layout, end_to_end, frozen_parameters
from fedq.models import build_model


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))


def test_spans_are_coded_then_exempt_then_statistics() -> None:
    layout = Layout.of(small_model(), "int4")
    assert [(s.name, s.role, s.codec.spec) for s in layout.spans] == [
        ("0.weight", "coded", "int4"),
        ("3.weight", "coded", "int4"),
        ("0.bias", "exempt", "bf16"),
        ("1.weight", "exempt", "bf16"),
        ("1.bias", "exempt", "bf16"),
        ("3.bias", "exempt", "bf16"),
        ("1.running_mean", "stats", "bf16"),
        ("1.running_var", "stats", "bf16"),
    ]
    offset = 0
    for span in layout.spans:
        assert span.offset == offset
        assert span.slice == slice(offset, offset + span.numel)
        offset += span.numel
    assert layout.numel == offset
    assert layout.num_params == sum(p.numel() for p in small_model().parameters())
    assert layout["3.weight"].shape == (5, 8)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_a_cast_carries_everything(name: str) -> None:
    layout = Layout.of(small_model(), name)
    assert {s.codec.spec for s in layout.spans} == {name}
    assert layout.fixed_nbytes == layout.numel * (4 if name == "fp32" else 2)


def test_offsets_do_not_depend_on_the_codec() -> None:
    layouts = [Layout.of(small_model(), spec) for spec in ("fp32", "int4", "topk", "threshold")]
    assert len({tuple((s.name, s.shape, s.offset, s.role) for s in layout.spans) for layout in layouts}) == 1


@pytest.mark.parametrize("spec", ["int4", "sign", "fp16", "topk:density=0.1"])
def test_a_layout_of_shapes_is_that_of_the_module(spec: str) -> None:
    model = small_model()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if t.is_floating_point()}
    assert Layout.of_shapes(shapes, spec) == Layout.of(model, spec)
    assert Layout.of_shapes(shapes, spec).hash == Layout.of(model, spec).hash
    assert Layout.of_shapes({}, spec).numel == 0


def test_hash_is_of_names_shapes_order_and_codecs() -> None:
    base = Layout.of(small_model(), "int4")
    assert base.hash == Layout.of(small_model(seed=5), codec("int4:block=256")).hash
    assert 0 <= base.hash < 2**64
    conv, norm, flatten, linear = small_model()
    others = [
        Layout.of(small_model(), "int3"),
        Layout.of(small_model(), "int4:block=512"),
        Layout.of(nn.Sequential(conv, norm, flatten, nn.Linear(8, 6)), "int4"),
        Layout.of(nn.Sequential(conv, norm, linear), "int4"),
        Layout.of(nn.Sequential(conv, nn.GroupNorm(2, 8), flatten, linear), "int4"),
        Layout.of(small_model(), "topk:density=0.0123456"),
        Layout.of(small_model(), "topk:density=0.01234561"),
    ]
    assert len({base.hash, *(layout.hash for layout in others)}) == len(others) + 1


def test_flatten_is_the_tensors_in_order() -> None:
    model = small_model()
    layout = Layout.of(model, "int4")
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    expected = torch.cat([named[s.name].detach().reshape(-1) for s in layout.spans])
    flat = layout.flatten(model)
    assert torch.equal(flat, expected)
    views = layout.views(flat)
    assert list(views) == [s.name for s in layout.spans]
    views["3.bias"].fill_(4.0)
    assert (flat[layout["3.bias"].slice] == 4.0).all()


def test_channels_last_keeps_values_and_memory_format() -> None:
    plain, last = small_model(), small_model().to(memory_format=torch.channels_last)
    layout = Layout.of(plain, "int4")
    assert torch.equal(layout.flatten(plain), layout.flatten(last))
    flat = torch.arange(layout.numel, dtype=torch.float32)
    layout.unflatten_(flat, last)
    weight = last.get_parameter("0.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight.detach().reshape(-1), flat[: weight.numel()])
    assert torch.equal(layout.flatten(last), flat)
    assert last[1].num_batches_tracked == 0


def test_half_precision_modules_flatten_to_float32() -> None:
    model = small_model().to(torch.bfloat16)
    layout = Layout.of(model, "int8")
    flat = layout.flatten(model)
    assert flat.dtype == torch.float32
    layout.unflatten_(flat * 2, model)
    assert torch.equal(layout.flatten(model), flat * 2)


def test_tied_parameters_travel_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert [s.name for s in Layout.of(model, "int4").spans] == ["0.weight", "0.bias", "1.bias"]


@pytest.mark.parametrize("spec", ["fp32", "int4", "sign", "topk:density=0.1", "threshold:value=0.1"])
def test_encode_and_decode_add_go_span_by_span(spec: str) -> None:
    model, seed = small_model(), 7 | 9 << 32
    layout = Layout.of(model, spec)
    flat = layout.flatten(model)
    payloads = layout.encode(flat, seed=seed)
    out = torch.ones(layout.numel)
    layout.decode_add([p.data for p in payloads], out, seed=seed, weight=0.5)
    for i, span in enumerate(layout.spans):
        x = flat[span.slice].view(span.shape)
        alone = span.codec.encode(x, seed=kernels.span_seed(seed, i))
        assert torch.equal(alone.data, payloads[i].data)
        assert torch.equal(out[span.slice], (1 + 0.5 * alone.decode()).view(-1))
    if layout.fixed_nbytes is not None:
        assert layout.fixed_nbytes == sum(p.nbytes for p in payloads)
    assert (layout.fixed_nbytes is None) is spec.startswith("threshold")


@pytest.mark.parametrize("spec", ["fp32", "bf16", "int4", "threshold:value=0.1"])
@pytest.mark.parametrize("sends_values", [False, True])
def test_neighbours_of_one_cast_are_coded_as_each_alone(spec: str, sends_values: bool) -> None:
    layout = Layout.of(small_model(), spec)
    if sends_values:  # in the middle of the exempt ones, and without a residual
        layout = layout.with_values({layout.spans[3].name: codec("bf16")})
    generator = torch.Generator().manual_seed(3)
    flat, residual = (torch.randn(n, generator=generator) for n in (layout.numel, layout.num_params))
    expected = residual.clone()
    payloads = layout.encode(flat, seed=5, residual=residual)
    for i, (span, payload) in enumerate(zip(layout.spans, payloads, strict=True)):
        x, seed = flat[span.slice].view(span.shape), kernels.span_seed(5, i)
        if span.role == "stats" or span.sent == "values":
            alone = span.codec.encode(x, seed=seed)
        else:
            alone = span.codec.encode_with_residual(x, expected[span.slice].view(span.shape), seed=seed)
        assert torch.equal(payload.data, alone.data)
        assert (payload.shape, payload.seed, payload.codec) == (span.shape, seed, span.codec)
    assert torch.equal(residual, expected)
    datas = [payload.data for payload in payloads]
    for given in (datas, [data.clone() for data in datas]):  # one after another in one buffer, and not
        layout.check(given)
        out = torch.ones(layout.numel)
        layout.decode_add(given, out, seed=5, weight=0.5)
        total = torch.empty(layout.numel)
        layout.decode_sum([given, given], total, seeds=[5, 5], weights=[0.5, 0.25])
        for span, payload in layout.payloads(given, seed=5):
            decoded = payload.decode().view(-1)
            assert torch.equal(out[span.slice], 1 + 0.5 * decoded)
            assert torch.equal(total[span.slice], 0.5 * decoded + 0.25 * decoded)


def test_what_lies_end_to_end_is_not_copied() -> None:
    memory = torch.arange(20, dtype=torch.uint8)
    parts = list(memory[2:].split([3, 0, 10, 5]))
    joined = end_to_end(parts)
    assert joined.tolist() == list(range(2, 20))
    assert joined.data_ptr() == memory[2:].data_ptr()
    for apart in ([parts[0], parts[3]], [parts[2], parts[0]], [parts[0], parts[2].clone()], [memory[::2], memory[:3]]):
        copied = end_to_end(apart)
        assert copied.tolist() == [value for part in apart for value in part.tolist()]
        assert copied.data_ptr() != apart[0].data_ptr()


def test_payloads_are_counted() -> None:
    layout = Layout.of(small_model(), "int8")
    with pytest.raises(FieldError, match=r"payloads=1 .*allowed: 8"):
        layout.decode_add([torch.zeros(3, dtype=torch.uint8)], torch.zeros(layout.numel), seed=0)


# Coded weights alone against float32: b/8 + 2/block bytes an element and so on, each within 1 % for the block ends.
RATIOS = [
    ("int8", (1 + 2 / 256) / 4),
    ("int4", 0.12695),
    ("int2", (0.25 + 2 / 256) / 4),
    ("ternary", (0.2 + 2 / 256) / 4),
    ("sign", 1 / 31.5),
    ("blocktopk:k=1,block=64,bits=2", 1 / 248.2),
    ("blocktopk:k=1,block=64", (22 / 64 / 8) / 4),
    ("topk:density=0.01", 0.01 * (16 + 2 + math.log2(100)) / 32),
    ("randk:density=0.01", 0.005),
]


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    with torch.device("meta"):
        return build_model("resnet18")


@pytest.mark.parametrize(("spec", "ratio"), RATIOS)
def test_resnet18_bytes(resnet18: nn.Module, spec: str, ratio: float) -> None:
    layout = Layout.of(resnet18, spec)
    coded = [s for s in layout.spans if s.role == "coded"]
    raw = 4 * sum(s.numel for s in coded)
    nbytes = sum(s.codec.payload_nbytes(s.shape) for s in coded)
    # Elias-Fano spends between 1.5 and 2 bits beyond log2(n/k): up to 3 % of a top-k entry.
    assert nbytes / raw == pytest.approx(ratio, rel=0.03 if spec.startswith("topk") else 0.01)
    exempt = sum(s.numel for s in layout.spans if s.role == "exempt")
    stats = sum(s.numel for s in layout.spans if s.role == "stats")
    assert (exempt, stats) == (9610, 9600)
    assert layout.num_params == 11_173_962
    assert layout.fixed_nbytes is not None
    assert layout.fixed_nbytes == nbytes + 2 * (exempt + stats)
    assert layout.fixed_nbytes == pytest.approx(
        ratio * raw + 2 * (exempt + stats), rel=0.03 if "topk:d" in spec else 0.01
    )


def test_resnet18_whole_messages(resnet18: nn.Module) -> None:
    raw = Layout.of(resnet18, "fp32").fixed_nbytes
    assert raw == 4 * (11_173_962 + 9600)
    nbytes = {s: Layout.of(resnet18, s).fixed_nbytes for s in ("int4", "sign", "blocktopk:k=1,block=64,bits=2")}
    assert all(isinstance(n, int) for n in nbytes.values())
    assert nbytes["int4"] / raw == pytest.approx(0.128, rel=0.01)
    assert 1 / 31 < nbytes["sign"] / raw < 1 / 29
    assert raw / nbytes["blocktopk:k=1,block=64,bits=2"] > 190


# ---- what travels ------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """A layer with a table that follows from its code, a mask, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.register_buffer("mean", torch.zeros(4))


def test_buffers_outside_the_state_dict_do_not_travel() -> None:
    model = nn.Sequential(Rotary(), nn.BatchNorm1d(4), Rotary())
    layout = Layout.of(model, "int8")
    assert {s.name for s in layout.spans} == {n for n, t in model.state_dict().items() if t.is_floating_point()}
    stats = [s.name for s in layout.spans if s.role == "stats"]
    assert stats == ["0.mean", "1.running_mean", "1.running_var", "2.mean"]
    layout.unflatten_(torch.full((layout.numel,), 3.0), model)
    assert torch.equal(model[0].table, torch.arange(8.0))
    alone = Rotary()
    assert "table" not in {s.name for s in Layout.of(alone, "fp32").spans}


def test_frozen_parameters_do_not_travel() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    layout = Layout.of(model, "int4")
    assert [s.name for s in layout.spans if s.role != "stats"] == ["3.weight", "1.weight", "1.bias", "3.bias"]
    before = model[0].weight.clone()
    layout.unflatten_(torch.zeros(layout.numel), model)
    assert torch.equal(model[0].weight, before)
    assert not model[3].weight.any()
    assert set(frozen_parameters(model)) == {"0.weight", "0.bias"}


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(FieldError, match="every parameter is frozen"):
        Layout.of(small_model().requires_grad_(False), "int4")
    assert Layout.of(nn.Flatten(), "int4").numel == 0


@pytest.mark.parametrize(("freeze", "words"), [(True, "frozen"), (False, "trained")])
def test_what_is_frozen_or_unfrozen_later_is_named(freeze: bool, words: str) -> None:
    model = small_model()
    model[0].weight.requires_grad_(freeze)
    layout = Layout.of(model, "int4")
    layout.check_trained(model)
    model[0].weight.requires_grad_(not freeze)
    with pytest.raises(FieldError, match=rf"0\.weight='{words}' is not allowed"):
        layout.check_trained(model)


class Wave(nn.Module):
    """Complex numbers of each role."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.register_buffer("seen", torch.randn(5, dtype=torch.complex64))


def test_complex_tensors_are_laid_out_as_real_and_imaginary_parts() -> None:
    module, layout = Wave(), Layout.of(Wave(), "int4")
    rows = [(span.name, span.shape, span.role) for span in layout.spans]
    assert rows == [("weight", (4, 3, 2), "coded"), ("bias", (3, 2), "exempt"), ("seen", (5, 2), "stats")]
    flat = layout.flatten(module)
    parts = [torch.stack((t.real, t.imag), dim=-1).reshape(-1) for t in (module.weight, module.bias, module.seen)]
    assert torch.equal(flat, torch.cat(parts).detach())
    other = Wave()
    layout.unflatten_(flat, other)
    assert all(
        torch.equal(a, b) for a, b in zip(other.state_dict().values(), module.state_dict().values(), strict=True)
    )
    assert not layout.held(module), "float32 parts hold the flat buffer's values"


def test_the_compiler_leaves_no_trace_in_names() -> None:
    plain = small_model()
    compiled = torch.compile(small_model(), backend="eager")
    assert Layout.of(compiled, "int4") == Layout.of(plain, "int4")
    assert torch.equal(Layout.of(plain, "fp32").flatten(compiled), Layout.of(plain, "fp32").flatten(plain))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    layout = Layout.of(model, "fp32")
    assert [s.name for s in layout.spans] == ["embedding.weight"]
    layout.unflatten_(torch.arange(24.0), model)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, torch.arange(24.0).view(6, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_change_is_what_a_module_changed_and_not_its_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64).to(torch.float32))
    model[0].to(dtype)
    layout = Layout.of(model, "fp32")
    replica = torch.randn(layout.numel)
    layout.unflatten_(replica, model)
    held = layout.held(model)
    assert set(held) == {"0.weight", "0.bias"}  # float32 tensors cost nothing
    sent = layout.to_sent_(layout.flatten(model), replica, layout.changes(model, held))
    assert not sent.any()
    with torch.no_grad():
        model[0].weight.add_(torch.randn(64, 64).to(dtype) * 2.0**-6)
        model[1].weight.add_(1.0)
    sent = layout.to_sent_(layout.flatten(model), replica, layout.changes(model, held))
    views = layout.views(sent)
    moved = (model[0].weight.detach().double() - held["0.weight"].double()).float()
    assert torch.equal(views["0.weight"], moved)
    assert views["0.weight"].any()
    assert not views["0.bias"].any()
    assert torch.equal(views["1.weight"], layout.views(layout.flatten(model) - replica)["1.weight"])


def test_a_float64_module_loses_no_small_step() -> None:
    model = nn.Linear(8, 8).double()
    layout = Layout.of(model, "fp32")
    replica = torch.ones(layout.numel)
    layout.unflatten_(replica, model)
    held = layout.held(model)
    with torch.no_grad():
        model.weight.add_(1e-12)
    sent = layout.to_sent_(layout.flatten(model), replica, layout.changes(model, held))
    torch.testing.assert_close(layout.views(sent)["weight"], torch.full((8, 8), 1e-12), rtol=1e-3, atol=0)


def test_values_are_sent_as_the_module_has_them() -> None:
    model = nn.Linear(8, 8).bfloat16()
    layout = Layout.of(model, "fp32").with_values({"weight": codec("sign")})
    replica = torch.randn(layout.numel)
    layout.unflatten_(replica, model)
    sent = layout.to_sent_(layout.flatten(model), replica, layout.changes(model, layout.held(model)))
    assert torch.equal(layout.views(sent)["weight"], model.weight.detach().float())
    assert not layout.views(sent)["bias"].any()
