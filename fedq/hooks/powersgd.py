"""PowerSGD (Vogels et al. 2019), as PyTorch's own hook computes it, over one bucket that holds the whole model.

A matrix's gradient M of n x m travels as P = MQ and Q = MᵀP of r columns each, summed by all-reduce; what is lost is
added to the next step's gradient. PyTorch's hook starts collectives from the callbacks of others, which crashes or
hangs on Gloo where DDP has several buckets. Here DDP's buckets are collected until the last one of the step and lie in
the order of the module's parameters: one exchange, and no state that depends on buckets. There is no overlap with the
backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_powersgd
from torch.futures import Future

from fedq.collectives import Sent
from fedq.collectives.mean import Leg
from fedq.collectives.peers import Peers
from fedq.errors import FieldError
from fedq.hooks.exchange import GradScale, StepExchange, mean_of
from fedq.hooks.flat import GradientRun, views_of
from fedq.hooks.lane import Promise
from fedq.hooks.powersgd_options import PowerSGDOptions
from fedq.phases import PhaseTimer, Timer

SCHEMA_VERSION = 1
_MIN_SAVING = 2  # torch's default: a matrix that would not shrink at least so much travels as it is
_EPSILON = 1e-20  # turns the direction of a zero column into zeros instead of NaN, and rounds away from any other
_ONLY = 0  # index of the one bucket


@dataclass
class _Part:
    """One of DDP's buckets: its flat buffer, and each parameter's gradient in it by number."""

    buffer: Tensor
    grads: dict[int, Tensor]
    promise: Promise


@dataclass(frozen=True)
class _Matrix:
    """A parameter that travels as P (rows x rank) and Q (columns x rank)."""

    name: str
    rows: int
    cols: int
    rank: int


class PowerSGDExchange(StepExchange):
    """Averages gradients with PowerSGD, error feedback and warm start.

    Gradients of any float type are averaged in float32. Parameters with at most one dimension, and matrices that would
    not shrink to half, travel as they are. A single rank keeps its gradients.

    A step whose gradients are not finite leaves error memory and Q as they were, so a gradient scaler can skip it; and
    a column of Q that became zero (a layer without a gradient) keeps its old direction, which PyTorch's hook would
    never find again.

    Args:
        module: The module inside DDP.
        peers: The ranks that take part: a whole process group.
        options: Rank and start.
        seed: Of the first Q; the same on all ranks.
        grad_scaler: The scaler of float16 training, or a function that returns the scale.
        timer: Told what torch's hook takes: to its first message as encoding, from there as exchange.
    """

    feedback = True

    def __init__(
        self,
        module: nn.Module,
        peers: Peers,
        options: PowerSGDOptions,
        *,
        seed: int = 0,
        grad_scaler: GradScale | None = None,
        timer: PhaseTimer | None = None,
    ) -> None:
        super().__init__(module, peers, grad_scaler, timer)
        self.options = options
        self._seed = seed % 2**32
        self._sent = Sent()
        self._torch = torch_powersgd.PowerSGDState(
            peers.group,
            matrix_approximation_rank=options.rank,
            start_powerSGD_iter=options.start,
            min_compression_rate=_MIN_SAVING,
            orthogonalization_epsilon=_EPSILON,
            random_seed=self._seed,
        )
        matrices = [_matrix(name, param, options.rank) for name, param in self._params.items()]
        self._matrices = {matrix.name: matrix for matrix in matrices if matrix is not None}
        self._buckets: list[_Part] = []

    @property
    def step(self) -> int:
        """Steps so far."""
        return self._torch.iter

    @property
    def sent(self) -> Sent:
        """Bytes that a ring sends from this rank: uncompressed gradients and P on the first leg, Q on the second."""
        return self._sent

    def makeup(self, leg: Leg) -> list[tuple[str, str, int]]:
        """Return parameter, part and bytes of what travels once compression has started: P and Q are ``codes``."""
        rows = []
        for name, numel in self.numels.items():
            matrix = self._matrices.get(name)
            if matrix is not None:
                rows.append((name, "codes", 4 * matrix.rank * (matrix.rows if leg == "first" else matrix.cols)))
            elif leg == "first":
                rows.append((name, "exempt", 4 * numel))
        return rows

    # ---- averaging -----------------------------------------------------------------------------------------------

    def average(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Return the bucket's mean over all ranks as a future, which waits for the last bucket of the step."""
        if bucket.index() == 0:
            self._buckets = []  # what a backward pass that raised has left
        numbers = [self._number[param] for param in bucket.parameters()]
        grads = dict(zip(numbers, bucket.gradients(), strict=True))
        part = _Part(bucket.buffer(), grads, Promise(bucket.buffer().device))
        self._buckets.append(part)
        self.beside.submitted(is_first=bucket.index() == 0, is_last=bucket.is_last())
        if bucket.is_last():
            parts, self._buckets = self._buckets, []
            self._enqueue(lambda: self._mean_of_buckets(parts), [p.promise for p in parts], part.buffer.device)
        return part.promise.future

    def _mean_of_buckets(self, parts: Sequence[_Part]) -> list[Tensor]:
        grads = {number: grad for part in parts for number, grad in part.grads.items()}
        for number, place in enumerate(self._run.views):
            if number not in grads:
                place.zero_()
        places = [self._run.views[number] for number in grads]
        torch._foreach_copy_(places, list(grads.values()))
        self._mean(self._run.buffer, self.beside)
        torch._foreach_copy_(list(grads.values()), places)
        self.beside.finished()
        return [part.buffer for part in parts]

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Replace the ``.grad`` of all trainable parameters by their means over all ranks; see `StepExchange`."""
        if self.peers.size == 1:
            self._torch.iter += 1
            return
        self._mean(self._run.load(), self.timer)
        self._run.store()

    @cached_property
    def _run(self) -> GradientRun:
        """The whole model's gradients in one float32 buffer, in row-major order."""
        params = list(self._params.values())
        buffer = torch.zeros(sum(self.numels.values()), device=params[0].device)
        return GradientRun(range(len(params)), params, buffer, keep_strides=False)

    def _mean(self, flat: Tensor, timer: Timer) -> None:
        if self.peers.size == 1:
            self._torch.iter += 1
            return
        self._unscaled(flat, lambda values: self._average(values, timer))

    def _average(self, flat: Tensor, timer: Timer) -> None:
        """Run torch's hook on the flat gradient and count what it sent."""
        state = self._torch
        if state.iter < self.options.start:
            self._run_hook(timer)
            self._sent.first += self._ring(flat.numel())
            return
        if not state.q_memory_dict:
            self._begin()
        old_error, old_q = state.error_dict[_ONLY], state.q_memory_dict[_ONLY].clone()
        numel_before = state.total_numel_after_compression
        self._run_hook(timer)
        p, q = state.p_memory_dict[_ONLY], state.q_memory_dict[_ONLY]
        uncompressed = state.total_numel_after_compression - numel_before - p.numel() - q.numel()
        self._sent.first += self._ring(uncompressed) + self._ring(p.numel())
        self._sent.second += self._ring(q.numel())
        if not q.isfinite().all():  # the same on all ranks
            state.error_dict[_ONLY] = old_error
            q.copy_(old_q)
            return
        self._forget_uncompressed()
        if (q == 0).any():
            self._revive(q, old_q)

    def _run_hook(self, timer: Timer) -> None:
        with timer.phase("encode"):
            exchanged = torch_powersgd.powerSGD_hook(self._torch, self._whole)
        with timer.phase("exchange"):
            exchanged.wait()

    def _begin(self) -> None:
        """Make error memory, P and Q; Q is what torch's hook would draw, without touching the generators of others."""
        state, buffer, matrices = self._torch, self._run.buffer, self._matrices.values()
        state.error_dict[_ONLY] = torch.zeros_like(buffer)
        state.p_memory_dict[_ONLY] = buffer.new_empty(sum(m.rows * m.rank for m in matrices))
        state.q_memory_dict[_ONLY] = buffer.new_empty(sum(m.cols * m.rank for m in matrices))
        state.rng.seed(self._seed)
        generator = torch.Generator().manual_seed(state.rng.randint(1_000_000_000))
        for q in self._q_by_name(state.q_memory_dict[_ONLY]).values():
            q.copy_(torch.randn(1, *q.shape, generator=generator)[0])

    def _forget_uncompressed(self) -> None:
        """Zero the error memory of what travelled as it is, where torch's hook keeps the distance to the mean."""
        exact = [view for name, view in self._error_by_name().items() if name not in self._matrices]
        if exact:
            torch._foreach_zero_(exact)

    def _revive(self, q: Tensor, old: Tensor) -> None:
        """Give columns that became zero their old direction back."""
        for new, before in zip(self._q_by_name(q).values(), self._q_by_name(old).values(), strict=True):
            new.copy_(torch.where((new == 0).all(dim=0), before, new))

    def _error_by_name(self) -> dict[str, Tensor]:
        """Return each parameter's error memory as a view."""
        views = views_of(self._torch.error_dict[_ONLY], self._run.params, keep_strides=False)
        return dict(zip(self._names, views, strict=True))

    def _q_by_name(self, q: Tensor) -> dict[str, Tensor]:
        """Return each matrix's Q as a view of torch's memory, where matrices of one shape lie together."""
        by_shape: dict[tuple[int, int], list[_Matrix]] = {}
        for matrix in self._matrices.values():
            by_shape.setdefault((matrix.rows, matrix.cols), []).append(matrix)
        ordered = [matrix for group in by_shape.values() for matrix in group]
        parts = q.split([matrix.cols * matrix.rank for matrix in ordered])
        return {m.name: part.view(m.cols, m.rank) for m, part in zip(ordered, parts, strict=True)}

    @cached_property
    def _whole(self) -> Any:
        return _OneBucket(self._run)

    def _ring(self, numel: int) -> int:
        """Return the bytes that a ring all-reduce of float32 sends from each rank."""
        return 2 * (self.peers.size - 1) * 4 * numel // self.peers.size

    # ---- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's step count, error memory and Q, by parameter name; P is computed anew in every step."""
        state, error, q = self._torch, {}, {}
        if _ONLY in state.error_dict:
            error = {name: view.clone() for name, view in self._error_by_name().items() if name in self._matrices}
            q = {name: part.clone() for name, part in self._q_by_name(state.q_memory_dict[_ONLY]).items()}
        return {"schema_version": SCHEMA_VERSION, "step": state.iter, "error": error, "q": q}

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Go on from saved states.

        Args:
            states: This rank's own; or, after a change of the number of ranks, those of all old ranks: every rank then
                starts from the mean of the error memories. Q is the same on all.

        Raises:
            FieldError: No state, or matrices that this model does not have with this rank.
        """
        if not states:
            raise FieldError("states", 0, "this rank's state, or those of all old ranks")
        self._check(states)
        state = self._torch
        state.iter = int(states[0]["step"])
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()
        if not states[0]["q"]:
            return
        self._begin()
        error, q = self._error_by_name(), self._q_by_name(state.q_memory_dict[_ONLY])
        for name, mean in mean_of([old["error"] for old in states]).items():
            error[name].copy_(mean)
            q[name].copy_(states[0]["q"][name])

    def _check(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Refuse states of another model or rank."""
        error = {name: tuple(self._params[name].shape) for name in self._matrices}
        q = {name: (matrix.cols, matrix.rank) for name, matrix in self._matrices.items()}
        for state in states:
            for part, shapes in (("error", error), ("q", q)):
                found = {name: tuple(value.shape) for name, value in state[part].items()}
                if found and found != shapes:
                    raise FieldError(f"shapes of powersgd's {part}", found, f"{shapes}: the same model and rank")


class _OneBucket:
    """Stands in for DDP's bucket: what torch's hook asks of one that holds a whole model.

    Args:
        run: The model's gradients.
    """

    def __init__(self, run: GradientRun) -> None:
        self._run = run
        self._gradients = [view if view.dim() else view.view(1) for view in run.views if view.numel()]

    def index(self) -> int:
        return _ONLY

    def buffer(self) -> Tensor:
        return self._run.buffer

    def gradients(self) -> list[Tensor]:
        return self._gradients

    def is_last(self) -> bool:
        return True


def _matrix(name: str, param: Tensor, rank: int) -> _Matrix | None:
    """Return how a parameter travels compressed, or None if it travels as it is: torch's rule."""
    rows = param.shape[0] if param.dim() else 1
    cols = param.numel() // max(1, rows)
    rank = min(rows, cols, rank)
    shrinks = (rows + cols) * rank * _MIN_SAVING < rows * cols
    return _Matrix(name, rows, cols, rank) if shrinks else None
