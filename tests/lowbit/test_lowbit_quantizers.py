"""Few-bit weights against independent oracles: nearest levels, least squares, unbiased rounding, gradients."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import few, tried
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from fedq.errors import FieldError
from fedq.lowbit import (
    Binary,
    Quantizer,
    Ternary,
    Uniform,
    choose_quantizers,
    deploy,
    deployed_state_dict,
    few_bit_layers,
    quantizer,
    use_few_bits,
)
from fedq.lowbit.activations import BinaryInput
from fedq.lowbit.layers import few_bit_weight

GRIDS = ("minmax", "symmetric", "dorefa", "gaussian")
UNIFORM = [Uniform(bits=b, grid=g) for b, g in itertools.product(range(2, 17), GRIDS) if g != "gaussian" or b <= 8]
ALL = [Binary(), Binary(scale="learned"), Ternary(), *UNIFORM]
ALL_BOTH = [chosen for one in ALL for chosen in (one, type(one)(**(vars(one) | {"per": "channel"})))]


def named(chosen: Quantizer) -> str:
    return chosen.spec


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def levels(chosen: Quantizer, rows: Tensor) -> Tensor:
    """Return every level of each group, [groups, num_levels]."""
    codes = torch.arange(chosen.num_levels, dtype=torch.float32).expand(len(rows), -1)
    return chosen.values(codes, chosen.scales(rows))


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", few([*UNIFORM, Binary()], 12), ids=named)
def test_a_weight_goes_to_the_nearest_level(chosen: Quantizer) -> None:
    rows = weights(3, 999) * torch.tensor([[1.0], [1e-3], [50.0]]) + torch.tensor([[0.0], [0.01], [-20.0]])
    own = levels(chosen, rows).double()
    above = torch.searchsorted(own, rows.double().contiguous()).clamp(1, own.shape[1] - 1)
    distances = torch.stack([(own.gather(1, i) - rows).abs() for i in (above - 1, above)])
    found = chosen.values(chosen.codes(rows, chosen.scales(rows), stochastic=False), chosen.scales(rows))
    # A place near a tie, off by three roundings of 2^-24 of the largest value, costs twice that.
    slack = 8 * 2**-24 * rows.abs().amax(dim=1, keepdim=True)
    assert ((found.double() - rows).abs() <= distances.amin(dim=0) + slack).all()


@pytest.mark.parametrize("chosen", few(ALL_BOTH, 16), ids=named)
def test_values_are_levels_and_codes_are_whole(chosen: Quantizer) -> None:
    weight = weights(4, 5, 3, 3)
    rows = chosen.rows(weight)
    scales = chosen.scales(rows)
    codes = chosen.codes(rows, scales, stochastic=False)
    assert scales.shape == (4 if chosen.per == "channel" else 1, chosen.num_scales)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= chosen.num_levels - 1
    assert torch.equal(chosen.quantize(weight), chosen.values(codes, scales).view(weight.shape))
    own = levels(chosen, rows)
    found = chosen.rows(chosen.quantize(weight))
    assert all(torch.isin(values, allowed).all() for values, allowed in zip(found, own, strict=True))


@pytest.mark.parametrize("chosen", few([c for c in ALL_BOTH if c.per == "channel"], 12), ids=named)
def test_a_channel_is_a_tensor_of_its_own(chosen: Quantizer) -> None:
    weight = weights(4, 5, 3, 3)
    alone = type(chosen)(**(vars(chosen) | {"per": "tensor"}))
    assert torch.equal(chosen.quantize(weight), torch.stack([alone.quantize(channel) for channel in weight]))


@pytest.mark.parametrize("bits", range(2, 17))
def test_grids_are_what_they_are_called(bits: int) -> None:
    rows = weights(1, 500)
    minmax, symmetric, dorefa = (levels(Uniform(bits=bits, grid=g), rows)[0] for g in GRIDS[:3])
    assert (len(minmax), len(symmetric), len(dorefa)) == (2**bits, 2**bits - 1, 2**bits)
    limit = rows.abs().max()
    torch.testing.assert_close(torch.stack((minmax[0], minmax[-1])), torch.stack((rows.min(), rows.max())))
    assert symmetric[len(symmetric) // 2] == 0
    for grid in (symmetric, dorefa):
        assert torch.equal(grid, -grid.flip(0))
        torch.testing.assert_close(grid[-1], limit)
    assert 0 not in dorefa


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_gaussian_step_is_the_best_for_gaussian_weights(bits: int) -> None:
    rows = weights(1, 200_000)
    chosen = Uniform(bits=bits, grid="gaussian")
    own = chosen.scales(rows)

    def error(scales: Tensor) -> float:
        codes = chosen.codes(rows, scales, stochastic=False)
        return float((chosen.values(codes, scales) - rows).square().mean())

    best = min(error(own * factor) for factor in torch.linspace(0.8, 1.25, 46).tolist())
    assert error(own) <= 1.01 * best  # a sample's best step is not the distribution's


def test_auto_is_gaussian_up_to_four_bits() -> None:
    assert [Uniform(bits=b).spacing for b in (2, 4, 5, 16)] == ["gaussian", "gaussian", "minmax", "minmax"]


def test_binary_is_the_least_squares_of_all_signs_and_scales() -> None:
    weight = weights(10)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)))
    scales = (signs @ weight / 10).clamp(min=0)  # the best of each pattern of signs
    best = (scales[:, None] * signs - weight).square().sum(dim=1).min()
    torch.testing.assert_close((Binary().quantize(weight) - weight).square().sum(), best)


def test_a_ternary_scale_is_the_least_squares_of_its_pattern() -> None:
    weight = weights(1000)
    found = Ternary().quantize(weight)
    pattern = found.sign()
    assert torch.equal(pattern != 0, weight.abs() > 0.7 * weight.abs().mean())
    (scale,) = torch.linalg.lstsq(pattern[:, None].double(), weight[:, None].double()).solution.flatten()
    torch.testing.assert_close(found.max().double(), scale, rtol=1e-6, atol=0)  # one rounding to float32


def test_the_ternary_threshold_is_nearly_the_best_for_gaussian_weights() -> None:
    weight = weights(100_000)

    def error(threshold: float) -> float:
        kept = weight * (weight.abs() > threshold)
        scale = kept.abs().sum() / kept.count_nonzero()
        return float((kept.sign() * scale - weight).square().mean())

    best = min(error(t) for t in torch.linspace(0.1, 1.5, 141).tolist())
    assert float((Ternary().quantize(weight) - weight).square().mean()) <= 1.02 * best  # 0.7 stands for 0.76 there


# ---- stochastic rounding -----------------------------------------------------------------------------------------

STOCHASTIC = [Uniform(bits=b, grid=g, rounding="stochastic") for b in (2, 5, 16) for g in GRIDS[:3]]


@pytest.mark.parametrize("chosen", STOCHASTIC, ids=named)
def test_stochastic_rounding_has_the_weight_as_its_expectation(
    chosen: Uniform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Summed over a grid of K noises each weight comes out within 1/K of a step, of K noises that cover [0, 1)."""
    weight, num = weights(400), 256
    noise = iter(torch.arange(num) / num)
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, float(next(noise))))
    total = sum(chosen.quantize(weight, stochastic=True).double() for _ in range(num))
    step = chosen.scales(chosen.rows(weight))[0, 0].double()
    slack = 2**-22 * weight.abs().max()  # roundings of the places and values
    assert ((total / num - weight).abs() <= step / num + slack).all()


