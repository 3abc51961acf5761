"""QuPeD's Algorithm 1 as a job: its step written out by hand, freezing, what is chosen and saved, ranks, refusals."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from distributed import run_group
from jobs import file_hash, small_config
from properties import few, is_all
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from fedq.cli import main
from fedq.config import Config
from fedq.data import Split
from fedq.engines import choose_precision
from fedq.errors import FieldError
from fedq.federated.image_training import LocalTraining
from fedq.layout import Layout
from fedq.lowbit.centres import Centres, CentreSchedule, inner_weights
from fedq.models import build_model
from fedq.personalize.centralized import train_alone
from fedq.personalize.learners import Quantization
from fedq.personalize.own_models import Network, OwnModel
from fedq.trainers.run import run_job

SOLO: dict[str, Any] = {
    "algorithm": "quped",
    "exchange": "none",
    "num_clients": 1,
    "cohort": None,
    "local_steps": None,
    "regularizer_weight": 1e-3,
}


def run_quietly(config: Config) -> dict[str, Any]:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return run_job(config)


def solo_run(out: Path, **flags: Any) -> dict[str, Any]:
    return run_quietly(small_config(out, **(SOLO | flags)))


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def centre_rows(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "centres.parquet").to_pylist()


def rounded(values: Tensor) -> set[float]:
    return {round(value, 6) for value in values.unique().tolist()}


# ---- one client's training ----


class ThreeLayers(nn.Module):
    """Small enough to write its training out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(12, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(torch.relu(self.stem(x.flatten(1))))).relu())


