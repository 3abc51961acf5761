"""Kill jobs with SIGKILL at random moments, resume them under other world sizes, and compare with a run never stopped.

    python tests/stress/kill_resume.py --kills 50 --work DIR --out table.md

Every job is `train.py` in processes of its own. Either one rank is killed (the others must end by themselves) or all
at once. A job that was resumed to its end must have the same `model.safetensors`, byte for byte, and the same payload
rows in its ledger as the reference, which ran on one rank. Exits with 1 on any difference.

    python tests/stress/kill_resume.py --elastic --kills 100 --work DIR --out table.md

Nothing is resumed by hand here: each job is one `torchrun --max-restarts 200`, of which single ranks are killed, rank 0
too: while they start, in a round, or while a checkpoint is written. It must end with 0, repeat at most one round a
kill, and leave the same model, metrics and ledger, byte for byte (but for seconds), as a run of as many ranks in peace.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

T = TypeVar("T")
C = TypeVar("C", bound=tuple[Any, ...])

ROOT = Path(__file__).resolve().parents[2]
COMMON = (
    "--dataset digits --model cnn62k --num-clients 7 --cohort 5 --local-steps 3 --threads 1 --device cpu --rounds {}"
)
ROUNDS, ELASTIC_ROUNDS = 8, 20
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
    flags, reference = f"{COMMON.format(ROUNDS)} {CONFIGURATIONS[name]}", folder / "reference"
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


# ---- one torchrun that starts its ranks again ----

ELASTIC = (("int4, fedadam, int8 down", 2), ("sign, fedavgm, int4 down", 3), ("fp32, fedavg, fp32 down", 2))
"""Configurations, and ranks of their jobs."""
MOMENTS = ("start", "round", "save")


@dataclass
class ElasticTally:
    """What happened to the jobs of one configuration and number of ranks."""

    jobs: int = 0
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    of_rank_0: int = 0
    repeated: int = 0
    """Rounds that were finished and done again."""
    seconds: float = 0.0
    """Of all jobs, beyond those that they would have taken in peace."""
    differences: list[str] = field(default_factory=list)


class Supervised:
    """One torchrun, whose ranks are killed."""

    def __init__(self, flags: str, num_ranks: int, log: Path, *torchrun: str) -> None:
        self.num_ranks, self.log = num_ranks, log
        where = torchrun or ("--standalone", "--nproc-per-node", str(num_ranks), "--max-restarts", "200")
        command = [sys.executable, "-m", "torch.distributed.run", *where, str(ROOT / "train.py"), *shlex.split(flags)]
        with log.open("ab") as output:
            self.agent = subprocess.Popen(
                command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output, cwd=log.parent
            )
        self._seen: set[int] = set()

    def is_running(self) -> bool:
        return self.agent.poll() is None

    def ranks(self) -> dict[int, int]:
        """Return the processes of the ranks that live."""
        found = {}
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children")
        for pid in map(int, _text(children).split()):
            environ = dict(entry.partition("=")[::2] for entry in _text(Path(f"/proc/{pid}/environ")).split("\0"))
            if "RANK" in environ and " Z " not in _text(Path(f"/proc/{pid}/stat")):
                found[int(environ["RANK"])] = pid
        return found

    def next_ranks(self) -> dict[int, int]:
        """Wait for ranks that have not been seen yet, and return them; none if the job ends before."""
        while self.is_running():
            ranks = self.ranks()
            if len(ranks) == self.num_ranks and not self._seen & set(ranks.values()):
                self._seen |= set(ranks.values())
                return ranks
            time.sleep(0.01)
        return {}

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Wait for something that the job does, and return whether it still runs then."""
        while self.is_running() and not condition():
            time.sleep(0.001)
        return self.is_running()

    def end(self) -> int:
        """Wait for the job's end and return its exit code."""
        try:
            return self.agent.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.agent.kill()
            for pid in self.ranks().values():
                os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"the job hangs; see {self.log}") from None


def torment_by_torchrun(name: str, num_ranks: int, kills: int, folder: Path, rng: random.Random) -> ElasticTally:
    """Run a configuration once in peace, then jobs whose ranks are killed until there were as many kills as asked."""
    flags, tally = f"{COMMON.format(ELASTIC_ROUNDS)} {CONFIGURATIONS[name]}", ElasticTally()
    folder.mkdir(parents=True)
    begin = time.monotonic()
    job, reference = Supervised(f"{flags} --out reference", num_ranks, folder / "log"), folder / "reference"
    job.wait_until((reference / "starts").exists)
    start_s = time.monotonic() - begin
    if job.end():
        raise RuntimeError(f"the reference of {name!r} failed; see {job.log}")
    peace_s = time.monotonic() - begin
    while sum(tally.kills.values()) < kills:
        victim, begin = folder / f"victim{tally.jobs}", time.monotonic()
        job = Supervised(f"{flags} --out {victim.name}", num_ranks, victim.with_suffix(".log"))
        killed = _kill_ranks(job, victim, kills, rng, tally, start_s, (peace_s - start_s) / ELASTIC_ROUNDS)
        code = job.end()
        tally.jobs += 1
        tally.seconds += time.monotonic() - begin - peace_s
        difference = f"exit code {code}" if code else compare_elastic(reference, victim, killed)
        tally.repeated += 0 if code else json.loads((victim / "summary.json").read_text())["repeated_rounds"]
        print(f"{name}, {num_ranks} ranks: {victim.name}, {killed} kills: {difference or 'equal'}", flush=True)
        tally.differences += [f"{victim}: {difference}"] if difference else []
    return tally


