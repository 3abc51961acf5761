"""A run whose model diverges ends at its last good checkpoint, on every rank alike, or goes back there."""

from __future__ import annotations

import io
import itertools
import json
import re
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_group
from federation import Federation, federation
from jobs import file_hash, small_config
from properties import few
from safetensors.torch import load_file

from fedq.checkpoint import Checkpoints
from fedq.cli import main
from fedq.config import Config
from fedq.errors import DivergedError, FieldError
from fedq.federated.client import Client
from fedq.federated.rounds import Outcome
from fedq.federated.training import RoundContext, Trained
from fedq.models import build_model
from fedq.network import join
from fedq.network.settings import SERVER_DEFAULTS, check_server
from fedq.trainers.run import run_job
from fedq.wire import Frame, Kind

EVERYBODY = {"cohort": None, "num_clients": 4, "lr_schedule": "constant", "lr": 0.05}


def breaks_down(patch: pytest.MonkeyPatch, *, since: int, above: float = 0.0, add: float = float("nan")) -> None:
    """Let every client's training since a round end in values that are no use, with a learning rate above one."""
    train = Client.train

    def trained(client: Client, start: torch.Tensor, context: RoundContext) -> Trained:
        result = train(client, start, context)
        if context.round >= since and context.lr > above:
            result.flat.add_(add)
        return result

    patch.setattr(Client, "train", trained)


def run_broken(rank: int, config: Config, how: dict[str, Any]) -> tuple[str, str]:
    """Run a job that breaks down; return the summary or the error of one rank, and what it printed."""
    heard = io.StringIO()
    with redirect_stdout(heard), redirect_stderr(heard), pytest.MonkeyPatch.context() as patch:
        if how:
            breaks_down(patch, **how)
        try:
            result = json.dumps(run_job(config))
        except DivergedError as error:
            result = str(error)
    return result, heard.getvalue()


