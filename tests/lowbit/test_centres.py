"""Learned quantization centres against brute force, numerical derivatives and autograd; what collapses; state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedq.errors import FieldError
from fedq.lowbit.centres import (
    PATIENCE,
    Centres,
    CentreSchedule,
    CentreStep,
    QuantizedPass,
    centre_gradient,
    hard_quantize,
    initial_centres,
    inner_weights,
    nearest,
    prox_centres,
    prox_weights,
    respread,
    soft_quantize,
)
from fedq.models import build_model

L1, L2 = CentreStep(2), CentreStep(2, "l2")
FIXED = CentreStep(1, centres="fixed")
BITS = range(1, 9)


def distance(x: Tensor, centres: Tensor) -> Tensor:
    """Return each weight's distance to its nearest centre, by looking at all of them."""
    return (x.unsqueeze(-1) - centres).abs().min(dim=-1).values


def rising(low: float, high: float, num: int) -> st.SearchStrategy[Tensor]:
    values = st.lists(st.floats(low, high, width=32), min_size=num, max_size=num, unique=True)
    return values.map(lambda v: torch.tensor(sorted(v)))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet20", image_size=8)


# ---- quantizers ----


@given(rising(-2, 2, 4), st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20))
def test_hard_quantizer_takes_a_nearest_centre(centres: Tensor, values: list[float]) -> None:
    x = torch.tensor(values)
    q = hard_quantize(x, centres)
    assert all(value in centres for value in q)
    assert torch.allclose((x - q).abs(), distance(x, centres), rtol=0, atol=1e-6)  # a midpoint is rounded to float32


def test_hard_quantizer_keeps_shapes_and_memory_formats_do_not_matter() -> None:
    x = torch.randn(4, 3, 5, 5)
    centres = torch.tensor([-0.5, 0.0, 0.25, 1.0])
    assert torch.equal(hard_quantize(x.to(memory_format=torch.channels_last), centres), hard_quantize(x, centres))
    assert hard_quantize(torch.tensor(0.3), centres).shape == ()


@pytest.mark.parametrize("bits", BITS)
def test_soft_quantizer_becomes_the_hard_one(bits: int) -> None:
    x = torch.rand(500, dtype=torch.float64) * 2 - 1
    centres = (torch.rand(2**bits, dtype=torch.float64) * 2 - 1).sort().values
    midpoints = (centres[1:] + centres[:-1]) / 2
    x = x[distance(x, midpoints) > 1e-4]
    # Beyond 1e-4 of a midpoint a sigmoid of sharpness 1e6 is within exp(-100) of its limit.
    assert torch.allclose(soft_quantize(x, centres, 1e6), hard_quantize(x, centres), rtol=0, atol=1e-12)
    errors = [(soft_quantize(x, centres, p) - hard_quantize(x, centres)).abs().mean() for p in (1e1, 1e2, 1e3, 1e4)]
    assert errors == sorted(errors, reverse=True)


def test_soft_quantizer_has_the_limits_gradients() -> None:
    x = torch.tensor([-0.9, -0.2, 0.05, 0.4, 0.8], dtype=torch.float64, requires_grad=True)
    centres = torch.tensor([-0.6, 0.0, 0.5], dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, dtype=torch.float64)
    by_x, by_centre = torch.autograd.grad(soft_quantize(x, centres, 1e4) @ g, (x, centres))
    assert by_x.abs().max() < 1e-12  # so weights feel nothing of the quantized model
    codes = nearest(x.detach(), centres.detach())
    assert torch.allclose(by_centre, centre_gradient(g, codes, 3), rtol=0, atol=1e-9)


# ---- the step of the weights ----

GRID = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
WIDE_GRID = torch.linspace(-4, 4, 80_001, dtype=torch.float64)


def assert_minimises(x: Tensor, y: float, penalty: Tensor, own: Tensor, grid: Tensor) -> None:
    """The objective at x is nowhere undercut on the grid; float32 moves it by its slope, below 10, times 1e-6."""
    found = 0.5 * (x.double() - y) ** 2 + own
    assert float(found) <= float((0.5 * (grid - y) ** 2 + penalty).min()) + 1e-5


