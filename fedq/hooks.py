"""A DDP communication hook: each gradient bucket is averaged in few bits while the backward pass goes on.

    state = fedq.hooks.register(ddp_model, "int4")

Residuals belong to parameters, not to buckets, so DDP may rebuild its buckets. On Gloo one worker thread takes the
buckets in the order in which DDP hands them out, the same on every rank; on NCCL a stream of its own does.

(No postponed annotations here: DDP compares those of its hook with types.)
"""

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from fedq.codecs import Codec, codec
from fedq.collectives import MeanExchange, Residuals, Segment, Sent, assign_owners, cut
from fedq.collectives.mean import Leg
from fedq.collectives.peers import Peers
from fedq.errors import FieldError
from fedq.layout import exempt_codec

SCHEMA_VERSION = 1


def register(
    model: nn.parallel.DistributedDataParallel,
    spec: str | Codec = "int4",
    *,
    second: str | Codec | None = None,
    feedback: bool | None = None,
    schedule: str = "auto",
    ranks_per_node: int = 1,
    seed: int = 0,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> "StepState":
    """Replace a DDP model's all-reduce by the compressed mean.

    Parameters with at most one dimension travel as bfloat16 in the same messages; under a cast (``fp32``, ``fp16``,
    ``bf16``) everything travels in that type.

    Args:
        model: As `DistributedDataParallel` returned it, on every rank.
        spec: Codec of the first leg, of fixed payload size.
        second: Codec of the second leg; default: the same.
        feedback: Whether what is lost is added to the next step; default: if the codec loses more than a cast does.
        schedule: See `fedq.collectives.compressed_mean`.
        ranks_per_node: Consecutive ranks that share a node.
        seed: Of rotation, index choice and rounding noise; the same on all ranks.
        grad_scaler: The scaler of float16 training, so that residuals are kept unscaled.

    Returns:
        The state: bytes sent, and residuals to be saved and restored.

    Raises:
        FieldError: Not a DDP model, or a codec or schedule that cannot be used.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        raise FieldError("model", type(model).__name__, "a DistributedDataParallel model")
    state = StepState(
        model.module,
        Peers(model.process_group),
        spec,
        second=second,
        feedback=feedback,
        schedule=schedule,
        ranks_per_node=ranks_per_node,
        seed=seed,
        grad_scaler=grad_scaler,
    )
    model.register_comm_hook(state, compressed_mean_hook)
    return state


def compressed_mean_hook(state: "StepState", bucket: dist.GradBucket) -> Future[Tensor]:
    """Average one bucket; the DDP communication hook that `register` registers."""
    return state.average(bucket)


def check_step_codec(spec: str) -> None:
    """Refuse what gradients cannot travel as.

    Raises:
        FieldError: No codec, or one whose payload size depends on the values.
    """
    chosen = codec(spec)
    if not chosen.fixed_size:
        raise FieldError("codec", spec, "a codec of fixed payload size, such as topk or blocktopk")


class StepState:
    """What the hook keeps between steps; one on each rank.

    Args:
        module: The module inside DDP, whose parameter names the residuals have.
        peers: The ranks that take part.
        spec: Codec of the first leg.
        second: Codec of the second leg; default: the same.
        feedback: Whether there are residuals; default: if a codec wants them.
        schedule: See `fedq.collectives.compressed_mean`.
        ranks_per_node: Consecutive ranks that share a node.
        seed: Of everything random.
        grad_scaler: The scaler of float16 training.
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
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        chosen = codec(spec), codec(spec if second is None else second)
        self.feedback = any(c.wants_feedback for c in chosen) if feedback is None else feedback
        first, other = (c.resolved(feedback=self.feedback) for c in chosen)
        self.codecs = first, other
        self.peers = peers
        self.schedule = schedule
        self.ranks_per_node = ranks_per_node
        self.seed = seed
        self.grad_scaler = grad_scaler
        self.step = 0
        self.residuals = Residuals()
        self._params = {name: param for name, param in module.named_parameters() if param.requires_grad}
        self._names = list(self._params)
        self._number: dict[Tensor, int] = {param: number for number, param in enumerate(self._params.values())}
        self._exchanges: dict[tuple[int, ...], MeanExchange] = {}
        self._lane = _Lane() if not peers.is_nccl else None
        numbers = range(len(self._names))
        self._owners = {s.key: s.owner for s in assign_owners(self._segments(numbers), peers.size)}

    @property
    def sent(self) -> Sent:
        """Bytes that this rank handed to the process group so far, by leg."""
        exchanges = self._exchanges.values()
        return Sent(sum(e.sent.first for e in exchanges), sum(e.sent.second for e in exchanges))

    def average(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Return the bucket's mean over all ranks as a future."""
        buffer, step = bucket.buffer(), self.step
        self.step += bucket.is_last()
        exchange = self._exchange([self._number[param] for param in bucket.parameters()])
        if self._lane is not None:
            return self._lane.submit(lambda: self._mean(exchange, buffer, step))
        return self._on_stream(exchange, buffer, step)

    def _on_stream(self, exchange: MeanExchange, buffer: Tensor, step: int) -> Future[Tensor]:
        """Average on a CUDA stream of its own, which waits for the gradients and which DDP waits for."""
        future: Future[Tensor] = Future(devices=[buffer.device])
        stream = _stream(buffer.device)
        stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(stream):
            future.set_result(self._mean(exchange, buffer, step))
        return future

    def _mean(self, exchange: MeanExchange, buffer: Tensor, step: int) -> Tensor:
        scale = self._scale()
        if scale is not None:
            buffer.div_(scale)
        exchange.run(buffer, seed=(self.seed << 32) + step, residuals=self.residuals if self.feedback else None)
        return buffer if scale is None else buffer.mul_(scale)

    def _scale(self) -> Tensor | None:
        scaler = self.grad_scaler
        return None if scaler is None or not scaler.is_enabled() else scaler._scale

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

    @property
    def numels(self) -> dict[str, int]:
        """Elements of each parameter whose gradient is averaged."""
        return {name: param.numel() for name, param in self._params.items()}

    def makeup(self, leg: Leg) -> list[tuple[str, str, int]]:
        """Return what the whole model's payload of a leg is made of: parameter, part and bytes."""
        rows = []
        for segment in self._segments(range(len(self._names))):
            name, chosen = self._names[segment.param], getattr(segment, leg)
            sections = chosen.section_nbytes((segment.numel,))
            exempt = self._params[name].dim() <= 1
            rows += [(name, "exempt" if exempt else part, nbytes) for part, nbytes in sections.items()]
        return rows

    # ---- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's step count and residuals, by parameter name and segment."""
        legs = {"first": self.residuals.first, "second": self.residuals.second}
        named = {
            leg: {f"{self._names[param]}/{part}": value.clone() for (param, part), value in kept.items()}
            for leg, kept in legs.items()
        }
        return {"schema_version": SCHEMA_VERSION, "step": self.step, **named}

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
        self.step = int(states[0]["step"])
        self.residuals = Residuals(_mean_of([self._numbered(s["first"]) for s in states]))
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


def _mean_of(states: Sequence[Mapping[tuple[int, int], Tensor]]) -> dict[tuple[int, int], Tensor]:
    """Return the mean residual of each segment; a rank without one counts as zero."""
    total: dict[tuple[int, int], Tensor] = {}
    for state in states:
        for key, value in state.items():
            total[key] = total[key] + value if key in total else value
    return {key: value / len(states) for key, value in total.items()} if len(states) > 1 else total


class _Lane:
    """One thread that does what it is given, in order; a failure reaches whoever waits for the result."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Any, Future[Tensor]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, work: Any) -> Future[Tensor]:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._serve, name="fedq-exchange", daemon=True)
            self._thread.start()
        future: Future[Tensor] = Future()
        self._queue.put((work, future))
        return future

    def _serve(self) -> None:
        while True:
            work, future = self._queue.get()
            try:
                with torch.no_grad():
                    future.set_result(work())
            except Exception as error:
                future.set_exception(error)  # type: ignore[arg-type]


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
