"""The benchmarks on links: their rows, their bytes against formulas, and namespaces that are always taken down."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import bench_collectives
import bench_step
import links
import pytest
from properties import few
from torch import nn

from fedq.codecs import codec
from fedq.collectives.segments import SEGMENT
from fedq.models import build_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ABOUT = {"hardware", "torch", "date"}


def why_no_namespaces() -> str:
    try:
        with links.links(1, "unlimited"):
            return ""
    except links.LinksUnavailable as error:
        return str(error)


LINK = "none" if why_no_namespaces() else "unlimited"
needs_namespaces = pytest.mark.skipif(bool(why_no_namespaces()), reason=why_no_namespaces() or "-")


def run(script: str, *flags: str) -> tuple[list[dict[str, Any]], str]:
    """Run a benchmark with two ranks, on loopback if need be; return its rows and its table."""
    out, flags = Path(flags[0]), flags[1:]
    command = [
        sys.executable,
        str(BENCHMARKS / "network" / script),
        "--links",
        LINK,
        "--ranks",
        "2",
        "--out",
        str(out),
        *flags,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    return json.loads(out.read_text()), done.stdout


def payload_nbytes(spec: str, model: nn.Module) -> int:
    """What the layout says: segments of the weights in the codec, everything with one dimension in bfloat16."""
    chosen, total = codec(spec), 0
    for param in model.parameters():
        if param.dim() == 1:
            total += 2 * param.numel()
            continue
        whole, rest = divmod(param.numel(), SEGMENT)
        total += whole * chosen.payload_nbytes(SEGMENT) + chosen.payload_nbytes(rest)
    return total


@pytest.mark.slow
def test_steps_have_rows_and_bytes_by_the_formula(tmp_path: Path) -> None:
    arms = ["no_sync", "none", "bf16", "int4", "int4-int6"]
    flags = ["--model", "cnn62k", "--steps", "2", "--repetitions", "2", "--trace", str(tmp_path / "traces")]
    rows, text = run("bench_step.py", str(tmp_path / "rows.json"), "--arms", *arms, *flags)
    names = set(bench_step.Row.__dataclass_fields__) | ABOUT | {"model", "batch_size"}
    assert all(set(row) == names for row in rows)
    by_arm = {row["arm"]: row for row in rows if row["overlap"] or row["arm"] == "no_sync"}
    assert list(by_arm) == arms
    assert {row["arm"] for row in rows if not row["overlap"]} == set(arms)  # with one bucket, and without any exchange
    model = build_model("cnn62k")
    int4, int6 = payload_nbytes("int4", model), payload_nbytes("int6", model)
    assert by_arm["int4"]["payload_bytes_per_step"] == int4  # one phase: to the one other rank
    assert by_arm["int4-int6"]["payload_bytes_per_step"] == pytest.approx((int4 + int6) / 2, abs=1)
    for arm, expected in {"none": 4 * 62006, "bf16": 2 * 62006, "int4": int4, "int4-int6": (int4 + int6) / 2}.items():
        assert expected < by_arm[arm]["interface_bytes_per_step"], arm
        if LINK != "none":  # the machine's loopback carries what others send, too
            # Headers: 66 bytes for each of a few packets and acknowledgements of each message.
            assert by_arm[arm]["interface_bytes_per_step"] < 1.01 * expected + 3000, arm
    assert all(row["ms_per_step"] > 0 and row["num_steps"] >= 2 for row in rows)
    assert by_arm["none"]["ratio_to_none"] == 1.0
    assert by_arm["no_sync"]["exposed_ms"] == 0.0
    assert all(0 <= row["trace_exposed_ms"] < 1000 for row in rows)
    assert (tmp_path / "traces" / f"{LINK}-2ranks-int4@once.json").exists()
    assert f"| {LINK} | 2 | int4 | off |" in text


@pytest.mark.slow
def test_collectives_have_rows_and_bytes_by_the_formula(tmp_path: Path) -> None:
    flags = ["--sizes", "65536", "--codecs", "fp32", "int4", "--calls", "2", "--repetitions", "2"]
    rows, _ = run("bench_collectives.py", str(tmp_path / "rows.json"), *flags)
    assert all(set(row) == set(bench_collectives.Row.__dataclass_fields__) | ABOUT for row in rows)
    int4 = codec("int4").payload_nbytes(65536 // 4)
    expected = {
        ("all_reduce", "fp32"): 65536,
        ("all_reduce", "bf16"): 32768,
        ("reduce", "fp32"): 65536,
        ("one_phase", "fp32"): 65536,
        ("one_phase", "int4"): int4,
        ("two_phase", "fp32"): 65536,
        ("two_phase", "int4"): int4,
    }
    assert {(row["schedule"], row["codec"]): row["payload_bytes"] for row in rows} == expected
    assert all(row["payload_bytes"] < row["interface_bytes"] for row in rows)
    assert rows[0]["ratio_to_all_reduce"] == 1.0


# ---- the trace ---------------------------------------------------------------------------------------------------


def event(name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "tid": tid}


def test_waiting_is_what_the_backward_pass_idles_after_its_last_gradient() -> None:
    events = [
        event("backward", 0, 100_000),
        event("conv", 1_000, 9_000),  # idle before and after it, but gradients are still to come
        event("torch::autograd::AccumulateGrad", 20_000, 5_000),
        event("copy_bucket_to_grad", 60_000, 10_000),
        event("inner", 62_000, 3_000),
        event("elsewhere", 30_000, 20_000, tid=2),
        event("optimizer", 150_000, 9_000),
    ]
    assert bench_step.waited(events) == pytest.approx((60 - 25) + (100 - 70))


# ---- bars --------------------------------------------------------------------------------------------------------


def row(arm: str, ms: float, link: str) -> bench_step.Row:
    return bench_step.Row(link, 2, arm, arm != "no_sync", ms, 0.1, 1, None, 1.0, 1.0, 5, None)


@pytest.mark.parametrize(
    ("link", "int4", "met"),
    [
        ("1gbit", 250, True),
        ("1gbit", 260, False),  # 1.5x none, but slower than fp16
        ("100mbit", 55, True),
        ("100mbit", 60, False),
        ("unlimited", 480, True),
        ("unlimited", 481, False),
    ],
)
def test_bars_for_two_ranks(link: str, int4: float, met: bool) -> None:
    rows = [row("none", 400, link), row("fp16", 250, link), row("bf16", 255, link), row("int4", int4, link)]
    assert ("met by int4" in bench_step.bar(rows)) == met
    assert not bench_step.bar(rows[:-1])


# ---- links -------------------------------------------------------------------------------------------------------


def namespaces() -> list[str]:
    """Names of this process's namespaces."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return re.findall(rf"fedq{os.getpid()}-\w+", listed)


