"""Which proxy stands between us and a host, as gRPC itself decides it; never one before this machine's loopback."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest

from fedq import waiting
from fedq.cli import main
from fedq.network.connection import Backoff, Connection, Lost
from fedq.proxies import download_proxies, grpc_proxy, is_loopback, loopback_is_direct, why_grpc_proxy
from fedq.waiting import Pace

HOST = "203.0.113.7"  # of nobody: RFC 5737
LIMIT_S = 30.0


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def proxy() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def is_asked(proxy: socket.socket, target: str, *, limit_s: float) -> bool:
    """Let bare gRPC call a target; say whether the proxy hears of it."""
    proxy.settimeout(limit_s)
    channel = grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)])
    call = channel.unary_unary("/a/b").future(b"", timeout=limit_s)
    try:
        connection, _ = proxy.accept()
        with connection:
            connection.settimeout(limit_s)
            return connection.recv(100).startswith(b"CONNECT " + target.encode())
    except TimeoutError:
        return False
    finally:
        call.cancel()
        channel.close()


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"grpc_proxy": "P", "http_proxy": "http://127.0.0.1:9"}, "grpc_proxy"),
        ({"https_proxy": "P", "http_proxy": "http://127.0.0.1:9"}, "https_proxy"),
        ({"http_proxy": "P"}, "http_proxy"),
        ({"http_proxy": "P", "no_proxy": "localhost,.example.org"}, "http_proxy"),
        ({"http_proxy": "P", "no_proxy": "*"}, "http_proxy"),
        ({"http_proxy": "P", "NO_PROXY": HOST}, "http_proxy"),
        ({"http_proxy": "P", "no_grpc_proxy": "other", "no_proxy": HOST}, "http_proxy"),
        ({"http_proxy": "P", "no_proxy": HOST}, None),
        ({"http_proxy": "P", "no_proxy": "localhost, 113.7 "}, None),
        ({"http_proxy": "P", "no_proxy": "203.0.113.0/24"}, None),
        ({"http_proxy": "P", "no_grpc_proxy": HOST}, None),
        ({"all_proxy": "P", "ALL_PROXY": "P", "HTTP_PROXY": "P", "HTTPS_PROXY": "P"}, None),
        ({"grpc_proxy": "", "http_proxy": "P"}, None),
        ({"http_proxy": "socks5://127.0.0.1:9"}, None),
    ],
)
def test_the_proxy_is_that_which_grpc_asks(
    monkeypatch: pytest.MonkeyPatch, proxy: socket.socket, variables: dict[str, str], name: str | None
) -> None:
    address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
    for key, value in variables.items():
        monkeypatch.setenv(key, address if value == "P" else value)
    assert grpc_proxy(HOST, os.environ) == ("" if name is None else f"{name}={address}")
    assert is_asked(proxy, f"{HOST}:99", limit_s=LIMIT_S if name else 0.3) == (name is not None)


def test_what_leaves_hosts_out_is_told_and_a_password_is_not() -> None:
    given = {"http_proxy": "http://me:secret@proxy:3128", "no_proxy": ".example.org"}
    words = "the proxy of http_proxy=http://***@proxy:3128 is in between (no_proxy=.example.org does not leave out h)"
    assert why_grpc_proxy("h", given) == words
    assert why_grpc_proxy("a.example.org", given) == ""
    assert "no_proxy is not set for h" in why_grpc_proxy("h", {"http_proxy": "http://proxy:3128"})


@pytest.mark.parametrize(
    ("host", "is_here"),
    [
        *[(host, True) for host in ("localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.9.9.9", "::1")],
        *[("::ffff:127.0.0.1", True), ("10.0.0.1", False), ("localhost.example.org", False), ("::2", False)],
    ],
)
def test_what_is_loopback(host: str, is_here: bool) -> None:
    assert is_loopback(host) == is_here
    assert bool(grpc_proxy(host, {"http_proxy": "http://proxy:3128"})) != is_here


def lost(connection: Connection) -> None:
    with pytest.raises(Lost):
        connection.describe(5.0)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_server_on_loopback_is_called_without_the_proxy(
    monkeypatch: pytest.MonkeyPatch, proxy: socket.socket, host: str
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)
        connection = Connection(f"{host}:{server.getsockname()[1]}", None, 0)
        calling = threading.Thread(target=lost, args=(connection,))
        calling.start()
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(24).startswith(b"PRI * HTTP/2.0")
        calling.join(LIMIT_S)
        connection.close()
    proxy.settimeout(0)
    with pytest.raises(BlockingIOError):
        proxy.accept()


def test_a_client_without_a_server_says_so_and_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(waiting, "PACE", Pace(0.2, 60.0))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for loopback, and so not named
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    flags = ["--insecure", "--number", "0", "--connect", f"localhost:{port}", "--give-up-after", "1"]
    assert main(["client", *flags, "--out", str(tmp_path), "--device", "cpu"]) == 2
    line, error = capsys.readouterr().err.splitlines()
    assert line.startswith(f"waiting for the server (localhost:{port}, without TLS")
    assert "s so far, for " in line
    assert error.startswith("error: connect=")
    assert "Connection refused" in error
    assert "a server that answers within 1 s" in error
    assert "proxy" not in line + error


def test_a_proxy_is_named_in_the_line_and_in_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["certs", "--clients", "1", "--host", HOST, "--out", str(tmp_path / "certs")]) == 0
    monkeypatch.setattr(waiting, "PACE", Pace(0.2, 60.0))
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        nobody = f"127.0.0.1:{reserved.getsockname()[1]}"
    monkeypatch.setenv("https_proxy", f"http://{nobody}")
    trust = ["--certs", str(tmp_path / "certs/client-0"), "--connect", f"{HOST}:99", "--give-up-after", "1"]
    capsys.readouterr()
    assert main(["client", *trust, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    line, error = capsys.readouterr().err.splitlines()
    for text in (line, error):
        assert f"the proxy of https_proxy=http://{nobody} is in between (no_proxy is not set for {HOST})" in text


def test_a_lost_server_is_said_at_once_and_how_long_it_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedq.network.connection._FIRST_S", 0.001)
    said: list[str] = []
    connection = Connection("localhost:1", None, 0)
    backoff = Backoff(connection, 300.0, said.append)
    for _ in range(3):
        backoff.wait("localhost:1: closed")
    assert said == ["waiting for the server (localhost:1: closed): 0 s so far, for 300 s more"]
    backoff.succeed()
    backoff.wait("localhost:1: closed again")
    assert said[1:] == ["waiting for the server (localhost:1: closed again): 0 s so far, for 300 s more"]
    connection.close()


class _Web(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("before", [None, "example.org"])
def test_a_download_from_loopback_is_direct_and_the_environment_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    if before is not None:
        monkeypatch.setenv("no_proxy", before)
    with HTTPServer(("127.0.0.1", 0), _Web) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}/file"
        with loopback_is_direct([url]):
            assert urllib.request.urlopen(url, timeout=LIMIT_S).read() == b"here"
        web.shutdown()
    assert os.environ.get("no_proxy") == before
    assert download_proxies([url], os.environ) == ""
    assert download_proxies(["http://data.org/x", "http://data.org/y"], os.environ) == "http_proxy=http://127.0.0.1:9"
    assert download_proxies(["https://data.org/x", "http://a.example.org/x"], os.environ) == (
        "" if before else "http_proxy=http://127.0.0.1:9"
    )
