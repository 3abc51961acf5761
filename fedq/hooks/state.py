"""Gradients in few bits: codecs and residuals of a module's parameters, whatever buckets they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
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
from fedq.hooks.exchange import GradScale, StepExchange, mean_of
from fedq.hooks.flat import GradientRun, gradient_runs
from fedq.hooks.lane import Promise
from fedq.layout import exempt_codec
from fedq.phases import PhaseTimer, Timer

SCHEMA_VERSION = 1


class StepState(StepExchange):
    """Averages gradients in the codes of two legs, with error feedback.

    Args:
        module: The module inside DDP, whose parameter names the residuals have.
        peers: The ranks that take part.
        spec: Codec of the first leg.
        second: Codec of the second leg; default: the same.
        feedback: Whether there are residuals; default: if a codec wants them.
        schedule: See `fedq.collectives.compressed_mean`; ``auto`` decides once, for the whole model.
        ranks_per_node: Consecutive ranks that share a node.
        seed: Of everything random.
        grad_scaler: The scaler of float16 training, or a function that returns the scale.
        timer: Told what encoding, waiting and decoding take.
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

    def makeup(self, leg: Leg) -> list[tuple[str, str, int]]:
        """Return what the whole model's payload of a leg is made of: parameter, part and bytes."""
        rows = []
        for segment in self._segments(range(len(self._names))):
            name, chosen = self._names[segment.param], getattr(segment, leg)
            sections = chosen.section_nbytes((segment.numel,))
            exempt = self._params[name].dim() <= 1
            rows += [(name, "exempt" if exempt else part, nbytes) for part, nbytes in sections.items()]
        return rows

    def segments(self) -> list[Segment]:
        """Return the whole model's segments, with the rank that owns each."""
        segments = self._segments(range(len(self._names)))
        return [replace(segment, owner=self._owners[segment.key]) for segment in segments]

    def average(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Return the bucket's mean over all ranks as a future."""
        buffer, step = bucket.buffer(), self._step
        self._step += bucket.is_last()
        exchange = self._exchange([self._number[param] for param in bucket.parameters()])
        promise, is_last = Promise(buffer.device), bucket.is_last()
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
        step, self._step = self._step, self._step + 1
        if self.peers.size == 1:
            return
        for run in self._runs:
            self._mean(self._exchange(run.numbers), run.load(), step, self.timer)
            run.store()

    @cached_property
    def _runs(self) -> list[GradientRun]:
        return gradient_runs(list(self._params.values()))  # type: ignore[arg-type]

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
        params = [self._params[self._names[number]] for number in numbers]
        return cut([param.numel() for param in params], [self._codecs_of(param) for param in params], numbers)

    def _codecs_of(self, param: Tensor) -> tuple[Codec, Codec]:
        if param.dim() > 1:
            return self.codecs
        first, second = self.codecs
        return exempt_codec(first), exempt_codec(second)

    # ---- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's step count and residuals, by parameter name and segment."""
        legs = {"first": self.residuals.first, "second": self.residuals.second}
        named = {
            leg: {f"{self._names[param]}/{part}": value.clone() for (param, part), value in kept.items()}
            for leg, kept in legs.items()
        }
        return {"schema_version": SCHEMA_VERSION, "step": self._step, **named}

    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Go on from saved states.

        Args:
            states: This rank's own; or, after a change of the number of ranks, those of all old ranks: every rank then
                starts from the mean of the first leg's residuals, and the second leg's go to whoever owns them now.

        Raises:
            FieldError: No state, or residuals of a parameter that this model does not have.
        """
        if not states:
            raise FieldError("states", 0, "this rank's state, or those of all old ranks")
        self._step = int(states[0]["step"])
        self.residuals = Residuals(mean_of([self._numbered(s["first"]) for s in states]))
        for state in states:
            self.residuals.second |= self._numbered(state["second"])

    def _numbered(self, named: Mapping[str, Tensor]) -> dict[tuple[int, int], Tensor]:
        numbered = {}
        for key, value in named.items():
            name, _, part = key.rpartition("/")
            if name not in self._params:
                raise FieldError("residual of", name, "a parameter of the model")
            param = self._params[name]
            numbered[self._names.index(name), int(part)] = value.to(param.device, torch.float32, copy=True)
        return numbered
