"""Kill jobs with SIGKILL at random moments, resume them under other world sizes, and compare with a run never stopped.

    python benchmarks/kill_resume.py --kills 50 --work DIR --out table.md

Every job is `train.py` in processes of its own. Either one rank is killed (the others must end by themselves) or all
at once. A job that was resumed to its end must have the same `model.safetensors`, byte for byte, and the same payload
rows in its ledger as the reference, which ran on one rank. Exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
COMMON = (
    "--dataset digits --model cnn62k --num-clients 7 --cohort 5 --local-steps 3 --rounds 8 --threads 1 --device cpu"
)
CONFIGURATIONS = {
    "int4, fedadam, int8 down": "--uplink int4 --downlink int8 --server fedadam:lr=0.01",
    "sign, fedavgm, int4 down": "--uplink sign --downlink int4 --server fedavgm:momentum=0.9,lr=0.3",
    "threshold without feedback, adamw, to all": (
        "--uplink threshold:value=0.01 --feedback off --server adamw:lr=0.003 --downlink-to all --checkpoint-every 2"
    ),
    "fp32, fedavg, fp32 down": "--uplink fp32 --downlink fp32 --server fedavg",
    "blocktopk, fedyogi, residuals spilled": (
        "--uplink blocktopk:k=1,block=64 --downlink topk:density=0.1 --server fedyogi:lr=0.01 --memory-limit-gib 0.0003"
    ),
}
LIMIT_S = 300  # of one start; a rank that is left over when others were killed must be gone long before


@dataclass
class Tally:
    """What happened to one configuration's jobs."""

    kills: int = 0
    resumes: int = 0
    finished: int = 0
    """Jobs that were killed at least once and then resumed to their end."""
    span_s: float = 0.0
    """Seconds from which moments are drawn: of the job's quickest start that was not killed."""
    differences: list[str] = field(default_factory=list)


class Job:
    """The processes of one start of a job."""

    def __init__(self, flags: str, world_size: int, log: Path) -> None:
        place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        command = [sys.executable, str(ROOT / "train.py"), *shlex.split(flags)]
        self.log = log
        with log.open("ab") as output:
            self.ranks = [
                subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank)}, stdout=output, stderr=output)
                for rank in range(world_size)
            ]

    def wait_for(self, path: Path, seconds: float) -> float:
        """Wait until a file is written anew, then for some seconds more; at most until the job ends.

        Returns:
            When the file was written, by the monotonic clock.
        """
        before = path.stat().st_mtime_ns if path.exists() else None
        while self.is_running() and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)
        written = time.monotonic()
        while self.is_running() and time.monotonic() < written + seconds:
            time.sleep(0.01)
        return written

    def is_running(self) -> bool:
        return any(rank.poll() is None for rank in self.ranks)

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.ranks[rank].kill()

    def end(self) -> list[int]:
        """Wait for all ranks and return their exit codes."""
        deadline = time.monotonic() + LIMIT_S
        try:
            return [rank.wait(max(0.0, deadline - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            self.kill(list(range(len(self.ranks))))
            raise RuntimeError(f"a rank hangs; see {self.log}") from None


def torment(name: str, kills: int, folder: Path, rng: random.Random) -> Tally:
    """Run a configuration once in peace, then kill and resume jobs of it until it was killed as often as asked."""
    flags, reference = f"{COMMON} {CONFIGURATIONS[name]}", folder / "reference"
    folder.mkdir(parents=True)
    start = time.monotonic()
    job = Job(f"{flags} --out {reference}", 1, folder / "log")
    active = job.wait_for(reference / "starts", 0.0)
    if any(job.end()):
        raise RuntimeError(f"the reference of {name!r} failed; see {job.log}")
    print(f"{name}: reference, {active - start:.1f} s to start, {time.monotonic() - active:.1f} s to run", flush=True)
    tally, number = Tally(span_s=time.monotonic() - active), 0
    while tally.kills < kills:
        victim = folder / f"victim{number}"
        _one_victim(flags, victim, kills, rng, tally)
        difference = compare(reference, victim)
        print(f"{name}: {victim.name} after {tally.kills} kills: {difference or 'equal'}", flush=True)
        tally.differences += [f"{victim}: {difference}"] if difference else []
        number += 1
    return tally


def _one_victim(flags: str, victim: Path, kills: int, rng: random.Random, tally: Tally) -> None:
    """Start and resume a job, with kills until there were enough of them, to its end."""
    kills_before = tally.kills
    while True:
        world_size = rng.randint(1, 3)
        is_resumed = (victim / "config.yaml").exists()  # killed before that, there is nothing to go on from
        command = f"--resume {victim}" if is_resumed else f"{flags} --out {victim}"
        job = Job(command, world_size, victim.with_suffix(".log"))
        tally.resumes += is_resumed
        if tally.kills < kills:
            active = job.wait_for(victim / "starts", rng.uniform(0.0, 0.7 * tally.span_s))
            if not job.is_running():
                tally.span_s = min(tally.span_s, time.monotonic() - active)
            else:
                everyone = list(range(world_size))
                job.kill(everyone if rng.random() < 0.5 else [rng.choice(everyone)])
        codes = job.end()
        if not any(codes):
            tally.finished += tally.kills > kills_before
            return
        if -9 not in codes:
            raise RuntimeError(f"exit codes {codes} without a kill; see {job.log}")
        tally.kills += 1


def compare(reference: Path, victim: Path) -> str:
    """Return what differs, the empty text if nothing does."""
    if (reference / "model.safetensors").read_bytes() != (victim / "model.safetensors").read_bytes():
        return "model.safetensors differs"
    return "" if _payload_rows(reference) == _payload_rows(victim) else "the ledger's payload rows differ"


def _payload_rows(folder: Path) -> list[tuple]:
    rows = pq.read_table(folder / "ledger.parquet").to_pylist()
    keys = ("round", "client", "direction", "tensor", "part", "raw", "payload")
    return sorted(tuple(row[key] for key in keys) for row in rows if row["payload"])


def table(tallies: dict[str, Tally]) -> str:
    lines = [
        "| configuration | kills | resumes | killed jobs that finished | equal to the run never stopped |",
        "|---|---|---|---|---|",
    ]
    for name, t in tallies.items():
        equal = f"no: {'; '.join(t.differences)}" if t.differences else "yes, all"
        lines.append(f"| {name} | {t.kills} | {t.resumes} | {t.finished} | {equal} |")
    total = [sum(getattr(t, key) for t in tallies.values()) for key in ("kills", "resumes", "finished")]
    return "\n".join([*lines, f"| all | {' | '.join(map(str, total))} | |", ""])


def _free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills in all (default: 50)")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the runs; what an earlier call left is deleted"
    )
    parser.add_argument("--out", type=Path, help="where the table is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments, ranks and world sizes")
    parser.add_argument("--at-once", type=int, default=2, help="configurations side by side (default: 2)")
    given = parser.parse_args()
    names = list(CONFIGURATIONS)
    shutil.rmtree(given.work / "kill_resume", ignore_errors=True)
    with ThreadPoolExecutor(given.at_once) as pool:
        futures = {}
        for i, name in enumerate(names):
            kills = given.kills // len(names) + (i < given.kills % len(names))
            folder = given.work.resolve() / "kill_resume" / str(i)
            futures[name] = pool.submit(torment, name, kills, folder, random.Random(f"{given.seed} {name}"))
        tallies = {name: future.result() for name, future in futures.items()}
    text = table(tallies)
    print(text)
    if given.out:
        given.out.write_text(text)
    return int(any(t.differences for t in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
