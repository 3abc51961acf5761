"""A server and clients as real processes: the same result as without a network, also through crashes."""

from __future__ import annotations

import importlib
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from federation import JOB, OWN, Federation, federation
from image_files import random_images, write_parquet
from launched import environ, execute, summary
from safetensors.numpy import load_file
from torch import nn

from fedq.cli import main
from fedq.data import load_dataset, normalize
from fedq.errors import FieldError
from fedq.network import ClientConfig, join, run_client
from fedq.network.certs import make_certs

TWO = ("--clients", "2", "--rounds", "3")


@pytest.fixture
def fed(tmp_path: Path):
    with federation(tmp_path) as fed:
        yield fed


def _train_py(out: Path, *flags: str) -> Path:

    done = execute(sys.executable, "train.py", *JOB, "--out", str(out), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def _uplink(run: Path, client: int | None = None) -> tuple[int, int]:
    """Return the bytes of updates that are payload, and those that are not."""
    rows = pq.read_table(run / "ledger.parquet").to_pylist()
    mine = [row for row in rows if row["direction"] == "uplink" and client in (None, row["client"])]
    framing = sum(row["payload"] for row in mine if row["part"] == "framing")
    return sum(row["payload"] for row in mine) - framing, framing


@pytest.mark.slow
def test_over_tls_a_run_is_that_of_train_py_bit_for_bit(fed: Federation, tmp_path: Path) -> None:
    flags = ("--num-clients", "2", "--rounds", "3", "--uplink", "sign", "--server", "fedadam:lr=0.01")
    alone = _train_py(tmp_path / "alone", *flags)
    make_certs(tmp_path / "certs", 2, hosts=["localhost"])
    server = fed.server(*flags, trust=("--certs", str(tmp_path / "certs" / "server")))
    clients = [fed.client(n, trust=("--certs", str(tmp_path / "certs" / f"client-{n}"))) for n in (0, 1)]
    said = server.ends_well()
    for client in clients:
        assert "finished after 3 rounds" in client.ends_well()
    assert (fed.run / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert "TLS, client certificates" in said
    here, there = summary(fed.run), summary(alone)
    assert here["test_accuracy"] == there["test_accuracy"]
    assert here["test_balanced_accuracy"] == there["test_balanced_accuracy"]
    assert here["left_out"] == []
    # The message around the payload names its tensors; that is all that it adds.
    (payload, framing), (alone_payload, _) = _uplink(fed.run), _uplink(alone)
    assert payload == alone_payload
    assert 0 < framing < 6 * 1000
    assert "unfinished" not in {row["tensor"] for row in pq.read_table(fed.run / "ledger.parquet").to_pylist()}
    for number in (0, 1):  # everybody ends with the server's model
        theirs = load_file(tmp_path / f"client{number}" / "model.safetensors")
        ours = load_file(fed.run / "model.safetensors")
        assert all(np.array_equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.slow
def test_a_first_model_from_the_seed_is_not_sent(fed: Federation, tmp_path: Path) -> None:
    flags = ("--num-clients", "2", "--rounds", "2", "--uplink", "sign", "--downlink", "int4", "--start", "seed")
    alone = _train_py(tmp_path / "alone", *flags)
    server = fed.server(*flags)
    clients = [fed.client(0), fed.client(1)]
    server.ends_well()
    for client in clients:
        client.ends_well()
    assert (fed.run / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert summary(fed.run)["downlink_bytes"] < 2 * 2 * 62_006 * 0.6  # two changes of four bits for two clients


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on_as_if_it_had_not_been(fed: Federation, tmp_path: Path) -> None:
    flags = ("--num-clients", "2", "--rounds", "6", "--uplink", "sign", "--server", "fedadam:lr=0.01")
    alone = _train_py(tmp_path / "alone", *flags)
    first = fed.server(*flags)
    clients = [fed.client(0), fed.client(1)]
    first.until_it_says("round 2/6")
    first.kill()
    server = fed.server(resume=True)
    said = server.ends_well()
    for client in clients:
        client.ends_well()
    assert "resumed after round" in said
    assert (fed.run / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    rows = fed.rows()
    assert sorted((row["round"], row["client"]) for row in rows) == [(r, c) for r in range(6) for c in (0, 1)]
    assert {row["status"] for row in rows} == {"ok"}


@pytest.mark.slow
def test_a_client_that_is_killed_is_named_and_comes_back(fed: Federation) -> None:
    server = fed.server(
        *("--clients", "2", "--rounds", "40", "--reconnect-grace", "0.5", "--min-cohort", "1", "--local-steps", "40")
    )
    steady, victim = fed.client(0), fed.client(1)
    server.until_it_says("round 2/40")
    victim.kill()
    server.until_it_says("client 1 is left out")
    again = fed.client(1)
    again.until_it_says("round")
    said = server.ends_well()
    steady.ends_well()
    again.ends_well()
    assert "the connection to client 1 is lost" in said
    statuses = fed.statuses()
    assert all(statuses[number, 0] == "ok" for number in range(40))
    missed = [text for (_, client), text in statuses.items() if client == 1 and text != "ok"]
    assert missed
    assert all("the connection was lost" in text for text in missed)
    assert [one["client"] for one in summary(fed.run)["left_out"]] == [1] * len(missed)
    assert "left out" in said


@pytest.mark.slow
def test_clients_may_differ_in_codec(fed: Federation) -> None:
    server = fed.server(*TWO, "--uplink", "int8")
    clients = [fed.client(0, "--uplink", "fp32"), fed.client(1, "--uplink", "sign")]
    server.ends_well()
    assert "uplink fp32" in clients[0].ends_well()
    assert "uplink sign" in clients[1].ends_well()
    assert sum(_uplink(fed.run, client=0)) > 3 * 4 * 62_006
    assert sum(_uplink(fed.run, client=1)) < 3 * 62_006 / 6
    assert summary(fed.run)["left_out"] == []


@pytest.mark.slow
def test_a_site_of_two_ranks_is_one_client(fed: Federation, tmp_path: Path) -> None:

    server = fed.server(*TWO, "--uplink", "int8", "--local-steps", "4")
    alone = fed.client(0)
    command = (
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fedq"),
        *("client", "--connect", fed.address, "--insecure", "--number", "1", "--out", str(tmp_path / "site"), *OWN),
    )
    for exchange in ("step", "round"):
        shutil.rmtree(fed.run, ignore_errors=True)
        if exchange == "round":
            server, alone = fed.server(*TWO, "--uplink", "int8", "--local-steps", "4"), fed.client(0)
        done = execute(*command, "--exchange", exchange, env=environ())
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"2 ranks by {exchange}" in done.stdout
        server.ends_well()
        alone.ends_well()
        assert summary(fed.run)["left_out"] == []
        assert [row["num_examples"] for row in fed.rows()][:2] == [100, 100]


@pytest.mark.slow
def test_a_client_trains_on_data_of_its_own(fed: Federation, tmp_path: Path) -> None:
    for name, num in (("servers", 80), ("own", 24)):
        for split in ("train", "test"):
            labels = [7] * num if name == "own" else [0, 9] * (num // 2)
            write_parquet(tmp_path / name / "mnist" / f"{split}.parquet", random_images(num, 28, 28), labels)
    servers, own = (("--data-dir", str(tmp_path / name)) for name in ("servers", "own"))
    server = fed.server(
        *TWO, "--dataset", "mnist", "--val-fraction", "0.1", "--train-examples", "60", *servers, "--local-steps", "6"
    )
    clients = [fed.client(0, *servers), fed.client(1, "--own-data", *own)]
    server.ends_well()
    assert "30 images here" in clients[0].ends_well()  # half of 60: the share that the server has dealt it
    assert f"{tmp_path / 'own'}" in clients[1].ends_well()
    assert "24 images here" in clients[1].said  # all: nothing is held out where the server tests
    rows = {row["client"]: row for row in fed.rows() if row["round"] == 0}
    assert {row["status"] for row in fed.rows()} == {"ok"}
    assert [rows[n]["num_examples"] for n in (0, 1)] == [30, 24]
    assert sum(rows[0]["label_counts"]) == 30
    assert not any(rows[1]["label_counts"])  # nobody but the client knows them
    assert rows[1]["train_accuracy"] > 0.8 > rows[0]["train_accuracy"]  # all of its images are sevens


@pytest.mark.slow
def test_a_model_and_a_loop_of_ones_own_take_part(fed: Federation) -> None:
    (fed.folder / "own_model.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
    )
    server = fed.server("--clients", "2", "--rounds", "4", "--model", "own_model:make", "--uplink", "int4")
    server.until_it_says("listening")
    with pytest.raises(FieldError, match=r"fedq\.network\.join"):
        run_client(ClientConfig(connect=fed.address, insecure=True, number=0))
    data = load_dataset("digits", data_dir=Path("data")).train
    results: dict[int, dict] = {}

    def take_part(number: int) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        mine = slice(number, None, 2)
        images = normalize(data.images[mine], (0.5,) * 3, (0.5,) * 3)
        labels = data.labels[mine]

        def train(lr: float) -> tuple[float, float]:
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            for x, y in zip(images.split(64), labels.split(64), strict=True):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
            return float(loss.detach()), 0.5

        results[number] = join(
            *(fed.address,), model=model, train=train, num_examples=len(labels), insecure=True, number=number,
            out=fed.folder / f"own{number}", say=lambda line: None,
        ) | {"model": model}  # fmt: skip

    threads = [threading.Thread(target=take_part, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    server.ends_well()
    for thread in threads:
        thread.join(60)
    final = load_file(fed.run / "model.safetensors")
    for result in results.values():
        assert result["rounds"] == 4
        assert np.array_equal(result["model"][1].weight.detach().numpy(), final["1.weight"])
    assert summary(fed.run)["test_accuracy"] > 0.6
    assert [row["num_examples"] for row in fed.rows()][:2] == [647, 647]
    assert [sum(row["label_counts"]) for row in fed.rows()][:2] == [0, 0]  # the server does not know them


ADAPTED = """
import torch
from torch import nn

class Adapted(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(3072, 8).requires_grad_(False)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(torch.relu(self.base(x.flatten(1))).to(self.head.weight.dtype)).float()
"""


@pytest.mark.slow
def test_frozen_parameters_do_not_travel_and_must_agree(fed: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    (fed.folder / "adapted.py").write_text(ADAPTED)
    monkeypatch.syspath_prepend(str(fed.folder))
    adapted = importlib.import_module("adapted")
    server = fed.server("--clients", "1", "--rounds", "2", "--model", "adapted:Adapted", "--uplink", "int8")
    server.until_it_says("listening")

    def take_part(model: nn.Module, train: Callable[[float], None], said: list[str]) -> None:
        out = fed.folder / "own"
        join(fed.address, model=model, train=train, num_examples=9, insecure=True, number=0, out=out, say=said.append)

    with pytest.raises(FieldError, match=r"base\.bias='frozen, checksum .*as the server's"):
        take_part(adapted.Adapted(seed=1), lambda lr: None, [])
    with pytest.raises(FieldError, match=r"base\.bias='not frozen'"):
        take_part(adapted.Adapted().requires_grad_(True), lambda lr: None, [])
    model, said, rounds = adapted.Adapted(), list[str](), list[float]()
    model.head.bfloat16()  # of another type than the server's

    def train(lr: float) -> None:
        rounds.append(lr)
        if len(rounds) == 2:
            model.base.requires_grad_(True)

    take_part(model, train, said)
    server.ends_well()
    assert any("no update: training failed: FieldError: base.bias='trained'" in line for line in said)
    first, second = (row["status"] for row in fed.rows())
    assert first == "ok"
    assert "base.bias='trained'" in second
    start, final = adapted.Adapted().state_dict(), load_file(fed.run / "model.safetensors")
    for name in start:  # the client changed nothing: neither did the rounds, though its bfloat16 holds no such weights
        assert np.array_equal(final[name], start[name].numpy()), name
    ledger = pq.read_table(fed.run / "ledger.parquet").to_pylist()
    assert {row["tensor"] for row in ledger if row["part"] != "framing"} == {"head.weight", "head.bias"}


def test_settings_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    for flags, words in (
        (("server",), "certs=None"),
        (("server", "--insecure", "--bind", "0.0.0.0:8470"), "only on loopback"),
        (("server", "--insecure", "--exchange", "step"), "exchange='step'"),
        (("client", "--insecure"), "number=None"),
        (("client", "--insecure", "--number", "0", "--connect", "example.org:1"), "only on loopback"),
        (("client", "--certs", str(tmp_path)), "certs="),
        (("certs", "--clients", "0"), "clients=0"),
    ):
        assert main(flags) == 2, flags
        assert words in capsys.readouterr().err


@pytest.mark.usefixtures("few_figures")
def test_a_run_across_a_network_has_a_report(fed: Federation) -> None:
    pytest.importorskip("bokeh")
    server = fed.server(*TWO)
    clients = [fed.client(0), fed.client(1)]
    server.ends_well()
    for client in clients:
        client.ends_well()

    assert main(["report", str(fed.run), "--out", str(fed.folder / "page")]) == 0
    assert summary(fed.run)["launcher"] == "fedq server"
    interface = summary(fed.run)["interface"]
    assert interface is None or interface["sent"] >= interface["counted"]
