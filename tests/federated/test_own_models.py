"""Models that nobody here wrote: in other types than float32, with frozen parameters, with tied ones."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_group
from jobs import file_hash, small_config
from properties import few
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from fedq.collectives import Transport
from fedq.data import Split
from fedq.engines.precision import Precision
from fedq.errors import FieldError
from fedq.federated.client import Client
from fedq.federated.frozen import check_frozen, check_ranks, frozen_checksums
from fedq.federated.image_training import LocalTraining
from fedq.federated.stacked import train_stacked
from fedq.federated.training import RoundContext
from fedq.feedback import ErrorFeedback, ResidualStore, read_residual
from fedq.kernels import derive_seed
from fedq.layout import Layout, LayoutSchedule
from fedq.network.participant import Participant, VersionsOnDisk
from fedq.trainers.run import run_job
from fedq.wire import Kind

CLASSES, PIXELS = 10, 64


def pixels(images: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)


class Adapted(nn.Module):
    """A frozen layer with a trained adapter of rank 2 beside it, as LoRA has it, and a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(PIXELS, 16).requires_grad_(False)
        self.down = nn.Linear(PIXELS, 2, bias=False)
        self.up = nn.Linear(2, 16, bias=False)
        self.head = nn.Linear(16, CLASSES)
        self.register_buffer("table", torch.linspace(0, 1, PIXELS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pixels(x) + self.table
        return self.head(torch.relu(self.base(x) + self.up(self.down(x))))


class Half(nn.Module):
    """A network in bfloat16 that takes and gives float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(PIXELS, 16).bfloat16()
        self.last = nn.Linear(16, CLASSES).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(pixels(x).bfloat16()))).float()


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(PIXELS, PIXELS)
        self.second = nn.Linear(PIXELS, PIXELS)
        self.second.weight = self.first.weight
        self.head = nn.Linear(PIXELS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(pixels(x))))))


def adapted() -> nn.Module:
    return Adapted()


def adapted_anew() -> nn.Module:
    """Another base each time: what a model that reads its weights from elsewhere may do."""
    torch.seed()
    return Adapted()


def half() -> nn.Module:
    return Half()


def tied() -> nn.Module:
    return Tied()


class Wave(nn.Module):
    """A layer of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(PIXELS, 16, dtype=torch.complex64))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = pixels(x).to(torch.complex64) @ self.weight
        return self.head(torch.cat((z.real, z.imag), dim=1).relu())


def wave() -> nn.Module:
    return Wave()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(900, CLASSES))


def compiled_network() -> nn.Module:
    return torch.compile(network(), backend="eager")  # type: ignore[return-value]


def run(out: Path, model: str, **flags: Any) -> dict[str, Tensor]:
    run_job(small_config(out, model=f"test_own_models:{model}", **flags))
    return load_file(out / "model.safetensors")


# ---- types that cannot hold the replica --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split() -> Split:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return Split(images, torch.randint(CLASSES, (40,), generator=generator))


