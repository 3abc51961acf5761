"""Bytes of Flower's messages: counted from the very objects that Flower serializes, and what they are made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message as FlowerMessage

from fedq.federated.accounting import span_sections
from fedq.files import replace_file, writable
from fedq.flower.arrays import Model
from fedq.ledger import Ledger, MessageParts
from fedq.wire import Message, split_body


def message_nbytes(message: FlowerMessage) -> int:
    """Return the bytes of a message as Flower sends it: every object that it consists of, each once, serialized.

    What carries the objects (HTTP, gRPC, TLS) comes on top; see the measurements in ``docs/flower.md``.
    """
    objects: dict[str, int] = {}

    def visit(found: Any, object_id: str) -> None:
        if object_id not in objects:
            objects[object_id] = len(found.deflate())
            for child_id, child in (found.children or {}).items():
                visit(child, child_id)

    visit(message, "")
    return sum(objects.values())


def message_parts(model: Model, messages: Sequence[Message], nbytes: int) -> MessageParts:
    """Return what a message in fedq's format is made of.

    Args:
        model: Model that the message brings, or brings up to date: in float32 it is what would have travelled.
        messages: Messages of fedq in it; none of them holds payloads where the receiver is up to date.
        nbytes: Bytes of the Flower message; those that belong to no tensor are framing.
    """
    sections: dict[str, Counter[str]] = {span.name: Counter() for span in model.layout.spans}
    exact: Counter[str] = Counter()
    for message in messages:
        if message.layout is not None:
            parts = span_sections(message.layout, split_body(message.layout, message.frame.body))
            for span, found in zip(message.layout.spans, parts, strict=True):
                sections[span.name].update(found)
        exact.update({name: tensor.numel() * tensor.element_size() for name, tensor in message.exact.items()})
    rows: list[tuple[str, str, int, int]] = []
    for span in model.layout.spans:
        carrier = "codes" if span.role == "coded" else span.role
        found = {carrier: 0} | dict(sections[span.name])
        rows += [(span.name, part, 4 * span.numel * (part == carrier), size) for part, size in found.items()]
    return _with_framing(rows + _exact_rows(model, exact), nbytes)


def plain_parts(model: Model, nbytes: int) -> MessageParts:
    """Return what a message with plain arrays is made of."""
    rows = [
        (span.name, "codes" if span.role == "coded" else span.role, 4 * span.numel, 4 * span.numel)
        for span in model.layout.spans
    ]
    exact = {name: tensor.numel() * tensor.element_size() for name, tensor in model.exact.items()}
    return _with_framing(rows + _exact_rows(model, exact), nbytes)


def framing(nbytes: int) -> MessageParts:
    """Return what a message without a model is made of."""
    return _with_framing([], nbytes)


def _exact_rows(model: Model, sent: Mapping[str, int]) -> list[tuple[str, str, int, int]]:
    return [
        (name, "exempt", tensor.numel() * tensor.element_size(), sent.get(name, 0))
        for name, tensor in model.exact.items()
    ]


def _with_framing(rows: list[tuple[str, str, int, int]], nbytes: int) -> MessageParts:
    """Return the rows and one for all other bytes.

    Flower sends equal objects of a message once, and new models have many equal vectors of ones and zeros; then the
    rows have more bytes than travel. What is too much is taken off the vectors first, which are the last rows.
    """
    payload = [row[3] for row in rows]
    payload.append(nbytes - sum(payload))
    for i in reversed(range(len(rows))):
        taken = min(payload[i], max(0, -payload[-1]))
        payload[i] -= taken
        payload[-1] += taken
    tensors, parts, raws, _ = zip(*rows, ("", "framing", 0, 0), strict=True)
    return MessageParts(tensors, parts, np.array(raws, dtype=np.int64), np.array(payload, dtype=np.int64))


def totals(ledger: Ledger) -> dict[str, Any]:
    """Return the sums: bytes of messages and of the same in float32, by direction and by round."""
    directions = {"up": "uplink", "down": "downlink"}
    found: dict[str, Any] = {}
    for short, direction in directions.items():
        sums = ledger.totals(direction)
        found |= {f"{short}_bytes": sums.payload, f"{short}_float32_bytes": sums.raw}
    found["rounds"] = [
        {"round": row["round"]}
        | {f"{short}_bytes": row[f"{name}_payload"] for short, name in directions.items()}
        | {f"{short}_float32_bytes": row[f"{name}_raw"] for short, name in directions.items()}
        for row in ledger.by_round()
    ]
    return found


def write_totals(ledger: Ledger, path: Path) -> None:
    """Write the sums as JSON.

    Raises:
        FieldError: The file cannot be written.
    """
    with writable("ledger", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(totals(ledger), indent=1) + "\n").encode())


def in_words(sums: Mapping[str, int]) -> str:
    """Return the sums in one line."""
    up, down = (
        f"{name} {sums[f'{short}_bytes'] / 1e6:.2f} MB (float32 {sums[f'{short}_float32_bytes'] / 1e6:.2f} MB)"
        for short, name in (("up", "uplink"), ("down", "downlink"))
    )
    return f"{up}, {down}"
