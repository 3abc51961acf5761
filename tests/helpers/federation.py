"""A server and clients across the loopback interface, for tests: processes, and clients that do not behave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from clients import client_on
from launched import environ, free_ports, until
from torch import nn
from warm import Command

from fedq.federated.training import Trained
from fedq.layout import Layout, LayoutSchedule
from fedq.models import build_model
from fedq.network.connection import Connection
from fedq.network.participant import Participant, VersionsOnDisk
from fedq.wire import Message, read_note

# Digits come with scikit-learn; one thread, so that sums have one order wherever the job runs.
JOB = (
    *("--dataset", "digits", "--train-examples", "200", "--model", "cnn62k", "--local-steps", "2"),
    *("--batch-size", "16", "--lr", "0.05", "--precision", "fp32", "--device", "cpu", "--threads", "1"),
)
OWN = ("--threads", "1", "--device", "cpu")
LIMIT_S = 120
_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0}))
from fedq.cli import main
sys.exit(main())
"""


class Party:
    """A process with its output in a file."""

    def __init__(self, log: Path, *command: str) -> None:
        self.log = log
        log.touch()
        self.process = Command(command, output=log, env=environ(), cwd=log.parent)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def until_it_says(self, words: str) -> None:
        until(lambda: words in self.said or self.process.poll() is not None, f"{words!r} in {self.log.name}", LIMIT_S)
        assert words in self.said, self.said

    def ends_well(self) -> str:
        assert self.process.wait(LIMIT_S) == 0, self.said
        return self.said

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Federation:
    """Starts a server and clients in a folder; ends what is left at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports()
        self.address = f"localhost:{self.port}"
        self.run = folder / "run"
        self._parties: list[Party] = []

    def server(
        self,
        *flags: str,
        trust: tuple[str, ...] = ("--insecure",),
        resume: bool = False,
        open_files: int | None = None,
    ) -> Party:
        """Start a server, which may have so many files open."""
        how = ("-m", "fedq") if open_files is None else ("-c", _LIMITED.format(open_files))
        what = ("--resume", str(self.run)) if resume else (*JOB, "--accept-own-data", "--out", str(self.run))
        log = self.folder / f"server{len(self._parties)}.log"
        return self._start(log, *how, "server", "--bind", self.address, *trust, *what, *flags)

    def client(self, number: int, *flags: str, trust: tuple[str, ...] | None = None) -> Party:
        trust = ("--insecure", "--number", str(number)) if trust is None else trust
        log = self.folder / f"client{number}-{len(self._parties)}.log"
        own = ("--out", str(self.folder / f"client{number}"))
        return self._start(log, "-m", "fedq", "client", "--connect", self.address, *trust, *own, *OWN, *flags)

    def end(self) -> None:
        for party in self._parties:
            if party.process.poll() is None:
                party.kill()

    def _start(self, log: Path, *command: str) -> Party:
        party = Party(log, *command)
        self._parties.append(party)
        return party

    def rows(self) -> list[dict[str, Any]]:
        """Return what clients.parquet has of each client and round."""
        return pq.read_table(self.run / "clients.parquet").to_pylist()

    def statuses(self) -> dict[tuple[int, int], str]:
        return {(row["round"], row["client"]): row["status"] for row in self.rows()}


@contextmanager
def federation(folder: Path) -> Iterator[Federation]:
    fed = Federation(folder)
    try:
        yield fed
    finally:
        fed.end()


class AddOne:
    """Trains by adding a constant to every parameter, at once."""

    def __init__(self, model: nn.Module, step: float = 0.0) -> None:
        self.model = model
        self.layout = Layout.of(model, "fp32")
        self.step = step

    def run(self, start: torch.Tensor, indices: torch.Tensor, *, lr: float, seed: int) -> Trained:
        return Trained(start + self.step, 1.0, 0.5, 1)


Act = Callable[[Connection, Participant, Message, dict[str, Any]], None]


class Puppet(threading.Thread):
    """A client in a thread of the test: it trains at once, and answers its tasks in its own way.

    Args:
        fed: The federation.
        number: Its number.
        act: Answers a task; default: properly.
        model: Its model, if not the federation's.
        uplink: Codec of its updates.
        examples: That it says it has.
        step: What its training adds to every parameter.
    """

    def __init__(
        self,
        fed: Federation,
        number: int,
        act: Act | None = None,
        *,
        model: nn.Module | None = None,
        uplink: str = "fp32",
        examples: int = 50,
        step: float = 0.0,
    ) -> None:
        super().__init__(daemon=True)
        self.fed, self.number, self.act = fed, number, act or answer_properly
        self.model = model or build_model("cnn62k")
        self.uplink, self.examples, self.step = uplink, examples, step
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        connection = Connection(self.fed.address, None, self.number)
        try:
            self.outcome = self._take_part(connection)
        except Exception as error:
            self.outcome = error
        finally:
            connection.close()

    def _take_part(self, connection: Connection) -> dict[str, Any]:
        described = connection.describe()
        training = AddOne(self.model, self.step)
        schedule = LayoutSchedule.of(self.model, self.uplink, feedback=False)
        client = client_on(self.number, torch.arange(self.examples), training, schedule)
        on_disk = VersionsOnDisk(self.fed.folder / f"puppet{self.number}", self.number, has_feedback=False)
        participant = Participant(client, on_disk, run=described["run"], uplink=self.uplink)
        for message in connection.follow(participant.hello()):
            if message.frame.kind.has_payloads:
                participant.take(message)
                continue
            text = read_note(message)
            if text["kind"] == "welcome":
                connection.opened(text["session"])
            elif text["kind"] == "task":
                participant.arrive(text)
                self.act(connection, participant, message, text)
            else:
                return text
        return {}


def answer_properly(connection: Connection, participant: Participant, message: Message, text: dict[str, Any]) -> None:
    connection.send(participant.answer(text, message.sequence), timeout=60)
