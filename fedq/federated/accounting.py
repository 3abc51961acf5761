"""From messages to ledger rows: what each buffer that moved was made of. Nothing is estimated here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from fedq.layout import Layout, Span
from fedq.ledger import MessageParts
from fedq.wire import Frame, split_body

Sections = Mapping[str, int]
"""Bytes of a payload by part."""


def message_parts(layout: Layout, frame: Frame) -> MessageParts:
    """Return the frame's bytes by tensor and part, counted from its buffers."""
    if not frame.kind.has_payloads:
        return framing("", frame.nbytes)
    sections = span_sections(layout, split_body(layout, frame.body))
    return payload_parts(list(zip(layout.spans, sections, strict=True)), frame.nbytes)


def span_sections(layout: Layout, datas: Sequence[Tensor]) -> list[Sections]:
    """Return the bytes by part of every span's payload."""
    return [
        span.codec.section_nbytes(span.shape, data) if span.role == "coded" else {span.role: data.numel()}
        for span, data in zip(layout.spans, datas, strict=True)
    ]


def payload_parts(payloads: Sequence[tuple[Span, Sections]], nbytes: int) -> MessageParts:
    """Return the rows of some payloads in ``nbytes`` bytes, of which the rest is framing."""
    rows: list[tuple[str, str, int, int]] = []
    for span, sections in payloads:
        carrier = "codes" if span.role == "coded" else span.role
        rows += [(span.name, part, 4 * span.numel * (part == carrier), size) for part, size in sections.items()]
    rows.append(("", "framing", 0, nbytes - sum(row[3] for row in rows)))
    tensors, parts, raws, payload = zip(*rows, strict=True)
    return MessageParts(tensors, parts, np.array(raws, dtype=np.int64), np.array(payload, dtype=np.int64))


def framing(name: str, nbytes: int) -> MessageParts:
    """Return one row of framing bytes: size tables, metrics."""
    return MessageParts((name,), ("framing",), np.zeros(1, dtype=np.int64), np.array([nbytes], dtype=np.int64))


def plain_model(layout: Layout) -> MessageParts:
    """Return the rows of the whole model in float32: what a newcomer downloads."""
    nbytes = np.array([4 * span.numel for span in layout.spans], dtype=np.int64)
    parts = tuple("codes" if span.role == "coded" else span.role for span in layout.spans)
    return MessageParts(tuple(span.name for span in layout.spans), parts, nbytes, nbytes)
