"""TensorBoard's events of one start of a run, written where they come up: no thread of its own can fail unheard."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedq.files import make_folder

_VERSION = "brain.Event:2"


class Events:
    """Adds scalars to a new file of events.

    Args:
        folder: Folder of the files of events; made if need be.
        purge_step: Round from which on TensorBoard forgets what earlier files say; None: it forgets nothing.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        make_folder(folder)
        name = f"events.out.tfevents.{time.time_ns() / 1e9:.9f}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = (folder / name).open("ab", buffering=0)
        try:
            self._write(file_version=_VERSION)
            if purge_step is not None:
                self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        except BaseException:
            self.close()
            raise

    def add(self, round: int, numbers: Mapping[str, float]) -> None:
        """Write a round's numbers by tag."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in numbers.items()]
        self._write(step=round, summary=Summary(value=values))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
        self._file.write(record.getvalue())
