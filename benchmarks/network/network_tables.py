"""Tables of the network benchmark: what runs have left (see `network_runs.py`) as Markdown, and which bars are met."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from network_runs import MODEL, MOMENTUM, OURS, PIECES, SYSTEMS, WEIGHT_DECAY, WHOLE, Exchange, Federation

from fedq.sweep.table import interval

COMMAND = "python benchmarks/network/bench_network.py"
TITLES = {
    "exchange": "A round without training, beside bare gRPC",
    "accuracy": "MNIST across a network: accuracy, and bytes on the interface",
    "links": "The same through slow links",
}
SLOWEST = 2.0
"""A round's seconds over bare gRPC's that are allowed."""
FRAME, WIRE, WIRE_A_MESSAGE = 0.01, 0.05, 20_000
"""Overheads that are allowed: of the frame, of everything on the wire, and bytes for each message besides."""
WITHIN, UPLINK_SHARE, REACHED = 0.3, 0.26, 97.5
"""int8 against float32: points of accuracy, share of the uplink's bytes; what float32 is to reach, in percent."""
Facts = dict[str, Any]


def met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def cost(runs: Iterable[Facts]) -> Facts:
    """Return the processor and wall seconds of some runs."""
    found = list(runs)
    return {name: sum(run[name] for run in found) for name in ("cpu_s", "wall_s")}


def remade(part: str, flags: str, runs: Iterable[Facts]) -> str:
    """Return the last line: the command, and what it costs."""
    spent = cost(runs)
    return (
        f"Re-made by `{COMMAND} --part {part} {flags}--out RESULTS --table docs/network_results.md` "
        f"({spent['cpu_s'] / 60:.0f} minutes of CPU, {spent['wall_s'] / 60:.0f} minutes in all).\n"
    )


def table_line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def head_lines(*cells: str) -> list[str]:
    return [table_line(cells), "|---" * len(cells) + "|"]


# ---- exchange --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExchangeRow:
    """One model and number of clients, with the turns of every system."""

    exchange: Exchange
    turns: Mapping[str, Sequence[Facts]]

    def seconds(self, system: str) -> list[float]:
        """Return the seconds of every round."""
        return [seconds for turn in self.turns[system] for seconds in turn["seconds"]]

    @property
    def bare_s(self) -> float:
        """The median round of the faster bare exchange."""
        return min(statistics.median(self.seconds(system)) for system in (WHOLE, PIECES))

    @property
    def ratio(self) -> float:
        """Our median round over the bare one."""
        return statistics.median(self.seconds(OURS)) / self.bare_s

    def part_s(self, name: str) -> float:
        """Return the median seconds of a part of our rounds: moving, client or server."""
        return statistics.median(parts[name] for turn in self.turns[OURS] for parts in turn["parts"])

    def line(self) -> str:
        cells = [self.exchange.model, f"{self.exchange.nbytes / 1e6:.2f}", str(self.exchange.clients)]
        cells += [span(self.seconds(system)) for system in (WHOLE, PIECES, OURS)]
        cells += [f"{1e3 * self.part_s(name):.1f}" for name in ("moving", "client", "server")]
        return table_line([*cells, f"{self.part_s('moving') / self.bare_s:.2f}", f"{self.ratio:.2f}"])


def span(seconds: Sequence[float]) -> str:
    """Return median, least and most, in milliseconds."""
    return f"{1e3 * statistics.median(seconds):.1f} ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"


