"""Error feedback: what a codec loses is kept and added to the next update of the same owner.

Residuals are float32, keyed by owner (a client) and laid out by parameter name; statistics have none. The store
keeps them in memory up to a limit and spills the rest to disk, so none is ever dropped.
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fedq.codecs import Codec, Payload
from fedq.errors import FieldError, check_all, one_of
from fedq.files import make_folder, replace_file
from fedq.layout import Layout
from fedq.specs import parse

_MAGIC = b"FQR1"
_TRAILER = struct.Struct("<4sI")


class Feedback(Protocol):
    """What encodes an owner's updates, with or without a memory."""

    def encode(self, owner: int, layout: Layout, flat: Tensor, *, seed: int, memory: float = 1.0) -> list[Payload]:
        """Encode a flat update of ``owner``; ``memory`` is the share of its old residual that counts."""


@dataclass(frozen=True)
class AutoFeedback:
    """Residuals for clients whose codec loses more than a cast does and is not unbiased.

    Args:
        memory: Share of a client's residual that is left after each round in which it was not sampled, from 0 to 1,
            which forgets nothing.

    Raises:
        FieldError: The share is not from 0 to 1.
    """

    memory: float = 1.0
    asked: ClassVar[bool | None] = None
    """True where residuals are kept whatever the codec, False where none is, None where the codec decides."""

    def __post_init__(self) -> None:
        check_all([("memory", self.memory, 0 <= self.memory <= 1, "0 to 1")])

    def wants(self, codecs: Iterable[Codec]) -> bool:
        """Return whether a client with these codecs keeps a residual."""
        return any(codec.wants_feedback for codec in codecs)


@dataclass(frozen=True)
class AlwaysFeedback(AutoFeedback):
    """Residuals for every client."""

    asked: ClassVar[bool | None] = True

    def wants(self, codecs: Iterable[Codec]) -> bool:
        """Return True."""
        return True


@dataclass(frozen=True)
class NeverFeedback:
    """No residuals: what a codec loses is lost."""

    memory: ClassVar[float] = 1.0
    asked: ClassVar[bool | None] = False

    def wants(self, codecs: Iterable[Codec]) -> bool:
        """Return False."""
        return False


FeedbackRule = AutoFeedback | NeverFeedback
FEEDBACK: dict[str, type[FeedbackRule]] = {"auto": AutoFeedback, "on": AlwaysFeedback, "off": NeverFeedback}
"""Rules of who keeps residuals, by the names of specs."""


def feedback_rule(spec: str) -> FeedbackRule:
    """Return the rule that a spec names: ``auto``, ``on``, ``off``, ``on:memory=0.5``.

    Raises:
        FieldError: The rule or an option is unknown or out of range; the error names the field ``feedback``.
    """
    return parse("feedback", spec, FEEDBACK)


class NoFeedback:
    """Encode and forget."""

    def encode(self, owner: int, layout: Layout, flat: Tensor, *, seed: int, memory: float = 1.0) -> list[Payload]:
        """Encode a flat update; ``owner`` and ``memory`` do not matter."""
        return layout.encode(flat, seed=seed)


class ErrorFeedback:
    """Encode ``update + residual`` and keep the new residual (Seide et al. 2014, Karimireddy et al. 2019).

    Guarantees for every parameter ``decoded + new residual = update + old residual`` to one float32 rounding, so what
    was applied and what was meant differ by the last residual alone. A block whose update is not finite leaves its
    residual as it was and sends the non-finite value on.

    Args:
        store: The store that holds the residuals.
    """

    def __init__(self, store: ResidualStore) -> None:
        self.store = store

    def encode(self, owner: int, layout: Layout, flat: Tensor, *, seed: int, memory: float = 1.0) -> list[Payload]:
        """Encode a flat update of ``owner`` and replace its residual.

        Args:
            owner: Number of the residual's owner in the store, such as a client's number.
            layout: The layout by which the update is encoded.
            flat: The update, flat float32.
            seed: Seed of the message.
            memory: Share of the old residual that counts, 0 to 1: less than 1 forgets what has gone stale.
        """
        residual = self.store.get(owner, layout.num_params).to(flat.device)
        if memory != 1.0:
            residual.mul_(memory)
        payloads = layout.encode(flat, seed=seed, residual=residual)
        self.store.put(owner, residual)
        return payloads

    def state_dict(self, layout: Layout) -> dict[int, dict[str, Tensor]]:
        """Return every residual by owner and parameter name (copies, on the CPU)."""
        spans = [s for s in layout.spans if s.role != "stats"]
        state = {}
        for owner in self.store.owners():
            flat = self.store.get(owner, layout.num_params)
            state[owner] = {s.name: flat[s.slice].view(s.shape).to("cpu", copy=True) for s in spans}
        return state

    def load_state_dict(self, layout: Layout, state: dict[int, dict[str, Tensor]]) -> None:
        """Take residuals over by name; parameters that are not named start from zero.

        Raises:
            FieldError: A residual belongs to no parameter of the layout, or has another shape.
        """
        params = {s.name: s for s in layout.spans if s.role != "stats"}
        for owner, residuals in state.items():
            flat = torch.zeros(layout.num_params)
            for name, value in residuals.items():
                if name not in params:
                    raise FieldError("residual of", name, one_of(params, name))
                span = params[name]
                if tuple(value.shape) != span.shape:
                    raise FieldError(f"residual of {name}", tuple(value.shape), f"shape {span.shape}")
                flat[span.slice] = value.reshape(-1)
            self.store.put(owner, flat)


