"""What a receiver accepts: every limit is checked before anything is allocated for the thing that it limits."""

from __future__ import annotations

from dataclasses import dataclass

from fedq.layout import Layout


@dataclass(frozen=True)
class Limits:
    """Largest message that is read. A server knows its model and should ask for little more than that takes.

    Args:
        message_bytes: Bytes of a whole message.
        header_bytes: Bytes of a message's head: fixed fields and tables.
        tensors: Number of payloads and exact tensors together.
        name_bytes: Bytes of a tensor's name in UTF-8.
        spec_bytes: Bytes of a codec's spec.
        dims: Number of dimensions of a tensor.
        decoded_bytes: Bytes of all tensors decoded, 4 an element of a payload. Decoding on the reference, which serves
            where the C++ library is missing and for ``scale=tensor`` and ``scale=channel``, takes a small multiple of
            the largest tensor for a moment.
        note_bytes: Bytes of a body without payloads: a note, or the text of an error.
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
            layout: Layout of the model.
            note_bytes: Bytes of a body without payloads, as above.
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