def exchange_section(rows: Sequence[ExchangeRow], about: Facts) -> str:
    worst = max(row.ratio for row in rows)
    turns = rows[0].turns[OURS]
    lines = [
        f"## {TITLES['exchange']}",
        "",
        f"{about['hardware']}, torch {about['torch']}, grpcio {about['grpcio']}, {about['date']}; server and clients "
        "on loopback, mutual TLS, one torch thread each.",
        "",
        "Nothing is trained: `fedq.network.join` with a function that returns at once, and `fedq server`, float32 both "
        "ways. Ours: from one task's arrival at a client to the next one's: all that a round does, but for evaluation "
        "and checkpoint. Of it: the bytes' way, with messages' checksums and the model that newcomers are offered "
        "(moving); what the client does with them: decode and apply, compare the model's checksum, write it into the "
        "module and read it, encode (client); decode, average, step, encode (server); the rest is metrics and books. "
        "Bare: `rivals/bare_grpc.py`, the same bytes down to all clients and up from all, a message whole or in pieces "
        f"of 1 MiB. Median (least to most) of {sum(len(turn['seconds']) for turn in turns)} rounds in {len(turns)} "
        "turns, systems interleaved.",
        "",
        *head_lines(
            *("model", "MB", "clients", "bare, whole, ms", "bare, 1 MiB, ms", "ours, ms"),
            *("moving", "client", "server", "moving / bare", "ours / bare"),
        ),
        *(row.line() for row in rows),
        "",
        f"Bar: at most {SLOWEST:g} times the faster bare exchange; the worst is {worst:.2f} ({met(worst <= SLOWEST)}).",
        "",
        remade("exchange", "", [turn for row in rows for turns in row.turns.values() for turn in turns]),
    ]
    return "\n".join(lines)


# ---- accuracy and bytes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overheads:
    """What crossed beside the payloads.

    Args:
        frame: All bytes of messages over those of their payloads, less 1; the worse direction.
        wire: Bytes on the server's interface over those of the messages, less 1.
        frames: The same in Ethernet frames.
        excess: Bytes on the interface beyond what is allowed in proportion, for each message.
    """

    frame: float
    wire: float
    frames: float
    excess: float

    @classmethod
    def of(cls, run: Facts) -> Overheads | None:
        """Return a run's; None without an interface of its own."""
        crossed, both = run["crossed"], list(run["messages"].values())
        if crossed is None:
            return None
        told = sum(way["all"] for way in both)
        moved = crossed["sent"] + crossed["received"]
        return cls(
            frame=max(way["all"] / way["payload"] for way in both) - 1,
            wire=moved / told - 1,
            frames=(crossed["sent_frames"] + crossed["received_frames"]) / told - 1,
            excess=(moved - (1 + WIRE) * told) / sum(way["count"] for way in both),
        )


@dataclass(frozen=True)
class Cell:
    """All seeds of one codec and number of clients."""

    federation: Federation
    runs: Sequence[Facts]

    @property
    def accuracies(self) -> np.ndarray:
        """Test accuracy in percent, by run."""
        return 100 * np.array([run["test_accuracy"] for run in self.runs])

    @property
    def overheads(self) -> list[Overheads]:
        """Those of the runs that had an interface of their own."""
        return [found for run in self.runs if (found := Overheads.of(run)) is not None]

    def mean_of(self, direction: str, name: str) -> float:
        """Return the mean of a figure of the messages in one direction."""
        return float(np.mean([run["messages"][direction][name] for run in self.runs]))

    def differences(self, base: Cell) -> np.ndarray:
        """Return the differences to another cell, in points, over the seeds that both have."""
        reference = {run["settings"]["seed"]: run["test_accuracy"] for run in base.runs}
        pairs = [(run["test_accuracy"], reference.get(run["settings"]["seed"])) for run in self.runs]
        return np.array([100 * (one - other) for one, other in pairs if other is not None])

    def uplink_share(self, base: Cell) -> float:
        """Return the uplink's bytes over another cell's."""
        return self.mean_of("uplink", "all") / base.mean_of("uplink", "all")

    def line(self, base: Cell | None) -> str:
        """Return its line; differences are to ``base``."""
        federation, accuracies = self.federation, self.accuracies
        found = self.overheads
        worst = [
            f"{100 * max(getattr(one, name) for one in found):.2f} %" if found else "-"
            for name in ("frame", "wire", "frames")
        ]
        count = sum(self.mean_of(direction, "count") for direction in ("uplink", "downlink"))
        return table_line(
            [
                str(federation.clients),
                f"{federation.uplink} / {federation.downlink}",
                str(federation.rounds),
                f"{accuracies.mean():.2f}" + (f" ± {accuracies.std(ddof=1):.2f}" if len(accuracies) > 1 else ""),
                interval(self.differences(base)) if base is not None and base is not self else "",
                f"{self.mean_of('uplink', 'all') / 1e6:.2f}",
                f"{self.uplink_share(base):.3f}" if base is not None else "-",
                f"{self.mean_of('downlink', 'all') / 1e6:.2f}",
                f"{count:.0f}",
                *worst,
                f"{np.mean([run['ends_s'][-1] for run in self.runs]):.0f}",
                f"{np.mean([run['cpu_s'] for run in self.runs]):.0f}",
            ]
        )