@given(rising(-1, 1, 4), st.floats(-3, 3, width=32), st.floats(0, 5, width=32))
def test_l1_step_is_exact_in_the_box_where_centres_are(centres: Tensor, y: float, s: float) -> None:
    x = prox_weights(torch.tensor([y]), centres, s, L1)
    own = s * distance(x.double(), centres.double())
    assert -1 <= float(x) <= 1
    assert_minimises(x, y, s * distance(GRID, centres.double()), own, GRID)


@given(rising(-2, 2, 4), st.floats(-3, 3, width=32), st.floats(0, 5, width=32))
def test_l1_step_is_exact_where_it_ends_inside_the_box(centres: Tensor, y: float, s: float) -> None:
    x = prox_weights(torch.tensor([y]), centres, s, L1)
    assume(abs(float(x)) < 1)
    assert_minimises(
        x, y, s * distance(WIDE_GRID, centres.double()), s * distance(x.double(), centres.double()), WIDE_GRID
    )


def test_l1_step_with_centres_outside_the_box_may_miss_the_minimum() -> None:
    """What the docstring leaves out of its claim: y is nearest to a centre that the box keeps it away from."""
    centres, y, s = torch.tensor([0.2, 3.0]), 2.0, 2.0
    x = prox_weights(torch.tensor([y]), centres, s, CentreStep(1))
    values = 0.5 * (GRID - y) ** 2 + s * distance(GRID, centres.double())
    assert float(x) == 1.0
    assert float(0.5 * (x - y) ** 2 + s * distance(x, centres)) > float(values.min()) + 0.1


@given(rising(-2, 2, 4), st.floats(-3, 3, width=32), st.floats(0, 5, width=32))
def test_l2_step_is_exact(centres: Tensor, y: float, s: float) -> None:
    x = prox_weights(torch.tensor([y]), centres, s, L2)
    own = s * distance(x.double(), centres.double()) ** 2
    assert_minimises(x, y, s * distance(WIDE_GRID, centres.double()) ** 2, own, WIDE_GRID)


@given(st.floats(-3, 3, width=32), st.floats(0, 3, width=32))
def test_fixed_centres_give_proxquant(y: float, s: float) -> None:
    x = prox_weights(torch.tensor([y]), torch.tensor([-1.0, 1.0]), s, FIXED)
    sign = 1.0 if y >= 0 else -1.0
    away = abs(y) - 1
    expected = sign * (1 + math.copysign(1, away) * max(0.0, abs(away) - s))
    assert float(x) == pytest.approx(expected, abs=1e-6)


def test_no_strength_and_much_strength() -> None:
    y, centres = torch.rand(50) * 2 - 1, torch.tensor([-0.5, -0.1, 0.1, 0.6])
    for step in (L1, L2):
        assert torch.allclose(prox_weights(y, centres, 0.0, step), y, rtol=0, atol=1e-6)
    assert torch.equal(prox_weights(y, centres, 10.0, L1), hard_quantize(y, centres))
    assert torch.allclose(prox_weights(y, centres, 1e6, L2), hard_quantize(y, centres), rtol=0, atol=1e-5)


# ---- the step of the centres ----


@pytest.mark.parametrize("bits", BITS)
def test_centre_gradient_is_autograds(bits: int) -> None:
    x, g = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    values = initial_centres(x, bits).requires_grad_()
    codes = nearest(x, values.detach())
    (expected,) = torch.autograd.grad((values[codes] * g).sum(), values)
    assert torch.allclose(centre_gradient(g, codes, 2**bits), expected, rtol=0, atol=1e-12)


