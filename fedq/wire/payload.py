"""One payload as bytes that describe themselves, and back: the message of a single tensor.

The tensor travels under the name ``tensor``, as values. A payload's numbers are float32 whatever the tensor was; if it
was of another type, an exact tensor without elements, ``dtype``, is of that type. The message's seed is the one from
which the payload's own follows as that of a message's first tensor. So any reader of the format can decode it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedq.codecs import Payload, packs_payloads
from fedq.errors import FieldError
from fedq.kernels import message_seed
from fedq.layout import Layout, Span
from fedq.wire.frame import Frame, Kind, join_payloads
from fedq.wire.limits import DEFAULT_LIMITS, Limits
from fedq.wire.message import SERVER, Message, unpack

_NAME, _DTYPE = "tensor", "dtype"


@packs_payloads
def pack_payload(payload: Payload) -> bytes:
    """Return a payload as a whole message; see `Payload.to_bytes`."""
    layout = Layout((Span(_NAME, payload.shape, 0, payload.codec, "coded", "values"),))
    seed = message_seed(payload.seed, 0)
    body = join_payloads(layout, [payload])
    frame = Frame(Kind.UPDATE, 0, SERVER, layout.hash, seed, 0.0, math.nan, math.nan, body)
    exact = {} if payload.dtype == torch.float32 else {_DTYPE: torch.empty(0, dtype=payload.dtype)}
    return Message(frame, layout, exact=exact).pack()


def decode(data: bytes | bytearray | memoryview, limits: Limits = DEFAULT_LIMITS) -> Tensor:
    """Return the tensor that `Payload.to_bytes` has packed, in its shape and data type, on the CPU.

    ::

        data = fedq.codec("int4").encode(x).to_bytes()
        fedq.decode(data)     # in any process; nothing else is needed

    Args:
        data: The bytes; they are not changed.
        limits: Largest sizes that are accepted.

    Raises:
        FieldError: The bytes are no such message, are damaged, or are beyond the limits.
    """
    message = unpack(data, limits)
    names = [span.name for span in message.layout.spans] if message.layout else []
    if len(names) != 1 or message.exact.keys() - {_DTYPE}:
        allowed = "one, as Payload.to_bytes writes; fedq.wire.unpack(data).tensors() reads any message"
        raise FieldError("message tensors", [*names, *message.exact], allowed)
    assert message.layout is not None
    dtype = message.exact[_DTYPE].dtype if message.exact else torch.float32
    if not dtype.is_floating_point:
        raise FieldError("message dtype", dtype, "a floating-point type")
    payload = message.payloads()[0]
    return Payload(payload.data, payload.codec, payload.shape, dtype, payload.seed).decode()