def _kill_ranks(
    job: Supervised, victim: Path, kills: int, rng: random.Random, tally: ElasticTally, start_s: float, round_s: float
) -> int:
    """Kill one rank of each start of a job, until there were enough kills or it has ended; return how many it met."""
    starts, checkpoints, killed = victim / "starts", victim / "checkpoints", 0
    while sum(tally.kills.values()) < kills and (ranks := job.next_ranks()):
        before, moment = _changed(starts), rng.choice(MOMENTS)
        if moment == "start":
            time.sleep(rng.uniform(0.0, start_s))
        else:
            job.wait_until(partial(_is_new, starts, before))
            time.sleep(rng.uniform(0.0, 3 * round_s))
        if moment == "save":
            job.wait_until(lambda: bool(list(checkpoints.glob(".*.tmp"))))
        rank = rng.randrange(job.num_ranks)
        if job.ranks().get(rank) == ranks[rank]:
            os.kill(ranks[rank], signal.SIGKILL)
            killed += 1
            tally.kills[moment] += 1
            tally.of_rank_0 += rank == 0
    return killed


def compare_elastic(reference: Path, victim: Path, kills: int) -> str:
    """Return what differs from a run of as many ranks in peace, the empty text if nothing does."""
    for name in ("model.safetensors", "ledger.parquet"):
        if (reference / name).read_bytes() != (victim / name).read_bytes():
            return f"{name} differs"
    if _metrics(reference) != _metrics(victim):
        return "metrics.jsonl differs"
    lines = [json.loads(line) for line in (victim / "starts.jsonl").read_text().splitlines()]
    repeated = [line["repeated_rounds"] for line in lines if "repeated_rounds" in line]
    if any(rounds > 1 for rounds in repeated) or len(repeated) > kills:
        return f"more than one round repeated a kill: {repeated} in {kills} kills"
    return ""


def _metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def _is_new(path: Path, before: int | None) -> bool:
    return _changed(path) != before


def _changed(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _text(path: Path) -> str:
    """Return a file of /proc, empty if the process has gone."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def elastic_table(tallies: dict[tuple[str, int], ElasticTally]) -> str:
    lines = [
        "| configuration | ranks | jobs | kills: at the start, in a round, in a save | of rank 0 "
        "| rounds repeated | seconds a kill | equal to the run never stopped |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, ranks), t in tallies.items():
        kills = sum(t.kills.values())
        equal = f"no: {'; '.join(t.differences)}" if t.differences else "yes, all"
        by_moment = f"{kills}: {', '.join(map(str, t.kills.values()))}"
        cost = f"{t.seconds / max(1, kills):.1f}"
        lines.append(f"| {name} | {ranks} | {t.jobs} | {by_moment} | {t.of_rank_0} | {t.repeated} | {cost} | {equal} |")
    return "\n".join([*lines, ""])


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
    parser.add_argument("--elastic", action="store_true", help="kill ranks of torchrun --max-restarts 200")
    given = parser.parse_args()
    shutil.rmtree(given.work / "kill_resume", ignore_errors=True)
    if given.elastic:
        by_torchrun = _side_by_side(given, torment_by_torchrun, ELASTIC)
        text, differ = elastic_table(by_torchrun), any(t.differences for t in by_torchrun.values())
    else:
        by_hand = _side_by_side(given, torment, [(name,) for name in CONFIGURATIONS])
        text = table({name: tally for (name,), tally in by_hand.items()})
        differ = any(t.differences for t in by_hand.values())
    print(text)
    if given.out:
        given.out.write_text(text)
    return int(differ)


def _side_by_side(given: argparse.Namespace, kill: Callable[..., T], cases: Sequence[C]) -> dict[C, T]:
    """Return what happened in each case, some of them at once."""
    with ThreadPoolExecutor(given.at_once) as pool:
        futures = {}
        for i, case in enumerate(cases):
            kills = given.kills // len(cases) + (i < given.kills % len(cases))
            folder = given.work.resolve() / "kill_resume" / str(i)
            futures[case] = pool.submit(kill, *case, kills, folder, random.Random(f"{given.seed} {case[0]}"))
        return {case: future.result() for case, future in futures.items()}


if __name__ == "__main__":
    sys.exit(main())
