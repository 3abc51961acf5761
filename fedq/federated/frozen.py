"""The parameters of a model that are not trained: they never travel, so all participants must have the same ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedq.collectives import Transport
from fedq.errors import FieldError
from fedq.layout import frozen_parameters
from fedq.wire import crc32c, values_crc32c

_ALLOWED = "the same values everywhere, as frozen parameters do not travel"


def frozen_checksums(module: nn.Module) -> dict[str, int]:
    """Return the CRC32C of each frozen parameter by name: of its type, its shape and its values."""
    return {name: _checksum(param.detach()) for name, param in frozen_parameters(module).items()}


def _checksum(tensor: Tensor) -> int:
    return values_crc32c(tensor, crc32c(f"{tensor.dtype} {list(tensor.shape)}".encode()))


def check_frozen(own: Mapping[str, int], theirs: Mapping[str, int], whose: str) -> None:
    """Compare the checksums of two participants' frozen parameters.

    Args:
        own: Checksums of the participant here, by name of the parameter.
        theirs: Checksums of the other participant, by name of the parameter.
        whose: The other participant, in words for the error.

    Raises:
        FieldError: Checksums differ; the text names the first such parameter.
    """
    for name in sorted({*own, *theirs}):
        mine, wanted = (_words(checksums.get(name)) for checksums in (own, theirs))
        if mine != wanted:
            raise FieldError(name, mine, f"{wanted}, as {whose}: {_ALLOWED}")


def _words(checksum: int | None) -> str:
    return "not frozen" if checksum is None else f"frozen, checksum {checksum:08x}"


def check_ranks(module: nn.Module, transport: Transport) -> int:
    """Compare the ranks' models: what they are made of, and the values of frozen parameters, which do not travel.

    Returns:
        Payload bytes that crossed between the ranks.

    Raises:
        FieldError: The ranks' models differ, raised on every rank; the text names the first frozen parameter that does.
    """
    if transport.world_size == 1:
        return 0
    made_of = [f"{name} {p.dtype} {list(p.shape)} {p.requires_grad}" for name, p in module.named_parameters()]
    models, moved = transport.all_gather(torch.tensor([crc32c("\n".join(made_of).encode())]))
    if (models != models[0]).any():
        texts = ", ".join(f"{checksum:08x}" for checksum in models.flatten().tolist())
        allowed = "one model on every rank: the same names, shapes, types and frozen parameters"
        raise FieldError("model", f"checksums by rank {texts}", allowed)
    own = frozen_checksums(module)
    if not own:
        return moved.payload
    rows, moved_too = transport.all_gather(torch.tensor(list(own.values())))
    for name, column in zip(own, rows.T.tolist(), strict=True):
        if len(set(column)) > 1:
            values = ", ".join(f"{checksum:08x}" for checksum in column)
            raise FieldError(name, f"frozen, checksums by rank {values}", _ALLOWED)
    return moved.payload + moved_too.payload
