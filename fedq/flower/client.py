"""The client's mod: it turns what the server sends into the model that the app trains from, and packs the answer.

The app sees plain arrays and knows nothing of it. A server without fedq is answered as if the mod were not there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.clientapp.typing import ClientAppCallable, Mod

from fedq.codecs import Codec, codec_schedule
from fedq.errors import FieldError
from fedq.federated.training import RoundContext
from fedq.flower.accounting import message_nbytes
from fedq.flower.arrays import (
    Model,
    array_records,
    layout_of,
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
from fedq.flower.state import Facts, NodeFolder, NodeState, state_folder
from fedq.flower.versions import all_finite, changed, check_shapes
from fedq.kernels import derive_seed
from fedq.layout import Layout
from fedq.wire import Frame, Kind, Message, join_payloads


def fedq_mod(uplink: str | None = None, *, feedback: bool | None = None, folder: str | Path | None = None) -> Mod:
    """Return a mod for `ClientApp(mods=[fedq_mod()])`; it has to be the first of the mods.

    Args:
        uplink: Codec of this client's updates, or a schedule such as ``"int4 sign@7"``; default: what the server asks
            for.
        feedback: Whether there is error feedback; default: where the codec is one that gains by it.
        folder: Folder in which nodes keep their replica and residual; default: ``flower`` in fedq's cache folder.

    Raises:
        FieldError: The codec does not exist.
    """
    if uplink is not None:
        codec_schedule(uplink)

    def mod(message: FlowerMessage, context: Context, call_next: ClientAppCallable) -> FlowerMessage:
        if not message.has_content() or not _speaks_fedq(message.content):
            return call_next(message, context)
        node = NodeFolder(state_folder(folder), context.run_id, context.node_id)
        with node.locked():
            return _Turn(node, message, context, uplink, feedback).run(call_next)

    return mod


def _speaks_fedq(content: RecordDict) -> bool:
    return mark_of(content) is not None or wire_key(content) is not None


@dataclass(frozen=True)
class _Turn:
    """One message, from the server's bytes to the answer's."""

    node: NodeFolder
    message: FlowerMessage
    context: Context
    uplink: str | None
    feedback: bool | None

    def run(self, call_next: ClientAppCallable) -> FlowerMessage:
        """Bring the replica up to date, let the app work, and pack what it answers."""
        received_nbytes, state = message_nbytes(self.message), self.node.load()
        held = state.facts.version if state is not None else 0
        try:
            state, key = self._received(state)
        except FieldError as error:
            log.warning("fedq: %s; the server is asked for what is missing", error)
            return FlowerMessage(with_mark(RecordDict(), {"version": held}), reply_to=self.message)
        facts = state.facts
        facts.received_bytes += received_nbytes
        facts.received_float32_bytes += state.model.plain_nbytes
        # Before training: if that fails, the replica is where the server may think it is.
        self.node.save(state, in_memory=False)
        reply = call_next(self.message, self.context)
        if reply.has_error() or not reply.has_content():
            return reply
        float32_nbytes = self._pack(reply, state, key)
        sent_nbytes = message_nbytes(reply)
        facts.sent_bytes += sent_nbytes
        facts.sent_float32_bytes += float32_nbytes
        self.node.save(state)
        log.info(
            "fedq: %s of version %d: received %d bytes, sent %d (models in float32: %d and %d)",
            *(self.message.metadata.message_type, facts.version, received_nbytes, sent_nbytes),
            *(state.model.plain_nbytes, float32_nbytes),
        )
        return reply

    # ---- what the server sent ------------------------------------------------------------------------------------

    def _received(self, state: NodeState | None) -> tuple[NodeState, str]:
        """Return the state after the message, and the key of the model's record, which now holds plain arrays.

        Raises:
            FieldError: The message is damaged, or changes a version that this node does not have.
        """
        content = self.message.content
        mark, key = mark_of(content), wire_key(content)
        if mark is not None:
            key = str(mark["record"])
            state = self._whole(state, content[key], mark)
            self.message.content = without_mark(content)
            return state, key
        assert key is not None
        state, others = _changed_state(state, content, key)
        self.message.content = with_record(content, key, replace(state.model, others=others).record())
        return state, key

    def _whole(self, state: NodeState | None, record: Any, mark: Mapping[str, Any]) -> NodeState:
        """Return the state of a node that got the whole model; its residual goes on within a session."""
        if not isinstance(record, ArrayRecord):
            raise FieldError("record", mark["record"], "the key of an ArrayRecord")
        model = read_record(record)
        session, version = int(mark["session"]), int(mark["version"])
        if state is not None and state.facts.session == session:
            state.model, state.facts.version, state.facts.names = model, version, list(model.names)
            return state
        facts = Facts(session, int(mark["seed"]), str(mark["uplink"]), version, list(model.names))
        return self.node.new(facts, model)

    # ---- what the app answers ------------------------------------------------------------------------------------

    def _pack(self, reply: FlowerMessage, state: NodeState, key: str) -> int:
        """Replace the model in an answer by its packed update; return its bytes in float32."""
        content, version = reply.content, state.facts.version
        found = _model_record(content, state.model, key)
        if found is None:
            reply.content = with_mark(content, {"version": version})
            return 0
        key, trained = found
        update = self._update(state, trained)
        reply.content = with_record(content, key, wire_record([update], trained.others))
        return trained.plain_nbytes

    def _update(self, state: NodeState, trained: Model) -> Message:
        """Return the message of an update; one that is not finite says so and is empty, and leaves the residual."""
        facts = state.facts
        wanted = self.uplink or facts.uplink
        chosen = _at(wanted, facts.version - 1)
        feedback = chosen.wants_feedback if self.feedback is None else self.feedback
        layout = layout_of(trained.shapes, chosen, feedback=feedback)
        update = layout.to_sent_(trained.flat.clone(), state.model.taking(trained.shapes))
        party = self.context.node_config.get("partition-id", self.context.node_id)
        number = derive_seed("node", str(party))
        seed = RoundContext(facts.version - 1, 0.0, facts.seed).uplink_seed(number)
        if not all_finite(update):
            log.warning("fedq: the update is not finite; the server is told so and gets none")
            return _message(Kind.LEFT_OUT, None, facts.version, number, 0, torch.empty(0, dtype=torch.uint8))
        payloads = state.feedback(layout, feedback).encode(0, layout, update, seed=seed)
        body = join_payloads(layout, payloads)
        return _message(Kind.UPDATE, layout, facts.version, number, seed, body, trained.exact)


def _message(
    kind: Kind,
    layout: Layout | None,
    version: int,
    number: int,
    seed: int,
    body: torch.Tensor,
    exact: Mapping[str, torch.Tensor] | None = None,
) -> Message:
    """Return an update's message; weight and metrics are in Flower's own records."""
    layout_hash = layout.hash if layout else 0
    frame = Frame(kind, version - 1, number, layout_hash, seed, 0.0, math.nan, math.nan, body)
    return Message(frame, layout, version, exact or {})


def _changed_state(state: NodeState | None, content: RecordDict, key: str) -> tuple[NodeState, dict[str, Array]]:
    """Return the state after the changes in a record, and the arrays beside them.

    Raises:
        FieldError: The changes are damaged, or do not lead on from the version that this node has.
    """
    if state is None:
        raise FieldError("replica", None, "one to change: this node's state is gone")
    messages, others = wire_messages(content, key, limits_for(state.model))
    for message in messages:
        facts, version = state.facts, message.sequence
        if message.frame.kind == Kind.NOTE and version == facts.version:
            continue
        if message.frame.kind == Kind.CHANGE and version <= facts.version:
            continue  # the answer that said so never reached the server
        if message.frame.kind != Kind.CHANGE or version != facts.version + 1:
            raise FieldError("version", (message.frame.kind.name, version), f"a change to {facts.version + 1}")
        if check_shapes(message.layout, state.model) != state.model.shapes:
            raise FieldError("message layout", "some arrays", "all of the model's")
        exact = {**state.model.exact, **{name: tensor.clone() for name, tensor in message.exact.items()}}
        state.model = replace(state.model, flat=changed(state.model.flat, message), exact=exact)
        state.facts.version = version
    return state, others


def _model_record(content: RecordDict, model: Model, key: str) -> tuple[str, Model] | None:
    """Return the record of an answer that holds the model or some of its arrays, preferably under the same key."""
    records = sorted(array_records(content), key=lambda item: item[0] != key)
    for found, record in records:
        trained = read_record(record, model.shapes)
        if trained.shapes or (found == key and not model.shapes):
            return found, trained
    return None


def _at(schedule: str, round: int) -> Codec:
    """Return the codec of a round, counted from 0."""
    return [chosen for first, chosen in codec_schedule(schedule) if first <= round][-1]