def base_of(cells: Iterable[Cell], cell: Cell) -> Cell | None:
    """Return the float32 cell of as many clients."""
    same = [other for other in cells if other.federation.clients == cell.federation.clients]
    return next((other for other in same if other.federation.uplink == "fp32"), None)


def accuracy_section(cells: Sequence[Cell], about: Facts) -> str:
    lines = [
        f"## {TITLES['accuracy']}",
        "",
        setting(cells[0].federation, cells[0].runs[0], about),
        "",
        "Every party is a process in a network namespace of its own, behind a bridge, with mutual TLS. Bytes are those "
        "of a whole run. Messages: those with payloads. Frame: all bytes of the messages, control messages too, over "
        "their payloads' (the worse direction). Wire: what the kernel counted on the server's interface, both "
        "directions, over the messages' bytes; TLS, HTTP/2, TCP, handshakes and acknowledgements are in it. In frames: "
        "the same as Ethernet frames of 1,500 bytes, each with its headers (the interface counts one for all that "
        "the kernel hands over in one piece). Seconds: from the moment that all clients are ready to the end of the "
        "last round, all processes on one machine.",
        "",
        *head_lines(
            *("clients", "up / down", "rounds", "test accuracy, %", "difference to fp32 (95 %)", "MB up", "of fp32"),
            *("MB down", "messages", "frame", "wire", "in frames", "s", "CPU s"),
        ),
        *(cell.line(base_of(cells, cell)) for cell in cells),
        "",
        *overhead_verdicts([found for cell in cells for found in cell.overheads]),
        *accuracy_verdicts(cells),
        "",
        remade("accuracy", "--data-dir DIR ", [run for cell in cells for run in cell.runs]),
    ]
    return "\n".join(lines)


def overhead_verdicts(overheads: Sequence[Overheads]) -> list[str]:
    """Return the bars of the bytes, and whether they are met."""
    if not overheads:
        return []
    frame, wire, excess = (max(getattr(one, name) for one in overheads) for name in ("frame", "wire", "excess"))
    return [
        f"- The frame adds at most {100 * frame:.2f} % (bar: {100 * FRAME:g} %, {met(frame <= FRAME)}).",
        f"- Everything on the wire adds at most {100 * wire:.2f} %; beyond {100 * WIRE:g} % are at most "
        f"{max(0.0, excess) / 1e3:.1f} kB a message (bar: {WIRE_A_MESSAGE / 1e3:g} kB, "
        f"{met(excess <= WIRE_A_MESSAGE)}).",
    ]


def accuracy_verdicts(cells: Sequence[Cell]) -> list[str]:
    """Return the bars of float32 and int8 at the first number of clients, and whether they are met."""
    named = {cell.federation.uplink: cell for cell in reversed(cells) if cell.federation.clients == least(cells)}
    lines = []
    if plain := named.get("fp32"):
        reached = plain.accuracies.mean()
        lines.append(
            f"- float32 with {least(cells)} clients: {reached:.2f} % (bar: {REACHED:g} %, {met(reached >= REACHED)})."
        )
    if plain and (int8 := named.get("int8")):
        gap, share = int8.differences(plain), int8.uplink_share(plain)
        is_met = abs(gap.mean()) <= WITHIN and share <= UPLINK_SHARE
        lines.append(
            f"- int8 with {least(cells)} clients: {interval(gap)} points from float32 over {len(gap)} paired seeds, at "
            f"{share:.3f} of its uplink (bars: {WITHIN:g} points, {UPLINK_SHARE:g}; {met(is_met)})."
        )
    return lines


