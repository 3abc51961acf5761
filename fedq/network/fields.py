"""What every field of a message may be: tables for notes, answers and settings. Nothing is used or stored before.

`fedq.wire` has checked sizes, checksums, tables and payloads by then; here is what the numbers and words must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fedq.data import NAMED
from fedq.errors import FieldError, check_all
from fedq.wire import Kind, Message

FOLDER = "folder"
"""What clients are told in place of a folder's name: each has one of its own."""
DATASETS = (*NAMED, FOLDER)
MOST_EXAMPLES = 1 << 40
"""Examples that a client may say it has: sums over all clients stay exact in float64 and fit 64-bit columns."""
_UINT32, _UINT64 = (1 << 32) - 1, (1 << 64) - 1
_LAST_ROUND = (1 << 31) - 1  # the widest that the tables of a run hold
_SHOWN = 80


class _Field(NamedTuple):
    """What a value of a note may be, in words, whether one is that, and whether it may be missing or null."""

    allowed: str
    holds: Callable[[Any], bool]
    is_optional: bool = False


def _whole(least: int, most: int) -> _Field:
    return _Field(f"a whole number, {least} to {most}", lambda value: _is_number(value, int) and least <= value <= most)


def _number(most: float) -> _Field:
    return _Field(f"a number, 0 to {most:g}", lambda value: _is_number(value, int, float) and 0 <= value <= most)


def _text(longest: int) -> _Field:
    allowed = f"text of at most {longest} characters, all of them visible"
    return _Field(allowed, lambda value: isinstance(value, str) and len(value) <= longest and value.isprintable())


def _table(allowed: str, holds: Callable[[Any], bool]) -> _Field:
    def is_table(value: Any) -> bool:
        return isinstance(value, dict) and all(map(str.isprintable, value)) and all(map(holds, value.values()))

    return _Field(allowed, is_table)


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


_CHECKSUM, _VERSION = _whole(0, _UINT32), _whole(0, _LAST_ROUND)
_HOLDS = {"version": _VERSION, "checksum": _CHECKSUM}
NOTES: dict[str, dict[str, _Field]] = {
    "federation": {
        "run": _text(64),
        "number": _whole(0, 10**9),
        "clients": _whole(1, 10**9),
        "settings": _table("groups of settings by name", lambda group: isinstance(group, dict)),
        "frozen": _table("checksums by name", _CHECKSUM.holds)._replace(is_optional=True),
    },
    "hello": {
        "run": _text(64),
        "uplink": _text(256),
        "feedback": _Field("true or false", lambda value: isinstance(value, bool)),
        "num_examples": _whole(1, MOST_EXAMPLES),
        "instance": _text(64)._replace(is_optional=True),
        "own_data": _Field("true or false", lambda value: isinstance(value, bool), is_optional=True),
        **{name: field._replace(is_optional=True) for name, field in _HOLDS.items()},
    },
    "welcome": {"session": _text(64)},
    "task": {
        "round": _whole(0, _LAST_ROUND),
        "lr": _number(1e9),
        "seed": _whole(0, _UINT64),
        "timeout": _number(1e12),
        **_HOLDS,
    },
    "finished": {
        "rounds": _whole(0, _LAST_ROUND)._replace(is_optional=True),
        "test_accuracy": _number(1.0)._replace(is_optional=True),
        "stopped": _text(256)._replace(is_optional=True),
        **_HOLDS,
    },
}
"""Fields of every note that is read, by its kind. What else it says is ignored, and so are notes that only knock."""


