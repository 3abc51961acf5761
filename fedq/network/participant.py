"""A client's side of the federation: its model, and what is on its disk. No connection is known here."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping
from ctypes import c_float
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedq.errors import FieldError
from fedq.federated.aggregate import apply_change
from fedq.federated.client import Client
from fedq.federated.client_states import ClientStates
from fedq.federated.parts import Part
from fedq.federated.training import RoundContext
from fedq.feedback import ErrorFeedback, NoFeedback, ResidualStore
from fedq.files import replace_file
from fedq.layout import Layout
from fedq.network.catch_up import checksum
from fedq.wire import Kind, Limits, Message

_KEPT = 3
"""Versions of the residual on disk: a server that was restarted may ask for its last round again."""


class Diverged(Exception):
    """The model is not the server's: only a whole one helps."""


class VersionsOnDisk:
    """What a client keeps on disk: its residual and its state, one version for each round that it took part in.

    A round that is asked again starts from what the first time started from, so it ends the same.

    Args:
        folder: Folder for the residuals, the client's own states, and the run and codec that they belong to.
        number: The client's number, from 0.
        has_feedback: Whether the client has a residual at all.
    """

    def __init__(self, folder: Path, number: int, *, has_feedback: bool) -> None:
        self.folder = folder
        self.number = number
        self.store = ResidualStore(folder=folder / "residuals") if has_feedback else None
        self.feedback = NoFeedback() if self.store is None else ErrorFeedback(self.store)
        self.states = ClientStates(folder / "states")
        self._version: int | None = None

    def begin(self, run: str, uplink: str) -> None:
        """Go on with what is kept of a run; what another run, or another codec, has left is deleted."""
        file, now = self.folder / "state.json", {"run": run, "uplink": uplink}
        before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if before != now:
            self._forget(self._versions())
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(now).encode())
        self._version = None

    def follow(self, client: Client) -> None:
        """Keep a client's state from now on; the one that it has now is that before the first round."""
        self.states.follow(client)
        if client.keeps_state and not self._versions():
            self.states.note(self.number)
            self.states.save(0)

    def before(self, round: int) -> int | None:
        """Return to what the client had when a round began; say which round left it, None if none did."""
        version = max((version for version in self._versions() if version <= round), default=None)
        if version is None or version != self._version:
            for store in self._stores:
                has_file = version is not None and store.path(self.number, version).exists()
                store.attach({self.number: version} if version is not None and has_file else {})
            self._version = version
        self.states.note(self.number)
        return version - 1 if version else None

    def after(self, round: int) -> None:
        """Keep what a round has left, before its answer is sent."""
        saved = [store.save(round + 1) for store in self._stores]
        if any(self.number in owners for owners in saved):
            self._version = round + 1
        self._forget(sorted(self._versions())[:-_KEPT])

    def undo(self, round: int) -> None:
        """Forget what a round has left: its answer did not count."""
        self._forget([round + 1])
        self._version = None

    @property
    def _stores(self) -> list[ResidualStore | ClientStates]:
        return [self.states] if self.store is None else [self.store, self.states]

    def _versions(self) -> dict[int, list[Path]]:
        """Return the files on disk by version."""
        pattern, found = re.compile(rf"client-{self.number:06d}-(\d+)\.(f32|pt)"), dict[int, list[Path]]()
        for store in self._stores:
            assert store.folder is not None
            for path in store.folder.glob("client-*"):
                if match := pattern.fullmatch(path.name):
                    found.setdefault(int(match[1]), []).append(path)
        return found

    def _forget(self, versions: Iterable[int]) -> None:
        files = self._versions()
        for path in [path for version in versions for path in files.get(version, [])]:
            path.unlink(missing_ok=True)