def least(cells: Sequence[Cell]) -> int:
    return min(cell.federation.clients for cell in cells)


# ---- slow links ------------------------------------------------------------------------------------------------------


def links_section(found: Sequence[tuple[Federation, Facts]], about: Facts) -> str:
    federation, run = next(pair for pair in found if pair[0].system == OURS)
    target = 100 * (federation.target or 1.0)
    plain = next((seconds_to(run) for arm, run in found if arm.system == OURS and arm.uplink == "fp32"), None)
    lines = [
        f"## {TITLES['links']}",
        "",
        f"{setting(federation, run, about)} Every party is behind a link of {federation.link} in each direction (a "
        "token bucket), the server too, whose link all clients share.",
        "",
        f"Seconds until {target:g} % of the validation images are right at the end of a round, from the moment that "
        "all clients are ready; training ends there. fedq: mutual TLS, the first model in float32. R2's way: "
        "`rivals/socket_pickle.py`, whole float32 models in pickles on plain TCP, written from the description of a "
        "socket demo, with its mistakes mended. Flower: its FedAvg, deployed, without TLS. All start from the same "
        "weights, with the same shares, local training and learning rates; shuffles and dropout differ.",
        "",
        *head_lines(
            *("system", "up / down", "rounds", f"s to {target:g} %", "first round, s", "later rounds, s"),
            *("MB of messages", "MB on the server's link", "times as fast as fedq's fp32"),
        ),
        *(links_line(federation, run, plain) for federation, run in found),
        "",
        remade("links", "--data-dir DIR ", [run for _, run in found]),
    ]
    return "\n".join(lines)


def links_line(federation: Federation, run: Facts, plain: float | None) -> str:
    ends, seconds, crossed = run["ends_s"], seconds_to(run), run["crossed"]
    best = f"not in {len(ends)} rounds ({100 * max(run['val_accuracies']):.1f} %)"
    told = message_bytes(run)
    return table_line(
        [
            SYSTEMS[federation.system],
            f"{federation.uplink} / {federation.downlink}",
            str(len(ends)),
            f"{seconds:.0f}" if seconds is not None else best,
            f"{ends[0]:.1f}",
            f"{np.mean(np.diff(ends)):.1f}" if len(ends) > 1 else "-",
            f"{told / 1e6:.1f}" if told is not None else "-",
            f"{(crossed['sent'] + crossed['received']) / 1e6:.1f}" if crossed else "-",
            f"{plain / seconds:.1f}" if plain is not None and seconds is not None else "-",
        ]
    )


def seconds_to(run: Facts) -> float | None:
    """Return when a round first reached the target; None if none did."""
    reached = zip(run["val_accuracies"], run["ends_s"], strict=True)
    return next((end for accuracy, end in reached if accuracy >= run["settings"]["target"]), None)


def message_bytes(run: Facts) -> int | None:
    """Return the bytes of all messages, if the system says."""
    if "messages" in run:
        return sum(way["all"] for way in run["messages"].values())
    return run.get("moved")


def setting(federation: Federation, run: Facts, about: Facts) -> str:
    """Return what was trained, and on what."""
    return (
        f"{about['data_note']}: {run['data']}; {MODEL}, {run['num_params']:,} parameters, IID shares, one epoch a "
        f"round, batch {federation.batch_size}, SGD {federation.lr:g} (cosine), momentum {MOMENTUM:g}, weight decay "
        f"{WEIGHT_DECAY:g}, no augmentation, feedback auto, one thread a process; {about['hardware']}, torch "
        f"{about['torch']}, grpcio {about['grpcio']}, {about['date']}."
    )
