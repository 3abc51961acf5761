"""Whether all ranks have registered the same: compared once, so that they neither train apart nor abort in mid-step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from fedq.collectives.peers import Peers
from fedq.errors import FieldError
from fedq.wire import crc32c, values_crc32c

Settings = dict[str, Any]
_FAILED = "a setting that this rank cannot have"
Made = TypeVar("Made")


def agreed(
    peers: Peers, make: Callable[[], Made], describe: Callable[[Made], tuple[Settings, Mapping[str, Tensor]]]
) -> Made:
    """Return what ``make`` makes, if all ranks make the same; every rank calls it.

    Some hundred bytes travel to every other rank, and more only where the ranks differ.

    Args:
        peers: The ranks that must agree.
        make: Function that makes it; it may raise `FieldError`, which every rank then raises.
        describe: Function that returns settings by the names that a user knows, as JSON can hold them, and the
            tensors that are to have the same names, shapes, types and values.

    Raises:
        FieldError: The ranks differ: the same error on every rank, with each rank's value. Or ``make`` raised on some
            rank.
    """
    if peers.size == 1 or peers.group is None:
        return make()
    try:
        made = make()
    except FieldError as error:
        _compare(peers, {_FAILED: [error.field, repr(error.value), error.allowed]}, {})
        raise
    _compare(peers, *describe(made))
    return made


def _compare(peers: Peers, settings: Settings, tensors: Mapping[str, Tensor]) -> None:
    """Raise the same error on every rank if one has another setting or tensor, or has failed."""
    table = {name: [_kind(tensor), values_crc32c(tensor)] for name, tensor in tensors.items()}
    whole = crc32c(json.dumps(table).encode())
    described = [json.loads(text) for text in peers.gather_texts(json.dumps({"settings": settings, "model": whole}))]
    found = [rank["settings"] for rank in described]
    failures = {rank: one[_FAILED] for rank, one in enumerate(found) if _FAILED in one}
    if failures:
        field, value, allowed = next(iter(failures.values()))
        where = "" if len(failures) == peers.size else f" on {_ranks(list(failures), peers.size)}"
        raise FieldError(field, _Words(value + where), allowed)
    for name in settings:
        _refuse_different(name, [one.get(name) for one in found])
    if len({rank["model"] for rank in described}) > 1:
        _refuse_different_models([json.loads(text) for text in peers.gather_texts(json.dumps(table))])


def _kind(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}{'' if tensor.requires_grad else ' (frozen)'}"


def _refuse_different_models(tables: Sequence[Mapping[str, list]]) -> None:
    """Name the first parameter in which the ranks' models differ."""
    names = list(dict.fromkeys(name for table in tables for name in table))
    for name in names:
        _refuse_different(f"parameter {name}", [table[name][0] if name in table else "not there" for table in tables])
    _refuse_different("order of parameters", [", ".join(table) for table in tables])
    for name in names:
        values = [f"values with checksum {table[name][1]:08x}" for table in tables]
        _refuse_different(f"parameter {name}", values, "the same values on every rank before the first step")


def _refuse_different(name: str, values: Sequence[Any], allowed: str = "the same on every rank") -> None:
    distinct = list(dict.fromkeys(map(str, values)))
    if len(distinct) > 1:
        where = {text: [rank for rank, value in enumerate(values) if str(value) == text] for text in distinct}
        said = "; ".join(f"{text} on {_ranks(ranks, len(values))}" for text, ranks in where.items())
        raise FieldError(name, _Words(said), allowed)


def _ranks(ranks: Sequence[int], num: int) -> str:
    if len(ranks) == num:
        return "every rank"
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{more}"


class _Words(str):
    """Text that an error shows without quotes."""

    __slots__ = ()

    __repr__ = str.__str__
