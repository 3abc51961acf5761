"""The server's side of every connection: who is there, what each is asked, and what each has answered.

Everything here runs in one thread, that of the event loop, so nothing is locked; the rounds, in the main thread, call
it through `fedq.network.service.Service`. gRPC is not known here.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedq.errors import FieldError
from fedq.federated.accounting import framing, payload_parts, span_sections
from fedq.federated.cohort import sample_cohort
from fedq.federated.downlink import without_raw
from fedq.federated.training import RoundContext
from fedq.layout import Layout, LayoutSchedule
from fedq.ledger import MessageParts
from fedq.network.catch_up import CatchUp
from fedq.network.client_record import ClientRecord, RateLimit, Task
from fedq.network.fields import check_answer, check_note
from fedq.network.settings import NetworkConfig
from fedq.text import clean
from fedq.waiting import Wait, named
from fedq.wire import Frame, Kind, Limits, Message, note, split_body

_log = logging.getLogger(__name__)
Moved = tuple[int, str, MessageParts]
"""Client, direction and make-up of a message."""
_MOST_TRIES = 10
"""Times that a client may begin to send an answer to one task."""
_MOST_MAKEUPS = 256
_TRAINING_S = 60.0
"""Seconds of a round in which nothing is said of those who have not answered."""


class Refused(Exception):
    """A client that may not take part, or a message that nobody waits for.

    Args:
        reason: The reason in words, for both sides.
        is_final: Whether trying again cannot help.
    """

    def __init__(self, reason: str, *, is_final: bool = True) -> None:
        super().__init__(reason)
        self.reason = clean(reason)
        self.is_final = is_final


@dataclass(frozen=True)
class Terms:
    """What a federation's clients are told and held to.

    Args:
        run: Name of the run, never that of another.
        num_clients: Number of clients in the federation.
        cohort_size: Number of clients that a round asks.
        min_cohort: Smallest number of clients that a round begins with.
        shares: Settings that clients need, as plain values by group and name.
        shares_held: Number of examples in each client's share of the server's data set; -1: there is no share.
        layout: Layout of the model in float32.
        schedule: Function from an uplink's spec, and whether there is feedback, to the layouts of its updates.
        network: The server's settings: timeouts and limits.
        frozen: CRC32C of each parameter that does not travel, by name.
    """

    run: str
    num_clients: int
    cohort_size: int
    min_cohort: int
    shares: Mapping[str, Any]
    shares_held: Sequence[int]
    layout: Layout
    schedule: Callable[[str, bool], LayoutSchedule]
    network: NetworkConfig
    frozen: Mapping[str, int] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        """What a client's message may be: an update of this model in float32 and a table of its tensors, at most."""
        return Limits.of_model(self.layout, note_bytes=4096)


@dataclass(frozen=True)
class Assignment:
    """What a client is told at a time.

    Args:
        task: The task that the client is asked; None at the end.
        models: Messages that bring the client to the newest model.
        note: The note with the task, or with the last words.
        version: Number of rounds that the model has seen which the client holds then.
    """

    task: Task | None
    models: list[Message]
    note: Message
    version: int


class _RoundEnd:
    """Until when a round waits for each of its clients.

    One that has let a whole round pass in silence is asked again, but waited for only as long again as the others took,
    until it answers. Once the quorum has answered nobody is waited for.

    Args:
        asked: Records of the clients that this round asks, as they are when it begins.
        network: The server's settings: timeouts and quorum.
    """

    def __init__(self, asked: Sequence[ClientRecord], network: NetworkConfig) -> None:
        self._began, self._timeout = time.monotonic(), network.round_timeout
        self._asked, self._needed = asked, math.ceil(network.quorum * len(asked) - 1e-9)  # 0.7 * 10 is above 7
        silent = {record.number for record in asked if record.is_silent}
        self._silent = silent if len(silent) < len(asked) else set()
        self._others_took: float | None = None

    def moments(self, waiting: Sequence[ClientRecord], now: float) -> list[float]:
        """Return until when to wait for each of those whose answers are missing."""
        if sum(record.task is not None and record.task.answer is not None for record in self._asked) >= self._needed:
            return [now] * len(waiting)
        last = self._began + self._timeout
        if not self._silent:
            return [last] * len(waiting)
        if self._others_took is None and all(record.number in self._silent for record in waiting):
            self._others_took = now - self._began
        soon = last if self._others_took is None else min(last, self._began + 2 * self._others_took)
        return [soon if record.number in self._silent else last for record in waiting]

    def why_missing(self, record: ClientRecord) -> str:
        """Return the reason, once the moment has come; whoever had the whole time is silent from now on."""
        if time.monotonic() >= self._began + self._timeout:
            record.is_silent = True
            return f"no answer within {self._timeout:g} s"
        if record.number in self._silent:
            return "no answer; since it was silent for a whole round it is not waited for until it answers"
        return f"no answer before the quorum of {self._needed} had answered"


