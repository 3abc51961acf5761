"""Learned quantization centres: the values that few-bit weights take, learned together with the float weights.

QuPeD (Ozkara, Singh, Data and Diggavi 2021, arXiv 2107.13892), Algorithm 1, and ProxQuant (Bai, Wang and Liberty 2019,
arXiv 1810.00861), whose centres are fixed. Both minimise ``f(x) + f(Q_c(x)) + lambda * R(x, c)`` over weights ``x`` and
centres ``c`` of each layer by alternating proximal steps, without a straight-through gradient: weights move on the
float model's gradient, centres on the quantized model's. What is here is numeric; training loops live in
`fedq.personalize`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedq.errors import FieldError
from fedq.lowbit.which import inner_layers

MAX_CENTRE_BITS = 8
BOX = 1.0
"""Bound of the weights in the l1 step, which keeps them within ``[-BOX, BOX]``."""
MAX_CENTRE_GRADIENT = 10.0
"""Largest magnitude of a centre's gradient in the l1 step."""
PATIENCE = 200
"""Steps without a member after which a centre is moved to where it serves."""

_MAX_COMPARED = 7
"""Most midpoints with each of which every weight is compared; with more it is searched among them."""


@dataclass(frozen=True)
class CentreStep:
    """Options of both proximal steps.

    Args:
        bits: Bits of a weight, 1 to 8: ``2^bits`` centres.
        regularizer: Distance to the nearest centre that is penalized: ``l1`` or squared ``l2``.
        sign: Sign of the penalty in the centres' l1 step: as in its subgradient (``corrected``), or the opposite, as in
            QuPeD's ``published`` code.
        centres: ``learned``, or ``fixed`` at -1 and +1 (ProxQuant; 1 bit).
    """

    bits: int
    regularizer: Literal["l1", "l2"] = "l1"
    sign: Literal["corrected", "published"] = "corrected"
    centres: Literal["learned", "fixed"] = "learned"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_CENTRE_BITS:
            raise FieldError("bits", self.bits, f"1 to {MAX_CENTRE_BITS}")
        if self.centres == "fixed" and self.bits != 1:
            raise FieldError("bits", self.bits, "1 with fixed centres, which are -1 and +1")


@dataclass(frozen=True)
class CentreSchedule:
    """How fast centres move, how hard weights are pulled to them, and when they are set to them.

    Args:
        num_epochs: Number of epochs of the whole training.
        freeze_at: Share of the epochs after which weights become their centres, above 0 and at most 1.
        regularizer_weight: Weight ``lambda_0`` of the regularizer, from which its weight in each epoch follows.
        centre_lr: Learning rate ``e_2`` of the centres in the first epoch.
    """

    num_epochs: int
    freeze_at: float
    regularizer_weight: float
    centre_lr: float

    @property
    def freeze_epoch(self) -> int:
        """First epoch in which weights are centres and stay where they are; ``num_epochs`` if there is none."""
        # 0.7 of 10 is 7.000000000000001 in some products: such an excess is no epoch.
        product = self.freeze_at * self.num_epochs
        whole = round(product)
        return max(1, whole if abs(product - whole) < 1e-9 else int(product) + 1)

    def weight(self, epoch: int) -> float:
        """Return ``lambda_t = lambda_0 (epoch + 1)``: the pull grows by the same amount in every epoch."""
        return self.regularizer_weight * (epoch + 1)

    def lr(self, epoch: int) -> float:
        """Return the centres' rate: a tenth from 2/5, a hundredth from 7/10 of the epochs before freezing."""
        done = epoch / self.freeze_epoch
        return self.centre_lr * (0.01 if done >= 0.7 else 0.1 if done >= 0.4 else 1.0)


# ---- quantizers --------------------------------------------------------------------------------------------------


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """Return the number of each weight's nearest centre, int64, of the shape of ``x``; the upper one of two.

    Args:
        x: Weights, of any shape.
        centres: The centres, float32 [m], rising.
    """
    x, midpoints = x.contiguous(), _midpoints(centres)
    if len(midpoints) > _MAX_COMPARED:
        return torch.bucketize(x, midpoints, right=True)
    codes = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint in midpoints:  # several times faster than a search, whose branches nobody can predict
        codes += (x >= midpoint).view(torch.uint8)
    return codes.long()


def hard_quantize(x: Tensor, centres: Tensor) -> Tensor:
    """Return ``Q_c(x)``, each weight's nearest centre (arXiv 2107.13892, section 2)."""
    return _values(centres, nearest(x, centres))