def sgd(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def local_training(split: Split, model: nn.Module, **changes: Any) -> LocalTraining:
    fp32 = Precision("fp32", "cpu", channels_last=False)
    made = LocalTraining(model, Layout.of(model, "fp32"), split, (0.5,), (0.5,), sgd, fp32, batch_size=8, augment=False)
    return replace(made, **changes)


def square(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, 64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sends", ["change", "values"])
def test_a_client_that_does_not_train_sends_zeros(tmp_path: Path, dtype: torch.dtype, sends: str) -> None:
    model = square(dtype)
    nothing = Client(lambda model, lr: None, num_examples=3)
    uplink = LayoutSchedule.of(model, "int8", feedback=True)
    if sends == "values":
        uplink = uplink.with_values({"weight": Layout.of(model, "int8")["weight"].codec})
    store = ResidualStore(folder=tmp_path)
    participant = Participant(
        nothing.seated(0, uplink, ErrorFeedback(store), model=model),
        VersionsOnDisk(tmp_path, 0, has_feedback=True),
        run="r",
        uplink="int8",
    )
    participant.replica = torch.randn(participant.layout.numel)
    answer = participant.answer({"round": 0, "lr": 0.1, "seed": 1}, 1)
    tensors = answer.tensors()
    assert not tensors["bias"].any()
    assert tensors["weight"].any() == (sends == "values")
    assert not store.get(0, participant.layout.num_params)[64 * 64 * (sends == "values") :].any()


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_step_of_bfloat16_is_what_it_changed(split: Split, side_by_side: bool) -> None:
    torch.manual_seed(1)
    local = local_training(split, Half(), steps=2)
    replica, indices = torch.randn(local.layout.numel) / 8, torch.arange(20)
    if side_by_side:
        trained = train_stacked(local, replica, [indices, indices + 20], lr=0.5, seeds=[5, 6])[0]
    else:
        trained = local.run(replica, indices, lr=0.5, seed=5)
    sent = local.layout.to_sent_(trained.flat.clone(), replica, trained.changes)
    assert torch.equal(sent, trained.flat - replica.bfloat16().float())
    assert 0 < float((sent != 0).float().mean()) < 1
    idle = local_training(split, Half(), steps=2, make_optimizer=lambda params, lr: sgd(params, 0.0))
    trained = idle.run(replica, indices, lr=0.5, seed=5)
    assert not idle.layout.to_sent_(trained.flat, replica, trained.changes).any()


def test_a_float32_model_keeps_nothing(split: Split) -> None:
    torch.manual_seed(1)
    local = local_training(split, Adapted(), steps=1)
    trained = local.run(torch.zeros(local.layout.numel), torch.arange(8), lr=0.1, seed=0)
    assert not trained.changes


def test_a_job_of_a_bfloat16_model_that_does_not_train_stays_where_it_is(tmp_path: Path) -> None:
    # The first rate is that of rounds: at 1e-30 no bfloat16 weight moves, so the residuals and the server have nothing.
    flags = {"uplink": "int4", "downlink": "fp32", "rounds": 2}
    models = [run(tmp_path / f"{n}", "half", lr=1e-30, **flags | {"rounds": n}) for n in (1, 2)]
    assert {t.dtype for t in models[0].values()} == {torch.bfloat16}
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    residuals = list((tmp_path / "2" / "residuals").glob("*.f32"))
    assert residuals
    assert not any(read_residual(file).any() for file in residuals)


# ---- frozen parameters -------------------------------------------------------------------------------------------


def test_a_job_sends_the_adapters_alone_and_saves_the_whole(tmp_path: Path) -> None:
    saved = run(tmp_path / "whole", "adapted", uplink="int4")
    trained = {"down.weight", "up.weight", "head.weight", "head.bias"}
    assert set(saved) == trained | {"base.weight", "base.bias"}
    residuals = list((tmp_path / "whole" / "residuals").glob("*.f32"))
    assert {read_residual(file).numel() for file in residuals} == {sum(saved[name].numel() for name in trained)}


def test_a_resumed_job_has_the_frozen_parameters_that_it_began_with(tmp_path: Path) -> None:
    first = run(tmp_path / "run", "adapted_anew", rounds=1)
    again = small_config(tmp_path / "run", model="test_own_models:adapted_anew", rounds=2, resume=tmp_path / "run")
    run_job(again)
    resumed = load_file(tmp_path / "run" / "model.safetensors")
    assert torch.equal(resumed["base.weight"], first["base.weight"])
    assert not torch.equal(resumed["head.weight"], first["head.weight"])


def test_a_whole_job_and_a_resumed_one_end_alike(tmp_path: Path) -> None:
    run(tmp_path / "whole", "adapted", rounds=3)
    run(tmp_path / "parts", "adapted", rounds=1)
    parts = tmp_path / "parts"
    run_job(small_config(parts, model="test_own_models:adapted", rounds=3, resume=parts))
    assert file_hash(tmp_path / "whole" / "model.safetensors") == file_hash(tmp_path / "parts" / "model.safetensors")


def _different(rank: int, how: str) -> str:
    model = Adapted()
    if rank == 1 and how == "frozen":
        model.requires_grad_(True)
    if rank == 1 and how == "shape":
        model.head = nn.Linear(16, CLASSES + 1)
    with pytest.raises(FieldError) as refused:
        check_ranks(model, Transport(torch.device("cpu")))
    return str(refused.value)


@pytest.mark.parametrize("how", ["frozen", "shape"])
def test_ranks_with_another_model_say_so_alike(how: str) -> None:
    one, other = run_group(2, _different, how)
    assert one == other
    assert one.startswith("model='checksums by rank")


def _compare(rank: int, changed: str | None) -> str:
    torch.manual_seed(0)
    model = Adapted()
    if changed is not None and rank == 1:
        with torch.no_grad():
            model.get_parameter(changed).view(-1)[-1].add_(1.0)
    try:
        return f"{check_ranks(model, Transport(torch.device('cpu')))} bytes"
    except FieldError as error:
        return error.field


# Two ranks send each other the checksums of the names and of both tensors, 8 bytes each.
@pytest.mark.parametrize(
    ("changed", "said"), [(None, "48 bytes"), ("head.bias", "48 bytes"), ("base.bias", "base.bias")]
)
def test_ranks_compare_what_is_frozen(changed: str | None, said: str) -> None:
    assert run_group(2, _compare, changed) == [said, said]


# ---- complex numbers, and the compiler ---------------------------------------------------------------------------


MODES: dict[str, dict[str, Any]] = {
    "round": {"exchange": "round"},
    "step": {"exchange": "step", "cohort": None},
    "none": {"exchange": "none", "cohort": None, "num_clients": 1},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_complex_numbers_are_trained_and_saved_as_such(tmp_path: Path, mode: str, optimizer: str) -> None:
    saved = run(tmp_path / "run", "wave", optimizer=optimizer, lr=0.01, **MODES[mode])
    assert saved["weight"].dtype == torch.complex64
    torch.manual_seed(derive_seed(0, "weights"))
    moved = saved["weight"] - Wave().weight.detach()
    assert 0 < moved.abs().max() < 1
    assert moved.real.any()
    assert moved.imag.any()


@pytest.mark.slow
@pytest.mark.parametrize("mode", few(["round", "step"], 1))
def test_a_run_of_a_compiled_model_goes_on_without_the_compiler(tmp_path: Path, mode: str) -> None:
    whole = run(tmp_path / "whole", "network", rounds=3, **MODES[mode])
    run(tmp_path / "parts", "compiled_network", rounds=1, **MODES[mode])
    parts = tmp_path / "parts"
    plain = {"model": "test_own_models:network", "resume_changed": ("model",)}
    run_job(small_config(parts, rounds=3, resume=parts, **plain, **MODES[mode]))
    resumed = load_file(parts / "model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_difference_is_named() -> None:
    torch.manual_seed(0)
    own = frozen_checksums(Adapted())
    assert set(own) == {"base.weight", "base.bias"}
    check_frozen(own, dict(own), "the server's")
    with pytest.raises(FieldError, match=r"base\.bias='frozen, checksum .*as the server's"):
        check_frozen(own, own | {"base.bias": 1}, "the server's")
    with pytest.raises(FieldError, match=r"base\.bias='frozen, checksum .*not frozen, as the server's"):
        check_frozen(own, {"base.weight": own["base.weight"]}, "the server's")
    with pytest.raises(FieldError, match=r"x='not frozen' .*frozen, checksum 00000001"):
        check_frozen(own, own | {"x": 1}, "the server's")
    half = frozen_checksums(Adapted().half())
    assert half.keys() == own.keys()
    assert not set(half.values()) & set(own.values())


def test_a_training_function_that_freezes_is_named() -> None:
    model = Adapted()

    def train(model: Adapted, lr: float) -> None:
        model.head.requires_grad_(False)

    layouts = LayoutSchedule.of(model, "int4", feedback=False)
    client = Client(train, num_examples=3).seated(0, layouts, SimpleNamespace(), model=model)
    start = torch.zeros(client.training.layout.numel)
    with pytest.raises(FieldError, match=r"head\.bias='frozen'"):
        client.train(start, RoundContext(0, 0.1, 0))
    with pytest.raises(FieldError, match=r"head\.bias='frozen'"):  # and before the next round does any work
        client.train(start, RoundContext(1, 0.1, 0))
    frame = client.failure(FieldError("head.bias", "frozen", "trained"), RoundContext(0, 0.1, 0))
    assert frame.kind == Kind.FAILED
    assert math.isnan(frame.loss)


# ---- tied parameters ---------------------------------------------------------------------------------------------


def test_a_tie_survives_a_job(tmp_path: Path) -> None:
    saved = run(tmp_path / "run", "tied")
    assert torch.equal(saved["first.weight"], saved["second.weight"])
    model = Tied()
    model.load_state_dict(saved)
    assert model.second.weight is model.first.weight
    assert Layout.of(model, "fp32").num_params == 64 * 64 + 2 * 64 + 650