@pytest.mark.parametrize("chosen", STOCHASTIC, ids=named)
def test_stochastic_rounding_is_unbiased_with_torchs_noise(chosen: Uniform) -> None:
    """The mean of n draws is within 6 standard errors, of which the largest is step / (2·sqrt(n))."""
    torch.manual_seed(1)
    values, num = torch.tensor([-1.0, -0.7131, 0.00017, 0.31, 0.9999, 1.0]), 200_000
    weight = values.expand(num, -1)
    mean = chosen.quantize(weight, stochastic=True).double().mean(dim=0)
    step = chosen.scales(chosen.rows(weight))[0, 0].double()
    assert ((mean - values).abs() <= 6 * step / (2 * math.sqrt(num)) + 2**-22).all()


@pytest.mark.parametrize("bits", range(2, 17))
def test_stochastic_rounding_leaves_what_is_on_the_grid(bits: int) -> None:
    torch.manual_seed(0)
    grid = torch.arange(2**bits) / 2**bits  # so that step and places are exact
    chosen = Uniform(bits=bits, grid="minmax", rounding="stochastic")
    assert torch.equal(chosen.quantize(grid, stochastic=True), grid)


def test_deployed_weights_are_never_rounded_at_random() -> None:
    layer = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    use_few_bits(layer, "int4:rounding=stochastic")
    state = deployed_state_dict(layer)
    assert torch.equal(state["1.weight"], deployed_state_dict(layer)["1.weight"])
    middle = layer[1]
    assert not torch.equal(middle.weight, middle.weight)  # in training