@given(rising(-1, 1, 4), st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30), st.integers(0, 10**6))
def test_l2_centre_step_is_the_minimiser_for_its_members(centres: Tensor, values: list[float], seed: int) -> None:
    x, lr, strength = torch.tensor(values), 0.1, 0.05
    h = torch.randn(4, generator=torch.Generator().manual_seed(seed))
    codes, v = nearest(x, centres), (centres - lr * h).double()
    expected = []
    for j in range(4):
        members = x[codes == j].double()
        costs = 0.5 * (GRID - v[j]) ** 2 + strength * ((members[:, None] - GRID) ** 2).sum(dim=0)
        expected.append(GRID[costs.argmin()].clamp(-1, 1))
    found = prox_centres(centres, x, h, lr, strength, L2)
    # The grid's step is 1e-4 and its ends are where the test's minimisers may lie outside.
    assert torch.allclose(found.double().clamp(-1, 1), torch.stack(expected).sort().values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_l1_centre_step_goes_down_the_penalty(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(101, dtype=torch.float64, generator=generator) * 2 - 1
    centres = torch.tensor([-0.7, -0.2, 0.3, 0.8], dtype=torch.float64)
    epsilon, strength = 1e-7, 1e-4
    slopes = []
    for j in range(4):
        move = torch.zeros(4, dtype=torch.float64)
        move[j] = epsilon
        slopes.append((distance(x, centres + move).sum() - distance(x, centres - move).sum()) / (2 * epsilon))
    slope = torch.stack(slopes)
    none = torch.zeros(4)
    corrected = prox_centres(centres, x, none, 0.1, strength, L1) - centres
    published = prox_centres(centres, x, none, 0.1, strength, CentreStep(2, sign="published")) - centres
    # A slope is a whole number of weights; the difference quotient gives it to 1e-8.
    assert torch.allclose(corrected, -strength * slope, rtol=0, atol=1e-9)
    assert torch.allclose(published, strength * slope, rtol=0, atol=1e-9)
    before, after = (distance(x, c).sum() for c in (centres, centres + corrected))
    assert after < before


def test_a_strong_l1_step_does_not_throw_a_centre_beyond_its_members() -> None:
    centres, x = torch.tensor([-1.0, 1.0]), torch.cat((torch.full((1000,), -0.3), torch.full((10,), 0.2)))
    found = prox_centres(centres, x, torch.zeros(2), 0.1, 0.01, CentreStep(1))
    assert torch.allclose(found, torch.tensor([-0.3, 0.9]))  # 1000 pulls of 0.01 would be 10; 10 of them are 0.1


def test_l1_centre_gradients_are_clipped_and_l2_ones_are_not() -> None:
    centres, x, h = torch.tensor([-0.5, 0.5]), torch.tensor([-0.5, 0.5]), torch.tensor([40.0, -3.0])
    l1 = prox_centres(centres, x, h, 0.01, 0.0, CentreStep(1))
    l2 = prox_centres(centres, x, h, 0.01, 0.0, CentreStep(1, "l2"))
    assert torch.allclose(l1, torch.tensor([-0.6, 0.53]))
    assert torch.allclose(l2, torch.tensor([-0.9, 0.53]))


def test_centres_stay_sorted_and_fixed_ones_stay() -> None:
    centres, x = torch.tensor([0.0, 0.1]), torch.tensor([0.0, 0.1])
    assert torch.allclose(
        prox_centres(centres, x, torch.tensor([-5.0, 5.0]), 0.1, 0.0, CentreStep(1)), torch.tensor([-0.4, 0.5])
    )
    fixed = torch.tensor([-1.0, 1.0])
    assert torch.equal(prox_centres(fixed, x, torch.ones(2), 0.1, 0.1, FIXED), fixed)


# ---- initial centres ----


@pytest.mark.parametrize("bits", BITS)
def test_initial_centres(bits: int) -> None:
    x = torch.randn(1000)
    centres = initial_centres(x, bits)
    if bits == 1:
        assert torch.allclose(centres, torch.stack((x[x < 0].mean(), x[x >= 0].mean())))
    else:
        assert torch.allclose(centres, torch.linspace(x.min(), x.max(), 2**bits), rtol=0, atol=1e-5)
    at_one = initial_centres(x, bits, outer_at_one=True)
    assert torch.equal(at_one, torch.tensor([-1.0, 1.0]) if bits == 1 else centres)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("x", [[0.0], [-3.0] * 5, [1e-3, 2e-3], [math.nan, math.inf], [1.0, math.nan, -1.0]])
def test_initial_centres_are_always_different(x: list[float], bits: int) -> None:
    centres = initial_centres(torch.tensor(x), bits)
    assert centres.shape == (2**bits,)
    assert centres.isfinite().all()
    assert (centres.diff() > 0).all()


# ---- what collapses ----


@given(
    st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=40),
    st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=8, max_size=8),
)
def test_respread_makes_different_finite_centres(values: list[float], centres: list[float]) -> None:
    old = torch.tensor(centres).sort().values
    is_bad = torch.cat((torch.tensor([False]), old.diff() <= 0))
    new = respread(old, torch.tensor([*values, math.nan]), is_bad)
    assert new.shape == old.shape
    assert new.isfinite().all()
    assert set(old.tolist()) <= set(new.tolist())
    x = torch.tensor(values)
    assert distance(x, new).sum() <= distance(x, old).sum() + 1e-6


