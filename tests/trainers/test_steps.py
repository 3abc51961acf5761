"""Data-parallel jobs: against a hand-written loop, the same on all ranks, counted bytes, resume, refusals."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from distributed import run_group
from jobs import LazyJobs, file_hash, small_config
from properties import few, slow_but_for
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fedq import hooks
from fedq.checkpoint import Checkpoints
from fedq.config import Config
from fedq.errors import FieldError
from fedq.models import build_model
from fedq.trainers import steps
from fedq.trainers.job import Job
from fedq.trainers.run import run_job

EPOCHS = 3


def step_config(out: Path, **flags: Any) -> Config:
    base = {"exchange": "step", "num_clients": 4, "cohort": None, "rounds": EPOCHS, "local_steps": 4}
    return small_config(out, **base | flags)


class Stopped(Exception):
    pass


def run_jobs(rank: int, configs: list[Config], stop_at: int | None = None) -> list[dict[str, Any]]:
    """Run jobs one after another on this rank; return its bytes on the wire, and its model, by job."""
    results = []
    for config in configs:
        heard, jobs, states = io.StringIO(), [], []
        with redirect_stdout(heard), redirect_stderr(heard), pytest.MonkeyPatch.context() as patch:
            run_epoch, register = steps._run_epoch, hooks.StepExchange.__init__

            def watched_epoch(job: Job, *given: Any, jobs=jobs, run_epoch=run_epoch) -> Any:
                jobs.append(job)
                if len(jobs) - 1 == stop_at:
                    raise Stopped
                return run_epoch(job, *given)

            def watched_state(self, *given: Any, states=states, register=register, **options: Any) -> None:
                states.append(self)
                register(self, *given, **options)

            patch.setattr(steps, "_run_epoch", watched_epoch)
            patch.setattr(hooks.StepExchange, "__init__", watched_state)
            try:
                summary = run_job(config)
            except Stopped:
                summary = {}
        model = {name: value.numpy().tobytes() for name, value in jobs[-1].model.state_dict().items()}
        sent = (states[0].sent.first, states[0].sent.second)
        results.append({"summary": summary, "model": model, "sent": sent, "heard": heard.getvalue()})
    return results


CASES = {
    "fp32": {"uplink": "fp32"},
    "bf16": {"uplink": "bf16"},
    "int4": {"uplink": "int4", "downlink": "int6"},
    "sign": {"uplink": "sign", "downlink": "int4", "optimizer": "adamw", "lr": 0.003},
    "two_phase": {"uplink": "int4", "downlink": "int8", "schedule": "two_phase"},
    "batchnorm": {"model": "resnet20", "rounds": 2, "local_steps": 1, "uplink": "int8"},
    "powersgd": {"uplink": "powersgd:rank=2,start=3"},
    "labels": {"partition": "dirichlet:alpha=0.5", "local_steps": None, "rounds": 1},
}


@pytest.fixture(scope="module", params=few([2, 1, 3], 1))
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LazyJobs:
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    return LazyJobs(request.param, folder, run_jobs, lambda folder, case: step_config(folder, **CASES[case]))


@pytest.mark.parametrize("case", slow_but_for(CASES, "fp32", "two_phase", "batchnorm"))
def test_all_ranks_end_with_the_same_model(ran: LazyJobs, case: str) -> None:
    first, *others = ran.ranks(case)
    assert all(other["model"] == first["model"] for other in others)
    saved = load_file(ran.folder(case) / "model.safetensors")
    assert {name: value.numpy().tobytes() for name, value in saved.items()} == first["model"]


@pytest.mark.parametrize("case", slow_but_for(CASES, "fp32", "two_phase", "batchnorm"))
def test_the_ledger_has_every_byte_of_the_legs(ran: LazyJobs, case: str) -> None:
    seen = ran.ranks(case)
    table = pq.read_table(ran.folder(case) / "ledger.parquet").to_pylist()
    summary = json.loads((ran.folder(case) / "summary.json").read_text())

    def booked(column: str, **wanted: Any) -> int:
        return sum(row[column] for row in table if all(row[key] == value for key, value in wanted.items()))

    for leg, direction in enumerate(("uplink", "downlink")):
        by_rank = [result["sent"][leg] for result in seen]
        assert summary[f"{direction}_bytes"] == booked("payload", direction=direction) == sum(by_rank)
        for rank, nbytes in enumerate(by_rank):
            assert booked("wire", direction=direction, client=rank) == nbytes
    assert booked("wire") == summary["wire_bytes"]
    statistics = booked("wire", direction="peer", part="stats", tensor="statistics")
    assert (statistics > 0) == (case == "batchnorm" and ran.world_size > 1)


@pytest.mark.parametrize("case", slow_but_for(["fp32", "bf16", "int4", "two_phase"], "fp32", "two_phase"))
def test_bytes_follow_the_formula(ran: LazyJobs, case: str) -> None:
    summary, num = ran.ranks(case)[0]["summary"], 62_006
    steps = EPOCHS * 4
    ring = 2 * (ran.world_size - 1) * 4 * num * steps  # of all ranks
    up, down = (summary[f"{direction}_bytes_fp32"] for direction in ("uplink", "downlink"))
    if case == "fp32":
        assert summary["uplink_bytes"] == pytest.approx(ring, rel=1e-5)
        assert up == pytest.approx(ring, rel=1e-5)
    elif case == "bf16":
        assert summary["uplink_bytes"] == pytest.approx(ring / 2, rel=1e-5)
    else:
        assert up + down == pytest.approx(ring, rel=1e-5)
    if case == "two_phase" and ran.world_size > 1:
        sent = summary["uplink_bytes"], summary["downlink_bytes"]
        each = (ran.world_size - 1) * num * steps
        assert sent == (pytest.approx(each * (4 + 0.06) / 8, rel=0.03), pytest.approx(each * (8 + 0.06) / 8, rel=0.03))


def test_plain_gradients_train_like_a_hand_written_loop(ran: LazyJobs) -> None:
    """The oracle: one process, the mean of the ranks' gradients in rank order, plain SGD."""
    world_size, (trained, *_) = ran.world_size, ran.ranks("fp32")
    noted = note_batches(step_config(ran.folder("fp32").with_name(f"noted{world_size}"), uplink="fp32"), world_size)
    torch.manual_seed(noted["weights_seed"])
    model = build_model("cnn62k", num_classes=10, in_channels=3, image_size=32).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, fused=True)
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = noted["lrs"][epoch]
        for step in range(4):
            total: list[Tensor] = [torch.zeros_like(p) for p in model.parameters()]
            for rank in range(world_size):
                x, y = (torch.from_numpy(value) for value in noted["batches"][epoch][rank][step])
                x = x.contiguous(memory_format=torch.channels_last)
                loss = functional.cross_entropy(model(x), y)
                grads = torch.autograd.grad(loss, list(model.parameters()))
                total = [t + g * (1.0 / world_size) for t, g in zip(total, grads, strict=True)]
            for param, grad in zip(model.parameters(), total, strict=True):
                param.grad = grad
            optimizer.step()
    got = load_file(ran.folder("fp32") / "model.safetensors")
    assert got.keys() == trained["model"].keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def note_batches(config: Config, world_size: int) -> dict[str, Any]:
    """Return the batches that each of so many ranks trains on, as the job draws them."""
    from fedq.data import batches as index_batches
    from fedq.federated.training import seeded
    from fedq.kernels import derive_seed
    from fedq.trainers.job import open_job

    with redirect_stdout(io.StringIO()), open_job(config) as job:
        images, labels, training = job.dataset.train.images, job.dataset.train.labels, job.training
        noted: dict[str, Any] = {"weights_seed": derive_seed(0, "weights"), "lrs": [], "batches": []}
        for epoch in range(EPOCHS):
            noted["lrs"].append(job.lr(epoch))
            order = torch.Generator().manual_seed(derive_seed(0, "order", epoch))
            mixed = torch.randperm(len(labels), generator=order)
            padded = torch.cat([mixed, mixed])[: -(-len(labels) // world_size) * world_size]
            by_rank = []
            for place in range(world_size):
                generator, mine = seeded(derive_seed(0, "local", epoch, place)), padded[place::world_size]
                steps = list(index_batches(len(mine), 16, generator=generator))[:4]
                by_rank.append(
                    [(training.inputs(images[mine[i]], generator).numpy(), labels[mine[i]].numpy()) for i in steps]
                )
            noted["batches"].append(by_rank)
    return noted


def test_every_image_is_seen_once_an_epoch(tmp_path: Path) -> None:
    seen = run_group(3, note_indices, step_config(tmp_path / "run"))
    for epoch in range(2):
        parts = [torch.from_numpy(by_epoch[epoch]) for by_epoch in seen]
        assert len({len(part) for part in parts}) == 1
        assert len(torch.cat(parts).unique()) == 280
    assert not torch.equal(torch.from_numpy(seen[0][0]), torch.from_numpy(seen[0][1]))


def note_indices(rank: int, config: Config) -> list[Any]:
    from fedq.trainers.job import open_job

    with redirect_stdout(io.StringIO()), open_job(config) as job:
        return [steps.epoch_indices(job, epoch).numpy() for epoch in range(2)]


# ---- resume ----


@pytest.mark.parametrize(
    "flags",
    few(
        [
            {"uplink": "powersgd:rank=2,start=3"},
            {"uplink": "sign", "optimizer": "adamw", "lr": 0.003},
            {"uplink": "int8", "model": "resnet20", "local_steps": 2},
            {"uplink": "int4", "downlink": "int4", "schedule": "two_phase"},
        ],
        1,
    ),
)
def test_a_resumed_job_ends_with_the_same_bits(tmp_path: Path, flags: dict[str, Any]) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    run_group(2, run_jobs, [step_config(whole, **flags)])
    run_group(2, run_jobs, [step_config(parted, **flags)], 2)
    assert Checkpoints(parted / "checkpoints").numbers() == [1, 2]
    results = run_group(2, run_jobs, [step_config(parted, resume=parted, **flags)])
    assert "resumed after round 2" in results[0][0]["heard"]
    for file in ("model.safetensors", "ledger.parquet"):
        assert file_hash(parted / file) == file_hash(whole / file)
    first, second = (
        [json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in (whole, parted)
    )
    for one, other in zip(first, second, strict=True):
        assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_a_job_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_group(2, run_jobs, [step_config(run)], 2)
    results = run_group(3, run_jobs, [step_config(run, resume=run)])
    assert "world_size 2 -> 3" in results[0][0]["heard"]
    assert results[0][0]["model"] == results[1][0]["model"] == results[2][0]["model"]
    assert results[0][0]["summary"]["rounds"] == EPOCHS


# ---- refusals ----


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"server": "fedadam"}, "server"),
        ({"cohort": 2}, "cohort"),
        ({"local_epochs": 2}, "local_epochs"),
        ({"chaos": "nan=0.1"}, "chaos"),
        ({"uplink": "threshold:value=0.01"}, "uplink"),
        ({"uplink": "int4 sign@2"}, "uplink"),
        ({"downlink": "threshold:value=0.01"}, "downlink"),
        ({"exchange": "round", "schedule": "two_phase"}, "schedule"),
        ({"exchange": "round", "uplink": "powersgd:rank=2"}, "uplink"),
        ({"uplink": "powersgd:rank=0"}, "uplink"),
        ({"uplink": "powersgd:rank=2", "downlink": "int6"}, "downlink"),
    ],
)
def test_settings_of_the_other_mode_are_refused(tmp_path: Path, flags: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as refusal:
        step_config(tmp_path, **flags)
    assert refusal.value.field == field


def test_a_schedule_that_cannot_be_is_refused_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="schedule"):
        run_group(2, run_jobs, [step_config(tmp_path / "run", schedule="hierarchical")])