# ---- extremes ----------------------------------------------------------------------------------------------------

ODD = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("chosen", few(ALL, 12), ids=named)
@tried(15)
@given(values=st.lists(ODD, min_size=1, max_size=12))
def test_codes_never_leave_the_grid(chosen: Quantizer, stochastic: bool, values: list[float]) -> None:
    rows = torch.tensor([values])
    codes = chosen.codes(rows, chosen.scales(rows), stochastic=stochastic)
    assert torch.equal(codes, codes.round())
    assert ((codes >= 0) & (codes <= chosen.num_levels - 1)).all()


@pytest.mark.parametrize("chosen", few(ALL, 8), ids=named)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 1e-45, -1e-40, 1e30])
def test_weights_all_alike_stay_finite_and_close(chosen: Quantizer, value: float) -> None:
    found = chosen.quantize(torch.full((7,), value))
    assert found.isfinite().all()
    assert ((found - value).abs() <= 2 * abs(value) + 1e-44).all()  # gaussian clips, denormals become any level
    if isinstance(chosen, Uniform) and chosen.spacing == "minmax":
        assert torch.equal(found, torch.full((7,), value))


@pytest.mark.parametrize("chosen", few(ALL, 12), ids=named)
def test_denormals_beside_a_zero_stay_finite(chosen: Quantizer) -> None:
    assert chosen.quantize(torch.tensor([0.0, 1e-45, -3e-42, 1e-39])).isfinite().all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("chosen", few([c for c in ALL_BOTH if c.per == "channel"], 12), ids=named)
def test_what_is_not_finite_shows_and_stays_in_its_channel(chosen: Quantizer, bad: float) -> None:
    weight = weights(3, 9)
    good = chosen.quantize(weight)
    weight[1, 4] = bad
    found = chosen.quantize(weight)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], good[[0, 2]])


# ---- specs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", few([*ALL_BOTH, *STOCHASTIC], 16), ids=named)
def test_a_spec_names_its_quantizer(chosen: Quantizer) -> None:
    assert quantizer(chosen.spec) == chosen
    assert quantizer(chosen) is chosen


