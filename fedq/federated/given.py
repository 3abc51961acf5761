"""What somebody gives a federation, looked at before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fedq.errors import FieldError
from fedq.federated.client import Client
from fedq.metrics import Metric
from fedq.runtime import Runtime, distributed, existing_group

Clients = Sequence[Client] | Callable[[int], Client] | int
_MOMENTS = ("on_start", "on_round", "on_end")


def trained_module(model: nn.Module) -> nn.Module:
    """Return the module that is trained, without DDP's wrapper.

    Raises:
        FieldError: ``model`` is no module, or has nothing to train.
    """
    if not isinstance(model, nn.Module):
        raise FieldError("model", type(model).__name__, "a torch.nn.Module")
    module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if not any(param.requires_grad for param in module.parameters()):
        raise FieldError("model", "no parameter is trained", "at least one with requires_grad=True")
    return module


def checked_metrics(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """Return the metrics.

    Raises:
        FieldError: There is no metric, one is no `Metric`, or two have one name.
    """
    chosen = (metrics,) if isinstance(metrics, Metric) else tuple(metrics)
    if not chosen:
        raise FieldError("metrics", metrics, "one or more")
    for number, metric in enumerate(chosen):
        if not isinstance(metric, Metric):
            raise FieldError(f"metric {number}", metric, "a fedq.Metric")
        if metric.name in [other.name for other in chosen[:number]]:
            raise FieldError("metrics", metric.name, "each name once")
    return chosen


def checked_callbacks(callbacks: Sequence[Any]) -> tuple[Any, ...]:
    """Return the callbacks.

    Raises:
        FieldError: A callback would never be called.
    """
    if not isinstance(callbacks, Iterable):
        callbacks = (callbacks,)
    chosen = tuple(callbacks)
    for callback in chosen:
        if not callable(callback) and not any(hasattr(callback, moment) for moment in _MOMENTS):
            raise FieldError(
                "callback", type(callback).__name__, f"a function, or something with {', '.join(_MOMENTS)}"
            )
    return chosen


def counted_clients(clients: Clients, num_clients: int | None) -> tuple[Callable[[int], Client] | None, int, bool]:
    """Return how to make a client, how many there are, and whether one may have a codec of its own.

    Raises:
        FieldError: There is no client, ``num_clients`` does not fit, one is no `Client`, or two share a state.
    """
    if isinstance(clients, int) or callable(clients):
        num = clients if isinstance(clients, int) else num_clients
        if num is None or num < 1 or (isinstance(clients, int) and num_clients not in (None, num)):
            raise FieldError("num_clients", num_clients if callable(clients) else num, "1 or more")
        return (None if isinstance(clients, int) else clients), num, True
    members = list(clients)
    if not members or num_clients not in (None, len(members)):
        raise FieldError(
            "num_clients", num_clients or len(members), f"left out, with {len(members)} clients of 1 or more"
        )
    owners: dict[int, int] = {}
    for number, client in enumerate(members):
        if not isinstance(client, Client):
            raise FieldError(f"client {number}", type(client).__name__, "a fedq.Client")
        for name, state in client.states.items():
            other = owners.setdefault(id(state), number)
            if other != number:
                raise FieldError(f"{name} of client {number}", f"that of client {other}", "a state of its own")
    return members.__getitem__, len(members), any(client.uplink is not None for client in members)


def place_among_ranks(stack: ExitStack, device: torch.device) -> Runtime:
    """Return this process's place among the ranks, with a process group that the stack closes if it is new.

    Raises:
        FieldError: The model is on another rank's GPU, under NCCL.
    """
    if dist.is_available() and dist.is_initialized():
        return existing_group(device)
    runtime = stack.enter_context(distributed("cuda" if device.type == "cuda" else "cpu"))
    if runtime.backend == "nccl" and runtime.device != device:
        raise FieldError("model", f"on {device}", f"on {runtime.device}, the GPU of rank {runtime.rank}")
    return runtime
