"""The server's side of an exchange: who holds which version, what each node is sent, and what its answer means."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.app.message_type import MessageType

from fedq.errors import FieldError
from fedq.flower.accounting import framing, message_nbytes, message_parts, plain_parts
from fedq.flower.arrays import (
    Model,
    array_records,
    limits_for,
    log,
    mark_of,
    read_record,
    wire_key,
    wire_messages,
    wire_record,
    with_mark,
    with_record,
    without_mark,
)
from fedq.flower.versions import Versions, all_finite, changed, check_shapes
from fedq.ledger import Ledger, MessageParts
from fedq.wire import Kind, Message, note

_ERROR_CODE = 0  # Flower's "unknown"


class LeftOut(Exception):
    """An answer that cannot be used; the text says why."""


@dataclass(frozen=True)
class _Asked:
    """What a node was sent and has not answered yet."""

    version: int
    round: int


class Exchange:
    """Packs messages for nodes and unpacks their answers.

    Args:
        uplink: Spec of the codec that clients are asked to use, or a schedule of codecs.
        downlink: Spec of the codec of the model's changes.
        seed: Seed of everything random in both.
    """

    def __init__(self, uplink: str, downlink: str, seed: int) -> None:
        self.ledger = Ledger()
        self._versions = Versions(downlink, seed)
        self._uplink = uplink
        self._seed = seed
        self._session = secrets.randbits(62)
        self._holds: dict[int, int] = {}
        self._asked: dict[int, _Asked] = {}
        self._numbers: dict[int, int] = {}
        self._round = 0
        self._has_warned = False

    # ---- down ----------------------------------------------------------------------------------------------------

    def pack(self, messages: Iterable[FlowerMessage]) -> list[FlowerMessage]:
        """Give every message that carries the model a content of its own for its node; the old one is not changed."""
        messages = list(messages)
        model = next((found for m in messages if (found := self._model_record(m.content))), None)
        if model is None:
            self._book_all(messages)
            return messages
        self._versions.advance(model[1], anew=not self._holds)
        packed: dict[tuple[int, int], tuple[RecordDict, list[Message] | None]] = {}
        originals = [message.content for message in messages]
        for message, content in zip(messages, originals, strict=True):
            found = self._model_record(content)
            if found is None or (found[1] is not model[1] and found[1] != model[1]):
                self._warn_of_others(found is not None)
                self._book_all([message])
                continue
            held = self._holds.get(message.metadata.dst_node_id, 0)
            case = id(content), held
            if case not in packed:
                packed[case] = self._content(content, found[0], held)
            message.content, changes = packed[case]
            self._ask(message, content, changes)
        self._versions.keep([asked.version for asked in self._asked.values()])
        return messages

    def _model_record(self, content: RecordDict) -> tuple[str, ArrayRecord] | None:
        """Return the model's record and its key: the one with the arrays that the replica has, or the first."""
        records = list(array_records(content))
        if len(records) > 1 and self._versions.number:
            names = self._versions.model.names
            records = [item for item in records if tuple(item[1]) == names] or records
        return records[0] if records else None

    def _content(self, content: RecordDict, key: str, held: int) -> tuple[RecordDict, list[Message] | None]:
        """Return the content for a node that holds a version (0: none), and fedq's messages in it, if any."""
        version = self._versions.number
        changes = self._versions.since(held)
        if changes is None:
            whole = with_record(content, key, self._versions.whole())
            session, seed, uplink = self._session, self._seed, self._uplink
            mark = {"record": key, "session": session, "version": version, "seed": seed, "uplink": uplink}
            return with_mark(whole, mark), None
        sent = changes or [note({}, sequence=version)]
        return with_record(content, key, wire_record(sent, self._versions.model.others)), sent

    def _ask(self, message: FlowerMessage, content: RecordDict, changes: list[Message] | None) -> None:
        node, nbytes, model = message.metadata.dst_node_id, message_nbytes(message), self._versions.model
        round = _round_of(content) or self._versions.number
        self._round = round
        self._asked[node] = _Asked(self._versions.number, round)
        parts = plain_parts(model, nbytes) if changes is None else message_parts(model, changes, nbytes)
        self._book(round, node, "downlink", parts)

    def _warn_of_others(self, is_model: bool) -> None:
        if is_model and not self._has_warned:
            self._has_warned = True
            log.warning("fedq: only one model at a time is packed; messages with another one stay in float32")

    # ---- up ------------------------------------------------------------------------------------------------------

    def unpack(self, replies: Iterable[FlowerMessage]) -> list[FlowerMessage]:
        """Return the answers with plain arrays; one that cannot be used becomes an answer with an error."""
        return [self._unpacked(reply) for reply in replies]

    def _unpacked(self, reply: FlowerMessage) -> FlowerMessage:
        node = reply.metadata.src_node_id
        asked = self._asked.pop(node, None)
        if not reply.has_content():
            return reply
        round = asked.round if asked else self._round
        try:
            content, parts = self._read(node, reply, asked)
        except (FieldError, LeftOut) as error:
            self._book(round, node, "uplink", framing(message_nbytes(reply)))
            return as_left_out(reply, f"{error} (round {round})")
        self._book(round, node, "uplink", parts)
        if content is not reply.content:
            reply.content = content
        return reply

    def _read(self, node: int, reply: FlowerMessage, asked: _Asked | None) -> tuple[RecordDict, MessageParts]:
        """Return an answer's plain content and what its bytes are made of.

        Raises:
            FieldError: The answer is damaged or of another model.
            LeftOut: The answer holds no update.
        """
        content, nbytes = reply.content, message_nbytes(reply)
        key, mark = wire_key(content), mark_of(content)
        if key is not None:
            return self._update(node, content, key, nbytes)
        if mark is not None:
            held = _version(mark.get("version"))
            self._learn(node, held)
            if asked is not None and held != asked.version:
                raise LeftOut(f"it holds version {held} of the model, not {asked.version}")
            return without_mark(content), framing(nbytes)
        if asked is not None:  # it was offered fedq, and does not know it
            self._holds.pop(node, None)
        records = list(array_records(content))
        return content, plain_parts(read_record(records[0][1]), nbytes) if records else framing(nbytes)

    def _update(self, node: int, content: RecordDict, key: str, nbytes: int) -> tuple[RecordDict, MessageParts]:
        """Return the content with the trained model instead of its packed update."""
        (update, *rest), others = wire_messages(content, key, limits_for(self._versions.model))
        base = self._versions.at(update.sequence)
        self._learn(node, update.sequence)
        if update.frame.kind == Kind.LEFT_OUT:
            raise LeftOut("its update is not finite")
        if update.frame.kind != Kind.UPDATE or rest:
            raise FieldError("answer", [update.frame.kind.name, *(m.frame.kind.name for m in rest)], "one UPDATE")
        shapes = check_shapes(update.layout, base)
        flat = changed(base.taking(shapes), update)
        if not all_finite(flat):
            raise LeftOut("its decoded update is not finite")
        names = _ordered(base.names, {*shapes, *update.exact, *others})
        trained = Model(names, shapes, flat, update.exact, others)
        return with_record(content, key, trained.record()), message_parts(trained, [update], nbytes)

    def _learn(self, node: int, version: int) -> None:
        """Note what a node holds."""
        if version:
            self._holds[node] = version
        else:
            self._holds.pop(node, None)

    # ---- nodes that lack something -------------------------------------------------------------------------------

    def behind(self, replies: Sequence[FlowerMessage]) -> set[int]:
        """Return the nodes that say they hold another version than the one that they were sent a change to."""
        found = set()
        for reply in replies:
            node = reply.metadata.src_node_id
            mark = mark_of(reply.content) if reply.has_content() else None
            if mark is not None and node in self._asked:
                held = _version(mark.get("version"))
                if held != self._asked[node].version:
                    self._learn(node, held)
                    found.add(node)
        return found

    def give_up(self, messages: Iterable[FlowerMessage]) -> None:
        """Note that nobody waits for the answers to these messages any more."""
        for message in messages:
            self._asked.pop(message.metadata.dst_node_id, None)

    def forget(self, nodes: Iterable[int]) -> None:
        """Send the whole model to these nodes next time."""
        for node in nodes:
            self._holds.pop(node, None)

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def book_answer(self, reply: FlowerMessage) -> None:
        """Count an answer that is not unpacked."""
        asked = self._asked.get(reply.metadata.src_node_id)
        round = asked.round if asked else self._round
        self._book(round, reply.metadata.src_node_id, "uplink", framing(message_nbytes(reply)))

    def _book_all(self, messages: Iterable[FlowerMessage]) -> None:
        for message in messages:
            nbytes, records = message_nbytes(message), list(array_records(message.content))
            parts = plain_parts(read_record(records[0][1]), nbytes) if records else framing(nbytes)
            round = _round_of(message.content) or self._round
            self._book(round, message.metadata.dst_node_id, "downlink", parts)

    def _book(self, round: int, node: int, direction: str, parts: MessageParts) -> None:
        number = self._numbers.setdefault(node, len(self._numbers))
        self.ledger.record(round=round, client=number, direction=direction, parts=parts)


def as_left_out(reply: FlowerMessage, why: str) -> FlowerMessage:
    """Return an answer with an error in the place of one that cannot be used, and log why."""
    log.warning("fedq: node %d is left out: %s", reply.metadata.src_node_id, why)
    return make_message(reply.metadata, error=Error(_ERROR_CODE, f"fedq: {why}"))


def is_training(message: FlowerMessage) -> bool:
    """Say whether a message asks for training."""
    return message.metadata.message_type.partition(".")[0] == MessageType.TRAIN


def _ordered(names: Sequence[str], found: set[str]) -> tuple[str, ...]:
    """Return names in the model's order, those that the model does not have at the end."""
    return (*(name for name in names if name in found), *sorted(found.difference(names)))


def _version(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _round_of(content: RecordDict) -> int:
    """Return Flower's round, from 1, as strategies write it into their configuration; 0 if there is none."""
    for record in content.config_records.values():
        number = record.get("server-round")
        if isinstance(number, int):
            return number
    return 0