@pytest.mark.parametrize(
    ("spec", "chosen", "bits"),
    [
        ("1", Binary(), 1),
        (1, Binary(), 1),
        ("int1", Binary(), 1),
        ("2", Uniform(bits=2), 2),
        ("16", Uniform(bits=16), 16),
        ("ternary", Ternary(), 1.6),
        ("int3:grid=dorefa,per=channel", Uniform(bits=3, grid="dorefa", per="channel"), 3),
    ],
)
def test_specs_are_read(spec: str | int, chosen: Quantizer, bits: float) -> None:
    assert quantizer(spec) == chosen
    assert chosen.bits_per_weight == bits


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("0", "bits=0 is not allowed; allowed: 1 to 16"),
        ("17", "bits=17"),
        ("int-3", "bits=-3"),
        ("binry", "did you mean 'binary'"),
        ("binary:grid=dorefa", "binary:option='grid'"),
        ("int4:gird=dorefa", "did you mean 'grid'"),
        ("int4:grid=best", "int4:grid='best' is not allowed; allowed: auto, minmax, symmetric, dorefa, gaussian"),
        ("int9:grid=gaussian", "int9:grid='gaussian' is not allowed; allowed: minmax, symmetric, dorefa above 8 bits"),
        ("int4:rounding=up", "int4:rounding='up' is not allowed; allowed: nearest, stochastic"),
        ("ternary:per=row", "ternary:per='row' is not allowed; allowed: tensor, channel"),
        ("binary:scale=max", "binary:scale='max'"),
        ("", "binary, float, int2 to int16, ternary"),
    ],
)
def test_a_bad_spec_says_what_is_allowed(spec: str, says: str) -> None:
    with pytest.raises(FieldError) as caught:
        quantizer(spec)
    assert says in str(caught.value)


def _stack(num: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(num)))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("binary", {"1": "binary", "2": "binary", "3": "binary"}),
        ("head=8,body=1,tail=8", {"0": "int8", "1": "binary", "2": "binary", "3": "binary", "4": "int8"}),
        ("head:2=4,tail=ternary", {"0": "int4", "1": "int4", "4": "ternary"}),
        ("body=2,2=32", {"0": "int2", "1": "int2", "3": "int2", "4": "int2"}),
        ("*=int4:grid=dorefa,per=channel 0=float", dict.fromkeys("1234", "int4:per=channel,grid=dorefa")),
    ],
)
def test_bits_by_layer(spec: str, expected: dict[str, str]) -> None:
    assert {name: chosen.spec for name, chosen in choose_quantizers(_stack(5), spec).items()} == expected


@pytest.mark.parametrize(
    ("num", "spec", "says"),
    [
        (2, "binary", "a layer between its first and its last one"),
        (0, "head=1", "a model with convolutions or linear layers"),
        (2, "head:2=1,tail=1", "head and tail of at most 2 layers"),
        (3, "conv*=1", "'conv*' fits none of 0, 1, 2"),
        (3, "head=1,head=2", "each place once"),
        (3, "head=1,head:2=2", "head once"),
        (3, "body=17", "bits=17"),
        (3, "body=", "where=bits"),
    ],
)
def test_bits_by_layer_that_do_not_fit(num: int, spec: str, says: str) -> None:
    with pytest.raises(FieldError) as caught:
        choose_quantizers(_stack(num), spec)
    assert says in str(caught.value)


# ---- gradients ---------------------------------------------------------------------------------------------------


def _few_bit(spec: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6 * 4, 3))
    use_few_bits(model, spec)
    return model


SPECS = ["binary", "binary:per=channel", "ternary", "int4", "int4:rounding=stochastic", "int8:grid=dorefa,per=channel"]


