"""From messages to ledger rows: what each buffer that moved was made of. Nothing is estimated here."""

from __future__ import annotations

import numpy as np

from fedq.layout import Layout
from fedq.ledger import MessageParts
from fedq.wire import Frame, split_body


def message_parts(layout: Layout, frame: Frame) -> MessageParts:
    """Return the frame's bytes by tensor and part, counted from its buffers."""
    rows: list[tuple[str, str, int, int]] = []
    datas = split_body(layout, frame.body) if frame.kind.has_payloads else []
    for span, data in zip(layout.spans, datas, strict=False):
        if span.role == "coded":
            sections = span.codec.section_nbytes(span.shape, data)
            raw = {"codes": 4 * span.numel}
            rows += [(span.name, part, raw.get(part, 0), nbytes) for part, nbytes in sections.items()]
        else:
            rows.append((span.name, span.role, 4 * span.numel, data.numel()))
    framing = frame.nbytes - sum(row[3] for row in rows)
    rows.append(("", "framing", 0, framing))
    tensors, parts, raws, payloads = zip(*rows, strict=True)
    return MessageParts(tensors, parts, np.array(raws, dtype=np.int64), np.array(payloads, dtype=np.int64))


def framing(name: str, nbytes: int) -> MessageParts:
    """Return one row of framing bytes: size tables, metrics."""
    return MessageParts((name,), ("framing",), np.zeros(1, dtype=np.int64), np.array([nbytes], dtype=np.int64))


def plain_model(layout: Layout) -> MessageParts:
    """Return the rows of the whole model in float32: what a newcomer downloads."""
    nbytes = np.array([4 * span.numel for span in layout.spans], dtype=np.int64)
    parts = tuple("codes" if span.role == "coded" else span.role for span in layout.spans)
    return MessageParts(tuple(span.name for span in layout.spans), parts, nbytes, nbytes)
