"""Sends messages that are legal on the wire, with extreme fields, to a live server: it must finish its rounds.

    python tests/stress/fuzz_server.py --messages 100000

Clients in threads of this process join `fedq server` on the loopback interface and answer every task with a message
whose fields are mostly right and now and then the ends of their ranges, random bits, or text with control characters.
It counts what the server said to each. Any end of the server but a clean one after its last round is a failure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedq.layout import Layout, LayoutSchedule
from fedq.models import build_model
from fedq.network.connection import Connection, NotWanted
from fedq.report.encoding import make_readable
from fedq.wire import Frame, Kind, Message, join_payloads, read_note

SPEC = "sign"
NUM_EXAMPLES = 40
_KINDS = (Kind.UPDATE,) * 6 + (Kind.LEFT_OUT,) * 3 + (Kind.FAILED,) * 3 + (Kind.NOTE, Kind.CHANGE, Kind.MODEL)
_ENDS = {32: (0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1), 64: (0, 1, 2**63 - 1, 2**63, 2**64 - 1)}
_FLOATS = (0.0, -0.0, 1.0, 1.01, -1.0, 1e38, -1e38, 3.4e38, -3.4e38, 1e-45, math.inf, -math.inf, math.nan)
_WEIGHTS = (0.0, 5e-324, 0.5, 2.0**31, 2.0**53 + 2, 2.0**63, 2.0**64, 1e300, 1.7e308)
_TEXTS = (
    "",
    "oops",
    "\x1b[2J\x1b[31m",
    "a\r\nround 9/9",
    "\u202e\u2066\u200b\ufeff",
    "\0" * 50,
    "\U0010ffff",
    "{" * 500,
)


def random_answer(
    rng: random.Random, layout: Layout, *, round: int, sequence: int, client: int, num_examples: int
) -> Message:
    """Return a message that is legal on the wire; about half of them are also right.

    Args:
        rng: Draws.
        layout: Of an update.
        round: As the task says; the others too.
        sequence: Of the task.
        client: The sender.
        num_examples: Its weight.
    """
    kind = rng.choice(_KINDS)
    frame = Frame(
        kind=kind,
        round=_odd(rng, round, lambda: _whole(rng, 32)),
        client=_odd(rng, client, lambda: _whole(rng, 32)),
        layout_hash=layout.hash if kind.has_payloads else _whole(rng, 64),
        seed=_whole(rng, 64),
        weight=_odd(rng, float(num_examples), lambda: rng.choice(_WEIGHTS)),
        loss=_odd(rng, 1.0, lambda: _float(rng), share=0.3),
        accuracy=_odd(rng, 0.5, lambda: _float(rng), share=0.2),
        body=_body(rng, layout, kind),
    )
    message = Message(frame, layout if kind.has_payloads else None, _odd(rng, sequence, lambda: _whole(rng, 64)))
    if kind.has_payloads and rng.random() < 0.05:
        return replace(message, exact={rng.choice("abc"): torch.zeros(rng.randrange(4))})
    return message


def _odd(rng: random.Random, usual: Any, draw: Any, share: float = 0.08) -> Any:
    return draw() if rng.random() < share else usual


def _whole(rng: random.Random, bits: int) -> int:
    return rng.choice(_ENDS[bits]) if rng.random() < 0.7 else rng.getrandbits(bits)


def _float(rng: random.Random) -> float:
    """Return a float32: one of the ends, or any bits."""
    if rng.random() < 0.5:
        return rng.choice(_FLOATS)
    return float(struct.unpack("<f", rng.getrandbits(32).to_bytes(4, "little"))[0])


def _body(rng: random.Random, layout: Layout, kind: Kind) -> torch.Tensor:
    if kind.has_payloads:
        return join_payloads(layout, layout.encode(torch.zeros(layout.numel), seed=0))
    if kind == Kind.LEFT_OUT:
        return torch.empty(0, dtype=torch.uint8)
    text: bytes = rng.choice(_TEXTS).encode() if rng.random() < 0.7 else rng.randbytes(rng.randrange(600))
    if kind == Kind.NOTE:
        text = json.dumps({"kind": rng.choice(["hello", "accepted", None]), "n": rng.choice(_ENDS[64])}).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


class Fuzzer(threading.Thread):
    """A client that answers every task with a random message.

    Args:
        address: Of the server.
        number: Its own.
        seed: Of its draws.
        layout: Of an update.
    """

    def __init__(self, address: str, number: int, seed: int, layout: Layout) -> None:
        super().__init__(daemon=True)
        self.connection = Connection(address, None, number)
        self.number, self.layout, self.rng = number, layout, random.Random(f"{seed} {number}")
        self.outcomes: Counter[str] = Counter()
        self.start()

    def run(self) -> None:
        try:
            self._take_part()
        except Exception as error:  # counted; what matters is how the server ends
            self.outcomes[f"{type(error).__name__}: {error}"] += 1
        finally:
            self.connection.close()

    def _take_part(self) -> None:
        hello = {"kind": "hello", "run": "", "uplink": SPEC, "feedback": False}
        for message in self.connection.follow(hello | {"num_examples": NUM_EXAMPLES, "own_data": True}):
            if message.frame.kind.has_payloads:
                continue
            text = read_note(message)
            if text["kind"] == "welcome":
                self.connection.opened(text["session"])
            elif text["kind"] == "task":
                self._answer(int(text["round"]), message.sequence)

    def _answer(self, round: int, sequence: int) -> None:
        answer = random_answer(
            self.rng, self.layout, round=round, sequence=sequence, client=self.number, num_examples=NUM_EXAMPLES
        )
        try:
            self.connection.send(answer, timeout=60)
            self.outcomes["taken"] += 1
        except NotWanted as error:
            self.outcomes["refused: " + str(error).partition("=")[0]] += 1


def _start_server(run: Path, log: Path, clients: int, rounds: int) -> tuple[subprocess.Popen[bytes], str]:
    """Start a server, and return it with its address."""
    job = "--dataset digits --train-examples 200 --model cnn62k --precision fp32 --device cpu --threads 1"
    flags = f"--uplink {SPEC} --downlink {SPEC} --accept-own-data --max-offences 1000000000 --round-timeout 60"
    often = f"--eval-every {max(1, rounds // 10)} --checkpoint-every {max(1, rounds // 10)}"
    sizes = f"--clients {clients} --rounds {rounds} --min-examples 1 --out {run}"
    command = f"-m fedq server --insecure --bind localhost:0 {job} {flags} {often} {sizes}"
    with log.open("wb") as file:
        server = subprocess.Popen([sys.executable, *command.split()], stdout=file, stderr=subprocess.STDOUT)
    while server.poll() is None:
        if found := re.search(rb"listening on (\S+?:\d+)", log.read_bytes()):
            return server, found[1].decode()
        time.sleep(0.1)
    raise RuntimeError(log.read_text(errors="replace"))


def _wait(server: subprocess.Popen[bytes], fuzzers: list[Fuzzer]) -> int:
    """Return how the server ended; without clients it would wait for ever, and is ended."""
    while server.poll() is None and any(fuzzer.is_alive() for fuzzer in fuzzers):
        time.sleep(0.1)
    try:
        return server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def main(argv: list[str] | None = None) -> int:
    """Run and report."""
    make_readable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(20), help="default: a new one")
    parser.add_argument("--out", type=Path, help="the server's run; default: a temporary folder")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return _run(args, args.out or Path(folder) / "run", Path(folder) / "log")


def _run(args: argparse.Namespace, run: Path, log: Path) -> int:
    began, rounds = time.monotonic(), -(-args.messages // args.clients)
    layout = LayoutSchedule.of(build_model("cnn62k"), SPEC, feedback=False).at(0)
    server, address = _start_server(run, log, args.clients, rounds)
    print(f"seed {args.seed}, {args.clients} clients, {rounds} rounds", flush=True)
    fuzzers = [Fuzzer(address, number, args.seed, layout) for number in range(args.clients)]
    code = _wait(server, fuzzers)
    for fuzzer in fuzzers:
        fuzzer.join(30)
    outcomes = sum((fuzzer.outcomes for fuzzer in fuzzers), Counter[str]())
    done = json.loads((run / "summary.json").read_text())["rounds"] if code == 0 else None
    print(f"{outcomes.total():,} messages in {time.monotonic() - began:.0f} s; the server ended with {code}")
    for what, count in outcomes.most_common():
        print(f"{count:>10,}  {what}")
    if code == 0 and done == rounds:
        return 0
    print(f"FAILED after {done} of {rounds} rounds\n" + log.read_text(errors="replace")[-4000:])
    return 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
