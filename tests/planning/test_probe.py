"""The probe on real ranks, and ``--uplink auto``: the same choice on all, kept in the run, and no other training."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from distributed import run_group
from jobs import file_hash, small_config
from properties import few, is_all

from fedq.cli import main
from fedq.config import Config, validate
from fedq.errors import FieldError
from fedq.planning.cluster import COLLECTIVES, Cluster, CodecSpeed, Level, moved_nbytes
from fedq.planning.probe import fit, measure
from fedq.planning.text import describe
from fedq.runtime import distributed
from fedq.trainers import auto_uplink
from fedq.trainers.run import run_job

SPECS = ("fp32", "bf16", "int8", "int4")


def test_a_line_is_found_through_small_and_large_messages() -> None:
    fixed, bandwidth = fit([(x, 1e-3 + x / 1e6) for x in (1.0, 1e3, 1e6)])
    assert fixed == pytest.approx(1e-3, rel=1e-2)
    assert bandwidth == pytest.approx(1e6)
    fixed, bandwidth = fit([(10.0, 0.1), (20.0, 0.1)])  # latency alone
    assert (fixed, bandwidth) == (0.1, 200.0)


def test_moved_bytes() -> None:
    assert moved_nbytes("all_reduce_float32", 100, 4) == 150
    assert moved_nbytes("exchange", 100, 4) == moved_nbytes("gather", 100, 4) == 300
    assert moved_nbytes("broadcast", 100, 4) == 100


def probed(rank: int, file: str, budget_s: float) -> Cluster:
    with distributed("cpu", 1) as runtime:
        cluster = measure(runtime, ["int4", "sign", "powersgd:rank=2"], budget_s=budget_s)
        if runtime.is_root:
            cluster.save(Path(file))
    return cluster


@pytest.mark.parametrize("ranks", few([2, 1, 3], 1))
def test_a_probe_of_real_ranks(tmp_path: Path, ranks: int) -> None:
    budget_s = 1.0 if is_all() else 0.2  # it is used up
    first, *others = run_group(ranks, probed, str(tmp_path / "link.json"), budget_s)
    assert (first.world_size, first.ranks_per_node, first.across, first.device) == (ranks, ranks, None, "cpu")
    assert Cluster.load(tmp_path / "link.json") == first
    assert max(map(len, describe(first, in_detail=True))) <= 120
    named = {"fp32", "bf16", "int4", "sign:magnitude=mean"} | ({"powersgd:rank=2"} if ranks > 1 else set())
    assert first.codecs.keys() == named
    assert first.memory_bandwidth > 1e7
    for speed in first.codecs.values():
        assert all(0 <= value < math.inf for value in vars(speed).values())
    if ranks == 1:
        assert first.inside is None
        return
    level = first.inside
    assert level is not None
    assert level.collectives.keys() == set(COLLECTIVES)
    for name, cost in level.collectives.items():
        assert 0 < cost.bandwidth < math.inf
        assert cost.ranks == ranks
        sizes = [size for size, _, _ in cost.points]
        assert sizes == sorted(sizes)
        for size, moved, seconds in cost.points:
            assert moved == pytest.approx(moved_nbytes(name, size, ranks))
            assert seconds > 0
    for other in others:  # times are those of the slowest rank, which all know
        assert other.inside == level


def test_the_command_on_one_rank_says_what_it_could_not_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "link.json"
    assert main(["probe", "--out", str(out), "--seconds", "0.2", "--codecs", "int8", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "one rank: no links" in text
    assert max(map(len, text.splitlines())) <= 120
    assert Cluster.load(out).inside is None
    assert main(["plan", "--link", str(out), "--model", "cnn62k", "--compute-ms", "5", "--codecs", "int8"]) == 0
    assert "none (fp32)" in capsys.readouterr().out


def test_a_probe_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--seconds", "0", "--out", str(tmp_path / "link.json")]) == 2
    assert main(["probe", "--codecs", "int9", "--out", str(tmp_path / "link.json")]) == 2
    assert main(["probe", "--seconds", "0.1", "--codecs", "int8", "--out", str(tmp_path / "no" / "link.json")]) == 2
    assert "int9" in (told := capsys.readouterr().err)
    assert "out=" in told


# ---- --uplink auto -------------------------------------------------------------------------------------------------


def link_file(path: Path, bandwidth: float, ranks: int = 2) -> Path:
    """Write a cluster whose codecs cost nothing, so that its bandwidth alone decides."""
    level = Level(1e-6, bandwidth)
    free = CodecSpeed(*[1e-15] * 7)
    cluster = Cluster(
        ranks, ranks, "gloo", "cpu", ("here",), 0, 1, 1e12, 0.0, level, None, dict.fromkeys(SPECS, free), "made up"
    )
    cluster.save(path)
    return path


def run_all(rank: int, configs: list[Config]) -> list[dict[str, Any]]:
    results = []
    for config in configs:
        heard = io.StringIO()
        with redirect_stdout(heard), redirect_stderr(heard), pytest.MonkeyPatch.context() as patch:
            patch.setattr(auto_uplink, "_PROBE_S", 0.2)
            summary = run_job(config)
        results.append({"summary": summary, "heard": heard.getvalue()})
    return results


def stored(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())["exchange"]


def test_auto_chooses_by_the_link_and_then_is_that_codec(tmp_path: Path) -> None:
    slow, fast = link_file(tmp_path / "slow.json", 1e4), link_file(tmp_path / "fast.json", 1e12)
    step = {"exchange": "step", "num_clients": 4, "cohort": None, "rounds": 1}
    flags = {
        "step_slow": step | {"uplink": "auto", "link": slow},
        "step_fast": step | {"uplink": "auto", "link": fast},
        "step_int4": step | {"uplink": "int4", "schedule": "one_phase"},
        "round_slow": {"uplink": "auto", "link": slow, "rounds": 1},
        "round_int4": {"uplink": "int4", "rounds": 1},
    }
    if is_all():  # or what the probe says is not looked at twice: it takes seconds
        flags["probed"] = {"uplink": "auto", "rounds": 1}
    configs = [small_config(tmp_path / name, **given) for name, given in flags.items()]
    first, _ = run_group(2, run_all, configs)
    told = dict(zip(flags, first, strict=True))
    assert stored(tmp_path / "step_slow")["uplink"] == stored(tmp_path / "round_slow")["uplink"] == "int4"
    assert stored(tmp_path / "step_slow")["schedule"] == "one_phase"
    assert stored(tmp_path / "step_slow")["link"] is None
    assert stored(tmp_path / "step_fast")["uplink"] == "fp32"
    if "probed" in flags:
        assert stored(tmp_path / "probed")["uplink"] in SPECS
        assert Cluster.load(tmp_path / "probed" / "link.json").world_size == 2
    assert yaml.safe_load((tmp_path / "step_slow" / "config.yaml").read_text())["clients"]["num_clients"] == 4
    # The choice uses up nothing: the same model as a job that is given the codec.
    for chosen, given in (("step_slow", "step_int4"), ("round_slow", "round_int4")):
        assert file_hash(tmp_path / chosen / "model.safetensors") == file_hash(tmp_path / given / "model.safetensors")
        assert told[given]["summary"]["uplink_chosen_because"] is None
    for name, word in (("step_slow", "times as long"), ("step_fast", "does not pay"), ("round_slow", "times as long")):
        assert word in told[name]["summary"]["uplink_chosen_because"]
        assert "uplink auto: " in told[name]["heard"]
        assert "considered: fp32, bf16, int8, int4" in told[name]["summary"]["uplink_chosen_because"]
    rows = pq.read_table(tmp_path / "round_slow" / "ledger.parquet").to_pylist()
    assert any(row["direction"] == "uplink" and row["payload"] for row in rows)


def test_a_resumed_run_does_not_choose_again(tmp_path: Path) -> None:
    slow, fast = link_file(tmp_path / "slow.json", 1e4), link_file(tmp_path / "fast.json", 1e12)
    out = tmp_path / "run"
    config = small_config(out, uplink="auto", link=slow, rounds=1, exchange="step", cohort=None, num_clients=4)
    run_group(2, run_all, [config])
    before = stored(out)
    longer = replace(config, run=replace(config.run, rounds=2, resume=out, out=None))
    again = replace(longer, exchange=replace(longer.exchange, link=fast))
    ((result,), _) = run_group(2, run_all, [again])
    assert stored(out) == before
    assert result["summary"]["uplink"] == "int4"
    assert "times as long" in result["summary"]["uplink_chosen_because"]


def refused(rank: int, config: Config) -> str:
    try:
        run_all(rank, [config])
    except FieldError as error:
        return str(error)
    return ""


def test_a_link_of_other_ranks_is_refused_on_all(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", uplink="auto", link=link_file(tmp_path / "link.json", 1e6, ranks=4))
    for words in run_group(2, refused, config):
        assert "link=" in words
        assert "2 ranks" in words


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"link": Path("link.json")}, "link="),
        ({"uplink": "auto", "exchange": "none"}, "--exchange none"),
        ({"uplink": "auto", "algorithm": "fedbat"}, "--algorithm fedbat"),
    ],
)
def test_what_auto_cannot_be_used_with(tmp_path: Path, flags: dict[str, Any], named: str) -> None:
    with pytest.raises(FieldError, match=named):
        validate(small_config(tmp_path / "run", **flags))


def test_the_reason_is_read_from_the_run(tmp_path: Path) -> None:
    assert auto_uplink.why_this_uplink(tmp_path) is None
    (tmp_path / "auto_uplink.json").write_text(json.dumps({"uplink": "int4", "because": "of bytes"}))
    assert auto_uplink.why_this_uplink(tmp_path) == "of bytes"