def test_respread_of_nothing_usable_starts_anew() -> None:
    x = torch.randn(100)
    new = respread(torch.full((4,), math.nan), x, torch.ones(4, dtype=torch.bool))
    assert torch.equal(new, initial_centres(x, 2))


def stepped(
    centres: Centres, model: nn.Module, gradient: float, step: CentreStep, times: int = 1, strength: float = 1e-6
) -> None:
    for _ in range(times):
        with QuantizedPass(model, centres) as quantized:
            pass
        gradients = {name: torch.full_like(w, gradient).detach() for name, w in quantized.weights.items()}
        centres.update(quantized, gradients, lr=0.01, strength=strength, step=step)


@pytest.mark.parametrize("cause", ["nan", "equal", "unused", "infinite gradient"])
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_collapsed_centres_are_reported_and_respread(cause: str, bits: int) -> None:
    model = small_model()
    centres = Centres.of(model, bits, outer_at_one=False)
    name = next(iter(centres.values))
    before = {n: c.clone() for n, c in centres.values.items()}
    if cause == "nan":
        centres.values[name][-1] = math.nan
    elif cause == "equal":
        centres.values[name][1] = centres.values[name][0]
    elif cause == "unused":
        centres.values[name][-1] = 50.0
        centres.idle[name][-1] = PATIENCE - 2
    gradient = math.inf if cause == "infinite gradient" else 0.0
    stepped(centres, model, gradient, CentreStep(bits), times=2, strength=0.0)
    for values in centres.values.values():
        assert values.isfinite().all()
        assert (values.diff() > 0).all()
    reports = centres.take_reports()
    if cause == "infinite gradient":  # is left out
        assert not reports
        assert torch.allclose(centres.values[name], before[name], rtol=0, atol=0.05)
    else:
        words = {"nan": "not finite", "equal": "equal", "unused": "without members"}[cause]
        assert any(line.startswith(name) and words in line for line in reports)
        assert centres.values[name].abs().max() < 10
    assert centres.take_reports() == []


def test_unused_centres_stay_where_no_other_place_is_better() -> None:
    model = small_model()
    centres = Centres.of(model, 2, outer_at_one=False)
    centres.quantize_(model)
    for values in centres.values.values():
        values[-1] += 5.0
    before = {name: values.clone() for name, values in centres.values.items()}
    centres.quantize_(model)
    for idle in centres.idle.values():
        idle[-1] = PATIENCE - 2
    stepped(centres, model, 0.0, CentreStep(2, "l2"), times=4)
    assert not centres.take_reports()
    assert all(torch.allclose(values, before[name], rtol=0, atol=1e-5) for name, values in centres.values.items())


