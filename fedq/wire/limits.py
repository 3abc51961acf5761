"""What a receiver accepts: every limit is checked before anything is allocated for the thing that it limits."""

from __future__ import annotations

from dataclasses import dataclass

from fedq.layout import Layout


@dataclass(frozen=True)
class Limits:
    """Largest message that is read. A server knows its model and should ask for little more than that takes.

    Args:
        message_bytes: A whole message.
        header_bytes: Its head: fixed fields and tables.
        tensors: Payloads and exact tensors together.
        name_bytes: A tensor's name in UTF-8.
        spec_bytes: A codec's spec.
        dims: Dimensions of a tensor.
        decoded_bytes: All tensors decoded, 4 bytes an element of a payload. Decoding on the reference, which serves
            where the C++ library is missing and for ``scale=tensor`` and ``scale=channel``, takes a small multiple of
            the largest tensor for a moment.
        note_bytes: Body of a message without payloads: a note, or the text of an error.
    """

    message_bytes: int = 1 << 31
    header_bytes: int = 4 << 20
    tensors: int = 10_000
    name_bytes: int = 512
    spec_bytes: int = 256
    dims: int = 8
    decoded_bytes: int = 1 << 33
    note_bytes: int = 1 << 20

    @classmethod
    def of_model(cls, layout: Layout, *, note_bytes: int) -> Limits:
        """Return limits for whoever knows the model: it in float32 with a table of its tensors, and no more.

        Args:
            layout: Of the model.
            note_bytes: As above.
        """
        plain, num = 4 * layout.numel, len(layout.spans)
        header = 4096 + 1024 * num
        return cls(
            message_bytes=plain + plain // 8 + 16 * num + header + 4096,
            header_bytes=header,
            tensors=num,
            decoded_bytes=plain,
            note_bytes=note_bytes,
        )


DEFAULT_LIMITS = Limits()
"""Limits for a receiver that does not know what to expect."""