def frame(client: int, kind: Kind) -> tuple[int, Frame]:
    return 0, Frame(kind, 0, client, 0, 0, 1.0, 1.0, 0.5, torch.empty(0, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("kinds", "skipped", "is_lost"),
    [
        ("LLL", "", True),
        ("LFF", "", True),
        ("UUU", "", False),
        ("LLU", "", False),  # one was used
        ("LLU", "2", True),  # too few were left
        ("LUU", "12", False),  # too few had come to begin with
        ("MMM", "", False),  # nobody came
        ("MML", "", False),  # one in three cannot end a run for the others
        ("MLL", "", True),
    ],
)
def test_a_round_is_lost_if_most_clients_sent_what_is_of_no_use(kinds: str, skipped: str, is_lost: bool) -> None:
    named = {"L": Kind.LEFT_OUT, "F": Kind.FAILED, "U": Kind.UPDATE, "M": Kind.MISSING}
    too_few = frozenset(map(int, skipped))
    left_out = {client: "why" for client, kind in enumerate(kinds) if kind != "U" or client in too_few}
    frames = [frame(client, named[kind]) for client, kind in enumerate(kinds)]
    assert Outcome(frames, left_out, skipped=too_few).is_lost is is_lost


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("aggregate", [pytest.param("rooted", marks=pytest.mark.slow), "two_phase"])
def test_two_lost_rounds_end_a_run_on_every_rank(tmp_path: Path, ranks: int, aggregate: str) -> None:
    config = small_config(tmp_path / "run", rounds=6, aggregate=aggregate, **EVERYBODY)
    errors = [error for error, _ in run_group(ranks, run_broken, config, {"since": 2})]
    assert len(errors) == ranks
    for error in errors:
        assert error.startswith("the model has diverged in round 3: no update of the last 2 rounds could be used; ")
        assert "after round 2; go on with: " in error
        assert f"--resume {tmp_path / 'run'} with other settings (" in error
    assert Checkpoints(tmp_path / "run" / "checkpoints").numbers() == [1, 2]  # of rounds that changed something


@pytest.mark.parametrize("eval_every", few([1, 6], 1))
@pytest.mark.parametrize(("add", "why"), few([(3e38, "its loss is not finite"), (1e30, "its loss is not finite")], 1))
def test_a_model_without_a_finite_loss_is_never_saved(tmp_path: Path, eval_every: int, add: float, why: str) -> None:
    config = small_config(tmp_path / "run", rounds=6, uplink="fp32", eval_every=eval_every, **EVERYBODY)
    error, _ = run_broken(0, config, {"since": 2, "add": add})
    assert error.startswith(f"the model has diverged in round 2: {why}; ")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.numbers() == [1, 2]
    assert checkpoints.load(2).state["replica"].abs().max() < 100


def test_a_server_that_overflows_is_seen(tmp_path: Path) -> None:
    # The mean is finite, twice it is not.
    config = small_config(tmp_path / "run", uplink="fp32", server="sgd:lr=2", **EVERYBODY)
    error, _ = run_broken(0, config, {"since": 1, "add": 3e38})
    assert error.startswith("the model has diverged in round 1: its values are not finite; ")
    assert Checkpoints(tmp_path / "run" / "checkpoints").numbers() == [1]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_goes_back_halves_its_learning_rate_from_there(tmp_path: Path, ranks: int) -> None:
    """The oracle is a run whose schedule halves the rate in that round."""
    same = {"rounds": 5, "uplink": "int4", "server": "fedavgm:lr=0.5", **EVERYBODY, "num_clients": 2}
    halved = small_config(tmp_path / "halved", **same | {"lr_schedule": "steps:at=2,factor=0.5"})
    rolled = small_config(tmp_path / "rolled", on_divergence="rollback", **same)
    run_group(ranks, run_broken, halved, {})
    results = run_group(ranks, run_broken, rolled, {"since": 2, "above": 0.04})
    summary, said = json.loads(results[0][0]), results[0][1]
    assert "resumed after round 2; rolled back, with 0.5 of the learning rate" in said
    assert (summary["rollbacks"], summary["rounds"], summary["repeated_rounds"]) == (1, 5, 2)
    assert file_hash(tmp_path / "rolled/model.safetensors") == file_hash(tmp_path / "halved/model.safetensors")
    rates = [json.loads(line)["lr"] for line in (tmp_path / "rolled/metrics.jsonl").read_text().splitlines()]
    assert rates == [0.05, 0.05, 0.025, 0.025, 0.025]


def test_the_lower_rate_outlives_the_process(tmp_path: Path) -> None:
    same = {"rounds": 5, "uplink": "int4", **EVERYBODY, "num_clients": 2}
    halved = small_config(tmp_path / "halved", **same | {"lr_schedule": "steps:at=2,factor=0.5"})
    run_broken(0, halved, {})
    first = small_config(tmp_path / "rolled", on_divergence="rollback", **same | {"rounds": 4})
    run_broken(0, first, {"since": 2, "above": 0.04})
    more = small_config(tmp_path / "rolled", resume=tmp_path / "rolled", **same)
    summary, _ = run_broken(0, more, {})
    assert json.loads(summary)["rollbacks"] == 1
    assert file_hash(tmp_path / "rolled/model.safetensors") == file_hash(tmp_path / "halved/model.safetensors")


def test_a_checkpoint_that_nobody_can_train_from_is_given_up(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", rounds=5, on_divergence="rollback", **EVERYBODY | {"num_clients": 2})
    error, said = run_broken(0, config, {"since": 3})  # at any rate
    found = re.findall(r"resumed after round (\d); rolled back, with ([\d.]+) of", said)
    assert found == [("3", "0.5"), ("2", "0.25"), ("3", "0.125"), ("2", "0.0625"), ("3", "0.03125")]
    assert "no update of the last 2 rounds could be used; stopped by divergence after round 2" in error
    assert Checkpoints(tmp_path / "run" / "checkpoints").numbers() == [2]


def test_one_lost_round_is_no_divergence(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", rounds=6, chaos="nan=0.5,seed=5", **EVERYBODY | {"num_clients": 1})
    summary = json.loads(run_broken(0, config, {})[0])
    rounds = [one["round"] for one in summary["left_out"]]
    assert rounds, "some round was lost"
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(rounds))
    assert summary["rounds"] == 6


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_that_diverge_end_alike(tmp_path: Path, ranks: int) -> None:
    config = small_config(
        tmp_path / "run", exchange="step", num_clients=4, cohort=None, rounds=6, lr=1e6, lr_schedule="constant"
    )
    errors = [error for error, _ in run_group(ranks, run_broken, config, {})]
    assert all(error.startswith("the model has diverged in round ") for error in errors)
    assert len({error.split(";")[0] for error in errors}) == 1
    for number in (checkpoints := Checkpoints(tmp_path / "run" / "checkpoints")).numbers():
        assert all(value.isfinite().all() for value in checkpoints.load(number).state["model"].values())


def test_clients_alone_end_when_none_is_left(tmp_path: Path) -> None:
    flags = {"exchange": "none", "num_clients": 2, "cohort": None, "lr": 1e6, "lr_schedule": "constant", "rounds": 6}
    error, _ = run_broken(0, small_config(tmp_path / "run", **flags), {})
    assert error.startswith("every model has diverged by round ")
    with pytest.raises(FieldError, match="on_divergence='rollback'"):
        small_config(tmp_path / "run", on_divergence="rollback", **flags)


def test_clients_with_models_of_their_own_end_too(tmp_path: Path) -> None:
    flags = {"algorithm": "local", "lr": 1e9, "lr_schedule": "constant", "rounds": 6}
    error, _ = run_broken(0, small_config(tmp_path / "run", **flags), {})
    assert "no update of the last 2 rounds could be used" in error


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    flags = ["--dataset", "digits", "--train-examples", "100", "--model", "cnn62k", "--local-steps", "1"]
    assert main([*flags, "--threads", "1", "--chaos", "nan=1", "--out", out]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: the model has diverged in round 1: no update of the last 2 rounds could be used")
    assert not any("Traceback" in line for line in said)


# ---- across a network ----


@pytest.fixture
def fed(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path) as made:
        yield made


class Breaking(threading.Thread):
    """A client that adds to its weights, and has only NaNs from its fourth round on if the rate is above 0.04."""

    def __init__(self, fed: Federation, number: int) -> None:
        super().__init__(daemon=True)
        self.fed, self.number, self.rates, self.said = fed, number, list[float](), list[str]()
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        model = build_model("cnn62k")

        def train(lr: float) -> None:
            self.rates.append(lr)
            broken = len(self.rates) > 3 and lr > 0.04
            with torch.no_grad():
                for param in model.parameters():
                    param.add_(float("nan") if broken else 0.001)

        self.outcome = join(
            self.fed.address,
            model=model,
            train=train,
            num_examples=50,
            insecure=True,
            number=self.number,
            out=self.fed.folder / f"client{self.number}",
            give_up_after=60,
            say=self.said.append,
        )


FLAGS = ("--clients", "2", "--rounds", "6", "--lr-schedule", "constant", "--join-timeout", "60")


@pytest.mark.slow
def test_a_server_stops_and_tells_its_clients(fed: Federation) -> None:
    server, clients = fed.server(*FLAGS), [Breaking(fed, number) for number in (0, 1)]
    assert server.process.wait(120) == 1, server.said
    assert "error: the model has diverged in round 4: no update of the last 2 rounds could be used" in server.said
    assert "Traceback" not in server.said
    for client in clients:
        client.join(60)
        assert client.outcome["stopped"] == "the model has diverged"
    assert Checkpoints(fed.run / "checkpoints").numbers() == [2, 3]


def test_a_server_goes_back_and_its_clients_with_it(fed: Federation) -> None:
    server = fed.server(*FLAGS, "--on-divergence", "rollback")
    clients = [Breaking(fed, number) for number in (0, 1)]
    said = server.ends_well()
    assert "resumed after round 3; rolled back, with 0.5 of the learning rate" in said
    for client in clients:
        client.join(60)
        assert client.rates == [0.05] * 5 + [0.025] * 3
        assert client.outcome["rounds"] == 6
    model = load_file(fed.run / "model.safetensors")
    assert all(value.isfinite().all() for value in model.values())


def test_a_server_that_may_go_back_needs_a_port_that_stays() -> None:
    network = replace(SERVER_DEFAULTS.network, bind="localhost:0", insecure=True)
    run = replace(SERVER_DEFAULTS.run, on_divergence="rollback")
    with pytest.raises(FieldError, match="bind='localhost:0'"):
        check_server(replace(SERVER_DEFAULTS, network=network, run=run))