class ResidualStore:
    """Flat float32 residuals by owner: the most recently used in memory, the others in files.

    A file is never changed: `save` writes what changed under a new number, so an older checkpoint stays whole until
    `prune`. Files carry a checksum.

    Args:
        limit_bytes: Memory for residuals in bytes; one residual always stays in memory.
        folder: Folder of the residuals' files; made when it is first needed. None: all residuals stay in memory.
    """

    def __init__(self, limit_bytes: int = 4 << 30, folder: Path | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.folder = folder
        self._memory: OrderedDict[int, Tensor] = OrderedDict()
        self._files: dict[int, Path] = {}
        self._changed: set[int] = set()

    def __contains__(self, owner: int) -> bool:
        return owner in self._memory or owner in self._files

    def owners(self) -> Iterable[int]:
        """Return the owners that have a residual, in order."""
        return sorted(set(self._memory) | set(self._files))

    def get(self, owner: int, numel: int) -> Tensor:
        """Return the owner's residual on the CPU or where it was put, zeros if there is none yet.

        Raises:
            FieldError: The residual has another size, or its file is damaged.
        """
        if owner in self._memory:
            self._memory.move_to_end(owner)
            flat = self._memory[owner]
        elif owner in self._files:
            flat = read_residual(self._files[owner])
        else:
            return torch.zeros(numel)
        if flat.numel() != numel:
            raise FieldError(f"residual of client {owner}", flat.numel(), f"{numel} elements")
        return flat

    def put(self, owner: int, flat: Tensor) -> None:
        """Keep the owner's residual; spill the least recently used ones above the limit."""
        self._memory[owner] = flat
        self._memory.move_to_end(owner)
        self._changed.add(owner)
        while len(self._memory) > 1 and self._memory_bytes() > self.limit_bytes and self.folder is not None:
            self._spill(*self._memory.popitem(last=False))

    def save(self, number: int) -> list[int]:
        """Write the residuals that changed since the last `save` as version ``number``; return their owners."""
        saved = sorted(self._changed)
        for owner in saved:
            flat = self._memory[owner] if owner in self._memory else read_residual(self._files[owner])
            self._files[owner] = self._write(self.path(owner, number), flat)
        self._changed.clear()
        return saved

    def attach(self, versions: Mapping[int, int]) -> None:
        """Take over saved residuals, by owner and version; they are read when they are needed."""
        self._memory.clear()
        self._changed.clear()
        self._files = {owner: self.path(owner, number) for owner, number in versions.items()}

    def path(self, owner: int, number: int) -> Path:
        """Return the file of a saved version."""
        assert self.folder is not None, "residuals are saved in a folder"
        return self.folder / f"client-{owner:06d}-{number:08d}.f32"

    def check(self, owner: int, number: int) -> None:
        """Read a saved version.

        Raises:
            FieldError: The version is missing or damaged.
        """
        read_residual(self.path(owner, number))

    def prune(self, keep: Collection[Path]) -> None:
        """Delete saved versions that no checkpoint refers to any more."""
        if self.folder is not None:
            prune_residuals(self.folder, keep)

    def _memory_bytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self._memory.values())

    def _spill(self, owner: int, flat: Tensor) -> None:
        """Drop a residual from memory; write it first if no file holds it."""
        assert self.folder is not None
        if owner in self._changed:
            self._files[owner] = self._write(self.folder / f"client-{owner:06d}.spill.f32", flat)

    def _write(self, path: Path, flat: Tensor) -> Path:
        make_folder(path.parent)
        data = flat.detach().cpu().contiguous().numpy().data.cast("B")
        replace_file(path, data, _TRAILER.pack(_MAGIC, zlib.crc32(data)))
        return path


def read_residual(path: Path) -> Tensor:
    """Read a residual's file.

    Raises:
        FieldError: The file is missing, cut short, or its checksum does not match; the text names it.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise FieldError("residual file", str(path), f"a file that can be read ({error.strerror})") from None
    body, trailer = data[: -_TRAILER.size], data[-_TRAILER.size :].tobytes()
    if len(trailer) < _TRAILER.size or _TRAILER.unpack(trailer) != (_MAGIC, zlib.crc32(body.data)):
        raise FieldError("residual file", str(path), "a whole file whose checksum matches")
    return torch.from_numpy(body.view(np.float32))


def prune_residuals(folder: Path, keep: Collection[Path]) -> None:
    """Delete saved residuals that no checkpoint refers to any more."""
    for path in folder.glob("client-*-*.f32"):
        if path not in keep and path.is_file():
            path.unlink(missing_ok=True)
