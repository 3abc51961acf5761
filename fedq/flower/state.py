"""What a client keeps between messages: its replica and its residual, in files of its own, one folder a node.

Flower may handle every message in a new process, and in a simulation many nodes share a few, so nothing depends on
memory; a small cache only saves reading. (`Context.state` would cross Flower's local HTTP with every message, and is
lost when the node's process ends.)
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fedq.data.cache import default_cache_dir
from fedq.errors import FieldError
from fedq.feedback import ErrorFeedback, Feedback, NoFeedback, ResidualStore, read_residual
from fedq.files import replace_file
from fedq.flower.arrays import Model, layout_of, log
from fedq.layout import Layout
from fedq.wire import SERVER, Frame, Kind, Limits, Message, join_payloads, unpack

try:
    import fcntl
except ImportError:  # Windows: Flower's own order of messages has to do
    fcntl = None  # type: ignore[assignment]

CACHE_BYTES = 1 << 30
"""Bytes of memory for replicas and residuals of the nodes that this process served last."""
KEEP_S = 7 * 24 * 3600
"""Seconds (a week) after which a run's folder that nobody touched is removed by the next run."""
_EVERYTHING = Limits(message_bytes=1 << 40, decoded_bytes=1 << 40)


@dataclass
class Facts:
    """The small part of a node's state, written as JSON.

    Args:
        session: Number of the server's session; with another one the node starts anew.
        seed: Seed of everything random.
        uplink: Spec of the codec that the server asks for.
        version: Version of the replica.
        names: Names of the model's arrays, in the record's order.
        residual: Number of the residual's file; 0: there is none.
        residual_of: Hash of the fp32 layout of the arrays that the residual is of, hexadecimal; empty: none so far.
        received_bytes, sent_bytes: Bytes of Flower's messages so far.
        received_float32_bytes, sent_float32_bytes: Bytes of the same models in float32.
    """

    session: int
    seed: int
    uplink: str
    version: int
    names: list[str]
    residual: int = 0
    residual_of: str = ""
    received_bytes: int = 0
    received_float32_bytes: int = 0
    sent_bytes: int = 0
    sent_float32_bytes: int = 0


@dataclass
class NodeState:
    """A node's state in memory.

    Args:
        facts: The small part of the state, which is written as JSON.
        model: The replica of the server's model.
        residuals: Store of the node's residual, whose owner has the number 0.
    """

    facts: Facts
    model: Model
    residuals: ResidualStore

    @property
    def nbytes(self) -> int:
        """Memory."""
        residual = 4 * self.model.flat.numel() if self.facts.residual else 0
        return self.model.plain_nbytes + residual

    def feedback(self, layout: Layout, wanted: bool) -> Feedback:
        """Return what encodes an update; a residual of another layout does not count."""
        if not wanted:
            return NoFeedback()
        # Codecs may change from round to round; names, shapes and so the offsets of the residual may not.
        shape = f"{layout_of({s.name: s.shape for s in layout.spans}, 'fp32', feedback=False).hash:016x}"
        if self.facts.residual and self.facts.residual_of != shape:
            log.warning("fedq: the update has other arrays than before; error feedback starts anew")
            self.residuals.attach({})
        self.facts.residual_of = shape
        return ErrorFeedback(self.residuals)


