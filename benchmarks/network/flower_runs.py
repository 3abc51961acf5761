"""Runs of a Flower app in its own engines: a simulation, or a deployment whose parties are processes of their own.

Nothing is left behind: what is started is ended by its id, and Flower's home is a folder of the run's own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SCRIPTS = Path(sysconfig.get_path("scripts"))
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
Prefix = Sequence[str]


class AppFailed(RuntimeError):
    """A run did not end well; the text has the end of the logs."""


@dataclass(frozen=True)
class Engine:
    """A SuperLink that takes runs.

    Args:
        folder: Flower's home, and the logs.
        environ: Of all its processes.
        prefix: In front of commands that have to reach the SuperLink.
    """

    folder: Path
    environ: Mapping[str, str]
    prefix: Prefix

    def run(self, app: Path, config: Mapping[str, object], limit_s: float, options: Sequence[str] = ()) -> str:
        """Run an app to its end; return its log.

        Raises:
            AppFailed: It failed or took too long.
        """
        settings = " ".join(f"{key}={_toml(value)}" for key, value in config.items())
        command = [*self.prefix, _script("flwr"), "run", str(app), "--stream", "--run-config", settings, *options]
        log = self.folder / "run.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=self.environ, stdout=file, stderr=file, start_new_session=True)
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end([process])
        text = log.read_text(errors="replace")
        if code != 0:
            raise AppFailed(f"the run {'took too long' if code is None else f'ended with {code}'}:\n{self.logs()}")
        return text

    def logs(self, num_bytes: int = 3000) -> str:
        """Return the end of every log."""
        found = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-num_bytes:]}" for path in found)


@contextlib.contextmanager
def simulation(folder: Path, environ: Mapping[str, str]) -> Iterator[Engine]:
    """Start a SuperLink that simulates its nodes."""
    with _superlink(folder, environ, [], "127.0.0.1", ["--simulation"]) as (engine, _):
        yield engine


@contextlib.contextmanager
def deployment(
    folder: Path, environ: Mapping[str, str], num_nodes: int, prefixes: Sequence[Prefix] = (), host: str = "127.0.0.1"
) -> Iterator[Engine]:
    """Start a SuperLink and its nodes.

    Args:
        folder: For homes and logs.
        environ: Added to the environment.
        num_nodes: SuperNodes; the i-th has ``partition-id`` i.
        prefixes: In front of the commands of SuperLink and nodes, such as those that enter a network namespace.
        host: The SuperLink's address.
    """
    prefixes = prefixes or [[]] * (num_nodes + 1)
    nodes: list[subprocess.Popen] = []
    with _superlink(folder, environ, prefixes[0], host, []) as (engine, address):
        try:
            for number, prefix in enumerate(prefixes[1:]):
                values = f"partition-id={number} num-partitions={num_nodes}"
                command = [_script("flower-supernode"), "--insecure", "--superlink", address, "--node-config", values]
                command += ["--port", str(_free_port())]
                home = engine.folder / f"node-{number}"
                home.mkdir()
                own = {**engine.environ, "FLWR_HOME": str(home)}
                nodes.append(_start([*prefix, *command], own, engine.folder / f"node-{number}.log"))
            yield engine
        finally:
            _end(nodes)


@contextlib.contextmanager
def _superlink(
    folder: Path, environ: Mapping[str, str], prefix: Prefix, host: str, options: Sequence[str]
) -> Iterator[tuple[Engine, str]]:
    folder.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    address = f"{host}:{port}"
    path = os.pathsep.join([str(_SCRIPTS), os.environ.get("PATH", "")])
    own = {**os.environ, **_QUIET, "PATH": path, "FLWR_HOME": str(folder), **environ}
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    command = [*prefix, _script("flower-superlink"), "--insecure", "--host", host, "--port", str(port), *options]
    process = _start(command, own, folder / "superlink.log")
    engine = Engine(folder, own, prefix)
    try:
        _wait_for(engine, process, prefix, host, port)
        yield engine, address
    finally:
        _end([process])


def _wait_for(engine: Engine, process: subprocess.Popen, prefix: Prefix, host: str, port: int) -> None:
    """Return once the port is open."""
    code = f"import socket; socket.create_connection(({host!r}, {port}), 1).close()"
    end = time.monotonic() + 90
    while subprocess.run(
        [*prefix, sys.executable, "-S", "-c", code], stderr=subprocess.DEVNULL, check=False
    ).returncode:
        if process.poll() is not None or time.monotonic() > end:
            raise AppFailed(f"the SuperLink did not start:\n{engine.logs()}")
        time.sleep(0.2)


def _start(command: Sequence[str], environ: Mapping[str, str], log: Path) -> subprocess.Popen:
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environ, stdout=file, stderr=file, start_new_session=True)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """End processes and what they started, which is in the sessions of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


def _script(name: str) -> str:
    return str(_SCRIPTS / name)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str | Path) else str(value)
