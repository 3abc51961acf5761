"""PowerSGD (Vogels et al. 2019), as PyTorch's own hook computes it, over one bucket that holds the whole model.

A matrix's gradient M of n x m travels as P = MQ and Q = MᵀP of r columns each, summed by all-reduce; what is lost is
added to the next step's gradient. PyTorch's hook starts collectives from the callbacks of others, which crashes or
hangs on Gloo where DDP has several buckets. Here DDP's buckets are collected until the last one of the step and lie in
the order of the module's parameters: one exchange, and no state that depends on buckets. There is no overlap with the
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_powersgd
from torch.futures import Future

from fedq.collectives import Sent
from fedq.collectives.mean import Leg, is_zero
from fedq.collectives.peers import Peers
from fedq.errors import FieldError
from fedq.hooks.background import Promise
from fedq.hooks.exchange import StepExchange, mean_of
from fedq.hooks.grad_scale import GradScale
from fedq.hooks.gradients import GradientRun, views_of
from fedq.hooks.parameters import check_bucket, in_words
from fedq.hooks.powersgd_options import PowerSGDOptions
from fedq.layout import as_real
from fedq.phases import PhaseTimer, Timer

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
    never find again. A matrix whose gradient is zero on this rank sends zeros and keeps its error for the next one:
    where no rank has a gradient, nobody applies what was sent.

    The parameters are those that are trained at registration. One that is frozen later travels on as zeros.

    Args:
        module: The module inside DDP.
        peers: The ranks that take part: a whole process group.
        options: Options of PowerSGD: the rank, and the number of steps before compression starts.
        seed: Seed of the first Q; the same on all ranks.
        grad_scaler: The scaler of float16 training, or a function that returns the scale.
        timer: Timer of what torch's hook takes: to its first message as encoding, from there as exchange.
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
        self._numbers = list(self.parameters.trained)
        self._seed = seed % 2**32
        self._sent = Sent()
        self._torch = self._torch_state(None if peers.group is None else _Waiting(peers.group))
        found = {n: _matrix(self._names[n], as_real(self.parameters[n].detach()), options.rank) for n in self._numbers}
        self._matrices = {matrix.name: matrix for matrix in found.values() if matrix is not None}
        self._buckets: list[_Part] = []

    def _torch_state(self, group: dist.ProcessGroup | None) -> torch_powersgd.PowerSGDState:
        return torch_powersgd.PowerSGDState(
            group,
            matrix_approximation_rank=self.options.rank,
            start_powerSGD_iter=self.options.start,
            min_compression_rate=_MIN_SAVING,
            orthogonalization_epsilon=_EPSILON,
            random_seed=self._seed,
        )

    def __getstate__(self) -> dict[str, Any]:
        memory = {name: getattr(self._torch, name) for name in self._torch.__slots__ if name != "process_group"}
        state = super().__getstate__() | {"_torch": memory, "_buckets": [], "_sent": Sent()}
        return {name: value for name, value in state.items() if name not in ("_run", "_places", "_whole")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        memory, self._torch = state["_torch"], self._torch_state(None)
        for name, value in memory.items():
            setattr(self._torch, name, value)

    def settings(self) -> dict[str, Any]:
        """Return what must be the same on all ranks, by the names of the options."""
        given = "None" if self.grad_scaler is None else "given"
        spec = f"powersgd:rank={self.options.rank},start={self.options.start}"
        return {"spec": spec, "seed": self._seed, "grad_scaler": given}

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
        for name, numel in zip(self._own_names, self._numels, strict=True):
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
        numbers, params, buffer = self._numbers_in(bucket), bucket.parameters(), bucket.buffer()
        check_bucket(buffer, params, [self._names[number] for number in numbers])
        if bucket.is_last():
            self._check_ddp()
        # Not the bucket's own list, which is wrong for complex parameters.
        views = views_of(buffer, params, keep_strides=True)
        part = _Part(buffer, dict(zip(numbers, views, strict=True)), Promise(buffer.device))
        self._buckets.append(part)
        self.beside.submitted(is_first=bucket.index() == 0, is_last=bucket.is_last())
        if bucket.is_last():
            parts, self._buckets = self._buckets, []
            self._enqueue(lambda: self._mean_of_buckets(parts), [p.promise for p in parts], part.buffer.device)
        return part.promise.future

    def _check_ddp(self) -> None:
        super()._check_ddp()
        self._refuse_unfrozen()

    def _refuse_unfrozen(self) -> None:
        """Refuse a parameter that was frozen at registration and is trained now.

        Raises:
            FieldError: There is one.
        """
        if new := [self._names[n] for n in self.parameters.trained if n not in self._places]:
            allowed = "those trained at registration: register or step_state called again, and load_state_dict"
            raise FieldError("parameters", in_words(new), f"{allowed}, under powersgd")

    def _mean_of_buckets(self, parts: Sequence[_Part]) -> list[Tensor]:
        # A parameter that was frozen between DDP and registration is in a bucket, with zeros, and has no place here.
        grads = {n: grad for part in parts for n, grad in part.grads.items() if n in self._places}
        for number, place in self._places.items():
            if number not in grads:
                place.zero_()
        places = [self._places[number] for number in grads]
        torch._foreach_copy_(places, list(grads.values()))
        self._mean(self._run.buffer, self.beside)
        torch._foreach_copy_(list(grads.values()), places)
        self.beside.finished()
        return [part.buffer for part in parts]

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Replace the ``.grad`` of all trainable parameters by their means over all ranks; see `StepExchange`."""
        if self.parameters.changed():
            self._refuse_unfrozen()
        self._look_at_scalers()
        if self.peers.size == 1:
            self._torch.iter += 1
            return
        self._mean(self._run.load(), self.timer)
        self._run.store()

    @cached_property
    def _own_names(self) -> list[str]:
        return [self._names[number] for number in self._numbers]

    @cached_property
    def _numels(self) -> list[int]:
        return [as_real(self.parameters[number].detach()).numel() for number in self._numbers]

    @cached_property
    def _run(self) -> GradientRun:
        """The whole model's gradients in one float32 buffer, in row-major order."""
        params = [self.parameters[number] for number in self._numbers]
        buffer = torch.zeros(sum(self._numels), device=params[0].device)
        return GradientRun(self._numbers, params, buffer, keep_strides=False)

    @cached_property
    def _places(self) -> dict[int, Tensor]:
        """Each parameter's place in the buffer, by its number in the module."""
        return dict(zip(self._numbers, self._run.views, strict=True))

    def _mean(self, flat: Tensor, timer: Timer) -> None:
        if self.peers.size == 1:
            self._torch.iter += 1
            return
        self._unscaled(flat, lambda values: self._average(values, timer))

    def _average(self, flat: Tensor, timer: Timer) -> None:
        """Run torch's hook on the flat gradient and count what it sent."""
        self.peers.check_original()
        state = self._torch
        if state.iter < self.options.start:
            self._run_hook(timer)
            self._sent.first += self._ring(flat.numel())
            return
        if not state.q_memory_dict:
            self._begin()
        waiting = self._set_errors_aside()
        old_error, old_q = state.error_dict[_ONLY], state.q_memory_dict[_ONLY].clone()
        numel_before = state.total_numel_after_compression
        self._run_hook(timer)
        p, q = state.p_memory_dict[_ONLY], state.q_memory_dict[_ONLY]
        uncompressed = state.total_numel_after_compression - numel_before - p.numel() - q.numel()
        self._sent.first += self._ring(uncompressed) + self._ring(p.numel())
        self._sent.second += self._ring(q.numel())
        if q.isfinite().all():  # the same on all ranks
            self._forget_uncompressed()
            if (q == 0).any():
                self._revive(q, old_q)
        else:
            state.error_dict[_ONLY] = old_error
            q.copy_(old_q)
        errors = self._error_by_name()
        for name, error in waiting.items():
            errors[name].add_(error)

    def _set_errors_aside(self) -> dict[str, Tensor]:
        """Take the error memory of matrices whose gradient is zero on this rank out of this step, and return it."""
        places = dict(zip(self._own_names, self._run.views, strict=True))
        errors = self._error_by_name()
        if self._run.buffer.device.type == "cpu":
            idle = [name for name in self._matrices if is_zero(places[name].view(-1))]
        else:  # one wait for the device, whatever the number of matrices
            found = [places[name].any() for name in self._matrices]
            used = torch.stack(found).tolist() if found else []
            idle = [name for name, has_values in zip(self._matrices, used, strict=True) if not has_values]
        waiting = {name: errors[name].clone() for name in idle}
        for name in idle:
            errors[name].zero_()
        return waiting

    def _run_hook(self, timer: Timer) -> None:
        with ExitStack() as phase:
            phase.enter_context(timer.phase("encode"))

            def sends() -> None:
                phase.close()
                phase.enter_context(timer.phase("exchange"))

            if isinstance(self._torch.process_group, _Waiting):
                self._torch.process_group.sends = sends
            torch_powersgd.powerSGD_hook(self._torch, self._whole).wait()

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
        return dict(zip(self._own_names, views, strict=True))

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

    def _own_state(self) -> dict[str, Any]:
        """Return this rank's step count, error memory and Q, by parameter name; P is computed anew in every step."""
        if not self._torch.q_memory_dict:
            self._begin()
        error = {name: view.clone() for name, view in self._error_by_name().items() if name in self._matrices}
        q = {name: part.clone() for name, part in self._q_by_name(self._torch.q_memory_dict[_ONLY]).items()}
        return {"step": self._torch.iter, "error": error, "q": q}

    def _load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from this rank's own state, or from the mean of all old ranks' error memories; Q is the same on all.

        Raises:
            FieldError: Matrices that this model does not have with this rank.
        """
        self._check(states)
        self._begin()
        self._torch.iter = int(states[0]["step"])
        error, q = self._error_by_name(), self._q_by_name(self._torch.q_memory_dict[_ONLY])
        for name, mean in mean_of([old["error"] for old in states]).items():
            error[name].copy_(mean)
            q[name].copy_(states[0]["q"][name])

    def _check(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Refuse states of another model or rank."""
        places = zip(self._own_names, self._run.views, strict=True)
        error = {name: tuple(place.shape) for name, place in places if name in self._matrices}
        q = {name: (matrix.cols, matrix.rank) for name, matrix in self._matrices.items()}
        for state in states:
            for part, shapes in (("error", error), ("q", q)):
                found = {name: tuple(value.shape) for name, value in state.get(part, {}).items()}
                if found != shapes:
                    raise FieldError(f"shapes of powersgd's {part}", found, f"{shapes}: the same model and rank")


class _Waiting(dist.ProcessGroup):
    """A process group that waits for what it starts, so that an error arises in the thread that asked.

    PyTorch's hook goes on in callbacks, which otherwise run in a thread of Gloo's: an error there, when another rank
    has gone, ends the process without a word of why.

    Args:
        group: The process group that does the work.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]
        self._group = group
        self.sends: Callable[[], None] = lambda: None
        """Called before each all-reduce."""

    def allreduce(self, tensors: list[Tensor], options: Any) -> Any:  # type: ignore[override]
        """Sum the tensors over the ranks, in place."""
        self.sends()
        work = self._group.allreduce(tensors, options)
        work.wait()
        return work


class _OneBucket:
    """Stands in for DDP's bucket: what torch's hook asks of one that holds a whole model.

    Args:
        run: All gradients of the model, in one buffer.
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
