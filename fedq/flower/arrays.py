"""Flower's array records as flat buffers, and the names under which fedq's own things travel in Flower's messages."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedq.codecs import Codec, codec
from fedq.codecs.dense import Cast
from fedq.errors import FieldError
from fedq.layout import Layout
from fedq.wire import Assembler, Limits, Message

WIRE = "fedq.wire"
"""Name, and serialization type, of the one uint8 array that holds fedq's messages, one after another."""
MARK = "fedq"
"""Key of the `ConfigRecord` that goes with whole models (who asks for what) and with replies without a payload."""
Shapes = Mapping[str, tuple[int, ...]]
log = logging.getLogger("flwr")

_NUMPY = "numpy.ndarray"
_EXACT = Cast("fp32")


def layout_of(shapes: Shapes, chosen: str | Codec, *, feedback: bool) -> Layout:
    """Return the layout in which a model travels.

    With ``fp32`` values travel and not changes, so that no sum is rounded: the receiver has the sender's bits.
    """
    made = codec(chosen).resolved(feedback=feedback)
    layout = Layout.of_shapes(shapes, made)
    return layout.with_values(dict.fromkeys(shapes, made)) if made == _EXACT else layout


@dataclass(frozen=True)
class Model:
    """The values of an array record.

    Args:
        names: Names of all arrays, in the record's order.
        shapes: Shapes by name of the arrays that are coded: float32 with at least one dimension.
        flat: Values of the coded arrays, flat, in the order of `layout`.
        exact: The other arrays that torch has a type for, by name.
        others: The rest by name, such as texts and arrays of another serialization, as Flower has them.
    """

    names: tuple[str, ...]
    shapes: Shapes
    flat: Tensor
    exact: Mapping[str, Tensor]
    others: Mapping[str, Array]

    @cached_property
    def layout(self) -> Layout:
        """Where each array lies in the flat buffer: the same for all codecs."""
        return Layout.of_shapes(self.shapes, _EXACT)

    @property
    def plain_nbytes(self) -> int:
        """Bytes of the values as they are."""
        exact = sum(tensor.numel() * tensor.element_size() for tensor in self.exact.values())
        return 4 * self.flat.numel() + exact + sum(len(array.data) for array in self.others.values())

    def taking(self, shapes: Shapes) -> Tensor:
        """Return a new flat buffer of some of the coded arrays, in the order of a layout of their shapes."""
        if list(shapes) == list(self.shapes):
            return self.flat.clone()
        views = self.layout.views(self.flat)
        parts = [views[span.name].reshape(-1) for span in Layout.of_shapes(shapes, _EXACT).spans]
        return torch.cat(parts) if parts else self.flat[:0].clone()

    def record(self) -> ArrayRecord:
        """Return the values as Flower has them."""
        tensors = {**self.layout.views(self.flat), **self.exact}
        arrays = {**self.others, **{name: Array(np.asarray(tensor)) for name, tensor in tensors.items()}}
        return ArrayRecord({name: arrays[name] for name in self.names})


def read_record(record: ArrayRecord, shapes: Shapes | None = None) -> Model:
    """Read an array record.

    Args:
        record: The array record, with any arrays; it is not changed.
        shapes: Shapes of the arrays that the other side knows as coded: those are cast to float32 if they have another
            float type (some strategies average to float64). None: every float32 array with a dimension is coded.

    Raises:
        FieldError: The bytes of an array are not what numpy writes.
    """
    coded: dict[str, np.ndarray] = {}
    exact: dict[str, Tensor] = {}
    others: dict[str, Array] = {}
    for name, array in record.items():
        values = _values(name, array) if array.stype == _NUMPY else None
        if values is None:
            others[name] = array
        elif _is_coded(name, values, shapes):
            coded[name] = values
        elif (tensor := _exact_tensor(values)) is not None:
            exact[name] = tensor
        else:
            others[name] = array
    order = [name for name in (shapes or coded) if name in coded]
    model = Model(tuple(record), {n: tuple(coded[n].shape) for n in order}, torch.empty(0), exact, others)
    flat = torch.empty(model.layout.numel)
    for name, view in model.layout.views(flat).items():
        view.numpy()[...] = coded[name]
    return replace(model, flat=flat)