def soft_quantize(x: Tensor, centres: Tensor, sharpness: float) -> Tensor:
    """Return ``c_1 + sum_j (c_j - c_{j-1}) sigmoid(P (x - (c_j + c_{j-1})/2))``, which is differentiable.

    The soft quantizer of arXiv 2107.13892, section 2. As ``P`` grows it becomes `hard_quantize`: its gradient with
    respect to a weight that is no midpoint vanishes, and with respect to a centre it becomes `centre_gradient`.

    Args:
        x: Weights, of any shape.
        centres: The centres, float32 [m], rising.
        sharpness: Sharpness ``P`` of the steps, finite and above 0.
    """
    soft = torch.zeros_like(x) + centres[0]
    for step, midpoint in zip(centres.diff(), _midpoints(centres), strict=True):
        soft = soft + step * torch.sigmoid(sharpness * (x - midpoint))
    return soft


def _values(centres: Tensor, codes: Tensor) -> Tensor:
    return centres.index_select(0, codes.flatten()).view(codes.shape)  # five times faster than centres[codes]


def _midpoints(centres: Tensor) -> Tensor:
    return centres[:-1] + 0.5 * centres.diff()  # not half the sum, which may overflow


# ---- steps -------------------------------------------------------------------------------------------------------


def prox_weights(y: Tensor, centres: Tensor, strength: float, step: CentreStep) -> Tensor:
    """Return ``argmin_x 1/2 (x - y)^2 + s * R(x, c)``, the proximal step of the weights (Algorithm 1, line 6).

    l1, ``R = |x - Q_c(x)|``: the weight moves by ``s`` towards ``q = Q_c(y)``, at most onto it, and is then clamped to
    [-1, 1]. For a fixed centre the objective is convex in ``x``, and its minimum grows with ``|y - c_j|``, so the
    nearest centre of ``y`` is the best one and the first move is exact. With the box as a constraint the clamp is exact
    too wherever all centres lie in the box, or the move ends inside it; with centres outside, and ``y`` nearer to one
    of them, another centre could be better. With fixed centres nothing is clamped and the move is ProxQuant's
    (arXiv 1810.00861, section 3.2): ``sign(y) (1 + sign(|y| - 1) relu(||y| - 1| - s))``.

    l2, ``R = (x - Q_c(x))^2``: ``(y + 2 s q) / (1 + 2 s)``, exact for the same reason; nothing is clamped.

    Args:
        y: Weights after the step along the gradient, of any shape.
        centres: The centres, float32 [m], rising.
        strength: Strength ``s = lambda * lr`` of the weights' regularizer, 0 or more.
        step: Options of the step.
    """
    q = hard_quantize(y, centres)
    if step.regularizer == "l2":
        return (y + 2.0 * strength * q) / (1.0 + 2.0 * strength)
    away = y - q
    moved = q.add_(functional.softshrink(away, strength))
    return moved if step.centres == "fixed" else moved.clamp_(-BOX, BOX)


def centre_gradient(gradient: Tensor, codes: Tensor, num_centres: int) -> Tensor:
    """Return ``h_j``, the gradient of ``f(values[codes])`` with respect to the values: the SUM over members.

    The limit of the soft quantizer's gradient (arXiv 2107.13892, section 2; `soft_quantize`).

    Args:
        gradient: Gradient of the quantized weights, of any shape.
        codes: Index of each weight's centre, of the same shape.
        num_centres: Number of centres ``m``.

    Returns:
        The gradient, float32 [m], summed in float64.
    """
    return _sum_by_code(codes, gradient, num_centres).to(gradient.dtype)


