"""The network benchmark: what is read from a run's files, tables, verdicts, a rival's messages. Runs are made up."""

from __future__ import annotations

import json
import socket
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bench_network
import links
import network_runs
import network_tables
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import socket_pickle
import torch
from network_runs import OURS, PIECES, SOCKET, WHOLE, Exchange, Federation
from network_tables import Cell, ExchangeRow, Overheads

ABOUT = {"hardware": "h", "torch": "t", "grpcio": "g", "date": "d", "data_note": "MNIST-10k"}
FEDERATION = Federation(data_dir="data", rounds=4, batch_size=16, lr=0.02)


def way(payload: int, framing: int, count: int = 10) -> dict[str, int]:
    return {"count": count, "payload": payload, "all": payload + framing}


def facts(federation: Federation, accuracy: float = 0.98, **given: Any) -> dict[str, Any]:
    """Return what a run has left: 1,000,000 payload bytes each way and 5,000 of framing."""
    crossed = {"sent": 1_010_000, "received": 1_010_000, "sent_frames": 1_050_000, "received_frames": 1_050_000}
    values: dict[str, Any] = {
        "settings": asdict(federation),
        "test_accuracy": accuracy,
        "val_accuracies": [0.9, 0.96],
        "ends_s": [10.0, 17.5],
        "messages": {"uplink": way(1_000_000, 5_000), "downlink": way(1_000_000, 5_000)},
        "crossed": crossed,
        "data": "7,200 train, 800 validation, 2,000 test images, 3x28x28",
        "num_params": 1_630_858,
        "wall_s": 60.0,
        "cpu_s": 30.0,
    }
    return values | given


def cell(uplink: str, accuracies: list[float], clients: int = 2, **given: Any) -> Cell:
    federation = replace(FEDERATION, uplink=uplink, clients=clients)
    runs = [facts(replace(federation, seed=seed), accuracy, **given) for seed, accuracy in enumerate(accuracies)]
    return Cell(federation, runs)


# ---- what a run has left ---------------------------------------------------------------------------------------------


def test_messages_are_counted_by_a_tensor_and_framing_is_no_payload(tmp_path: Path) -> None:
    def rows(direction: str, times: int) -> list[dict[str, Any]]:
        return times * [
            {"direction": direction, "tensor": "a", "part": "codes", "wire": 100},
            {"direction": direction, "tensor": "a", "part": "scales", "wire": 4},
            {"direction": direction, "tensor": "b", "part": "exempt", "wire": 10},
            {"direction": direction, "tensor": "", "part": "framing", "wire": 6},
        ]

    notes = [{"direction": "downlink", "tensor": "", "part": "framing", "wire": 50}] * 7
    pq.write_table(pa.Table.from_pylist(rows("uplink", 3) + rows("downlink", 5) + notes), tmp_path / "ledger.parquet")
    assert network_runs.messages(tmp_path / "ledger.parquet") == {
        "uplink": {"count": 3, "payload": 342, "all": 360},
        "downlink": {"count": 5, "payload": 570, "all": 600 + 350},
    }


def test_a_clients_work_is_no_part_of_the_bytes_way(tmp_path: Path) -> None:
    seconds = {"exchange": 5.0, "encode": 1.0, "decode": 2.0, "server": 3.0, "evaluation": 9.0}
    rows = [{"round": r, "phase": name, "seconds": s} for r in range(2) for name, s in seconds.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "phases.parquet")
    parts = network_runs.parts_of_rounds(tmp_path / "phases.parquet", [1.0, 4.0])
    assert parts == [{"moving": 4.0, "client": 1.0, "server": 6.0}, {"moving": 1.0, "client": 4.0, "server": 6.0}]


def test_a_rivals_report_is_read_as_a_run(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"begin": 100.0, "ends": [110.0, 115.0], "val_accuracies": [0.9, 0.95], "moved": 7}))
    found = network_runs.facts_of_report(path, None)
    assert found == {"ends_s": [10.0, 15.0], "val_accuracies": [0.9, 0.95], "moved": 7, "crossed": None}
    with pytest.raises(RuntimeError, match="no report"):
        network_runs.facts_of_report(tmp_path / "nothing.json", None)


def test_a_text_is_seen_once_it_is_in_every_file(tmp_path: Path) -> None:
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    seen = network_runs.FirstSeen(logs, "server 10.77.0.1")
    logs[0].write_text("uplink int8, server 10.77.0.1:8470 (TLS)\n")
    seen.look()
    first = seen.moment
    logs[1].write_text("")
    seen.look()
    assert seen.moment == first
    logs[1].write_text("server 10.77.0.1:8470")
    seen.look()
    assert seen.moment > first


def test_a_run_is_kept_and_not_mistaken_for_another(tmp_path: Path) -> None:
    folders: list[Path] = []

    def run(folder: Path) -> dict[str, Any]:
        folders.append(folder)
        return {"test_accuracy": 0.5}

    path = tmp_path / "one.json"
    first = network_runs.kept(path, {"lr": 0.1, "lrs": (1, 2)}, run)
    assert network_runs.kept(path, {"lr": 0.1, "lrs": (1, 2)}, run) == first
    assert folders == [tmp_path / "one"]
    assert first["test_accuracy"] == 0.5
    assert first["wall_s"] >= 0
    with pytest.raises(SystemExit, match=r"other settings \(lr\)"):
        network_runs.kept(path, {"lr": 0.2, "lrs": (1, 2)}, run)


