"""What averages gradients step by step, whatever travels: the interface, and what its two kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from fedq.collectives import Sent
from fedq.collectives.mean import Leg
from fedq.collectives.peers import Peers
from fedq.hooks.lane import Lane, Promise, Work, on_stream
from fedq.phases import BesideTimer, PhaseTimer, clock_of

Key = TypeVar("Key", bound=Hashable)
GradScale = torch.amp.GradScaler | Callable[[], float | Tensor]
"""A gradient scaler, or what returns the factor by which gradients are scaled now."""


class StepExchange(ABC):
    """Averages a module's gradients over ranks, and keeps what it needs between steps; one on each rank.

    Args:
        module: The module, without DDP around it; its trainable parameters are meant.
        peers: The ranks that take part.
        grad_scaler: The scaler of float16 training, or a function that returns the scale.
        timer: Told what encoding, waiting and decoding take; default: one of its own.
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
        self.timer = timer or PhaseTimer(clock_of(next(module.parameters()).device))
        self._lane = Lane(peers.group) if not peers.is_nccl else None
        self.grad_scaler = grad_scaler
        self._params = {name: param for name, param in module.named_parameters() if param.requires_grad}
        self._names = list(self._params)
        self._number: dict[Tensor, int] = {param: number for number, param in enumerate(self._params.values())}

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

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what this rank keeps between steps, by parameter name, as tensors and numbers."""

    @abstractmethod
    def load_state_dict(self, *states: Mapping[str, Any]) -> None:
        """Go on from this rank's own saved state; or, on another number of ranks, from those of all old ranks."""

    @property
    def numels(self) -> dict[str, int]:
        """Elements of each parameter whose gradient is averaged."""
        return {name: param.numel() for name, param in self._params.items()}

    def _enqueue(self, work: Work, promises: Sequence[Promise], device: torch.device) -> None:
        """Do some work while the backward pass goes on, after what was enqueued before, and keep its promises."""
        if self._lane is not None:
            self._lane.submit(work, promises)
        else:
            on_stream(work, promises, device)

    def _scale(self) -> float | Tensor | None:
        """Return the factor by which gradients are scaled now, if they are."""
        scaler = self.grad_scaler
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler._scale if scaler.is_enabled() else None
        return None if scaler is None else scaler()

    def _unscaled(self, buffer: Tensor, average: Callable[[Tensor], None]) -> Tensor:
        """Average a buffer in place, of which ``average`` sees the unscaled values."""
        scale = self._scale()
        if scale is None:
            average(buffer)
            return buffer
        values = buffer.float()  # float16 could not hold what the scale is there for
        average(values.div_(scale))
        values.mul_(scale)
        return buffer if values is buffer else buffer.copy_(values)


def mean_of(states: Sequence[Mapping[Key, Tensor]]) -> dict[Key, Tensor]:
    """Return the mean of each old rank's residuals by key; a rank without one counts as zero."""
    total: dict[Key, Tensor] = {}
    for state in states:
        for key, value in state.items():
            total[key] = total[key] + value if key in total else value
    return {key: value / len(states) for key, value in total.items()} if len(states) > 1 else total
