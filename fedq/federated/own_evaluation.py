"""An evaluation function of the user's own, called where it has to be, with its numbers told to all ranks."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedq.collectives import Transport
from fedq.errors import FieldError
from fedq.federated.own_training import signature_of
from fedq.federated.plain_bytes import from_bytes, to_bytes
from fedq.federated.training import seed_torch

Evaluate = Callable[..., "float | Mapping[str, Any]"]
"""``evaluate(model)`` returns a number, or numbers by name; with ``rank`` and ``ranks``, pairs (sum, count) by name."""


class OwnEvaluation:
    """Evaluates by a function of the user's.

    Args:
        evaluate: The function.
        name: Name of a number that the function returns without one.
        transport: Transport between the ranks.

    Raises:
        FieldError: The function cannot be called.
    """

    def __init__(self, evaluate: Evaluate, name: str, transport: Transport) -> None:
        if not callable(evaluate):
            raise FieldError("evaluate", type(evaluate).__name__, "a function evaluate(model)")
        self._evaluate = evaluate
        self._name = name
        self._transport = transport
        self._is_shared = _names_ranks(evaluate)

    def run(self, model: nn.Module, seed: int) -> tuple[dict[str, float], int]:
        """Return the numbers by name, the same on every rank, and the bytes that crossed.

        The model is in eval mode meanwhile, and as before afterwards. torch's random numbers are seeded, so that what
        an evaluation draws depends on no client that was trained on this rank before.

        Raises:
            FieldError: The function has returned no numbers.
            RuntimeError: The function has raised, on whichever rank; the text says what.
        """
        transport, messages = self._transport, list[Tensor]()
        if self._is_shared or transport.rank == 0:
            seed_torch(seed)
            messages = [to_bytes(self._call(model))]
        counts = [1] * transport.world_size if self._is_shared else [1] + [0] * (transport.world_size - 1)
        gathered, moved = transport.gather(messages, counts)
        nbytes, told = moved.payload + moved.sizes, None
        if transport.rank == 0:
            told = to_bytes(_joined([from_bytes(one) for of_rank in gathered for one in of_rank]))
        told, moved = transport.broadcast(told)
        answer = from_bytes(told)
        if "error" in answer:
            raise RuntimeError(f"evaluate has failed on rank {answer['rank']}: {answer['error']}")
        if "refused" in answer:
            raise FieldError("result of evaluate", answer["refused"], self._allowed)
        return answer["values"], nbytes + moved.payload + moved.sizes

    def _call(self, model: nn.Module) -> dict[str, Any]:
        """Return what this rank's call has come to, as plain values."""
        modes = [(module, module.training) for module in model.modules()]
        ranks = {"rank": self._transport.rank, "ranks": self._transport.world_size}
        model.eval()
        try:
            with torch.no_grad():
                told = self._evaluate(model, **(ranks if self._is_shared else {}))
        except Exception:
            return {"error": traceback.format_exc(limit=-3).strip(), "rank": self._transport.rank}
        finally:
            for module, was_training in modes:
                module.training = was_training
        named: Mapping[str, Any] = told if isinstance(told, Mapping) else {self._name: told}
        try:
            if self._is_shared:
                return {"sums": {str(name): [float(total), float(num)] for name, (total, num) in named.items()}}
            return {"values": {str(name): float(value) for name, value in named.items()}}
        except (TypeError, ValueError, RuntimeError):  # the last one is a tensor's of many values
            return {"refused": repr(told)[:200]}

    @property
    def _allowed(self) -> str:
        return "pairs (sum, count) by name" if self._is_shared else "a number, or numbers by name"


def _joined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first that went wrong, or the values: sums are added in rank order."""
    wrong = next((answer for answer in answers if "error" in answer or "refused" in answer), None)
    if wrong is not None or "values" in answers[0]:
        return wrong or answers[0]
    sums: dict[str, list[float]] = {}
    for answer in answers:
        for name, (total, num) in answer["sums"].items():
            both = sums.setdefault(name, [0.0, 0.0])
            both[0] += total
            both[1] += num
    return {"values": {name: total / num if num else float("nan") for name, (total, num) in sums.items()}}


def _names_ranks(evaluate: Evaluate) -> bool:
    signature = signature_of(evaluate)
    return signature is not None and {"rank", "ranks"} <= signature.parameters.keys()