class Hub:
    """The records of all clients, and one round at a time.

    Args:
        terms: The terms that clients are told and held to.
        first_sequence: Sequence number after which the numbers of tasks begin.
    """

    def __init__(self, terms: Terms, first_sequence: int = 0) -> None:
        self.terms = terms
        self.catch_up = CatchUp(terms.layout)
        self.records: dict[int, ClientRecord] = {}
        self.context: RoundContext | None = None
        """Context of the open round; None between rounds."""
        self.result: dict[str, Any] | None = None
        """Result that clients are told at the end, once it is there."""
        self.received = 0
        """Number of bytes of clients' messages so far."""
        self._sequence = first_sequence
        self._began = time.monotonic()
        self._changed = asyncio.Event()
        self._is_first = True
        self.own_data: frozenset[int] = frozenset()
        """Clients whose examples are no share of the server's data set; never changed, only replaced."""
        self._makeups: dict[tuple[int, Kind, int], MessageParts] = {}

    # ---- who is there ------------------------------------------------------------------------------------------------

    def record_of(self, number: int) -> ClientRecord:
        """Return the record of a client that calls.

        Args:
            number: Its number, from its certificate.

        Raises:
            Refused: It has no place here, or has broken the rules too often.
        """
        if not 0 <= number < self.terms.num_clients:
            raise Refused(f"client {number} has no seat; the federation has clients 0 to {self.terms.num_clients - 1}")
        record = self.records.setdefault(number, ClientRecord(number))
        if record.offences >= self.terms.network.max_offences:
            raise Refused(_shut_out(record))
        return record

    def knock(self, number: int) -> ClientRecord:
        """Return the record of somebody who calls in a client's name, unless that happens too often.

        Raises:
            Refused: As for `record_of`; or it calls too often.
        """
        record = self.record_of(number)
        _take(record.joins, number)
        return record

    def description(self, record: ClientRecord) -> Message:
        """Return what the federation is, as a client is told before it prepares."""
        terms = self.terms
        text = {"kind": "federation", "run": terms.run, "number": record.number, "clients": terms.num_clients}
        frozen = {"frozen": dict(terms.frozen)} if terms.frozen else {}
        return note(text | {"settings": dict(terms.shares)} | frozen)

    def admit(self, number: int, hello: Mapping[str, Any], peer: str = "") -> ClientRecord:
        """Let a client take part, anew if it had lost its connection.

        While one process is the client, another with the same certificate is sent away, and both are named.

        Args:
            number: Its number, from its certificate.
            hello: Fields of its greeting, as it sent them.
            peer: Address that the client calls from.

        Raises:
            Refused: It has no place, or says what cannot be.
        """
        record = self.record_of(number)
        returns = bool(record.instance) and hello.get("instance") == record.instance
        _take(record.returns if returns else record.joins, number)
        try:
            hello = check_note(hello, "hello")
        except FieldError as error:
            raise self.misgreeted(record, error) from None
        if record.followers and not returns:
            _log.warning(
                "client %d is here from %s; from %s comes another with its certificate", number, record.peer, peer
            )
            raise Refused(
                f"client {number} is here already, from {record.peer}; you come from {peer}: a certificate is for one "
                "process, and whoever holds it twice needs a new one",
                is_final=False,
            )
        uplink, has_own_data = self._uplink(hello), hello.get("own_data") is True
        if has_own_data and not self.terms.network.accept_own_data:
            raise Refused(
                "own_data=True is not allowed; allowed: a share of the server's data, or --accept-own-data there"
            )
        num_examples, share = hello["num_examples"], self.terms.shares_held[number]
        if not has_own_data and num_examples != share:
            raise Refused(f"num_examples={num_examples} is not allowed; allowed: {share}, its share; or --own-data")
        record.uplink, record.num_examples = uplink, num_examples
        self.own_data = self.own_data | {number} if has_own_data else self.own_data - {number}
        is_ours = hello["run"] == self.terms.run
        record.version = self.catch_up.recognise(hello.get("version"), hello.get("checksum")) if is_ours else None
        record.session = secrets.token_hex(16)
        record.instance, record.peer = hello.get("instance") or "", peer
        record.end_followers(f"client {number} has joined again, from {peer}")
        _log.info("client %d is here with %d examples", number, record.num_examples)
        return record

    def misgreeted(self, record: ClientRecord, error: FieldError) -> Refused:
        """Note a greeting that broke the rules; return what its sender is told."""
        record.offences += 1
        _log.warning("client %d broke the rules (%d): %s", record.number, record.offences, clean(str(error)))
        return Refused(f"not a greeting: {error}")

    def welcome(self, record: ClientRecord) -> Message:
        """Return what a client is told first."""
        return note({"kind": "welcome", "session": record.session}, client=record.number)

    def arrived(self, record: ClientRecord) -> None:
        """Note that a client follows."""
        record.is_connected = True
        self._changed.set()

    def left(self, record: ClientRecord) -> None:
        """Note that a client's connection is gone."""
        if record.is_connected and not record.followers:
            record.is_connected, record.lost_at = False, time.monotonic()
            if self.result is None:
                _log.warning("the connection to client %d is lost", record.number)
            self._changed.set()

    def record_in_session(self, number: int, session: str) -> ClientRecord:
        """Return the record of a client that sends.

        Raises:
            Refused: It has not joined, or has joined again since.
        """
        record = self.records.get(number)
        if record is None or not record.session or not hmac.compare_digest(record.session.encode(), session.encode()):
            raise Refused(f"client {number} has not joined, or has joined again since", is_final=False)
        return record

    # ---- what a client is told ---------------------------------------------------------------------------------------

    def assignment(self, record: ClientRecord) -> Assignment | None:
        """Return a client's open task with the messages that it needs for it; None if there is none."""
        if self.context is None or not record.has_open_task(self.context.round):
            return None
        assert record.task is not None
        assert self.catch_up.model is not None
        model, context = self.catch_up.model, self.context
        text = {
            "kind": "task",
            "round": context.round,
            "lr": context.lr,
            "seed": context.seed,
            "version": model.version,
            "checksum": model.checksum,
            "timeout": self.terms.network.round_timeout,
        }
        task = note(text, round=context.round, client=record.number, sequence=record.task.sequence)
        return Assignment(record.task, self.catch_up.lacking(record.version), task, model.version)

    def farewell(self, record: ClientRecord) -> Assignment:
        """Return the last messages: what leads to the final model, and the result."""
        assert self.catch_up.model is not None
        model, text = self.catch_up.model, {"kind": "finished", **(self.result or {})}
        text |= {"version": model.version, "checksum": model.checksum}
        return Assignment(None, self.catch_up.lacking(record.version), note(text), model.version)

    def sent(self, record: ClientRecord, message: Message, *, is_newest: bool) -> None:
        """Note a message that a client has been sent whole; the newest change stands for a whole float32 model."""
        parts = self._makeup(message)
        record.moved.append(("downlink", parts if is_newest else without_raw(parts)))

    def caught_up(self, record: ClientRecord, version: int) -> None:
        """Note what a client holds now."""
        record.version = version

    def cut_short(self, record: ClientRecord, nbytes: int, direction: str) -> None:
        """Note bytes of a message that did not arrive whole."""
        self.received += nbytes * (direction == "uplink")
        if nbytes:
            record.moved.append((direction, framing("unfinished", nbytes)))

    # ---- what a client answers ---------------------------------------------------------------------------------------

    def expects(self, record: ClientRecord) -> None:
        """Check that an answer of a client is wanted at all, before its bytes are taken.

        Raises:
            Refused: None is.
        """
        if self.context is None or not record.has_open_task(self.context.round):
            raise Refused(f"no answer of client {record.number} is wanted now", is_final=False)

    def begins(self, record: ClientRecord) -> None:
        """Note that a client begins to send an answer.

        Raises:
            Refused: None is wanted, or it has begun too often.
        """
        self.expects(record)
        assert record.task is not None
        if record.task.tries >= _MOST_TRIES:
            raise Refused(f"client {record.number} has tried {_MOST_TRIES} times to answer", is_final=False)
        record.task.tries += 1

    def accept(self, record: ClientRecord, message: Message) -> None:
        """Take a client's answer.

        Raises:
            Refused: The round is over, or the answer is of an earlier one.
            FieldError: It is no answer to what was asked.
        """
        self.expects(record)
        assert record.task is not None
        assert self.context is not None
        task = record.task
        check_answer(
            message,
            round=task.round,
            sequence=task.sequence,
            client=record.number,
            num_examples=record.num_examples,
        )
        answer = self._checked(record, message) if message.frame.kind == Kind.UPDATE else message
        record.moved.append(("uplink", self._makeup(answer)))
        self.received += message.nbytes
        task.answer, record.is_silent = answer, False
        self._changed.set()

    def _checked(self, record: ClientRecord, message: Message) -> Message:
        """Return an update with our layout, which is the one that its sender has announced."""
        assert record.uplink is not None
        layout = record.uplink.at(message.frame.round)
        if message.frame.layout_hash != layout.hash:
            allowed = f"{layout.hash:016x}: the model of this federation in the codec that the client has announced"
            raise FieldError("layout", f"{message.frame.layout_hash:016x}", allowed)
        split_body(layout, message.frame.body)
        return replace(message, layout=layout)

    def offend(self, record: ClientRecord, error: Exception) -> None:
        """Note a message that broke the rules; the round goes on without this client."""
        reason = clean(str(error))
        record.offences += 1
        _log.warning("client %d broke the rules (%d): %s", record.number, record.offences, reason)
        if self.context is not None and record.has_open_task(self.context.round):
            assert record.task is not None
            record.task.reason = f"refused: {reason}"
        if record.offences >= self.terms.network.max_offences:
            record.end_followers(_shut_out(record))
        self._changed.set()

    # ---- rounds ------------------------------------------------------------------------------------------------------

    async def run_round(self, context: RoundContext) -> list[Message]:
        """Ask a cohort, and return what came until all had answered or the round's time was up.

        Returns:
            One message for each client that was asked, in client order; those who did not answer have a message of
            kind `MISSING` with the reason.
        """
        cohort = await self._cohort(context)
        self.context = context
        for number in cohort:
            self._sequence += 1
            self.records[number].task = Task(context.round, self._sequence)
            self.records[number].told()
        asked = [self.records[number] for number in cohort]
        end = _RoundEnd(asked, self.terms.network)
        wait = self._wait_for_answers(asked, context.round)
        while waiting := [record for record in asked if record.has_open_task(context.round)]:
            now = time.monotonic()
            ends = zip(waiting, end.moments(waiting, now), strict=True)
            until = [min(moment, self._patience(record)) for record, moment in ends]
            for record, moment in zip(waiting, until, strict=True):
                if now >= moment:
                    assert record.task is not None
                    record.task.reason = self._why_missing(record, end)
            wait.look()
            await self._wait(min(min(until) - now, wait.quiet_s))
        self.context = None
        return [self._close(self.records[number], context) for number in cohort]

    def present(self) -> list[int]:
        """Return the clients that are here, in order."""
        limit = self.terms.network.max_offences
        return sorted(n for n, record in self.records.items() if record.is_connected and record.offences < limit)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Tell all clients that it is over."""
        self.result = dict(result)
        for record in self.records.values():
            record.told()

    def take_moved(self) -> list[Moved]:
        """Return what crossed since the last call, in client order."""
        rows = []
        for number, record in sorted(self.records.items()):
            rows += [(number, direction, parts) for direction, parts in record.moved]
            record.moved.clear()
        return rows

    async def _cohort(self, context: RoundContext) -> list[int]:
        """Wait for enough clients, and return those that are asked: all that are here, or a draw of them."""
        terms = self.terms
        until = self._began + terms.network.join_timeout if self._is_first else 0.0
        wait = Wait(lambda: self._absent(until), say=_log.info)
        while True:
            here, now = self.present(), time.monotonic()
            wanted = terms.num_clients if now < until else max(1, terms.min_cohort)
            if len(here) >= wanted:
                break
            wait.look()
            await self._wait(min(wait.quiet_s, max(0.05, until - now) if now < until else math.inf))
        self._is_first = False
        size = min(terms.cohort_size, len(here))
        picked = sample_cohort(len(here), size, seed=context.seed, round=context.round)
        return [here[place] for place in picked]

    def _absent(self, until: float) -> str:
        """Return who is not here, and who need not be, for a person."""
        terms, here = self.terms, self.present()
        missing = named("client", [number for number in range(terms.num_clients) if number not in here])
        least, left_s = max(1, terms.min_cohort), until - time.monotonic()
        enough = f"{least} would do" + (f" in {left_s:.0f} s" if left_s > 0 else "")
        return f"{missing} ({len(here)} of {terms.num_clients} are here; {enough})"

    def _wait_for_answers(self, asked: Sequence[ClientRecord], round: int) -> Wait:
        """Return the wait for those who were asked; it is quiet longer than others, as they train meanwhile."""

        def whom() -> str:
            open_tasks = [record.number for record in asked if record.has_open_task(round)]
            return f"answers of {named('client', open_tasks)} in round {round + 1}"

        return Wait(whom, self.terms.network.round_timeout, say=_log.info, first_s=_TRAINING_S)

    async def _wait(self, seconds: float) -> None:
        """Wait until something has changed, at most so long; without a task of its own, as `asyncio.wait_for` has."""
        self._changed.clear()
        alarm = asyncio.get_running_loop().call_later(max(0.0, seconds), self._changed.set)
        try:
            await self._changed.wait()
        finally:
            alarm.cancel()

    def _patience(self, record: ClientRecord) -> float:
        """Return until when a client is waited for."""
        return math.inf if record.is_connected else record.lost_at + self.terms.network.reconnect_grace

    def _why_missing(self, record: ClientRecord, end: _RoundEnd) -> str:
        """Return why a client has not answered, and note that it is silent if it had all the time there is."""
        if not record.is_connected:
            grace = self.terms.network.reconnect_grace
            return f"no answer: the connection was lost and not made again within {grace:g} s"
        return end.why_missing(record)

    def _close(self, record: ClientRecord, context: RoundContext) -> Message:
        """Return a client's answer, or why there is none; keep neither, and let nothing more of this round in."""
        task, record.task = record.task, None
        assert task is not None
        for upload in record.uploads:
            upload.cancel()
        if task.answer is not None:
            return task.answer
        body = torch.frombuffer(bytearray((task.reason or "no answer").encode()), dtype=torch.uint8)
        frame = Frame(
            Kind.MISSING, context.round, record.number, 0, 0, float(record.num_examples), math.nan, math.nan, body
        )
        return Message(frame)

    def _makeup(self, message: Message) -> MessageParts:
        """Return a message's make-up; that of codecs of fixed size is the same for every message of a layout."""
        layout = message.layout
        if layout is None or layout.fixed_nbytes is None:
            return _parts(message)
        key = (layout.hash, message.frame.kind, message.nbytes)
        if key not in self._makeups:
            if len(self._makeups) >= _MOST_MAKEUPS:  # clients that announce ever other codecs
                self._makeups.clear()
            self._makeups[key] = _parts(message)
        return self._makeups[key]

    def _uplink(self, hello: Mapping[str, Any]) -> LayoutSchedule:
        try:
            return self.terms.schedule(hello["uplink"], hello["feedback"])
        except FieldError as error:
            raise Refused(str(error)) from None


def _shut_out(record: ClientRecord) -> str:
    return f"client {record.number} is shut out after {record.offences} messages that broke the rules"


def _take(limit: RateLimit, number: int) -> None:
    if not limit.take():
        raise Refused(f"client {number} connects too often", is_final=False)


def _parts(message: Message) -> MessageParts:
    """Return a message's make-up for the ledger, its table and checksums among the framing."""
    frame, layout = message.frame, message.layout
    if layout is None or not frame.kind.has_payloads:
        return framing("", message.nbytes)
    sections = span_sections(layout, split_body(layout, frame.body))
    return payload_parts(list(zip(layout.spans, sections, strict=True)), message.nbytes)
