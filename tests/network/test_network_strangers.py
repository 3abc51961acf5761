"""People who connect and say nothing: they are few, go soon, and never take the descriptors that the server needs."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
from federation import Federation, Puppet, answer_properly, federation
from launched import summary, until

from fedq.errors import FieldError
from fedq.network.connection_limit import connection_limit

resource = pytest.importorskip("resource")


@pytest.fixture
def fed(tmp_path: Path):
    with federation(tmp_path) as fed:
        yield fed


class _Limits:
    """The limits of a process, as it is told and as it sets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, used: int = 30) -> None:
        self.now = (soft, hard)
        monkeypatch.setattr(resource, "getrlimit", lambda which: self.now)
        monkeypatch.setattr(resource, "setrlimit", self.set)
        monkeypatch.setattr(os, "listdir", lambda path: ["0"] * used)

    def set(self, which: int, now: tuple[int, int]) -> None:
        assert which == resource.RLIMIT_NOFILE
        self.now = now


@pytest.mark.parametrize(
    ("soft", "hard", "clients", "taken", "after"),
    [
        (1024, 4096, 10, 1044, 1122),  # two a client and 1,024; 30 are open, 48 kept
        (4096, 4096, 10, 1044, 4096),
        (256, 512, 10, 434, 512),
        (128, 128, 10, 50, 128),
        (128, 128, 50, 50, 128),
        (1024, resource.RLIM_INFINITY, 1000, 3024, 3102),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 10, 1044, resource.RLIM_INFINITY),
    ],
)
def test_how_many_connections_are_taken(
    soft: int, hard: int, clients: int, taken: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = _Limits(monkeypatch, soft, hard)
    assert connection_limit(clients) == taken
    assert limits.now == (after, hard)


def test_each_address_has_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(None, None, None, "", (address, 0)) for address in ("127.0.0.1", "::1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, type: found)
    _Limits(monkeypatch, 128, 128)
    assert connection_limit(10, "localhost") == 25
    limits = _Limits(monkeypatch, 1024, 4096)
    assert connection_limit(10, "localhost") == 1044
    assert limits.now == (30 + 48 + 2 * 1044, 4096)


def test_a_process_that_may_open_too_few_files_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _Limits(monkeypatch, 128, 128)
    with pytest.raises(FieldError, match=r"num_clients=51.*at most 50.*128 files"):
        connection_limit(51)


def _knock(port: int, times: int) -> list[socket.socket]:
    """Connect and say nothing."""
    knocking = []
    for _ in range(times):
        knocking.append(socket.socket())
        knocking[-1].settimeout(3)
        try:
            knocking[-1].connect(("127.0.0.1", port))
        except OSError:
            break
    return knocking


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_strangers_take_no_descriptors_that_the_server_needs(fed: Federation) -> None:
    server = fed.server("--clients", "1", "--rounds", "3", open_files=128)
    server.until_it_says("listening")
    may_go_on, files = threading.Event(), Path(f"/proc/{server.process.pid}/fd")

    def act(*args) -> None:
        may_go_on.wait(60)
        answer_properly(*args)

    puppet = Puppet(fed, 0, act)
    server.until_it_says("client 0 is here")
    before = len(os.listdir(files))
    knocking = _knock(fed.port, 200)
    until(lambda: len(os.listdir(files)) > before + 20, "strangers", 30)
    most = len(os.listdir(files))
    may_go_on.set()
    server.ends_well()
    puppet.join(30)
    assert most <= 128 - 32
    assert puppet.outcome["kind"] == "finished"
    assert summary(fed.run)["rounds"] == 3
    for one in knocking:
        one.close()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_strangers_are_shown_out_and_a_client_comes_in(fed: Federation) -> None:
    server = fed.server("--clients", "1", "--rounds", "1", open_files=128)
    server.until_it_says("listening")
    files = Path(f"/proc/{server.process.pid}/fd")
    before = len(os.listdir(files))
    knocking = _knock(fed.port, 200)
    client = fed.client(0)
    server.ends_well()
    client.ends_well()
    assert before < 128 - 48
    for one in knocking:
        one.close()
