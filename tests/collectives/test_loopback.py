"""Counted bytes against the loopback interface's own counters, in a network namespace where nobody else talks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import LIMIT_S, run_group
from jobs import small_config

from fedq.federated.training import RoundContext
from fedq.trainers.build import build_rounds, residual_store, round_settings
from fedq.trainers.job import open_job

ROUNDS = 3
CODECS = ("fp32", "int8")  # messages of 4.8 and 1.2 MB

# The interface counts each packet's IPv4 and TCP header (20 + 20 bytes, 12 more for TCP's time stamps), also of packets
# that only acknowledge; how many packets there were is counted too. What is left above the ledger is Gloo's header of
# less than 100 bytes a message, and the barriers.
PACKET_HEADER_BYTES = 52
# On a busy machine TCP sends a segment again when its acknowledgement is late. The kernel counts such segments, not
# their bytes; on the loopback interface one holds at most 64 KiB.
SEGMENT_BYTES = 1 << 16


def loopback_counters() -> tuple[int, int]:
    """Return bytes and packets received; on the loopback interface the ones sent are the same ones."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (values,) = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(values[0]), int(values[1])


def retransmitted_segments() -> int:
    """Return how many segments this network has sent a second time."""
    names, values = (line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines() if "Tcp:" in line)
    return int(dict(zip(names, values, strict=True))["RetransSegs"])


def measure(rank: int, folder: str) -> list[dict[str, Any]]:
    """Run rounds of two clients on two ranks; return what the ledger and the interface say of each job."""
    results = []
    for spec in CODECS:
        flags = {"model": "cnn1m", "num_clients": 2, "cohort": 2, "local_steps": 1, "uplink": spec, "downlink": spec}
        with open_job(small_config(Path(folder, spec), **flags)) as job:
            settings = round_settings(job.config, job.model)
            rounds = build_rounds(job, settings, residual_store(job, settings))
            rounds.share_start()

            def state(job=job) -> tuple[int, int, int, int]:
                job.transport.barrier()
                return (job.ledger.totals().wire, *loopback_counters(), retransmitted_segments())

            before = state()
            for number in range(ROUNDS):
                rounds.run(RoundContext(number, 0.05, 0))
            after = state()
            names = ("wire", "interface", "packets", "again")
            results.append({name: b - a for name, a, b in zip(names, before, after, strict=True)})
    return results


def main(folder: str) -> None:
    """Print rank 0's results; this is what runs in the namespace."""
    print(json.dumps(run_group(2, measure, folder, fresh=True)[0]))


def in_own_network(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, **options)


@pytest.fixture
def own_network() -> None:
    if not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("unshare or ip is missing")
    if in_own_network(["true"]).returncode:
        pytest.skip("a network namespace may not be made here: that takes root")


@pytest.mark.usefixtures("own_network")
def test_the_interface_counts_what_the_ledger_counts(tmp_path: Path) -> None:
    script = f"from test_loopback import main; main({str(tmp_path)!r})"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    done = in_own_network([sys.executable, "-c", script], env=environ)
    assert done.returncode == 0, done.stderr
    for counted in json.loads(done.stdout.splitlines()[-1]):
        assert counted["wire"] > 2 * ROUNDS * 1_000_000
        carried = counted["interface"] - PACKET_HEADER_BYTES * counted["packets"]
        assert carried > counted["wire"], "Gloo's own headers come on top"
        assert carried - SEGMENT_BYTES * counted["again"] <= 1.01 * counted["wire"], counted