@needs_namespaces
def test_links_are_limited_and_taken_down_on_failure() -> None:
    def fail_inside() -> None:
        with links.links(2, "100mbit") as prefixes:
            assert len(namespaces()) == 3
            shown = subprocess.run([*prefixes[1], "tc", "qdisc"], check=True, capture_output=True, text=True).stdout
            assert "rate 100Mbit" in shown
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert not namespaces()


@needs_namespaces
def test_a_rate_that_does_not_exist_leaves_nothing_behind() -> None:
    with pytest.raises(links.LinksUnavailable, match="none measures on plain loopback"), links.links(2, "fast"):
        pass
    assert not namespaces()


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("number", few([signal.SIGTERM, signal.SIGINT], 1))
def test_a_signal_takes_links_and_ranks_down(tmp_path: Path, number: int) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, signal, sys, time
            import links
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            here = pathlib.Path(__file__)
            if "--rank-of" in sys.argv:
                here.with_name("rank" + os.environ["RANK"]).write_text(str(os.getpid()))
                time.sleep(60)
            else:
                links.run_ranks(here, 2, "unlimited", {})
            """
        )
    )
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])}
    process = subprocess.Popen([sys.executable, str(script)], env=environ, stderr=subprocess.PIPE)
    try:
        files = [tmp_path / "rank0", tmp_path / "rank1"]
        end = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) != 0
    finally:
        process.kill()
        process.communicate()
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    assert f"fedq{process.pid}-" not in listed
    assert not any(Path("/proc", file.read_text()).exists() for file in files)


def test_without_root_it_says_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(links.LinksUnavailable, match=r"needs root\. --links none"), links.links(2, "1gbit"):
        pass
    with links.links(2, "none") as prefixes:
        assert prefixes == [[], []]


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text("import os, time\ntime.sleep(60 * int(os.environ['RANK'])) or exit(7)\n")
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"\[7, None\]"):
        links.run_ranks(script, 2, "none", {})
    assert time.monotonic() - begin < 30


def test_spread_is_half_the_distance_of_the_quartiles() -> None:
    median, spread = links.median_and_spread([1.0, 2.0, 3.0, 4.0, 5.0])
    assert median == 3.0
    assert spread == pytest.approx((4.5 - 1.5) / 2 / 3)
    assert links.median_and_spread([2.0]) == (2.0, 0.0)