def local_training(model: nn.Module, **options: Any) -> LocalTraining:
    images = torch.randint(256, (40, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(40) % 3)

    def make_optimizer(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=0.1)

    given: dict[str, Any] = {"batch_size": 8, "augment": False} | options
    return LocalTraining(
        model=model,
        layout=Layout.of(model, "fp32"),
        split=split,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        make_optimizer=make_optimizer,
        precision=choose_precision("fp32", torch.device("cpu")),
        **given,
    )


def own_model(local: LocalTraining, bits: int) -> OwnModel:
    network = Network("three", local.model, local.layout)
    return OwnModel(network, local.layout.flatten(local.model), Centres.of(local.model, bits, outer_at_one=False))


def by_hand(model: nn.Module, centres: Tensor, local: LocalTraining, batches: list[Tensor], regularizer: str) -> Tensor:
    """Algorithm 1 of arXiv 2107.13892 in its third epoch, with loops; the model is moved in place."""
    e1, e2, penalty = 0.05, 0.02, 3 * 0.01
    optimizer = local.make_optimizer(list(model.parameters()), e1)
    weight = model.inner.weight
    quantized_norm = [model.norm.running_mean.clone(), model.norm.running_var.clone()]
    for batch in batches:
        x, y = (local.split.images[batch] / 255 - 0.5) / 0.25, local.split.labels[batch]
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            values = weight.flatten().tolist()
            for i, value in enumerate(values):
                q = min(centres.tolist(), key=lambda c: abs(value - c))
                s = penalty * e1
                if regularizer == "l2":
                    values[i] = (value + 2 * s * q) / (1 + 2 * s)
                else:
                    moved = value - s if value > q + s else value + s if value < q - s else q
                    values[i] = max(-1.0, min(1.0, moved))
            weight.copy_(torch.tensor(values).view_as(weight))
        members = [min(range(len(centres)), key=lambda j: abs(v - float(centres[j]))) for v in values]
        twin = ThreeLayers().train()
        twin.load_state_dict(model.state_dict())
        twin.inner.weight = nn.Parameter(torch.tensor([float(centres[j]) for j in members]).view_as(weight))
        twin.norm.running_mean.copy_(quantized_norm[0])
        twin.norm.running_var.copy_(quantized_norm[1])
        functional.cross_entropy(twin(x), y).backward()
        gradient = twin.inner.weight.grad
        quantized_norm = [twin.norm.running_mean.clone(), twin.norm.running_var.clone()]
        new = []
        for j, c in enumerate(centres.tolist()):
            mine = [v for v, k in zip(values, members, strict=True) if k == j]
            h = sum(g for g, k in zip(gradient.flatten().tolist(), members, strict=True) if k == j)
            if regularizer == "l2":
                new.append((c - e2 * h + 2 * penalty * e2 * sum(mine)) / (1 + 2 * penalty * e2 * len(mine)))
            else:
                above, below = sum(v > c for v in mine), sum(v < c for v in mine)
                new.append(c - e2 * h + penalty * e2 * (above - below))
        centres = torch.tensor(sorted(new))
    return centres


@pytest.mark.parametrize("regularizer", ["l1", "l2"])
def test_an_epoch_is_algorithm_1_written_out_by_hand(regularizer: Any) -> None:
    torch.manual_seed(0)
    model, twin = ThreeLayers(), ThreeLayers()
    twin.load_state_dict(model.state_dict())
    twin.train()
    local = local_training(model)
    own = own_model(local, 2)
    start = own.centres.values["inner"].clone()
    quantization = Quantization(CentreSchedule(100, 0.8, 0.01, 0.02), regularizer)
    passed = train_alone(own, local, torch.arange(40), bits=2, quantization=quantization, round=2, lr=0.05, seed=5)
    batches = local.index_batches(40, torch.Generator().manual_seed(5))
    expected = by_hand(twin, start, local, batches, regularizer)
    own.fill(quantized=False)
    # The same steps in another order of float32 operations.
    assert torch.allclose(own.centres.values["inner"], expected, rtol=0, atol=1e-5)
    for name, tensor in twin.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(model.state_dict()[name], tensor, rtol=0, atol=1e-5), name
    assert [p.num_seen for p in passed] == [40, 40]
    assert passed[0].loss != passed[1].loss


def test_frozen_weights_do_not_move_by_decay_or_momentum_and_the_rest_learns() -> None:
    torch.manual_seed(0)
    local = local_training(ThreeLayers())
    own = own_model(local, 1)
    quantization = Quantization(CentreSchedule(10, 0.5, 0.01, 0.02))
    seen = []
    for round in range(10):
        passed = train_alone(
            own, local, torch.arange(40), bits=1, quantization=quantization, round=round, lr=0.05, seed=round
        )
        model = own.fill(quantized=True)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        assert len(passed) == (2 if round < 5 else 1)
    for state in seen[5:]:
        assert torch.equal(state["inner.weight"], seen[4]["inner.weight"])
        assert rounded(state["inner.weight"]) == rounded(own.centres.values["inner"])
    assert not torch.equal(seen[9]["head.weight"], seen[4]["head.weight"])
    assert not torch.equal(seen[9]["norm.running_mean"], seen[4]["norm.running_mean"])
    own.fill(quantized=False)
    assert torch.equal(local.model.inner.weight, seen[4]["inner.weight"])


# ---- the job ----


@pytest.fixture(scope="module")
def two_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("quped") / "run"
    return out, solo_run(out, client_bits="2", rounds=5, freeze_at=0.4, lr=0.05)


def test_the_saved_model_is_quantized_and_the_best_on_validation_data(two_bits: tuple[Path, dict[str, Any]]) -> None:
    out, summary = two_bits
    model = build_model("cnn62k")
    model.load_state_dict(load_file(out / "model.safetensors"))
    rows = centre_rows(out)
    for name, weight in inner_weights(model).items():
        values = {round(row["value"], 6) for row in rows if row["layer"] == name and row["round"] == 4}
        assert rounded(weight) <= values
    accuracies = [row["val_accuracy"] for row in metrics(out)][2:]  # rounds 2 to 4 are frozen
    assert summary["best_val_accuracy"] == max(accuracies)
    assert summary["client_best_round"] == [2 + accuracies.index(max(accuracies))]
    assert summary["client_test_accuracy"] == [summary["test_accuracy"]]
    assert summary["client_bits"] == [2]
    assert summary["num_params"] == 62_006
    assert summary["uplink_bytes"] == summary["downlink_bytes"] == 0


def test_rounds_log_both_models(two_bits: tuple[Path, dict[str, Any]]) -> None:
    out, _ = two_bits
    rows = metrics(out)
    names = ("loss", "accuracy", "quantized_loss", "quantized_accuracy")
    for row in rows:
        assert {f"train_{name}" for name in names} | {"val_accuracy", "val_float_accuracy"} <= row.keys()
        is_frozen = row["round"] >= 2
        assert (row["train_loss"] == row["train_quantized_loss"]) == is_frozen
    assert rows[-1]["val_accuracy"] == rows[-1]["val_float_accuracy"]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_centres_are_written(two_bits: tuple[Path, dict[str, Any]]) -> None:
    out, _ = two_bits
    rows = centre_rows(out)
    weights = {name: weight.numel() for name, weight in inner_weights(build_model("cnn62k")).items()}
    assert len(rows) == 5 * len(weights) * 4
    for round in range(5):
        for name, num in weights.items():
            mine = [row for row in rows if (row["round"], row["layer"]) == (round, name)]
            assert [row["index"] for row in mine] == [0, 1, 2, 3]
            assert sum(row["members"] for row in mine) == num
            values = [row["value"] for row in mine]
            assert values == sorted(values)
    assert len({row["value"] for row in rows if row["layer"] == "fc.0" and row["round"] >= 2}) == 4  # frozen


def test_the_test_accuracy_is_that_of_the_saved_model(two_bits: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Started from the saved model and trained at a rate that moves nothing, a float run tests the same."""
    out, summary = two_bits
    again = solo_run(
        tmp_path / "run",
        lr=1e-30,
        optimizer="sgd:weight_decay=0",
        rounds=1,
        warm_start=out / "model.safetensors",
        freeze_at=1.0,
    )
    assert again["test_accuracy"] == summary["test_accuracy"]
    assert again["test_balanced_accuracy"] == summary["test_balanced_accuracy"]


def test_thirty_two_bits_is_plain_training(tmp_path: Path) -> None:
    """The same batches, augmentation and optimizer as the job without centres: the same model, bit for bit."""
    resnet = {"model": "resnet20", "image_size": 8, "optimizer": "adam", "lr": 0.001, "local_steps": 3}
    for flags in ({}, resnet) if is_all() else ({},):
        quped, plain = tmp_path / f"quped{len(flags)}", tmp_path / f"plain{len(flags)}"
        solo_run(quped, client_bits="32", freeze_at=1.0, **flags)
        solo_run(plain, algorithm="fedavg", regularizer_weight=1e-4, **flags)
        assert file_hash(quped / "model.safetensors") == file_hash(plain / "model.safetensors")
        assert not (quped / "centres.parquet").exists()


MIXED = SOLO | {"num_clients": 3, "client_bits": "1,3,32", "rounds": 3, "local_steps": 2, "freeze_at": 0.6}


def run_of_rank(rank: int, config: Config) -> dict[str, Any]:
    summary = run_quietly(config)
    return {name: summary.get(name) for name in ("client_test_accuracy", "client_best_round", "client_bits")}


def test_clients_of_different_bits_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    results = {}
    for world_size in (1, 2):
        out = tmp_path / f"ranks{world_size}"
        config = small_config(out, **MIXED)
        first = run_of_rank(0, config) if world_size == 1 else run_group(world_size, run_of_rank, config)[0]
        results[world_size] = first, centre_rows(out), file_hash(out / "model.safetensors")
    assert results[1] == results[2]
    summary, rows, _ = results[1]
    assert summary["client_bits"] == [1, 3, 32]
    assert {(row["client"], row["index"]) for row in rows} == {(0, j) for j in range(2)} | {(1, j) for j in range(8)}


@pytest.mark.parametrize(
    "flags",
    few(
        [
            {"client_bits": "1", "centres": "fixed", "optimizer": "adam", "lr": 0.01},
            {
                "client_bits": "1",
                "optimizer": "adam",
                "lr": 0.01,
                "model": "resnet20",
                "image_size": 8,
                "local_steps": 2,
            },
            {"client_bits": "8", "regularizer": "l2", "centre_sign": "published", "centre_lr": 10.0},
            {"client_bits": "2", "freeze_at": 1.0, "precision": "bf16"},
        ],
        1,
    ),
)
def test_other_ways_to_train(tmp_path: Path, flags: dict[str, Any]) -> None:
    summary = solo_run(tmp_path / "run", **flags)
    assert summary["test_accuracy"] > 0
    bits = int(flags["client_bits"])
    states = load_file(tmp_path / "run" / "model.safetensors")
    layers = {row["layer"] for row in centre_rows(tmp_path / "run")}
    assert layers
    for layer in layers:
        values = states[f"{layer}.weight"].unique()
        assert len(values) <= 2**bits
        assert values.isfinite().all()
        if flags.get("centres") == "fixed":
            assert set(values.tolist()) == {-1.0, 1.0}


def test_a_target_ends_a_run_once_weights_are_frozen(tmp_path: Path) -> None:
    summary = solo_run(tmp_path / "run", client_bits="1", rounds=20, freeze_at=0.1, target_accuracy=0.001)
    assert summary["rounds"] == 3


# ---- refusals ----


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"client_bits": "0"}, "client_bits"),
        ({"client_bits": "9"}, "client_bits"),
        ({"client_bits": "16"}, "client_bits"),
        ({"client_bits": "2,x"}, "client_bits"),
        ({"client_bits": "2", "centres": "fixed"}, "client_bits"),
        ({"freeze_at": 0.0}, "freeze_at"),
        ({"freeze_at": 1.1}, "freeze_at"),
        ({"freeze_at": float("nan")}, "freeze_at"),
        ({"regularizer_weight": -1.0}, "regularizer_weight"),
        ({"centre_lr": float("inf")}, "centre_lr"),
        ({"prox_mu": 0.1}, "prox_mu"),
        ({"precision": "fp16"}, "precision"),
        ({"weights": "binary"}, "weights"),
        ({"distill_weight": 0.3}, "distill_weight"),
        ({"client_models": "resnet20"}, "client_models"),
        ({"warm_start": Path("nowhere.safetensors")}, "warm_start"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, flags: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as error:
        small_config(tmp_path / "run", **(SOLO | {"client_bits": "2"} | flags))
    assert error.value.field == field


@pytest.mark.parametrize("content", ["garbage", "another model"])
def test_a_warm_start_of_something_else_is_refused(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    if content == "garbage":
        path.write_bytes(b"\x08" + bytes(20))
    else:
        save_file(build_model("cnn1m", image_size=8).state_dict(), path)
    config = small_config(tmp_path / "run", **(SOLO | {"client_bits": "2"}))
    config = replace(config, personal=replace(config.personal, warm_start=path))
    with pytest.raises(FieldError) as error:
        run_quietly(config)
    assert error.value.field == "warm_start"


def test_the_command_line_says_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--dataset digits --model cnn62k --exchange none --algorithm quped --client-bits 12"
    assert main(argv.split()) == 2
    assert capsys.readouterr().err.startswith("error: client_bits='12' is not allowed; allowed: 1 to 8")