def test_weights_that_are_not_finite_leave_finite_centres() -> None:
    model = small_model()
    centres = Centres.of(model, 2, outer_at_one=False)
    with torch.no_grad():
        next(iter(inner_weights(model).values())).fill_(math.nan)
    stepped(centres, model, math.nan, CentreStep(2, "l2"))
    assert all(values.isfinite().all() for values in centres.values.values())


# ---- a model's centres ----


def test_quantized_pass_is_the_quantized_model_and_leaves_the_float_one() -> None:
    model = small_model()
    centres = Centres.of(model, 2, outer_at_one=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)

    twin = small_model()
    centres.quantize_(twin)
    twin.train()
    expected = nn.functional.cross_entropy(twin(images), labels)
    expected.backward()

    with QuantizedPass(model, centres) as quantized:
        loss = nn.functional.cross_entropy(model(images), labels)
        gradients = quantized.gradients(loss)
    assert torch.equal(loss, expected)
    assert list(gradients) == list(inner_weights(model))
    for name, weight in inner_weights(twin).items():
        assert torch.equal(gradients[name], weight.grad)
        assert len(weight.unique()) <= 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    twins = dict(twin.named_buffers())
    assert all(torch.equal(buffer, twins[name]) for name, buffer in centres.statistics.items())
    assert not torch.equal(centres.statistics["norm1.running_mean"], before["norm1.running_mean"])


def test_quantized_pass_puts_weights_back_after_an_error() -> None:
    model = small_model()
    centres = Centres.of(model, 1, outer_at_one=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError), QuantizedPass(model, centres):
        model(torch.randn(2, 7, 8, 8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_members_count_every_weight() -> None:
    model = small_model()
    centres = Centres.of(model, 3, outer_at_one=False)
    weights = inner_weights(model)
    members = centres.members(model)
    assert {name: int(count.sum()) for name, count in members.items()} == {n: w.numel() for n, w in weights.items()}


def test_state_round_trip() -> None:
    model = small_model()
    centres, other = (Centres.of(model, 2, outer_at_one=False) for _ in range(2))
    stepped(centres, model, 1.0, CentreStep(2), 3)
    other.load_state_dict(centres.state_dict())
    for of in (centres, other):
        stepped(of, model, -1.0, CentreStep(2))
    for part in ("values", "idle", "statistics"):
        mine, theirs = getattr(centres, part), getattr(other, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("network", "bits"), [("resnet20", 1), ("cnn62k", 2)])
def test_state_of_another_model_is_refused(network: str, bits: int) -> None:
    centres = Centres.of(small_model(), 2, outer_at_one=False)
    other = Centres.of(build_model(network), bits, outer_at_one=False)
    with pytest.raises(FieldError, match="this model"):
        centres.load_state_dict(other.state_dict())


def test_bad_settings_are_refused() -> None:
    for bits in (0, 9, -1, 32):
        with pytest.raises(FieldError, match="1 to 8"):
            Centres.of(small_model(), bits, outer_at_one=False)
    with pytest.raises(FieldError, match="1 with fixed centres"):
        CentreStep(2, centres="fixed")
    with pytest.raises(FieldError, match="a layer between"):
        Centres.of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 1, outer_at_one=False)


@pytest.mark.parametrize(
    ("num_epochs", "freeze_at", "first"), [(10, 0.7, 7), (250, 0.8, 200), (7, 0.8, 6), (10, 1.0, 10), (1, 0.1, 1)]
)
def test_schedule(num_epochs: int, freeze_at: float, first: int) -> None:
    schedule = CentreSchedule(num_epochs, freeze_at, 1e-4, 1e-4)
    assert schedule.freeze_epoch == first
    assert schedule.weight(0) == 1e-4
    assert schedule.weight(9) == pytest.approx(1e-3)


def test_published_centre_rates() -> None:
    schedule = CentreSchedule(250, 0.8, 1e-4, 1e-4)
    rates = [schedule.lr(epoch) for epoch in (0, 79, 80, 139, 140, 199)]
    assert rates == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])
