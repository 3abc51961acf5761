"""Gradients in few bits: codecs and residuals of a module's parameters, whatever buckets they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from fedq.codecs import Codec, codec
from fedq.collectives import MeanExchange, Residuals, Segment, Sent, assign_owners, choose_schedule, cut
from fedq.collectives.mean import Leg
from fedq.collectives.peers import Peers
from fedq.errors import FieldError
from fedq.hooks.background import Promise
from fedq.hooks.exchange import StepExchange, mean_of
from fedq.hooks.grad_scale import GradScale
from fedq.hooks.gradients import GradientRun, gradient_runs
from fedq.hooks.parameters import check_bucket
from fedq.layout import as_real, exempt_codec
from fedq.phases import PhaseTimer, Timer


class StepState(StepExchange):
    """Averages gradients in the codes of two legs, with error feedback.

    Args:
        module: The module inside DDP, whose parameter names the residuals have.
        peers: The ranks that take part.
        spec: Codec of the first leg.
        second: Codec of the second leg; default: the same.
        feedback: Whether there are residuals; default: if a codec wants them.
        schedule: Schedule as for `fedq.collectives.compressed_mean`; ``auto`` decides once, for the whole model.
        ranks_per_node: Number of consecutive ranks that share a node.
        seed: Seed of rotation, index choice and rounding noise; the same on all ranks.
        grad_scaler: The scaler of float16 training, or a function that returns the scale.
        timer: Timer of what encoding, waiting and decoding take.
    """

    def __init__(
        self,
        module: nn.Module,
        peers: Peers,
        spec: str | Codec = "int4",
        *,
        second: str | Codec | None = None,
        feedback: bool | None = None,
        schedule: str = "auto",
        ranks_per_node: int = 1,
        seed: int = 0,
        grad_scaler: GradScale | None = None,
        timer: PhaseTimer | None = None,
    ) -> None:
        super().__init__(module, peers, grad_scaler, timer)
        chosen = codec(spec), codec(spec if second is None else second)
        self.feedback = any(c.wants_feedback for c in chosen) if feedback is None else feedback
        first, other = (c.resolved(feedback=self.feedback) for c in chosen)
        self.codecs = first, other
        self.ranks_per_node = ranks_per_node
        self.seed = seed
        self.residuals = Residuals()
        self._step = 0
        self._exchanges: dict[tuple[int, ...], MeanExchange] = {}
        self._runs: list[GradientRun] = []
        segments = self._segments(range(len(self._names)))
        # For the whole model: a bucket of few bytes or of casts alone must not travel in another way than the rest, or
        # the results would depend on buckets.
        self.schedule = choose_schedule(schedule, segments, peers.size, ranks_per_node)
        self._owners = {s.key: s.owner for s in assign_owners(segments, peers.size)}

    @property
    def step(self) -> int:
        """Steps so far."""
        return self._step

    @property
    def sent(self) -> Sent:
        """Bytes that this rank handed to the process group so far, by leg."""
        exchanges = self._exchanges.values()
        return Sent(sum(e.sent.first for e in exchanges), sum(e.sent.second for e in exchanges))

    def settings(self) -> dict[str, Any]:
        """Return what must be the same on all ranks, by the names of the options."""
        first, second = self.codecs
        return {
            "spec": first.spec,
            "second": second.spec,
            "feedback": self.feedback,
            "schedule": self.schedule,
            "ranks_per_node": self.ranks_per_node,
            "seed": self.seed,
            "grad_scaler": "None" if self.grad_scaler is None else "given",
        }

    def makeup(self, leg: Leg) -> list[tuple[str, str, int]]:
        """Return what the whole model's payload of a leg is made of: parameter, part and bytes."""
        rows = []
        for segment in self._segments(self.parameters.trained):
            chosen = getattr(segment, leg)
            sections = chosen.section_nbytes((segment.numel,))
            exempt = self.parameters[segment.param].dim() <= 1
            name = self._names[segment.param]
            rows += [(name, "exempt" if exempt else part, nbytes) for part, nbytes in sections.items()]
        return rows

    def segments(self) -> list[Segment]:
        """Return the whole model's segments, with the rank that owns each."""
        return [replace(s, owner=self._owners[s.key]) for s in self._segments(self.parameters.trained)]

    def average(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Return the bucket's mean over all ranks as a future."""
        buffer, step, is_last = bucket.buffer(), self._step, bucket.is_last()
        numbers = self._numbers_in(bucket)
        exchange = self._exchange(numbers)
        if buffer.layout != torch.strided or buffer.numel() != exchange.numel:
            check_bucket(buffer, bucket.parameters(), [self._names[n] for n in numbers])
        if is_last:
            self._check_ddp()
        self._step += is_last
        promise = Promise(buffer.device)
        self.beside.submitted(is_first=bucket.index() == 0, is_last=is_last)

        def work() -> list[Tensor]:
            mean = self._mean(exchange, buffer, step, self.beside)
            if is_last:
                self.beside.finished()
            return [mean]

        self._enqueue(work, [promise], buffer.device)
        return promise.future

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Replace the ``.grad`` of all trainable parameters by their means over all ranks; see `StepExchange`."""
        if self.parameters.changed() or not self._runs:
            self._runs = gradient_runs({n: self.parameters[n] for n in self.parameters.trained})
        self._look_at_scalers()
        step, self._step = self._step, self._step + 1
        if self.peers.size == 1:
            return
        for run in self._runs:
            self._mean(self._exchange(run.numbers), run.load(), step, self.timer)
            run.store()

    def _mean(self, exchange: MeanExchange, buffer: Tensor, step: int, timer: Timer) -> Tensor:
        exchange.timer = timer
        residuals = self.residuals if self.feedback else None
        seed = (self.seed << 32) + step
        return self._unscaled(buffer, lambda values: exchange.run(values, seed=seed, residuals=residuals))

    def _exchange(self, numbers: list[int]) -> MeanExchange:
        """Return how a bucket of these parameters is averaged."""
        key = tuple(numbers)
        if key not in self._exchanges:
            segments = [replace(segment, owner=self._owners[segment.key]) for segment in self._segments(numbers)]
            self._exchanges[key] = MeanExchange(
                segments, self.peers, schedule=self.schedule, ranks_per_node=self.ranks_per_node
            )
        return self._exchanges[key]

    def _segments(self, numbers: Sequence[int]) -> list[Segment]:
        """Return the segments of parameters that lie one after another."""
        params = [self.parameters[number].detach() for number in numbers]
        return cut([as_real(param).numel() for param in params], [self._codecs_of(param) for param in params], numbers)

    def _codecs_of(self, param: Tensor) -> tuple[Codec, Codec]:
        if param.dim() > 1:
            return self.codecs
        first, second = self.codecs
        return exempt_codec(first), exempt_codec(second)

    # ---- state ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_exchanges": {}, "_runs": []}

    def _own_state(self) -> dict[str, Any]:
        """Return this rank's step count and residuals, by parameter name and segment; zeros where nothing was lost."""
        return {"step": self._step, "first": self._named("first"), "second": self._named("second")}

    def _named(self, leg: Leg) -> dict[str, Tensor]:
        kept = self.residuals.first if leg == "first" else self.residuals.second
        whole = self._exchange(self.parameters.trained).with_residual(leg) if self.feedback else []
        device = self.parameters[self.parameters.trained[0]].device
        fresh = {s.key: torch.zeros(s.numel, device=device) for s in whole if s.key not in kept}
        values = fresh | {key: value.clone() for key, value in kept.items()}
        return {f"{self._names[param]}/{part}": values[param, part] for param, part in sorted(values)}

    def _load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from this rank's own state; or from the mean of all old ranks' residuals of the first leg, while those
        of the second go to whoever owns them now.

        Raises:
            FieldError: Residuals of a parameter or a size that this model does not have.
        """
        first = mean_of([self._numbered(state["first"]) for state in states])
        second: dict[tuple[int, int], Tensor] = {}
        for state in states:
            second |= self._numbered(state["second"])
        self._step, self.residuals = int(states[0]["step"]), Residuals(first, second)

    def _numbered(self, named: Mapping[str, Tensor]) -> dict[tuple[int, int], Tensor]:
        places = {name: number for number, name in enumerate(self._names)}
        numbered = {}
        for key, value in named.items():
            name, _, part = key.rpartition("/")
            if name not in places:
                raise FieldError("residual of", name, "a parameter of the model")
            number = places[name]
            sizes = {segment.part: segment.numel for segment in self._segments([number])}
            if value.numel() != sizes.get(int(part)):
                raise FieldError(f"residual of {key}", value.numel(), f"{sizes.get(int(part), 0)} numbers")
            numbered[number, int(part)] = value.to(self.parameters[number].device, torch.float32, copy=True)
        return numbered