class NodeFolder:
    """The files of one node in one run.

    Args:
        base: Folder of all runs.
        run: Number that Flower gave the run.
        node: Number that Flower gave the node.
    """

    def __init__(self, base: Path, run: int, node: int) -> None:
        self._base = base
        self._run = base / f"{run & 2**64 - 1:016x}"
        self.path = self._run / f"{node & 2**64 - 1:016x}"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the node's lock: no two messages of one node are handled at a time, whatever Flower does."""
        if not self._run.exists():
            _forget_old(self._base)
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def load(self) -> NodeState | None:
        """Return the state, or None if there is none that can be read."""
        try:
            text = (self.path / "node.json").read_bytes()
        except OSError:
            return None
        state = _CACHE.get(self.path, text)
        if state is not None:
            return state
        try:
            return self._read(text)
        except (OSError, ValueError, TypeError) as error:
            log.warning("fedq: the state in %s cannot be used: %s", self.path, error)
            return None

    def _read(self, text: bytes) -> NodeState:
        facts = Facts(**json.loads(text))
        message = unpack((self.path / _replica_name(facts)).read_bytes(), _EVERYTHING)
        if message.layout is None:
            raise FieldError("replica", message.frame.kind.name, "MODEL")
        found = {span.name: span.shape for span in message.layout.spans}
        shapes = {name: found[name] for name in facts.names if name in found}
        exact = {name: tensor.clone() for name, tensor in message.exact.items()}
        model = Model(tuple(facts.names), shapes, torch.empty(message.layout.numel), exact, {})
        tensors = message.tensors()
        for name, view in model.layout.views(model.flat).items():
            view.copy_(tensors[name])
        residuals = ResidualStore(folder=self.path)
        if facts.residual:
            residuals.attach({0: facts.residual})
            read_residual(residuals.path(0, facts.residual))  # a damaged one shows now, not after training
        return NodeState(facts, model, residuals)

    def new(self, facts: Facts, model: Model) -> NodeState:
        """Return the state of a node that has just got the whole model; `save` writes it."""
        return NodeState(facts, model, ResidualStore(folder=self.path))

    def save(self, state: NodeState, *, in_memory: bool = True) -> None:
        """Write what changed; a reader sees the old state or the new one.

        Args:
            state: The node's state.
            in_memory: Whether to keep it in the cache too, because nothing will change it before it is loaded again.
        """
        facts, replica = state.facts, self.path / _replica_name(state.facts)
        if not replica.exists():
            replace_file(replica, *(memoryview(chunk) for chunk in _replica(state).chunks(64 << 20)))
        if state.residuals.save(facts.residual + 1):
            facts.residual += 1
        text = json.dumps(asdict(facts)).encode()
        replace_file(self.path / "node.json", text)
        keep = {replica, state.residuals.path(0, facts.residual)}
        for old in (*self.path.glob("replica-*"), *self.path.glob("client-*")):
            if old not in keep:
                old.unlink(missing_ok=True)
        if in_memory:
            _CACHE.put(self.path, text, state)


def _replica_name(facts: Facts) -> str:
    return f"replica-{facts.session:016x}-{facts.version:08d}.fedq"


def _replica(state: NodeState) -> Message:
    """Return the replica as a message: the format of the wire is good enough for the disk."""
    layout, model = state.model.layout, state.model
    body = join_payloads(layout, layout.encode(model.flat, seed=0))
    frame = Frame(Kind.MODEL, 0, SERVER, layout.hash, 0, 0.0, 0.0, 0.0, body)
    return Message(frame, layout, state.facts.version, model.exact)


def _forget_old(base: Path) -> None:
    """Remove the folders of runs that nobody touched for a week."""
    for node in base.glob("*/*/node.json"):
        try:
            if time.time() - node.stat().st_mtime > KEEP_S:
                shutil.rmtree(node.parent)
                node.parent.parent.rmdir()
        except OSError:  # another node's process was faster, or other nodes of the run are still there
            continue


def state_folder(folder: str | Path | None) -> Path:
    """Return where runs keep their state: the folder given, or one in the user's cache."""
    return Path(folder) if folder is not None else default_cache_dir() / "flower"


class _Cache:
    """The nodes served last, while what their file says is what this process wrote."""

    def __init__(self) -> None:
        self._states: OrderedDict[Path, tuple[bytes, NodeState]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path, text: bytes) -> NodeState | None:
        """Return a node's state if its file has not changed since; its caller holds the node's lock."""
        with self._lock:
            written, state = self._states.pop(path, (b"", None))
        return state if written == text else None

    def put(self, path: Path, text: bytes, state: NodeState) -> None:
        """Keep a node's state, and forget the ones used least recently beyond the limit."""
        with self._lock:
            self._states[path] = (text, state)
            while len(self._states) > 1 and sum(s.nbytes for _, s in self._states.values()) > CACHE_BYTES:
                self._states.popitem(last=False)


_CACHE = _Cache()