def test_federations_that_differ_in_what_a_table_shows_have_names_of_their_own() -> None:
    base = replace(FEDERATION, uplink="sign:block=256,rotate=true", downlink="int8")
    others = [{"uplink": "int8"}, {"downlink": "int4"}, {"clients": 5}, {"seed": 1}, {"link": "10mbit"}]
    names = {replace(base, **other).name for other in others} | {base.name, replace(base, system=SOCKET).name}
    assert len(names) == 2 + len(others)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_") for name in names)


def test_rivals_learn_with_the_servers_rates() -> None:
    from fedq.network.settings import SERVER_DEFAULTS
    from fedq.trainers.job import Job

    config = replace(SERVER_DEFAULTS, local=replace(SERVER_DEFAULTS.local, lr=0.02, lr_schedule="cosine"))
    config = replace(config, run=replace(config.run, rounds=4))
    job = Job.__new__(Job)
    object.__setattr__(job, "config", config)
    assert FEDERATION.lrs() == pytest.approx([job.lr(round) for round in range(4)])


def test_the_servers_flags_are_those_of_fedq_server() -> None:
    from fedq.cli import parse_args
    from fedq.network.settings import SERVER_DEFAULTS, check_server, resolved, short_forms

    federation = replace(FEDERATION, uplink="sign", downlink="int4", clients=5, seed=3, train_examples=500, target=0.95)
    flags = [*federation.server_flags(), "--bind", "10.77.0.1:8470", "--certs", "certs"]
    config = resolved(parse_args(short_forms(flags), defaults=SERVER_DEFAULTS))
    check_server(config)
    assert (config.exchange.uplink, config.exchange.downlink) == ("sign", "int4")
    assert (config.clients.num_clients, config.data.train_examples, config.data.image_size) == (5, 500, 28)
    assert (config.run.seed, config.run.rounds, config.run.target_accuracy) == (3, 4, 0.95)
    assert (config.local.batch_size, config.local.lr, config.data.augment) == (16, 0.02, False)
    assert "--target-accuracy" not in FEDERATION.server_flags()


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_overheads_are_of_all_bytes_of_messages() -> None:
    run = facts(FEDERATION)
    run["messages"]["uplink"] = way(500_000, 10_000, count=6)
    found = Overheads.of(run)
    assert found is not None
    told = 510_000 + 1_005_000
    assert found.frame == pytest.approx(0.02)
    assert found.wire == pytest.approx(2_020_000 / told - 1)
    assert found.frames == pytest.approx(2_100_000 / told - 1)
    assert found.excess == pytest.approx((2_020_000 - 1.05 * told) / 16)
    assert Overheads.of(facts(FEDERATION, crossed=None)) is None


@pytest.mark.parametrize(
    ("frame", "wire", "excess", "words"),
    [(0.01, 0.2, 20_000, ["met", "met"]), (0.011, 0.2, 0, ["MISSED", "met"]), (0.0, 0.0, 20_001, ["met", "MISSED"])],
)
def test_bars_of_the_bytes(frame: float, wire: float, excess: float, words: list[str]) -> None:
    lines = network_tables.overhead_verdicts([Overheads(0, 0, 0, -5), Overheads(frame, wire, 0, excess)])
    assert [line.split()[-1].rstrip(").") for line in lines] == words


@pytest.mark.parametrize(
    ("accuracies", "payload", "word"),
    [
        ([0.979, 0.982, 0.980], 255_000, "met"),
        ([0.979, 0.981, 0.971], 255_000, "MISSED"),
        ([0.98] * 3, 270_000, "MISSED"),
    ],
)
def test_int8_is_compared_seed_by_seed(accuracies: list[float], payload: int, word: str) -> None:
    messages = {"uplink": way(payload, 0), "downlink": way(payload, 0)}
    plain, int8 = cell("fp32", [0.980, 0.981, 0.979]), cell("int8", accuracies, messages=messages)
    lines = network_tables.accuracy_verdicts([plain, int8, cell("fp32", [0.9], clients=5)])
    assert "float32 with 2 clients: 98.00 % (bar: 97.5 %, met)" in lines[0]
    gap = 100 * (np.array(accuracies) - [0.980, 0.981, 0.979])
    assert f"{gap.mean():+.2f} ± " in lines[1]
    assert lines[1].endswith(f"{word}).")


def test_seeds_that_one_cell_lacks_are_not_compared() -> None:
    assert cell("sign", [0.97]).differences(cell("fp32", [0.98, 0.5])) == pytest.approx([-1.0])