def prox_centres(
    centres: Tensor,
    x: Tensor,
    gradient_sums: Tensor,
    lr: float,
    strength: float,
    step: CentreStep,
    *,
    codes: Tensor | None = None,
) -> Tensor:
    """Return the centres after their proximal step (Algorithm 1, line 8), sorted.

    With ``v_j = c_j - e_2 h_j`` and the members that weights have before the step:

    - l2: ``(v_j + 2 s S_j) / (1 + 2 s n_j)``, with ``n_j`` members that sum to ``S_j``: the exact minimiser of
      ``1/2 (c - v_j)^2 + s * sum_i (x_i - c)^2``.
    - l1: ``v_j + s (p_j - n-_j)`` with ``p_j`` members above and ``n-_j`` below the centre: a step along the negative
      subgradient of ``sum_i |x_i - c_j|``. It goes at most as far as members are on average, because ``s`` times the
      members of a large layer would throw the centre beyond all of them. With ``sign="published"`` the sign is the
      opposite one, which pushes a centre away from its members, however far. ``h`` is clipped to [-10, 10] first.

    A gradient that is not finite is left out. Values that collapse are the business of `Centres.update`.

    Args:
        centres: The centres, float32 [m], rising.
        x: Weights after their proximal step, of any shape.
        gradient_sums: Gradient ``h`` of the centres, float32 [m].
        lr: Learning rate ``e_2`` of the centres.
        strength: Strength ``s = lambda * e_2`` of the centres' regularizer.
        step: Options of the step.
        codes: Codes ``nearest(x, centres)``; None: they are computed.
    """
    if step.centres == "fixed":
        return centres
    codes, m = nearest(x, centres) if codes is None else codes, len(centres)
    h = torch.where(gradient_sums.isfinite(), gradient_sums, 0.0).double()
    v = centres.double()
    if step.regularizer == "l2":
        num_members = _count(codes, m)
        moved = (v - lr * h + 2.0 * strength * _sum_by_code(codes, x, m)) / (1.0 + 2.0 * strength * num_members)
    else:
        away = x - _values(centres, codes)
        pull = strength * _sum_by_code(codes, away.sign(), m)
        if step.sign == "corrected":
            mean_distance = _sum_by_code(codes, away.abs_(), m) / _count(codes, m).clamp(min=1)
            pull = pull.clamp(-mean_distance, mean_distance)
        else:
            pull = -pull
        moved = v - lr * h.clamp_(-MAX_CENTRE_GRADIENT, MAX_CENTRE_GRADIENT) + pull
    return moved.to(centres.dtype).sort().values


def initial_centres(x: Tensor, bits: int, *, outer_at_one: bool = False) -> Tensor:
    """Return ``2^bits`` rising, finite, different centres for a layer's weights.

    For 1 bit the means of negative and of non-negative weights, otherwise evenly spaced from the smallest to the
    largest weight (as QuPeD's published code); where that gives no different values, evenly spaced around them.

    Args:
        x: Weights, of any shape; those that are not finite do not count.
        bits: Bits of a weight, 1 to 8.
        outer_at_one: Put the two centres of 1 bit at -1 and +1: for Adam, whose steps do not follow the scale of the
            weights, in a network whose normalisation layers absorb that scale. More centres stay where weights are,
            as the two at the ends would have no members.
    """
    if outer_at_one and bits == 1:
        return torch.tensor([-1.0, 1.0], dtype=x.dtype, device=x.device)
    finite = x.detach().flatten()
    finite = finite[finite.isfinite()].double()
    low, high = finite.aminmax() if len(finite) else (x.new_zeros((), dtype=torch.float64),) * 2
    if bits == 1 and low < 0 <= high:
        values = torch.stack((finite[finite < 0].mean(), finite[finite >= 0].mean()))
    else:
        margin = torch.where(high > low, 0.0, 0.5 * low.abs().clamp(min=0.1))
        values = torch.linspace(0, 1, 2**bits, dtype=torch.float64, device=x.device) * (high - low + 2 * margin)
        values += low - margin
    return values.to(x.dtype).sort().values


def respread(centres: Tensor, x: Tensor, is_bad: Tensor) -> Tensor:
    """Return the centres with the bad ones moved, one after another, to where they serve most.

    A moved centre halves the way from the centre whose members are farthest from it in sum to its farthest member. If
    these lie on their centre already, it halves the widest gap.

    Args:
        centres: The centres, float32 [m]; only bad ones may be non-finite.
        x: Weights, of any shape; those that are not finite do not count.
        is_bad: Whether each centre is bad, bool [m].

    Returns:
        The centres, float32 [m], rising.
    """
    x = x.detach().flatten()
    x = x[x.isfinite()]
    kept = centres[~is_bad].sort().values
    if not len(kept):
        return initial_centres(x, (len(centres) - 1).bit_length())
    while len(kept) < len(centres):
        kept = torch.cat((kept, _best_place(kept, x).view(1))).sort().values
    return kept


def resolution(centres: Tensor) -> Tensor:
    """Return the gap below which two centres are one, [..., 1]: a thousandth of the mean gap, or float32's own.

    Args:
        centres: The centres, float32 [..., m], rising.
    """
    gap = (centres[..., -1:] - centres[..., :1]).abs() / max(1, centres.shape[-1] - 1)
    return torch.maximum(1e-3 * gap, 1e-6 * centres.abs().amax(dim=-1, keepdim=True))


