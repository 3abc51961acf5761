"""Feeds mutants of messages to the decoder: only clean refusals, no crash, no memory beyond the limits.

    python tests/stress/fuzz_wire.py --frames 1000000
    FEDQ_KERNELS=reference python tests/stress/fuzz_wire.py --frames 100000

Each mutant of `wire_mutants.py` is unpacked (every eighth through an `Assembler`, in chunks). One that is accepted
must decode to tensors of the shapes it names and pack to the same bytes again; every fourth must add and sum to the
same values, and every eighth decode to the same values on the reference. Any exception but a `FieldError`, a crash, or
an allocation beyond the limits is a failure: its input is saved and the run ends with 1. It all happens in a child
process that may allocate ``--room-mib`` beyond what it has when it starts; the decoder is told to accept 64 KiB
messages that decode to 1 MiB.
"""

from __future__ import annotations

import argparse
import gc
import math
import mmap
import os
import random
import resource
import struct
import sys
import time
import traceback
from collections import Counter
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from wire_mutants import mutant

from fedq import kernels
from fedq.errors import FieldError
from fedq.report.encoding import make_readable
from fedq.wire import Assembler, Limits, Message, read_note, split_body, unpack

LIMITS = Limits(message_bytes=1 << 16, header_bytes=1 << 13, tensors=64, decoded_bytes=1 << 20, note_bytes=1 << 12)
_STATE = struct.Struct("<Q")


class WrongError(AssertionError):
    """An accepted message that is not what it should be."""


def read(data: bytes, number: int) -> Message:
    """Unpack a mutant: whole, or every eighth in chunks."""
    if number % 8:
        return unpack(data, LIMITS)
    size = 1 + number // 8 % 97
    assembler = Assembler(LIMITS)
    messages = [m for start in range(0, len(data), size) for m in assembler.add(data[start : start + size])]
    if len(messages) != 1 or assembler.pending:
        raise FieldError("stream", (len(messages), assembler.pending), "one whole message")
    return messages[0]


def check(data: bytes, number: int) -> str:
    """Return how a mutant ended: ``decoded``, or the field that was refused.

    Raises:
        WrongError: It was accepted and is not what it should be.
        Exception: Whatever else is wrong with the decoder.
    """
    try:
        message = read(data, number)
    except FieldError as error:
        return str(error.field)
    if message.frame.kind.name == "NOTE":
        try:
            read_note(message)
        except FieldError as error:
            return str(error.field)
    _check_decoded(message, number % 4 == 1)
    frame = message.frame
    if not (math.isnan(frame.loss) or math.isnan(frame.accuracy)) and message.pack() != data:
        raise WrongError("packs to other bytes")
    if number % 8 == 2 and message.layout is not None:
        _check_implementations(message)
    return "decoded"


def _check_decoded(message: Message, in_every_way: bool) -> None:
    """Decode once, or in every way there is."""
    layout, frame = message.layout, message.frame
    tensors = message.tensors()
    if sum(t.numel() * t.itemsize for t in tensors.values()) > LIMITS.decoded_bytes:
        raise WrongError("decodes to more than the limit")
    if layout is None or not in_every_way:
        return
    datas = split_body(layout, frame.body)
    out, total = torch.zeros(layout.numel), torch.zeros(layout.numel)
    layout.decode_add(datas, out, seed=frame.seed)
    layout.decode_sum([datas, datas], total, seeds=[frame.seed] * 2, weights=[0.5, 0.5])
    for span, data in zip(layout.spans, datas, strict=True):
        if sum(span.codec.section_nbytes(span.shape, data).values()) != data.numel():
            raise WrongError("sections do not add up")
        decoded = tensors[span.name]
        if decoded.shape != span.shape or not torch.equal(
            decoded.reshape(-1).nan_to_num(), out[span.slice].nan_to_num()
        ):
            raise WrongError("decodes and adds to different values")


def _check_implementations(message: Message) -> None:
    """Compare with what the reference decodes."""
    layout, frame = message.layout, message.frame
    assert layout is not None
    for span, payload in layout.payloads(split_body(layout, frame.body), seed=frame.seed):
        plan = getattr(span.codec, "_plan", None)
        if not span.numel or plan is None:
            continue
        kernels.reference.check(plan(span.shape), payload.data, span.numel)
        out = torch.empty(span.numel)
        kernels.reference.decode(plan(span.shape), payload.data, span.numel, seed=payload.seed, out=out)
        if not torch.equal(payload.decode().view(-1).nan_to_num(), out.nan_to_num()):
            raise WrongError(f"{span.codec.spec} differs from the reference")


# ---- the child ---------------------------------------------------------------------------------------------------


def _memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _allow(nbytes: int) -> None:
    """Let this process have so much address space."""
    resource.setrlimit(resource.RLIMIT_AS, (nbytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


def fuzz(first: int, last: int, until: float, seed: int, room: int, state: mmap.mmap, pipe: Connection) -> None:
    """Check mutants ``first`` to ``last``, note in ``state`` which one is at work, and send counts or a failure."""
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    for number in range(200):  # everything that is loaded once
        check(mutant(number), number)
    gc.collect()
    limit = _memory_bytes() + room if room else resource.RLIM_INFINITY
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, (0.0, first)
    number = first
    for number in range(first, last):
        _STATE.pack_into(state, 0, number)
        _allow(resource.RLIM_INFINITY)  # a mutant may have a table of 9 MB, which is copied a few times
        data = mutant(seed << 40 | number)
        _allow(limit)
        start = time.process_time()
        try:
            outcomes[check(data, number)] += 1
        except BaseException:  # a MemoryError too
            pipe.send(("failed", number, traceback.format_exc()))
            return
        slowest = max(slowest, (time.process_time() - start, number))
        if number % 1024 == 0 and time.monotonic() > until:
            break
    _allow(resource.RLIM_INFINITY)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send(("done", number + 1 - first, outcomes, grown, slowest))


def save(folder: Path, seed: int, number: int) -> Path:
    """Write a mutant to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"mutant_{seed}_{number}.bin"
    file.write_bytes(mutant(seed << 40 | number))
    return file


def main(argv: list[str] | None = None) -> int:
    """Run and report."""
    make_readable()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(20), help="default: a new one")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop earlier")
    parser.add_argument("--room-mib", type=int, default=48, help="address space that the decoder may take, 0: any")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz_wire"), help="where inputs that fail are saved")
    args = parser.parse_args(argv)
    print(f"seed {args.seed}, kernels: {kernels.implementation('cpu')}", flush=True)

    state, started = mmap.mmap(-1, _STATE.size), time.monotonic()
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    until = started + args.seconds
    child = context.Process(
        target=fuzz, args=(0, args.frames, until, args.seed, args.room_mib << 20, state, sender), daemon=True
    )
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:  # it died
        child.join()
        (number,) = _STATE.unpack_from(state)
        result = ("failed", number, f"the process ended with {child.exitcode}")
    child.join()
    if result[0] == "failed":
        print(f"frame {result[1]} FAILED, saved as {save(args.out, args.seed, result[1])}\n{result[2]}")
        return 1
    _, frames, outcomes, grown, slowest = result
    seconds = time.monotonic() - started
    print(f"{frames:,} frames in {seconds:.0f} s, {frames / seconds:,.0f} a second; {outcomes['decoded']:,} decoded")
    took, number = slowest
    print(
        f"resident memory grew by {grown / 1024:.1f} MiB; at most {1e3 * took:.1f} ms of processor a frame ({number})"
    )
    for field, count in outcomes.most_common():
        print(f"{count:>10,}  {field if field == 'decoded' else 'refused: ' + field}")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
