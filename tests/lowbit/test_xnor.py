"""Binary convolutions by counting bits: exactly the float computation, on every instruction set."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from torch import nn
from torch.nn import functional as F

from fedq.errors import FieldError
from fedq.kernels.cpu import library
from fedq.kernels.cpu.xnor import BinaryConv
from fedq.lowbit import use_few_bits
from fedq.lowbit.xnor import XnorLayer, use_xnor
from fedq.models import build_model

pytestmark = pytest.mark.skipif(library.load() is None, reason=f"no C++ library: {library.why_missing()}")


@pytest.fixture(params=library.usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = library.isa()
    library.select_isa(request.param)
    yield request.param
    library.select_isa(before)


def plus_or_minus(condition: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, 1.0, -1.0)


def check(num: int, channels: int, outputs: int, image: tuple, kernel: tuple, stride: tuple, padding: tuple) -> None:
    """Compare with a float convolution of signs, whose sums are whole numbers and so exact."""
    generator = torch.Generator().manual_seed(num + 7 * channels + 31 * outputs)
    x = torch.randn(num, channels, *image, generator=generator)
    thresholds, scales = torch.randn(channels, generator=generator) / 4, torch.rand(outputs, generator=generator)
    x[0, 0, 0, 0] = thresholds[0]  # sign(0) is +1
    bias = torch.randn(outputs, generator=generator) if outputs % 2 else None
    signs = torch.randn(outputs, channels, *kernel, generator=generator) >= 0
    inputs = plus_or_minus(x - thresholds.view(1, -1, 1, 1) >= 0)
    expected = F.conv2d(inputs, plus_or_minus(signs), stride=stride, padding=padding) * scales.view(-1, 1, 1)
    if bias is not None:
        expected += bias.view(-1, 1, 1)
    assert torch.equal(BinaryConv.of(signs, scales, bias, stride, padding)(x, thresholds), expected)


@pytest.mark.parametrize(
    ("channels", "outputs", "side", "kernel", "stride", "padding"),
    [
        (64, 64, 8, 3, 1, 1),
        (64, 128, 8, 3, 2, 1),
        (128, 64, 4, 1, 2, 0),
        (16, 16, 33, 3, 1, 1),
        (65, 9, 5, 3, 1, 2),
        (3, 1, 9, 5, 2, 2),
        (200, 20, 1, 1, 1, 0),
        (130, 8, 8, 8, 1, 0),
    ],
)
def test_the_sums_are_exact(
    isa: str, channels: int, outputs: int, side: int, kernel: int, stride: int, padding: int
) -> None:
    check(2, channels, outputs, (side, side), (kernel, kernel), (stride, stride), (padding, padding))


PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@tried(60)
@given(
    num=st.integers(1, 2),
    channels=st.integers(1, 140),
    outputs=st.integers(1, 18),
    more=st.tuples(st.integers(0, 6), st.integers(0, 40)),
    kernel=PAIRS,
    stride=PAIRS,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_any_shape_is_exact(
    num: int, channels: int, outputs: int, more: tuple, kernel: tuple, stride: tuple, padding: tuple
) -> None:
    image = tuple(size + extra for size, extra in zip(kernel, more, strict=True))
    check(num, channels, outputs, image, kernel, stride, padding)


def test_threads_do_not_show() -> None:
    x, signs = torch.randn(3, 70, 9, 9), torch.randn(20, 70, 3, 3) >= 0
    conv = BinaryConv.of(signs, torch.rand(20), padding=(1, 1))
    alone = conv(x, torch.zeros(70))
    torch.set_num_threads(3)
    try:
        assert torch.equal(conv(x, torch.zeros(70)), alone)
    finally:
        torch.set_num_threads(1)


def test_strided_images_are_read_as_they_are() -> None:
    x, conv = torch.randn(2, 8, 6, 6), BinaryConv.of(torch.randn(8, 8, 3, 3) >= 0, torch.ones(8))
    expected = conv(x, torch.zeros(8))
    assert torch.equal(conv(x.to(memory_format=torch.channels_last), torch.zeros(8)), expected)


@pytest.mark.parametrize("x", [torch.zeros(1, 7, 4, 4), torch.zeros(1, 8, 4, 4).double(), torch.zeros(8, 4, 4)])
def test_other_images_are_refused(x: torch.Tensor) -> None:
    conv = BinaryConv.of(torch.randn(8, 8, 3, 3) >= 0, torch.ones(8))
    with pytest.raises(FieldError, match=r"float32 \[N, 8, height, width\] on the CPU"):
        conv(x, torch.zeros(8))


@pytest.mark.parametrize(
    "spec", ["binary", "binary:per=channel", "binary:scale=learned", "binary:scale=learned,per=channel"]
)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_layer_computes_what_it_did(isa: str, kind: str, spec: str) -> None:
    torch.manual_seed(0)
    ends = (nn.Conv2d(3, 6, 1), nn.Conv2d(5, 2, 1)) if kind == "conv" else (nn.Linear(3, 6), nn.Linear(5, 2))
    middle = nn.Conv2d(6, 5, 3, stride=(2, 1), padding=(1, 0)) if kind == "conv" else nn.Linear(6, 5)
    model = nn.Sequential(ends[0], middle, ends[1])
    use_few_bits(model, spec, activations="binary")
    scale = getattr(model[1].parametrizations.weight[0], "scale", None)
    if scale is not None:
        with torch.no_grad():
            scale[0] = -0.3
    x = torch.randn(2, 3, 7, 9) if kind == "conv" else torch.randn(2, 4, 3)
    model.eval()
    expected = model(x)
    assert use_xnor(model) == ["1"]
    assert isinstance(model[1], XnorLayer)
    # A float sum of 54 terms of one size is off by a few roundings of 2^-24.
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_whole_network_computes_what_it_did() -> None:
    torch.manual_seed(0)
    model = build_model("resnet20", image_size=8)
    use_few_bits(model, "binary:per=channel", activations="binary")
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model(x)  # statistics
        model.eval()
        fast = copy.deepcopy(model)
        assert len(use_xnor(fast)) == 18
        inputs: dict[str, list[torch.Tensor]] = {"fast": [], "model": []}
        for name, network in (("fast", fast), ("model", model)):
            for layer in network.stages.modules():
                if isinstance(layer, XnorLayer | nn.Conv2d):
                    layer.register_forward_hook(lambda _, __, out, n=name: inputs[n].append(out))
        found, expected = fast(x), model(x)
    # Sums differ in their last bits, and an input that near its threshold flips a sign: seldom, but not never.
    assert ((inputs["fast"][0] - inputs["model"][0]).abs() <= 1e-5).all()
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("layer", "spec", "activations"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "binary", "binary"),
        (nn.Conv2d(4, 4, 3, dilation=2), "binary", "binary"),
        (nn.Conv2d(4, 4, 3, padding="same"), "binary", "binary"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "binary", "binary"),
        (nn.Conv2d(4, 4, 9), "binary", "binary"),
        (nn.Conv1d(4, 4, 3), "binary", "binary"),
        (nn.Conv2d(4, 4, 3).double(), "binary", "binary"),
        (nn.Conv2d(4, 4, 3), "binary", "float"),
        (nn.Conv2d(4, 4, 3), "int2", "binary"),
    ],
)
def test_other_layers_stay_as_they_are(layer: nn.Module, spec: str, activations: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 2, 1))
    use_few_bits(model, spec, activations=activations)
    with pytest.raises(FieldError, match="binary weights and binary inputs"):
        use_xnor(model)
    assert model[1] is layer


def test_without_the_library_there_is_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedq.lowbit.xnor.load", lambda: None)
    with pytest.raises(FieldError, match=r"pip install --no-deps -e \."):
        use_xnor(nn.Linear(2, 2))
