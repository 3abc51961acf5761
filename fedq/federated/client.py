"""One client: how it trains, and the message that its update becomes.

Nothing here knows ranks or transports; the same client runs in one process, over a process group, or across a
network. Which client runs where is decided by the delivery.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any, SupportsFloat, TypeVar

import torch
from torch import Tensor, nn

from fedq.codecs import codec_schedule
from fedq.errors import FieldError
from fedq.federated.own_training import OwnTraining, State, TrainFunction, check_function, states_of
from fedq.federated.parts import Part
from fedq.federated.training import RoundContext, Trained, Training, is_finite
from fedq.feedback import Feedback, NoFeedback
from fedq.layout import LayoutSchedule
from fedq.phases import PhaseTimer
from fedq.wire import Frame, Kind, join_payloads

_log = logging.getLogger(__name__)
_MAX_ERROR_NBYTES = 500
_NOBODY = Part()
C = TypeVar("C", bound="Client")


class Client:
    """A member of a federation: how it trains, what it counts for, and what it keeps between rounds.

    ``train(model, lr)`` trains the module in place for one round, and returns its mean loss, a mapping of means by name
    (``loss`` among them), or None. It also gets those of these keyword arguments that it names: ``round`` (from 0),
    ``seed`` (of this client and round), ``first_step`` (optimizer steps that it has taken before this round) and
    ``client`` (its number). The module may be shared by several clients: it holds the newest model when a round of
    training begins, and nothing of what other clients have trained. torch's random numbers are seeded before each call;
    those of Python and NumPy are not.

    What a closure keeps between rounds is lost when a run is resumed; what ``state`` keeps is saved with the run.

    Args:
        train: The training function; or a `fedq.federated.training.Training`.
        num_examples: Weight of the client's update in the mean; above 0.
        state: What lives between rounds: something with `state_dict` and `load_state_dict` (an optimizer, a scheduler,
            a data loader), or several by name.
        uplink: Codec of the client's updates; default: the federation's.
        name: Client's name, which stands beside its number where a person reads of it.

    Raises:
        FieldError: The weight is not above 0, ``train`` cannot be called so, ``state`` has not the two methods, or the
            codec does not exist.
    """

    def __init__(
        self,
        train: TrainFunction | Training,
        *,
        num_examples: float,
        state: State | None = None,
        uplink: str | None = None,
        name: str | None = None,
    ) -> None:
        weight = float(num_examples) if isinstance(num_examples, SupportsFloat) else math.nan
        if not 0 < weight < math.inf:
            raise FieldError("num_examples", num_examples, "a weight above 0")
        self.num_examples = num_examples
        self.states = states_of(state)
        if uplink is not None:
            codec_schedule(uplink)
        self.uplink = uplink
        self.name = name
        self._train = train
        if callable(train):
            check_function(train)
        elif not hasattr(train, "run"):
            raise FieldError("train", type(train).__name__, "a function train(model, lr)")

    # ---- its place in a federation -----------------------------------------------------------------------------------

    number: int
    """Client's number, from 0."""
    training: Training
    layouts: LayoutSchedule | None
    """Layouts of the client's updates, by round; None: it sends no updates."""
    feedback: Feedback
    residual_memory: float

    def seated(
        self: C,
        number: int,
        layouts: LayoutSchedule | None,
        feedback: Feedback | None = None,
        *,
        model: nn.Module | None = None,
        residual_memory: float = 1.0,
    ) -> C:
        """Return the client with its place in a federation.

        Args:
            number: Client's number, from 0.
            layouts: Layouts of the client's updates, by round; None: nothing is sent.
            feedback: Feedback that encodes the client's updates; default: one that keeps no residual.
            model: Module that a training function trains; None only where the client has a `Training`.
            residual_memory: Share of the residual that is left after each round in which the client was not asked.
        """
        seated = copy.copy(self)
        seated.number = number
        seated.layouts = layouts
        seated.feedback = feedback or NoFeedback()
        seated.residual_memory = residual_memory
        if callable(self._train):
            assert model is not None, "a function needs a model to train"
            seated.training = OwnTraining(model, self._train)
        else:
            seated.training = self._train
        return seated

    # ---- what it keeps between rounds --------------------------------------------------------------------------------

    @property
    def keeps_state(self) -> bool:
        """Whether there is anything: a state of the user's, or a count of steps that its function asks for."""
        return bool(self.states) or (isinstance(self.training, OwnTraining) and self.training.asks_for_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return what it keeps."""
        num_steps = self.training.num_steps if isinstance(self.training, OwnTraining) else 0
        return {"num_steps": num_steps, "states": {name: one.state_dict() for name, one in self.states.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            FieldError: The client now keeps states of other names.
        """
        if state["states"].keys() != self.states.keys():
            raise FieldError(
                f"state of client {self.number}", sorted(self.states), f"{sorted(state['states'])}, as saved"
            )
        if isinstance(self.training, OwnTraining):
            self.training.num_steps = state["num_steps"]
        for name, one in self.states.items():
            one.load_state_dict(state["states"][name])

    # ---- a round -----------------------------------------------------------------------------------------------------

    def answer(
        self,
        replica: Tensor,
        context: RoundContext,
        *,
        parts: Part = _NOBODY,
        trained: Trained | None = None,
        missed: int = 0,
        timer: PhaseTimer | None = None,
    ) -> Frame:
        """Train from the replica, and return the message: the update, that it is not finite, or why there is none.

        Args:
            replica: The model that everybody holds, flat float32.
            context: The round.
            parts: What takes part in the round; told before and after training, and before and after encoding.
            trained: Result of training, where it was done together with other clients'; None: train now.
            missed: Rounds right before this one in which the client was not asked.
            timer: What measures the time of training and encoding; default: a new one.
        """
        timer = timer or PhaseTimer()
        parts.alive(f"training client {self.number} in round {context.round}")
        try:
            parts.before_training(context, self)
            if trained is None:
                with timer.phase("compute"):
                    trained = self.train(replica, context)
            else:
                self.training.layout.unflatten_(trained.flat, self.training.model)
            parts.after_training(context, self, trained)
        except Exception as error:
            named = f" ({self.name})" if self.name else ""
            _log.exception("round %d: training of client %d%s failed", context.round, self.number, named)
            return self.failure(error, context)
        if self.layouts is None:
            return self._frame(Kind.UPDATE, context, trained.loss, trained.accuracy, _nothing())
        with timer.phase("encode"):
            update = self.layouts.at(context.round).to_sent_(trained.flat, replica, trained.changes)
            parts.before_encoding(context, self, update)
            frame = self.message(update, trained, context, memory=self.residual_memory**missed)
        parts.after_encoding(context, self, update, frame)
        return frame

    def train(self, replica: Tensor, context: RoundContext) -> Trained:
        """Train from the replica in this round."""
        return self.training.run(replica, context, self.number)

    def message(self, update: Tensor, trained: Trained, context: RoundContext, *, memory: float = 1.0) -> Frame:
        """Return the update as a frame; one with a NaN or infinity becomes a frame that says so, without a body.

        The residual changes only when an update is sent; ``memory`` is the share of the old one that counts.
        """
        assert self.layouts is not None
        if not is_finite(update):
            return self._frame(Kind.LEFT_OUT, context, trained.loss, trained.accuracy, _nothing(update.device))
        seed, layout = context.uplink_seed(self.number), self.layouts.at(context.round)
        body = join_payloads(layout, self.feedback.encode(self.number, layout, update, seed=seed, memory=memory))
        return self._frame(Kind.UPDATE, context, trained.loss, trained.accuracy, body)

    def failure(self, error: Exception, context: RoundContext) -> Frame:
        """Return the frame that says why there is no update."""
        text = f"{type(error).__name__}: {error}".encode(errors="replace")[:_MAX_ERROR_NBYTES]
        body = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return self._frame(Kind.FAILED, context, math.nan, math.nan, body)

    def _frame(self, kind: Kind, context: RoundContext, loss: float, accuracy: float, body: Tensor) -> Frame:
        return Frame(
            kind=kind,
            round=context.round,
            client=self.number,
            layout_hash=0 if self.layouts is None else self.layouts.at(context.round).hash,
            seed=context.uplink_seed(self.number),
            weight=float(self.num_examples),
            loss=loss,
            accuracy=accuracy,
            body=body,
        )


def _nothing(device: torch.device | str = "cpu") -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device)
