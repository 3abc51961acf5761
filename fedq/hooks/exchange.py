"""What averages gradients step by step, whatever travels: the interface, and what its two kinds share."""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from fedq.collectives import Sent, Transport
from fedq.collectives.mean import Leg
from fedq.collectives.peers import Peers
from fedq.errors import FieldError
from fedq.hooks.background import BackgroundThread, Promise, Work, on_stream
from fedq.hooks.grad_scale import GradScale, UnknownScalers, current_scale
from fedq.hooks.parameters import Parameters, in_words
from fedq.layout import as_real
from fedq.phases import BesideTimer, PhaseTimer, clock_of

Key = TypeVar("Key", bound=Hashable)
_KEY = re.compile(r"rank(\d+)of(\d+)")
SCHEMA_VERSION = 2
"""Version of the form of what `StepExchange.state_dict` returns."""


class StepExchange(ABC):
    """Averages a module's gradients over ranks, and keeps what it needs between steps; one on each rank.

    It is `Stateful` as `torch.distributed.checkpoint` wants it; a checkpoint that rank 0 alone writes takes
    `gathered`. A copy (by `copy.deepcopy`, pickle or `AveragedModel`) keeps residuals and settings, and averages
    nothing: it has neither process group nor thread.

    Args:
        module: The module, without DDP around it; its trainable parameters are meant.
        peers: The ranks that take part.
        grad_scaler: The scaler of float16 training, or a function that returns the scale.
        timer: Timer of what encoding, waiting and decoding take; default: one of its own.

    Raises:
        FieldError: A module whose gradients cannot be averaged; see `Parameters`.
    """

    feedback: bool
    """Whether what is lost in a step is added to the next."""

    def __init__(
        self,
        module: nn.Module,
        peers: Peers,
        grad_scaler: GradScale | None = None,
        timer: PhaseTimer | None = None,
    ) -> None:
        self.peers = peers
        self.parameters = Parameters(module)
        self._names = self.parameters.names
        self.timer = timer or PhaseTimer(clock_of(next(module.parameters()).device))
        self._background = BackgroundThread(peers.group) if not peers.is_nccl else None
        self.grad_scaler = grad_scaler
        self._scalers = UnknownScalers()
        self._not_ddps: Collection[str] = ()
        self._in_buckets: set[int] = set()
        self._knows_ddp = False

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"timer": None, "_background": None, "grad_scaler": None, "_scalers": UnknownScalers()}
        return {name: value for name, value in self.__dict__.items() if name != "beside"} | left_out

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.timer = PhaseTimer()

    @cached_property
    def beside(self) -> BesideTimer:
        """What times the work that is done while the backward pass goes on."""
        return self.timer.beside()

    @property
    @abstractmethod
    def step(self) -> int:
        """Steps so far."""

    @property
    @abstractmethod
    def sent(self) -> Sent:
        """Bytes that this rank handed to the process group so far, by leg."""

    @abstractmethod
    def average(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Return the bucket's mean over all ranks as a future; the buckets of a step come in the same order on all."""

    @abstractmethod
    def average_gradients(self) -> None:
        """Replace the ``.grad`` of all trainable parameters by their means over all ranks.

        For training without DDP: every rank calls it once a step, after backward and before the optimizer. Bytes,
        residuals and means are those of the DDP hook. A parameter without a gradient counts as zeros, and has one
        afterwards, on every rank. A single rank keeps its gradients as they are.

        Raises:
            FieldError: A sparse gradient.
        """

    @abstractmethod
    def makeup(self, leg: Leg) -> list[tuple[str, str, int]]:
        """Return what the whole model's payload of a leg is made of: parameter, part and bytes."""

    # ---- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank keeps between steps, as tensors and numbers by parameter name.

        It stands under a key that names the rank and the number of ranks, so states of several ranks in one checkpoint
        (`torch.distributed.checkpoint`) stay apart. The keys are the same before the first step as after the last.
        """
        return {_key(self.peers.rank, self.peers.size): {"schema_version": SCHEMA_VERSION} | self._own_state()}

    def load_state_dict(self, *states: Mapping[str, Any], mean: bool = False) -> None:
        """Go on from this rank's own saved state, or on another number of ranks from the mean of all old ranks'.

        A state of version 1 does not name its rank: one is this rank's own, several are those of all ranks in order.

        Args:
            states: States that `state_dict` returned: this rank's own, or several ranks', each by itself or all in one.
            mean: Whether to start every rank from the mean, if the number of ranks is another one; so it does too if
                the states are given one by one.

        Raises:
            FieldError: Another rank's state, one of another number of ranks without ``mean``, states of which some are
                missing, or a state of another model, version or exchange.
        """
        own = _key(self.peers.rank, self.peers.size)
        keys = [own] if len(states) == 1 else [_key(rank, len(states)) for rank in range(len(states))]
        named = [_of_this_version(one, key) for one, key in zip(states, keys, strict=True)]
        found: dict[str, Any] = {key: state for one in named for key, state in one.items()}
        kept = [found[key] for key in self._keys_to_load(list(found), mean=mean or len(states) > 1)]
        for state in kept:
            if state.get("schema_version") != SCHEMA_VERSION:
                raise FieldError("schema_version", state.get("schema_version"), f"{SCHEMA_VERSION}")
        self._load_states(kept)

    def _keys_to_load(self, keys: Sequence[str], *, mean: bool) -> list[str]:
        own = _key(self.peers.rank, self.peers.size)
        if own in keys:
            return [own]
        found = [_KEY.fullmatch(str(key)) for key in keys]
        ranks, sizes = ({int(match[group]) for match in found if match} for group in (1, 2))
        said = ", ".join(map(str, keys))
        if None in found or len(sizes) != 1:
            raise FieldError("states", said, f"{own}: what state_dict returned")
        (old_size,) = sizes
        if old_size == self.peers.size:
            raise FieldError("states", said, f"{own}, this rank's own; where rank 0 alone writes, state.gathered()")
        if not mean:
            raise FieldError("states", said, f"{own}; or, with mean=True, the states of all {old_size} old ranks")
        if missing := sorted(set(range(old_size)) - ranks):
            raise FieldError("states", said, f"those of all {old_size} old ranks; missing: {missing}")
        return [_key(rank, old_size) for rank in range(old_size)]

    def gathered(self) -> GatheredState:
        """Return a `Stateful` for checkpoints that rank 0 writes for all, as Accelerate's are.

        ``accelerator.register_for_checkpointing(state.gathered())``
        """
        return GatheredState(self)

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """Return what this rank keeps between steps, with the same keys at any time."""

    @abstractmethod
    def _load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from this rank's own state, or from those of all old ranks."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return what must be the same on all ranks, by the names of the options."""

    # ---- what both kinds do in a step ----------------------------------------------------------------------------

    @property
    def numels(self) -> dict[str, int]:
        """Numbers in each parameter whose gradient is averaged; a complex element has two."""
        numbers = self.parameters.trained
        return {self._names[n]: as_real(self.parameters[n].detach()).numel() for n in numbers}

    def under_ddp(self, not_averaged: Collection[str]) -> None:
        """Be told which parameters DDP leaves to others, by name: it was asked to ignore them."""
        self._not_ddps = not_averaged

    def _numbers_in(self, bucket: dist.GradBucket) -> list[int]:
        """Return the numbers of the parameters in one of DDP's buckets.

        Raises:
            FieldError: A parameter that the module does not have.
        """
        params, known = bucket.parameters(), self.parameters.number
        strangers = [tuple(param.shape) for param in params if param not in known]
        if strangers:
            found = f"a parameter of shape {strangers[0]}, which the module did not have at registration"
            raise FieldError("bucket", found, "the module's own parameters: wrap it in DDP again, then register")
        numbers = [known[param] for param in params]
        self._in_buckets.update(numbers)
        return numbers

    def _check_ddp(self) -> None:
        """Refuse what DDP does not average, once a step, at its last bucket.

        Raises:
            FieldError: A parameter that requires a gradient and is in no bucket.
        """
        self._look_at_scalers()
        if self.parameters.changed() or not self._knows_ddp:
            self._knows_ddp = True
            missed = [self._names[n] for n in self.parameters.trained if n not in self._in_buckets]
            if missed := [name for name in missed if name not in self._not_ddps]:
                allowed = "those that DDP averages, which were trainable when it wrapped the module: wrap it again"
                raise FieldError("parameters", in_words(missed), allowed)

    def _look_at_scalers(self) -> None:
        if self.feedback and self.grad_scaler is None:
            self._scalers.look()

    def _enqueue(self, work: Work, promises: Sequence[Promise], device: torch.device) -> None:
        """Do some work while the backward pass goes on, after what was enqueued before, and keep its promises."""
        if self._background is not None:
            self._background.submit(work, promises)
        else:
            on_stream(work, promises, device)

    def _unscaled(self, buffer: Tensor, average: Callable[[Tensor], None]) -> Tensor:
        """Average a buffer in place, of which ``average`` sees the unscaled values."""
        scale = current_scale(self.grad_scaler)
        if scale is None:
            average(buffer)
            return buffer
        values = buffer.float()  # float16 could not hold what the scale is there for
        average(values.div_(scale))
        values.mul_(scale)
        return buffer if values is buffer else buffer.copy_(values)


class GatheredState:
    """The states of all ranks as one, on rank 0; what `StepExchange.gathered` returns.

    Args:
        exchange: This rank's exchange.
    """

    def __init__(self, exchange: StepExchange) -> None:
        self._exchange = exchange

    def state_dict(self) -> dict[str, Any]:
        """Return all ranks' states on rank 0, and this rank's own elsewhere; every rank must call it."""
        own, peers = self._exchange.state_dict(), self._exchange.peers
        written = io.BytesIO()
        torch.save(own, written)
        message = torch.frombuffer(written.getbuffer(), dtype=torch.uint8).to(peers.wire_device)
        messages, _ = Transport(peers.wire_device, peers.group).gather([message], [1] * peers.size)
        states = [torch.load(io.BytesIO(m.cpu().numpy().tobytes()), map_location="cpu") for (m,) in messages[1:]]
        return {key: state for one in (own, *states) for key, state in one.items()}

    def load_state_dict(self, state: Mapping[str, Any], *, mean: bool = False) -> None:
        """Give this rank its own state; see `StepExchange.load_state_dict`."""
        self._exchange.load_state_dict(state, mean=mean)


def _key(rank: int, size: int) -> str:
    return f"rank{rank}of{size}"


def _of_this_version(state: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a saved state under a key that names its rank, which version 1 did not have."""
    if state.get("schema_version") != 1:
        return state
    return {key: {**state, "schema_version": SCHEMA_VERSION}}


def mean_of(states: Sequence[Mapping[Key, Tensor]]) -> dict[Key, Tensor]:
    """Return the mean of each old rank's residuals by key; a rank without one counts as zero."""
    total: dict[Key, Tensor] = {}
    for state in states:
        for key, value in state.items():
            total[key] = total[key] + value if key in total else value
    return {key: value / len(states) for key, value in total.items()} if len(states) > 1 else total