def _best_place(kept: Tensor, x: Tensor) -> Tensor:
    codes = nearest(x, kept)
    away = x - _values(kept, codes)
    total = _sum_by_code(codes, away.abs(), len(kept))
    cell = total.argmax() if len(x) else 0
    away = torch.where(codes == cell, away, 0.0)
    if len(x) and away.abs().max() > 2 * resolution(kept):
        return kept[cell] + 0.5 * away[away.abs().argmax()]
    if len(kept) == 1:
        return kept[0] + kept[0].abs().clamp(min=0.1)
    widest = kept.diff().argmax()
    return kept[widest] + 0.5 * (kept[widest + 1] - kept[widest])


def _count(codes: Tensor, num_centres: int) -> Tensor:
    return torch.bincount(codes.flatten(), minlength=num_centres)


def _sum_by_code(codes: Tensor, values: Tensor, num_centres: int) -> Tensor:
    """Sum values by code, in float64: float32 would lose members of a large layer."""
    sums = torch.zeros(num_centres, dtype=torch.float64, device=values.device)
    return sums.scatter_add_(0, codes.flatten(), values.flatten().double())


# ---- a model's centres -------------------------------------------------------------------------------------------


@dataclass
class Centres:
    """What the quantized model of one client has of its own: centres, and the statistics of its normalisation layers.

    Args:
        values: Centres of each layer but the first and the last, float32 [2^bits], rising, by layer name.
        idle: Steps that each centre has been without members, int64 [2^bits] by layer name.
        statistics: The quantized model's buffers by name. Its activations differ from the float model's, so BatchNorm's
            running statistics do too: `QuantizedPass` swaps them in, and each model is evaluated with its own.
    """

    values: dict[str, Tensor]
    idle: dict[str, Tensor]
    statistics: dict[str, Tensor]
    _reports: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module, bits: int, *, outer_at_one: bool) -> Centres:
        """Return initial centres of a model's inner layers; see `initial_centres`. For ProxQuant: 1 bit, at one.

        Raises:
            FieldError: The model has no inner layers, or bits are outside 1 to 8.
        """
        CentreStep(bits)
        values = {
            name: initial_centres(weight.detach(), bits, outer_at_one=outer_at_one)
            for name, weight in inner_weights(model).items()
        }
        idle = {name: torch.zeros(len(c), dtype=torch.int64, device=c.device) for name, c in values.items()}
        return cls(values, idle, {name: buffer.detach().clone() for name, buffer in model.named_buffers()})

    @property
    def num_centres(self) -> int:
        """Centres of a layer."""
        return len(next(iter(self.values.values())))

    @torch.no_grad()
    def prox_weights_(self, model: nn.Module, strength: float, step: CentreStep) -> None:
        """Take the proximal step of the inner layers' weights in place; see `prox_weights`."""
        for name, weight in inner_weights(model, self.values).items():
            weight.copy_(prox_weights(weight, self.values[name], strength, step))

    @torch.no_grad()
    def update(
        self,
        quantized: QuantizedPass,
        gradients: Mapping[str, Tensor],
        *,
        lr: float,
        strength: float,
        step: CentreStep,
    ) -> None:
        """Take the centre step of every layer; what collapses is moved to where it serves, and `take_reports` tells.

        Collapsed are centres that are not finite, that equal their lower neighbour (`resolution`), or that had no
        member for `PATIENCE` steps while other centres have members away from them.

        Args:
            quantized: The pass that gave the gradients; it is over, so weights are the float ones again.
            gradients: Gradients of the quantized weights, by layer name.
            lr: Learning rate ``e_2`` of the centres.
            strength: Strength ``lambda * e_2`` of the centres' regularizer.
            step: Options of the step.
        """
        if step.centres == "fixed":
            return
        for name, weight in quantized.weights.items():
            codes, old = quantized.codes[name], self.values[name]
            h = centre_gradient(gradients[name], codes, len(old))
            self.values[name] = prox_centres(old, weight, h, lr, strength, step, codes=codes)
            self.idle[name] = (self.idle[name] + 1) * (_count(codes, len(old)) == 0)
        self._mend(quantized.weights)

    def members(self, model: nn.Module) -> dict[str, Tensor]:
        """Return how many weights each centre stands for, int64 [2^bits] by layer name."""
        weights = inner_weights(model, self.values)
        return {name: _count(nearest(w.detach(), self.values[name]), self.num_centres) for name, w in weights.items()}

    @torch.no_grad()
    def quantize_(self, model: nn.Module) -> None:
        """Make the model the quantized one for good: weights at their centres, and its statistics."""
        for name, weight in inner_weights(model, self.values).items():
            weight.copy_(hard_quantize(weight, self.values[name]))
        for name, buffer in model.named_buffers():
            buffer.copy_(self.statistics[name])

    def take_reports(self) -> list[str]:
        """Return what collapsed since the last call, a line a layer, and forget it."""
        reports = [f"{name}: {words}" for name, words in self._reports.items()]
        self._reports.clear()
        return reports

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, as plain tensors by name."""
        return {"values": dict(self.values), "idle": dict(self.idle), "statistics": dict(self.statistics)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            FieldError: The state belongs to another model, or to other bits.
        """
        for part in ("values", "idle", "statistics"):
            own, given = getattr(self, part), state[part]
            shapes, others = ({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (own, given))
            if shapes != others:
                different = sorted(n for n in shapes.keys() | others.keys() if shapes.get(n) != others.get(n))[0]
                raise FieldError(
                    f"centres:{part}", different, f"tensors of this model: {shapes.get(different)} for {different}"
                )
            setattr(self, part, {name: given[name].to(tensor, copy=True) for name, tensor in own.items()})

    def _mend(self, weights: Mapping[str, Tensor]) -> None:
        """Re-spread collapsed centres: one look at all layers, as each would make a GPU wait."""
        names = list(self.values)
        values, idle = (torch.stack(list(d.values())) for d in (self.values, self.idle))
        broken = ~values.isfinite()
        equal = torch.zeros_like(broken)
        equal[:, 1:] = values.diff(dim=1) <= resolution(values)
        unused = idle >= PATIENCE
        rows = (broken | equal | unused).any(dim=1).nonzero().flatten().tolist()
        for row in rows:
            marks = {"not finite": broken[row], "equal": equal[row] & ~broken[row], "without members": unused[row]}
            self._mend_layer(names[row], weights[names[row]], marks)

    def _mend_layer(self, name: str, weight: Tensor, marks: Mapping[str, Tensor]) -> None:
        old, is_bad = self.values[name], torch.stack(list(marks.values())).any(dim=0)
        self.idle[name] = self.idle[name].masked_fill(is_bad, 0)
        only_unused = bool((is_bad == marks["without members"]).all())
        if only_unused and (weight - hard_quantize(weight, old)).abs().max() <= 2 * resolution(old):
            return  # all weights lie on centres: no other place is better
        self.values[name] = respread(old, weight, is_bad)
        causes = ", ".join(f"{int(mark.sum())} {words}" for words, mark in marks.items() if mark.any())
        self._reports[name] = f"{int(is_bad.sum())} of {len(old)} centres re-spread ({causes})"


def inner_weights(model: nn.Module, names: Mapping[str, object] | None = None) -> dict[str, nn.Parameter]:
    """Return the weights of a model's inner layers by layer name; of the layers given, if they are known already."""
    chosen = inner_layers(model) if names is None else names
    return {name: model.get_submodule(name).weight for name in chosen}  # type: ignore[misc]


class QuantizedPass:
    """Inside the context the model is the quantized one, in place; afterwards the float one again.

    ::

        with QuantizedPass(model, centres) as quantized:
            loss = cross_entropy(model(images), labels)
            gradients = quantized.gradients(loss)
        centres.update(quantized, gradients, lr=..., strength=..., step=...)

    Buffers are swapped as well: forward passes inside update the quantized model's statistics, kept in `Centres`.

    Args:
        model: The float model.
        centres: The centres of the model's inner layers.
    """

    def __init__(self, model: nn.Module, centres: Centres) -> None:
        self.model = model
        self.centres = centres
        self.weights: dict[str, nn.Parameter] = inner_weights(model, centres.values)
        self.codes: dict[str, Tensor] = {}
        self._floats: list[Tensor] = []

    @torch.no_grad()
    def __enter__(self) -> QuantizedPass:
        self._floats = [weight.detach().clone() for weight in self.weights.values()]
        values = self.centres.values
        self.codes = {name: nearest(weight, values[name]) for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.copy_(_values(values[name], self.codes[name]))
        self._swap_buffers()
        return self

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for weight, before in zip(self.weights.values(), self._floats, strict=True):
            weight.copy_(before)
        self._swap_buffers()
        self._floats = []

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Return the loss's gradients with respect to the quantized weights, by layer name; `.grad` stays as it is."""
        return dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values())), strict=True))

    def _swap_buffers(self) -> None:
        statistics = self.centres.statistics
        for name, buffer in self.model.named_buffers():
            held = buffer.clone()
            buffer.copy_(statistics[name])
            statistics[name] = held