_BOOL = _Field("true or false", lambda value: isinstance(value, bool))
_WORD, _SPEC = _text(64), _text(256)  # which words there are, and what a spec may say, `fedq.config` checks
SETTINGS: dict[str, dict[str, _Field]] = {
    "data": {
        "dataset": _Field(f"one of {', '.join(DATASETS)}", lambda value: isinstance(value, str) and value in DATASETS),
        "image_size": _whole(1, 256)._replace(is_optional=True),
        "train_examples": _whole(1, 10**9)._replace(is_optional=True),
        "val_fraction": _number(0.5),
        "augment": _BOOL,
    },
    "clients": {"num_clients": _whole(1, 100_000), "partition": _SPEC, "min_examples": _whole(1, 10**9)},
    "local": {
        "model": _SPEC,
        "norm": _WORD,
        "local_epochs": _whole(1, 1_000),
        "local_steps": _whole(1, 100_000)._replace(is_optional=True),
        "batch_size": _whole(1, 65_536),
        "optimizer": _SPEC,
        "prox_mu": _number(1e6),
        "precision": _WORD,
    },
    "exchange": {"uplink": _SPEC, "feedback": _SPEC, "start": _WORD},
    "lowbit": {"weights": _SPEC, "activations": _WORD, "sends": _WORD, "server_sends": _WORD},
    "run": {"seed": _whole(0, _UINT64), "rounds": _whole(1, _LAST_ROUND)},
}
"""What a server may set at a client, by group. What else it sends is ignored: folders, for one, are the client's."""


_OLD: dict[str, dict[str, _Field]] = {
    "local": {"momentum": _number(1.0), "weight_decay": _number(1e3)},
    "exchange": {"residual_memory": _number(1.0)},
}
"""What servers of an earlier version set beside it; see `fedq.old_settings`."""


def check_settings(groups: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a server may set, by name; those it leaves out keep their defaults.

    Args:
        groups: Settings by group and name, as a server sends them.

    Raises:
        FieldError: The first that is not what it may be.
    """
    return {
        name: _checked(groups[group], name, field, whose="the server's ")
        for group, fields in SETTINGS.items()
        for name, field in {**fields, **_OLD.get(group, {})}.items()
        if name in groups.get(group, {})
    }


def check_note(said: Mapping[str, Any], *kinds: str) -> dict[str, Any]:
    """Return the fields of a note of one of these kinds, and nothing else that it says.

    Raises:
        FieldError: Of another kind, or the first field that is missing or not what it may be.
    """
    kind = said.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise FieldError("note kind", _shown(kind), ", ".join(kinds))
    fields: dict[str, Any] = {"kind": kind}
    for name, field in NOTES[kind].items():
        value = _checked(said, name, field)
        if name in said:
            fields[name] = value
    return fields


def _checked(said: Mapping[str, Any], name: str, field: _Field, whose: str = "") -> Any:
    value = said.get(name)
    if not ((field.is_optional and value is None) or field.holds(value)):
        raise FieldError(whose + name, _shown(value), field.allowed)
    return value


def check_answer(message: Message, *, round: int, sequence: int, client: int, num_examples: int) -> None:
    """Check all that a client's answer says beside its payloads.

    Args:
        message: The answer, a message of any kind that travels.
        round: Number of the task's round, from 0.
        sequence: Sequence number of the task, which the answer repeats.
        client: Client number in the sender's certificate.
        num_examples: Number of examples that the client has announced.

    Raises:
        FieldError: The first field that is not what it may be.
    """
    frame = message.frame
    asked, told = (round, sequence), (frame.round, message.sequence)
    check_all(
        [
            ("kind", frame.kind.name, frame.kind in _ANSWERS, "UPDATE, LEFT_OUT or FAILED"),
            ("exact tensors", len(message.exact), not message.exact, "none in an answer"),
            ("round, sequence", told, told == asked, f"{asked}, as in the task"),
            ("client", frame.client, frame.client == client, f"{client}, as in the certificate"),
            ("weight", frame.weight, frame.weight == num_examples, f"{num_examples}, as announced"),
            ("loss", frame.loss, not math.isinf(frame.loss), "a finite number, or NaN: not known"),
            ("accuracy", frame.accuracy, _is_accuracy(frame.accuracy), "0 to 1, or NaN: not known"),
        ]
    )


_ANSWERS = (Kind.UPDATE, Kind.LEFT_OUT, Kind.FAILED)


def _is_accuracy(value: float) -> bool:
    return math.isnan(value) or 0 <= value <= 1


def _shown(value: object) -> object:
    """Return a value, or its beginning where it is long."""
    text = repr(value)
    return value if len(text) <= _SHOWN else text[:_SHOWN] + "..."