@pytest.mark.parametrize("spec", [*SPECS, "binary:scale=learned"])
def test_a_float_weight_gets_the_gradient_of_its_few_bit_value(spec: str) -> None:
    model, images = _few_bit(spec), weights(5, 2, 6, 6)
    plain = deploy(copy.deepcopy(model))
    torch.manual_seed(3)
    with torch.no_grad():  # the very values that the forward pass below will draw
        plain[2].weight.copy_(model[2].weight)
    torch.manual_seed(3)
    F.cross_entropy(model(images), torch.arange(5) % 3).backward()
    F.cross_entropy(plain(images), torch.arange(5) % 3).backward()
    assert torch.equal(model[2].parametrizations.weight.original.grad, plain[2].weight.grad)
    assert torch.equal(model[0].weight.grad, plain[0].weight.grad)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_a_learned_scale_gets_the_gradient_of_the_loss_over_the_root_of_its_weights(per: str) -> None:
    model, images, labels = (
        _few_bit(f"binary:scale=learned,per={per}").double(),
        weights(5, 2, 6, 6),
        torch.arange(5) % 3,
    )
    images = images.double()
    scale = model[2].parametrizations.weight[0].scale
    assert torch.equal(
        scale.detach().float(),
        quantizer(f"binary:per={per}")
        .scales(quantizer(f"binary:per={per}").rows(model[2].parametrizations.weight.original.detach().float()))
        .flatten(),
    )
    F.cross_entropy(model(images), labels).backward()
    found = scale.grad.clone()
    for i in range(len(scale)):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                scale[i] += sign * 1e-6
                losses.append(float(F.cross_entropy(model(images), labels)))
                scale[i] -= sign * 1e-6
        numerical = (losses[0] - losses[1]) / 2e-6
        # Central differences of 1e-6 in float64: 1e-9 of cancellation and next to nothing of curvature.
        assert found[i] == pytest.approx(numerical * (len(scale) / (6 * 4 * 9)) ** 0.5, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("spec", ["binary", "binary:scale=learned", "ternary:per=channel", "int4"])
def test_stacked_models_give_each_its_own_outputs_and_gradients(spec: str) -> None:
    models = [_few_bit(spec) for _ in range(3)]
    for number, model in enumerate(models):
        with torch.no_grad():
            model[2].parametrizations.weight.original.mul_(1 + number).add_(0.01 * number)
    images, labels = weights(3, 5, 2, 6, 6), torch.arange(5) % 3
    params, buffers = stack_module_state(models)

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(models[0], (p, b), (x,)), labels)

    gradients = vmap(torch.func.grad(loss))(params, buffers, images)
    for number, model in enumerate(models):
        F.cross_entropy(model(images[number]), labels).backward()
        for name, parameter in model.named_parameters():
            # Batched convolutions sum in another order.
            torch.testing.assert_close(gradients[name][number], parameter.grad, rtol=1e-4, atol=1e-6)


def test_binary_inputs_are_signs_around_thresholds_with_a_clipped_gradient() -> None:
    binary = BinaryInput(3)
    with torch.no_grad():
        binary.threshold.copy_(torch.tensor([0.0, 0.5, -1.0]))
    x = torch.tensor([-2.0, -0.3, 0.0, 0.5, 1.2]).view(5, 1, 1, 1).repeat(1, 3, 2, 1).requires_grad_()
    out = binary(x)
    shifted = x.detach() - binary.threshold.detach().view(1, 3, 1, 1)
    assert torch.equal(out, torch.where(shifted >= 0, 1.0, -1.0))
    upstream = weights(*out.shape)
    out.backward(upstream)
    passed = upstream * (shifted.abs() <= 1)
    assert torch.equal(x.grad, passed)
    torch.testing.assert_close(binary.threshold.grad, -passed.sum(dim=(0, 2, 3)))


def test_binary_inputs_belong_to_convolutions_and_linear_layers() -> None:
    assert BinaryInput.of(nn.Linear(5, 2)).dim == -1
    assert BinaryInput.of(nn.Conv1d(5, 2, 1)).threshold.shape == (5,)
    with pytest.raises(FieldError, match="BatchNorm2d"):
        BinaryInput.of(nn.BatchNorm2d(3))


def test_loaded_scales_hold_until_the_weights_are_trained_on() -> None:
    model = _few_bit("int2")
    weight = few_bit_weight(model[2])
    assert weight is not None
    original = model[2].parametrizations.weight.original
    own = weight.scales(original)
    weight.load_scales(3 * own)
    model.eval()
    model(weights(1, 2, 6, 6))
    assert torch.equal(weight.scales(original), 3 * own)
    model.train()
    assert torch.equal(weight.scales(original), 3 * own)  # not yet
    model(weights(1, 2, 6, 6))
    assert torch.equal(weight.scales(original), own)
    assert list(few_bit_layers(model)) == ["2"]