class Participant:
    """What a client of a federation holds; it takes models and changes, and answers tasks.

    (A `fedq.Client` may have a state of its own, such as an optimizer's: `fedq.federated.client_states`.)

    Args:
        client: The client that trains, and encodes its updates.
        on_disk: Versions of its residual and its own state, one for each round.
        run: Name of the federation's run.
        uplink: Spec of the codecs of its updates, as it announces them.
        has_own_data: Whether the client's examples are no share of a data set that the server knows.
        has_start: Whether the module is the federation's first model already, drawn from its seed.
    """

    def __init__(
        self,
        client: Client,
        on_disk: VersionsOnDisk,
        *,
        run: str,
        uplink: str,
        has_own_data: bool = True,
        has_start: bool = False,
    ) -> None:
        self.client = client
        self.on_disk = on_disk
        self.run = run
        self.uplink = uplink
        self.parts = Part()
        self.has_own_data = has_own_data
        self.layout = client.training.layout
        self.replica = self.layout.flatten(client.training.model) if has_start else None
        self.version = 0 if has_start else None
        self.instance = secrets.token_hex(16)
        """By this the server knows that it is this process which joins again, and no other with its certificate."""
        self._answer: Message | None = None
        on_disk.begin(run, uplink)
        on_disk.follow(client)

    def hello(self) -> dict[str, Any]:
        """Return what the server must know of this client."""
        held = {} if self.replica is None else {"version": self.version, "checksum": checksum(self.replica)}
        return {
            "kind": "hello",
            "run": self.run,
            "uplink": self.uplink,
            "feedback": self.on_disk.store is not None,
            "num_examples": int(self.client.num_examples),
            "own_data": self.has_own_data,
            "instance": self.instance,
            **held,
        }

    @property
    def limits(self) -> Limits:
        """What a message of the server may be: nothing is held that is not of this model's size."""
        return Limits.of_model(self.layout, note_bytes=1 << 20)

    def take(self, message: Message) -> None:
        """Take the whole model, or a change of it.

        Raises:
            FieldError: It is of another model.
            Diverged: A change, but of what is not there.
        """
        assert message.layout is not None
        check_same_model(message.layout, self.layout)
        if message.frame.kind == Kind.MODEL:
            device = next(self.client.training.model.parameters()).device
            self.replica = torch.zeros(self.layout.numel, device=device)
            self.version = None
        elif self.replica is None:
            raise Diverged("a change came before a model")
        body = message.frame.body.to(self.replica.device)
        apply_change(message.layout, replace(message.frame, body=body), self.replica)

    def arrive(self, text: Mapping[str, Any]) -> None:
        """Compare the model with the server's, after all that leads to it was taken.

        Raises:
            Diverged: They differ; the one here is forgotten.
        """
        if self.replica is None or checksum(self.replica) != text["checksum"]:
            self.replica = self.version = None
            raise Diverged("the model here is not the server's")
        self.version = int(text["version"])

    def answer(self, text: Mapping[str, Any], sequence: int) -> Message:
        """Train as a task says, from the model as it is; the same task again gets the same answer."""
        if self._answer is None or self._answer.sequence != sequence:
            context = RoundContext(int(text["round"]), float(text["lr"]), int(text["seed"]))
            self._answer = self._train(context, sequence)
        return self._answer

    def undo(self) -> None:
        """Take the last answer back: it did not count."""
        if self._answer is not None:
            self.on_disk.undo(self._answer.frame.round)
            self._answer = None

    def _train(self, context: RoundContext, sequence: int) -> Message:
        assert self.replica is not None
        last, client = self.on_disk.before(context.round), self.client
        missed = 0 if last is None else context.round - last - 1
        frame = client.answer(self.replica, context, parts=self.parts, missed=missed)
        if math.isinf(c_float(frame.loss).value):  # a server knows finite losses, and those that are not known
            frame = replace(frame, loss=math.nan)
        self.on_disk.after(context.round)
        assert client.layouts is not None
        return Message(frame, client.layouts.at(context.round) if frame.kind.has_payloads else None, sequence)


def check_same_model(received: Layout, own: Layout) -> None:
    """Raise `FieldError` unless a message's tensors are those of this model, in the same order."""
    theirs, ours = ([(s.name, s.shape) for s in layout.spans] for layout in (received, own))
    if theirs != ours:
        odd = next((pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]), (len(theirs), len(ours)))
        raise FieldError("tensor", odd[0], f"{odd[1]}, as in this client's model")
