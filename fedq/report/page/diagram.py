"""Who sent what to whom, as inline SVG: narrow enough for a phone, coloured by the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fedq.report.page.evidence import Evidence
from fedq.text import human_bytes

WIDTH = 360
_BOX = 84
_GAP = 12


def diagram(one: Evidence) -> str:
    """Return the SVG of one run: server and clients with both directions, or ranks with both legs of a step."""
    if one.exchange == "step":
        return _svg(_steps(one), 300)
    if one.exchange == "none":
        return _svg(_alone(one), 130)
    return _svg(_rounds(one), 292)


def _rounds(one: Evidence) -> list[str]:
    summary = one.run.summary
    spread = summary.get("aggregate") == "two_phase"
    ranks = int(summary.get("world_size") or 1)
    where = f"a part on each of {ranks} ranks" if spread else "on rank 0"
    clients = int(summary.get("num_clients") or 0)
    cohort = summary.get("cohort") or clients
    on = f"{clients} clients, {cohort} a round, on {ranks} rank{'s' * (ranks > 1)}"
    return [
        _box(30, 8, WIDTH - 60, 46, "server", f"{summary.get('server', 'fedavg')}, {where}"),
        *_arrow(90, 216, 62, one, "uplink", "up"),
        *_arrow(270, 62, 216, one, "downlink", "down"),
        *_group(224, [f"client {i}" for i in _some(clients)]),
        _text(WIDTH / 2, 284, on, "small"),
    ]


def _steps(one: Evidence) -> list[str]:
    summary = one.run.summary
    ranks = int(summary.get("world_size") or 1)
    steps = ["rank 0 to all"] if ranks == 1 else [f"rank {i}" for i in _some(ranks)]
    if summary.get("downlink_bytes"):
        middle = ("owners of chunks", "decode, sum in float32, encode again")
        first, second = "first leg, to the owner of each chunk", "second leg, from owners to all ranks"
    else:
        middle, first = ("every rank", "decodes all and takes the mean"), "one leg, to every rank"
        second = "no second leg: one reaches everyone"
    return [
        *_group(8, steps),
        *_leg(54, 112, one, "uplink", first),
        _box(30, 120, WIDTH - 60, 46, *middle),
        *(_leg(170, 228, one, "downlink", second) if summary.get("downlink_bytes") else [_text(180, 200, second)]),
        *_group(236, steps),
        _text(WIDTH / 2, 294, f"{ranks} ranks, all with the same model after every step", "small"),
    ]


def _alone(one: Evidence) -> list[str]:
    clients = int(one.run.summary.get("num_clients") or 0)
    return [
        *_group(12, [f"client {i}" for i in _some(clients)]),
        _text(WIDTH / 2, 86, "nothing was sent", "strong"),
        _text(WIDTH / 2, 108, f"{clients} clients, each trained alone", "small"),
    ]


def arrow_words(one: Evidence, direction: str) -> list[str]:
    """Return a direction's codec, its bytes in all, a message's, and how that compares with float32."""
    summary = one.run.summary
    sent, raw = summary.get(f"{direction}_bytes") or 0, summary.get(f"{direction}_bytes_fp32") or 0
    codec = str(summary.get(direction, "-"))
    if one.run.algorithm == "fedbat" and direction == "uplink":
        codec = "fedbat"
    words = [codec, human_bytes(sent)]
    messages = one.bytes.messages.get(direction, 0) if one.bytes else 0
    if messages:
        noun = "rank and epoch" if one.exchange == "step" else "message"
        words.append(f"{human_bytes(sent / messages)} a {noun}")
    if sent and raw:
        words.append(f"{raw / sent:.3g}x less than float32" if raw > 1.02 * sent else "as much as float32")
    return words


def _arrow(x: float, start: float, end: float, one: Evidence, direction: str, noun: str) -> list[str]:
    codec, *rest = arrow_words(one, direction)
    lines = [noun, _cut(codec), *rest]
    top = (start + end) / 2 - 8 * (len(lines) - 1)
    words = [_text(x, top + 16 * i + 4, line, "strong" if i == 2 else "") for i, line in enumerate(lines)]
    return [_line(x - 76, start, end, direction), *words]


def _leg(start: float, end: float, one: Evidence, direction: str, noun: str) -> list[str]:
    codec, nbytes, *rest = arrow_words(one, direction)
    lines = [noun, f"{_cut(codec)}, {nbytes}", ", ".join(rest)]
    words = [
        _text(190, (start + end) / 2 - 12 + 16 * i, line, "strong" if i == 1 else "") for i, line in enumerate(lines)
    ]
    return [_line(14, start, end, direction), *words]


def _line(x: float, start: float, end: float, direction: str) -> str:
    tip = end + (7 if end < start else -7)
    head = f"M{x - 6} {tip} L{x} {end} L{x + 6} {tip} Z"
    return f'<path class="arrow {direction}" d="M{x} {start} L{x} {tip}"/><path class="head {direction}" d="{head}"/>'


def _group(y: float, names: Sequence[str]) -> list[str]:
    width = len(names) * _BOX + (len(names) - 1) * _GAP
    left = (WIDTH - width) / 2
    return [
        _text(left + i * (_BOX + _GAP) + _BOX / 2, y + 26, "…", "strong")
        if name.endswith("…")
        else _box(left + i * (_BOX + _GAP), y, _BOX, 40, name)
        for i, name in enumerate(names)
    ]


def _some(num: int) -> list[str]:
    """Return the first numbers, dots, and the last."""
    return [str(i) for i in range(num)] if num <= 3 else ["0", "…", str(num - 1)]


def _cut(words: str, most: int = 24) -> str:
    return words if len(words) <= most else f"{words[: most - 1]}…"


def _box(x: float, y: float, width: float, height: float, name: str, second: str = "") -> str:
    middle = x + width / 2
    lines = [_text(middle, y + height / 2 + (-3 if second else 5), name, "strong")]
    lines += [_text(middle, y + height / 2 + 14, _cut(second, 44), "small")] if second else []
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"/>' + "".join(lines)


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def _svg(parts: Sequence[str], height: int) -> str:
    words = "Diagram of who sent what to whom"
    box = f"0 0 {WIDTH} {height}"
    return f'<svg class="diagram" viewBox="{box}" role="img" aria-label="{words}">{"".join(parts)}</svg>'
