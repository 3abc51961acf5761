"""Checkpoints on disk: nested state as safetensors and JSON, written atomically, with checksums, the last two kept.

Nothing is executed when one is read. What a job's state consists of is not decided here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedq.errors import FieldError
from fedq.files import make_folder, move_aside, replace_file, sync_folder

FORMAT = 1
KEPT = 2
"""Number of checkpoints that stay on disk."""
_NAME = re.compile("[0-9]{8}|[1-9][0-9]{8,}")


class CheckpointError(ValueError):
    """A checkpoint that is damaged or of another kind; names the file and what is wrong with it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"checkpoint {path}: {problem}")
        self.path = path


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read.

    Args:
        number: Rounds that were finished when the checkpoint was written.
        state: The nested state, as it was given to `Checkpoints.save`.
    """

    number: int
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Folder of the checkpoints, one sub-folder each; made when the first is saved.
        kept: Number of checkpoints that stay on disk.
    """

    def __init__(self, folder: Path, kept: int = KEPT) -> None:
        self.folder = folder
        self.kept = kept

    def save(self, number: int, state: dict[str, Any]) -> None:
        """Write a checkpoint; after a crash at any moment it is there whole or not at all.

        Args:
            number: Rounds finished; the newest checkpoint is the one with the highest number.
            state: Dictionaries (string or integer keys), lists and tuples of tensors, arrays, strings, numbers,
                booleans and None.
        """
        target = self.folder / f"{number:08d}"
        temporary = self.folder / f".{target.name}.tmp"
        make_folder(self.folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            _write_state(temporary, number, state)
        except BaseException:  # a full disk should not hold half a checkpoint
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        sync_folder(self.folder)
        for old in self.numbers()[: -self.kept]:
            self.remove(old)

    def load(self, number: int) -> Loaded:
        """Read a checkpoint.

        Raises:
            CheckpointError: The checkpoint is damaged, or was written by another version.
        """
        return Loaded(number, _read_state(self.folder / f"{number:08d}", number))

    def load_part(self, number: int, key: str) -> Any:
        """Read one entry of a checkpoint's state, without tensors, which are not looked at; None if there is none.

        Raises:
            CheckpointError: The checkpoint is damaged, or was written by another version.
        """
        document = _read_document(self.folder / f"{number:08d}" / "state.json", number)
        return _from_plain(dict(document["state"]["items"]).get(key), {})

    def newest_whole(self, check: Callable[[Loaded], None]) -> tuple[Loaded, dict[int, str]]:
        """Return the newest checkpoint that is whole, and what is wrong with those after it.

        All processes agree because all read the same files.

        Args:
            check: Reads the files that a checkpoint names outside itself; raises `CheckpointError` or `FieldError`.

        Raises:
            FieldError: All checkpoints are damaged.
        """
        damaged: dict[int, str] = {}
        for number in reversed(self.numbers()):
            try:
                loaded = self.load(number)
                check(loaded)
            except (CheckpointError, FieldError) as error:
                damaged[number] = str(error)
                continue
            return loaded, damaged
        refused = [f"round {number} is refused: {why}" for number, why in damaged.items()]
        raise FieldError("resume", str(self.folder), "a checkpoint that is whole; " + "; ".join(refused))

    def set_aside(self, number: int) -> None:
        """Rename a checkpoint that cannot be used, so that it is no longer taken for one."""
        move_aside(self.folder / f"{number:08d}")

    def remove(self, number: int) -> None:
        """Delete a checkpoint, if it is there."""
        shutil.rmtree(self.folder / f"{number:08d}", ignore_errors=True)

    def numbers(self) -> list[int]:
        """Return the checkpoints' numbers, oldest first; what else lies in the folder is none."""
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if _NAME.fullmatch(entry.name))


def _write_state(folder: Path, number: int, state: dict[str, Any]) -> None:
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    document = {"format": FORMAT, "number": number, "state": _to_plain(state, "state", tensors)}
    data = save(tensors)
    document["tensors_crc32"] = zlib.crc32(data)
    text = json.dumps(document, allow_nan=True).encode()
    replace_file(folder / "state.safetensors", data)
    replace_file(folder / "state.json", text + f"\n{zlib.crc32(text):08x}\n".encode())


def _read_state(folder: Path, number: int) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    document, tensors_file = _read_document(folder / "state.json", number), folder / "state.safetensors"
    data = _read(tensors_file)
    if zlib.crc32(data) != document["tensors_crc32"]:
        raise CheckpointError(tensors_file, "its checksum does not match")
    try:
        state: dict[str, Any] = _from_plain(document["state"], load(data))
    except SafetensorError as error:
        raise CheckpointError(tensors_file, str(error)) from None
    return state


def _read_document(file: Path, number: int) -> dict[str, Any]:
    text, _, trailer = _read(file).partition(b"\n")
    if trailer != f"{zlib.crc32(text):08x}\n".encode():
        raise CheckpointError(file, "its checksum does not match")
    document: dict[str, Any] = json.loads(text)
    if document["format"] != FORMAT:
        raise CheckpointError(file, f"format {document['format']}; this version reads {FORMAT}")
    if document["number"] != number:
        raise CheckpointError(file, f"it belongs to checkpoint {document['number']}")
    return document


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"it cannot be read ({error.strerror})") from None


def _to_plain(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value in JSON's types; tensors go to ``tensors`` and leave their key behind."""
    if isinstance(value, np.ndarray):
        return {"array": _keep(_from_array(value, path), path, tensors)}
    if isinstance(value, Tensor):
        return {"tensor": _keep(value, path, tensors)}
    if isinstance(value, dict):
        return {"items": [[_key(key, path), _to_plain(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_to_plain(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise FieldError(path, type(value).__name__, "tensors, arrays, dictionaries, lists, strings and numbers")


def _key(key: Any, path: str) -> str | int:
    if not isinstance(key, str | int):
        raise FieldError(f"key of {path}", key, "strings and whole numbers")
    return key


def _from_array(array: np.ndarray, path: str) -> Tensor:
    try:
        return torch.from_numpy(array.copy())
    except TypeError:
        raise FieldError(path, f"array of {array.dtype}", "arrays of numbers and booleans") from None


def _keep(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    """Keep an own copy (safetensors refuses tensors that share memory), and return its key.

    The number keeps apart what a path alone does not: ``{1: x}`` from ``{"1": x}``, ``{"a/b": x}`` from nested ones.
    """
    key = f"{len(tensors)}:{path}"
    tensors[key] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return key


def _from_plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "items":
        return {key: _from_plain(item, tensors) for key, item in content}
    items: Iterator[Any] = (_from_plain(item, tensors) for item in content)
    return list(items) if kind == "list" else tuple(items)
