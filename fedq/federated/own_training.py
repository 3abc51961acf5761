"""A training function of the user's own, as a client's training."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedq.errors import FieldError
from fedq.federated.intact import kept_intact
from fedq.federated.training import RoundContext, Start, Trained, seed_torch
from fedq.layout import Layout

TrainFunction = Callable[..., "float | Mapping[str, float] | Sequence[float] | None"]
"""``train(model, lr)``: trains the model in place; returns its mean loss, means by name, or nothing."""
STEPS = "first_step"
_NAMED = ("round", "seed", STEPS, "client")
"""Arguments that a training function gets beside model and learning rate, if it names them."""
_LARGEST = torch.finfo(torch.float32).max


@runtime_checkable
class Stateful(Protocol):
    """What can be saved and go on: an optimizer, a scheduler, a data loader."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Go on from a state."""


State = Stateful | Mapping[str, Stateful]


def states_of(state: State | None) -> dict[str, Stateful]:
    """Return what a client keeps between rounds, by name; what has none is called ``state``.

    Raises:
        FieldError: A state lacks `state_dict` or `load_state_dict`.
    """
    named: Mapping[str, Any] = state if isinstance(state, Mapping) else {} if state is None else {"state": state}
    for name, one in named.items():
        if not isinstance(one, Stateful):
            raise FieldError(name, type(one).__name__, "something with state_dict and load_state_dict")
    return dict(named)


def check_function(train: TrainFunction) -> None:
    """Check that a function can be called as ``train(model, lr)``, with what it names besides.

    Raises:
        FieldError: The function needs an argument that it will not get.
    """
    signature = signature_of(train)
    if signature is None:
        return
    try:
        signature.bind(None, 0.0, **dict.fromkeys(named_by(train), 0))
    except TypeError as error:
        allowed = f"a function train(model, lr) that may name {', '.join(_NAMED)} as well"
        raise FieldError("train", f"{getattr(train, '__name__', train)}{signature} ({error})", allowed) from None


def named_by(train: TrainFunction) -> tuple[str, ...]:
    """Return which of the further arguments a training function names."""
    signature = signature_of(train)
    named = {} if signature is None else signature.parameters
    return tuple(name for name in _NAMED if name in named and named[name].kind is not inspect.Parameter.VAR_KEYWORD)


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return what a function of the user's may be called with; None if it does not say."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # one that is not written in Python
        return None


class OwnTraining:
    """Trains by a function of the user's.

    Args:
        model: Module that the function trains.
        train: The training function.
    """

    def __init__(self, model: nn.Module, train: TrainFunction) -> None:
        self.model = model
        self.train = train
        self.num_steps = 0
        """Optimizer steps that the function has taken so far."""
        self._named = named_by(train)

    @cached_property
    def layout(self) -> Layout:
        """The model's layout."""
        return Layout.of(self.model, "fp32")

    @property
    def asks_for_steps(self) -> bool:
        """Whether the function is told how many steps it has taken."""
        return STEPS in self._named

    def run(self, start: Tensor, context: RoundContext, client: int) -> Trained:
        """Write the flat model into the module, and train it; the seed is set for torch's own random numbers.

        Raises:
            FieldError: The function has replaced, reshaped, moved or frozen a parameter, or returned no mean.
        """
        began, seed = Start(self.layout, self.model, start), context.local_seed(client)
        told = {"round": context.round, "seed": seed, STEPS: self.num_steps, "client": client}
        seed_torch(seed)
        self.model.train()
        self.model.zero_grad(set_to_none=True)  # those of the client before
        try:
            with _counted() as steps, kept_intact(self.model):
                measured = self.train(self.model, context.lr, **{name: told[name] for name in self._named})
        finally:
            self.num_steps += steps[0]
        loss, accuracy, metrics = _measures(measured)
        return began.trained(loss, accuracy, steps[0], metrics)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Count the steps of any optimizer in the body, in this thread."""
    steps, own = [0], threading.get_ident()

    def count(*_: Any) -> None:
        steps[0] += threading.get_ident() == own

    handle = register_optimizer_step_post_hook(count)
    try:
        yield steps
    finally:
        handle.remove()


def _measures(told: float | Mapping[str, float] | Sequence[float] | None) -> tuple[float, float, dict[str, float]]:
    """Return loss, accuracy and all means of what a training function has returned.

    Raises:
        FieldError: The function has returned something else, or an accuracy outside 0 to 1.
    """
    if told is None:
        return math.nan, math.nan, {}
    try:
        if isinstance(told, Mapping):
            means: Mapping[str, Any] = told
        elif isinstance(told, Sequence) and not isinstance(told, str | bytes):
            means = dict(zip(("loss", "accuracy"), told, strict=True))
        else:
            means = {"loss": told}
        values = {str(name): _float32(value) for name, value in means.items()}
    except (TypeError, ValueError, RuntimeError):  # the last one is a tensor's of many values
        allowed = "a mean loss, a mapping of means by name, a pair (loss, accuracy), or None"
        raise FieldError("result of train", repr(told)[:200], allowed) from None
    accuracy = values.get("accuracy", math.nan)
    if not (math.isnan(accuracy) or 0 <= accuracy <= 1):
        raise FieldError("accuracy", accuracy, "0 to 1, as train returns it")
    return values.get("loss", math.nan), accuracy, values


def _float32(value: Any) -> float:
    """Return a number; one that float32 cannot hold, as a message has it, is infinite."""
    if isinstance(value, str | bytes):
        raise TypeError("text is no number")
    number = float(value)
    return number if not math.isfinite(number) or abs(number) < _LARGEST else math.copysign(math.inf, number)