def _values(name: str, array: Array) -> np.ndarray:
    try:
        values = array.numpy()
    except Exception as error:  # from bytes of another party numpy raises whatever its readers raise
        raise FieldError(f"array {name}", type(error).__name__, "what numpy.save writes") from None
    if not isinstance(values, np.ndarray):
        raise FieldError(f"array {name}", type(values).__name__, "one array")
    return values


def _is_coded(name: str, values: np.ndarray, shapes: Shapes | None) -> bool:
    if shapes is None:
        return values.dtype == np.float32 and values.size > 0 and values.ndim > 0
    return np.issubdtype(values.dtype, np.floating) and shapes.get(name) == values.shape


def _exact_tensor(values: np.ndarray) -> Tensor | None:
    """Return the values as a tensor of the same type, or None if torch has no such type."""
    try:
        return torch.from_numpy(np.array(values, order="C"))
    except (TypeError, ValueError):  # no such type, or another byte order
        return None


# ---- fedq's messages in Flower's ----------------------------------------------------------------------------------


def wire_record(messages: list[Message], others: Mapping[str, Array]) -> ArrayRecord:
    """Return the record that carries fedq's messages, and the arrays that they cannot hold."""
    data = b"".join(message.pack() for message in messages)
    return ArrayRecord({WIRE: Array("uint8", (len(data),), WIRE, data), **others})


def wire_messages(content: RecordDict, key: str, limits: Limits) -> tuple[list[Message], dict[str, Array]]:
    """Undo `wire_record`, under a key of a content.

    Raises:
        FieldError: The messages are damaged, cut short, or beyond the limits.
    """
    record = cast(ArrayRecord, content[key])
    data = record[WIRE].data
    if len(data) > limits.message_bytes:
        raise FieldError(f"{WIRE} bytes", len(data), f"at most {limits.message_bytes}")
    assembler = Assembler(limits)
    messages = assembler.add(data)
    if assembler.pending or not messages:
        raise FieldError(f"{WIRE} bytes", len(data), "at least one message, and all of them whole")
    return messages, {name: other for name, other in record.items() if name != WIRE}


def limits_for(model: Model) -> Limits:
    """Return limits that leave a model's messages ample room, and little more."""
    nbytes = 4 * model.plain_nbytes + (16 << 20)
    return Limits(message_bytes=nbytes, decoded_bytes=nbytes)


def wire_key(content: RecordDict) -> str | None:
    """Return the key of the record that carries fedq's messages, or None."""
    return next((key for key, record in array_records(content) if WIRE in record), None)


def array_records(content: RecordDict) -> Iterator[tuple[str, ArrayRecord]]:
    """Yield the array records and their keys (Flower's ``array_records`` copies; this does not)."""
    return ((key, record) for key, record in content.items() if isinstance(record, ArrayRecord))


def mark_of(content: RecordDict) -> ConfigRecord | None:
    """Return fedq's mark, or None."""
    mark = content.get(MARK)
    return mark if isinstance(mark, ConfigRecord) else None


def with_record(content: RecordDict, key: str, record: ArrayRecord) -> RecordDict:
    """Return a new content with another array record under a key and without fedq's mark; nothing is mutated."""
    return RecordDict({k: record if k == key else v for k, v in content.items() if k != MARK})


def without_mark(content: RecordDict) -> RecordDict:
    """Return the content without fedq's mark; nothing is mutated."""
    return RecordDict({k: v for k, v in content.items() if k != MARK}) if MARK in content else content


def with_mark(content: RecordDict, mark: Mapping[str, Any]) -> RecordDict:
    """Return a new content with a mark; nothing is mutated."""
    return RecordDict({**content, MARK: ConfigRecord(dict(mark))})