def test_the_table_of_accuracy() -> None:
    cells = [cell("fp32", [0.98, 0.97]), cell("sign", [0.96]), cell("sign", [0.9], clients=5, crossed=None)]
    text = network_tables.accuracy_section(cells, ABOUT)
    assert (
        "| 2 | fp32 / fp32 | 4 | 97.50 ± 0.71 |  | 1.00 | 1.000 | 1.00 | 20 | 0.50 % | 0.50 % | 4.48 % | 18 | 30 |"
        in text
    )
    assert "| 2 | sign / fp32 | 4 | 96.00 | -2.00 |" in text
    assert "| 5 | sign / fp32 | 4 | 90.00 |  | 1.00 | - | 1.00 | 20 | - | - | - | 18 | 30 |" in text
    assert "(2 minutes of CPU, 4 minutes in all)" in text
    assert text.startswith("## ")
    assert text.count("\n## ") == 0


def test_the_table_of_links_says_when_the_target_was_reached() -> None:
    slow = replace(FEDERATION, link="10mbit", target=0.95)
    int8, rival = replace(slow, uplink="int8"), replace(slow, system=SOCKET)
    told = facts(rival, val_accuracies=[0.8], ends_s=[40.0], moved=26_100_000, crossed=None)
    del told["messages"]
    found = [(slow, facts(slow)), (int8, facts(int8, val_accuracies=[0.95, 0.94])), (rival, told)]
    text = network_tables.links_section(found, ABOUT)
    assert "| fedq | fp32 / fp32 | 2 | 18 | 10.0 | 7.5 | 2.0 | 2.0 | 1.0 |" in text
    assert "| fedq | int8 / fp32 | 2 | 10 | 10.0 | 7.5 | 2.0 | 2.0 | 1.8 |" in text
    assert "| R2's way | fp32 / fp32 | 1 | not in 1 rounds (80.0 %) | 40.0 | - | 26.1 | - | - |" in text


def exchange_row(ours_ms: float) -> ExchangeRow:
    turns = {WHOLE: [{"seconds": [0.004, 0.006]}], PIECES: [{"seconds": [0.002, 0.004]}]}
    parts = [{"moving": 0.003, "client": 0.001, "server": 0.0005}]
    ours = [{"seconds": [ours_ms / 1e3], "parts": parts}] * 2
    found = turns | {OURS: ours}
    for turn in (turn for runs in found.values() for turn in runs):
        turn |= {"cpu_s": 30.0, "wall_s": 60.0}  # type: ignore[operator]
    return ExchangeRow(Exchange("cnn62k", 2, 3, 0), found)  # type: ignore[arg-type]


@pytest.mark.parametrize(("ours_ms", "word"), [(6, "met"), (6.1, "MISSED")])
def test_a_round_is_compared_with_the_faster_bare_exchange(ours_ms: float, word: str) -> None:
    text = network_tables.exchange_section([exchange_row(2), exchange_row(ours_ms)], ABOUT)
    assert (
        "| cnn62k | 0.25 | 2 | 5.0 (4.0 to 6.0) | 3.0 (2.0 to 4.0) | 2.0 (2.0 to 2.0) | 3.0 | 1.0 | 0.5 | 1.00 | 0.67 |"
        in text
    )
    assert f"the worst is {ours_ms / 3:.2f} ({word})" in text
    assert "of 2 rounds in 2 turns" in text


def test_an_exchanges_bytes_are_those_of_parameters_and_statistics() -> None:
    assert Exchange("cnn62k", 1, 2, 0).nbytes == 4 * 62_006
    assert bench_network.rounds_by_clients(["2:4", "10:8"]) == {2: 4, 10: 8}


# ---- links and rivals ------------------------------------------------------------------------------------------------


def test_traffic_is_what_kernel_counters_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        if command[0] == "ip":
            found: Any = [{"stats64": {"tx": {"bytes": 10}, "rx": {"bytes": 20}}}]
        else:
            found = [{"bytes": 11 if command[2] == "party" else 22}]
        return subprocess.CompletedProcess(command, 0, json.dumps(found), "")

    monkeypatch.setattr(subprocess, "run", run)
    now = links.End("10.77.0.1", "party", "switch", "p0").traffic()
    assert now == links.Traffic(sent=10, received=20, sent_frames=11, received_frames=22)
    assert now - links.Traffic(1, 2, 3, 4) == links.Traffic(9, 18, 8, 18)
    assert links.End("127.0.0.1").traffic() is None


def test_one_failing_process_ends_the_others(tmp_path: Path) -> None:
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    with pytest.raises(RuntimeError, match=r"\[None, 3\]"):
        links.run_together([["sleep", "60"], ["sh", "-c", "echo so; exit 3"]], [{}, {}], 60, logs)
    assert logs[1].read_text() == "so\n"


def test_the_rivals_messages_and_mean() -> None:
    one, two = socket.socketpair()
    with one, two:
        state = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
        sent = socket_pickle.send(one, (0, state))
        (round, received), nbytes = socket_pickle.receive(two)
    assert (round, nbytes) == (0, sent)
    mean = socket_pickle.mean([received, {"w": torch.tensor([3.0, 5.0]), "n": torch.tensor(4)}])
    assert mean["w"].tolist() == [2.0, 3.5]
    assert (mean["n"].item(), mean["n"].dtype) == (3, torch.int64)
