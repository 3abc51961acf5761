"""Every engine computes what plain PyTorch computes, bit for bit, alone and on two ranks, and is found where it should.

DeepSpeed and Accelerate keep global state, so each of these tests runs in processes of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import own_state, run_group
from properties import few
from torch import nn
from torch.nn import functional

from fedq.cli import parse_args
from fedq.config import Config
from fedq.engines import Engine, Precision, TorchEngine, make_engine
from fedq.engines.accelerate_engine import accelerate_settings
from fedq.engines.deepspeed_config import DeepSpeedFile
from fedq.errors import FieldError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"batch_size": 8, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "side_by_side": 1, "optimizer": "sgd"}
LAUNCHERS = {"deepspeed": "deepspeed", "accelerate": "accelerate"}


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


ENGINES = [pytest.param(name, marks=needs(name)) for name in LAUNCHERS]


def sgd(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9, weight_decay=1e-3, fused=True)


def model() -> nn.Module:
    """A small network with what engines stumble on: convolutions that lie channels last, and BatchNorm."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def engine(name: str, precision: str = "fp32", path: Path | None = None) -> Engine:
    chosen = Precision(precision, "cpu", channels_last=True)
    os.environ["LOCAL_WORLD_SIZE"] = os.environ.get("WORLD_SIZE", "1")  # as launchers do; Accelerate wants to know
    return make_engine(name, model(), sgd, chosen, settings=SETTINGS, deepspeed_config=path)


def batches(num: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    x = [torch.randn(8, 3, 8, 8, generator=g).contiguous(memory_format=torch.channels_last) for _ in range(num)]
    return [(one, torch.randint(0, 10, (8,), generator=g)) for one in x]


def step(steps_by: Engine, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0) -> None:
    steps_by.backward(functional.cross_entropy(steps_by.forward(x), y) * factor)
    steps_by.step()


def digest(steps_by: Engine) -> str:
    """Hash weights, statistics and optimizer state."""
    sha = hashlib.sha256()
    for tensor in steps_by.model.state_dict().values():
        sha.update(tensor.contiguous().numpy().tobytes())
    for state in steps_by.state_dict()["optimizer"]["state"].values():
        sha.update(state["momentum_buffer"].contiguous().numpy().tobytes())
    sha.update(repr(steps_by.state_dict()["scaler"]).encode())
    return sha.hexdigest()


# ---- one rank ----


def _life(_: int, name: str, precision: str) -> list[str]:
    """Train twice from new state, with another learning rate in between, and note where it got to each time."""
    steps_by, seen = engine(name, precision), []
    for lr in (0.05, 0.01):
        steps_by.start(lr)
        for number, (x, y) in enumerate(batches(4, seed=1)):
            if number == 2:
                steps_by.set_lr(lr / 2)
            step(steps_by, x, y)
            seen.append(digest(steps_by))
        steps_by.finish()
    return seen


@pytest.mark.parametrize("precision", few(["bf16", "fp32", "fp16"], 1))
@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_takes_the_steps_of_plain_torch_bit_for_bit(name: str, precision: str) -> None:
    assert run_group(1, _life, name, precision) == run_group(1, _life, "python", precision)


def _resumed(_: int, first: str, then: str) -> tuple[str, str]:
    seen = batches(6, seed=2)
    whole, before, after = engine("python"), engine(first), engine(then)
    for steps_by in (whole, before):
        steps_by.start(0.05)
    for x, y in seen[:3]:
        step(before, x, y)
    after.model.load_state_dict(before.model.state_dict())
    after.start(0.7)
    after.load_state_dict(before.state_dict())
    for x, y in seen:
        step(whole, x, y)
    for x, y in seen[3:]:
        step(after, x, y)
    return digest(after), digest(whole)


@pytest.mark.parametrize("name", ENGINES)
def test_a_state_is_taken_over_by_another_engine(name: str) -> None:
    for first, then in ((name, name), (name, "python"), ("python", name)):
        ((resumed, whole),) = run_group(1, _resumed, first, then)
        assert resumed == whole


def _overflown(_: int, name: str) -> tuple[bool, float, float]:
    steps_by = engine(name, "fp16")
    steps_by.start(0.05)
    x, y = batches(1, seed=3)[0]
    step(steps_by, x, y)
    before, scale = digest_of(steps_by.model), steps_by.state_dict()["scaler"]["scale"]
    step(steps_by, x, y, factor=float("inf"))
    return digest_of(steps_by.model) == before, scale, steps_by.state_dict()["scaler"]["scale"]


def digest_of(module: nn.Module) -> list[float]:
    return [float(param.detach().double().sum()) for param in module.parameters()]


@pytest.mark.parametrize("name", ["python", *ENGINES])
def test_an_overflow_in_float16_skips_the_step_and_halves_the_scale(name: str) -> None:
    ((is_same, scale, scale_after),) = run_group(1, _overflown, name)
    assert is_same
    assert scale_after == scale / 2


def _clipped(_: int, path: Path) -> list[list[Any]]:
    by_deepspeed, plain = engine("deepspeed", path=path), model()
    by_deepspeed.start(0.05)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for x, y in batches(3, seed=4):
        step(by_deepspeed, x, y)
        optimizer.zero_grad()
        functional.cross_entropy(plain(x), y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
    return [[value.tolist() for value in m.state_dict().values()] for m in (by_deepspeed.model, plain)]


@needs("deepspeed")
def test_clipping_and_an_optimizer_of_the_file_are_deepspeeds(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    params = {"lr": 0.05, "momentum": 0.9, "weight_decay": "auto"}
    path.write_text(json.dumps({"gradient_clipping": 0.1, "optimizer": {"type": "SGD", "params": params}}))
    ((ours, plain),) = run_group(1, _clipped, path)
    for one, other in zip(ours, plain, strict=True):
        # DeepSpeed adds 1e-6 to the norm elsewhere than torch does
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-6)


# ---- two ranks ----


def _round(rank: int, name: str, precision: str, overflow: bool) -> tuple[str, str]:
    """Train two clients on rank 0, of 3 and 5 steps, and one of 7 on rank 1, as a round does."""
    digests = []
    for who in (name, "python"):
        steps_by = engine(who, precision)
        for num_steps in ((3, 5), (7,))[rank]:
            steps_by.start(0.05)
            for number, (x, y) in enumerate(batches(num_steps, seed=rank)):
                step(steps_by, x, y, factor=float("inf") if overflow and number == 1 and rank == 0 else 1.0)
            digests.append(digest(steps_by))
            steps_by.finish()
    half = len(digests) // 2
    return ",".join(digests[:half]), ",".join(digests[half:])


@pytest.mark.parametrize(("precision", "overflow"), few([("fp16", True), ("bf16", False)], 1))
@pytest.mark.parametrize("name", ENGINES)
def test_clients_of_a_round_may_take_different_numbers_of_steps(name: str, precision: str, overflow: bool) -> None:
    results = run_group(2, _round, name, precision, overflow)
    assert all(by_engine == by_torch for by_engine, by_torch in results)
    assert results[0][0] != results[1][0]


def _shared(rank: int, name: str, precision: str, spec: str) -> tuple[str, int, float]:
    steps_by = engine(name, precision)
    state = steps_by.share_gradients({"spec": spec, "seed": 5})
    steps_by.start(0.05)
    statistics = dict(steps_by.model.named_buffers())
    for number, (x, y) in enumerate(batches(5, seed=rank)):
        step(steps_by, x, y, factor=float("inf") if precision == "fp16" and number == 3 and rank == 1 else 1.0)
    for buffer in statistics.values():  # the trainer shares these
        buffer.zero_()
    left = sum(float(value.abs().sum()) for value in own_state(state)["first"].values())
    return digest(steps_by), state.sent.first, left


@pytest.mark.parametrize(
    ("precision", "spec"), [("fp32", "fp32"), ("fp32", "int4"), ("bf16", "int4"), ("fp16", "int4")]
)
@pytest.mark.parametrize("name", ENGINES)
def test_gradients_are_shared_as_ddp_with_our_hook_shares_them(name: str, precision: str, spec: str) -> None:
    ours, torchs = (run_group(2, _shared, who, precision, spec) for who in (name, "python"))
    assert ours[0][0] == ours[1][0] == torchs[0][0] == torchs[1][0], "all ranks have the same bits under each engine"
    assert [row[1:] for row in ours] == [row[1:] for row in torchs], "bytes and residuals"


def _num_bytes_of_the_start(rank: int, name: str) -> list[str]:
    """Return what an engine asks of the group until training starts."""
    asked = []
    broadcast = dist.ProcessGroup.broadcast
    dist.ProcessGroup.broadcast = lambda group, *a, **b: (
        asked.append("broadcast") if group.size() > 1 else None,
        broadcast(group, *a, **b),
    )[1]
    steps_by = engine(name)
    steps_by.start(0.05)
    x, y = batches(1, seed=rank)[0]
    step(steps_by, x, y)
    return asked


@pytest.mark.parametrize("name", ENGINES)
def test_a_round_asks_nothing_of_other_ranks(name: str) -> None:
    assert run_group(2, _num_bytes_of_the_start, name) == [[], []]


# ---- the same job by every launcher ----


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _job(launcher: list[str], out: Path, *flags: str) -> str:
    small = "--dataset digits --train-examples 200 --model cnn62k --num-clients 3 --rounds 1 --precision fp32"
    command = [*launcher, "train.py", *small.split(), "--threads", "1", "--device", "cpu", "--out", str(out), *flags]
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PATH": paths, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@needs("deepspeed")
@needs("accelerate")
@pytest.mark.parametrize("exchange", ["round", "step"])
def test_deepspeed_and_accelerate_launch_train_as_torchrun_does(tmp_path: Path, exchange: str) -> None:
    port = str(_free_port())
    launchers = {
        "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2"],
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", port],
        "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    }
    models = {name: _job(words, tmp_path / name, "--exchange", exchange) for name, words in launchers.items()}
    assert models["deepspeed"] == models["accelerate"] == models["torchrun"]
    for name in launchers:
        assert json.loads((tmp_path / name / "summary.json").read_text())["launcher"] == name


# ---- DeepSpeed's file ----


def write(path: Path, **tree: Any) -> Path:
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"zero_optimization": {"stage": 1}}, r"zero_optimization\.stage=1 is not allowed; allowed: 0 \("),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage=3"),
        ({"gradient_compression": {"quantization_bits": 8}}, r"no such key; \"fedq\": {\"uplink\": \"int8\"}"),
        ({"gradient_clippin": 1.0}, "did you mean 'gradient_clipping'"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps=4 .*--batch-size"),
        ({"scheduler": {"type": "WarmupLR"}}, "--lr-schedule"),
        ({"communication_data_type": "fp16"}, "--uplink"),
        ({"train_batch_size": 64}, "train_micro_batch_size_per_gpu"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "one precision"),
        ({"fp16": {"enabled": True, "hysteresis": 4}}, r"fp16\.hysteresis=4 is not allowed; allowed: 2"),
        ({"fp16": {"enable": True}}, r"fp16\.enable.*did you mean 'enabled'"),
        ({"torch_autocast": {"enabled": True, "dtype": "int8"}}, r"torch_autocast\.dtype='int8'"),
        ({"fedq": {"uplnk": "int4"}}, r"fedq\.uplnk.*did you mean 'uplink'"),
        ({"fedq": {"rounds": "seven"}}, r"fedq\.rounds='seven' is not allowed; allowed: a whole number"),
        ({"fedq": {"batch_size": 8}, "train_micro_batch_size_per_gpu": 16}, r"fedq\.batch_size=8 .*or left out"),
        ({"train_micro_batch_size_per_gpu": "many"}, "train_micro_batch_size_per_gpu='many'.*whole number"),
        ({"fedq": 3}, "fedq=3 is not allowed; allowed: an object"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(tmp_path: Path, tree: dict, said: str) -> None:
    path = write(tmp_path / "ds.json", **tree)
    with pytest.raises(FieldError, match=said):
        parse_args(["--deepspeed-config", str(path)], defaults=Config())


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"bf16": {}, "bf16": {}}', "'bf16' is not allowed; allowed: given once"), ("{,}", "JSON"), ("[]", "an object")],
)
def test_a_file_that_is_no_plain_json_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(FieldError, match=said):
        DeepSpeedFile.read(path)
    with pytest.raises(FieldError, match="can be read"):
        DeepSpeedFile.read(tmp_path / "none.json")


def test_the_file_stands_between_yaml_and_flags(tmp_path: Path) -> None:
    path = write(
        tmp_path / "ds.json",
        train_micro_batch_size_per_gpu=24,
        optimizer={"type": "SGD", "params": {"lr": 0.5, "momentum": "auto"}},
        bf16={"enabled": True},
        fedq={"uplink": "int2", "downlink": "int6", "exchange": "none"},
    )
    yaml = tmp_path / "config.yaml"
    yaml.write_text("exchange: {uplink: sign, server: fedavgm, feedback: on}\nlocal: {batch_size: 4}\n")
    flag = ["--deepspeed_config", str(path), "--downlink", "int8"]  # with the underscore of DeepSpeed's own flag
    over = parse_args(["--config", str(yaml), *flag], defaults=Config())
    assert (over.local.batch_size, over.local.lr, over.local.precision) == (24, 0.5, "bf16")
    assert (over.exchange.uplink, over.exchange.downlink, over.exchange.exchange) == ("int2", "int8", "none")
    assert over.exchange.server == "fedavgm"
    assert over.run.deepspeed_config == path
    write(path, **json.loads(path.read_text()) | {"fedq": {"downlink": "int6", "feedback": "auto"}})
    config = parse_args(["--config", str(yaml), "--deepspeed-config", str(path)], defaults=Config())
    assert (config.exchange.uplink, config.exchange.downlink, config.exchange.feedback) == ("sign", "int6", "auto")
    yaml.write_text(f"{yaml.read_text()}run: {{deepspeed_config: {path}}}\n")
    under = parse_args(["--config", str(yaml)], defaults=Config())
    assert (under.local.batch_size, under.exchange.uplink, under.exchange.downlink) == (4, "sign", "int6")


def test_what_deepspeed_is_told_is_what_the_settings_say(tmp_path: Path) -> None:
    path = write(
        tmp_path / "ds.json",
        train_micro_batch_size_per_gpu="auto",
        fp16={"enabled": "auto", "initial_scale_power": 8, "loss_scale_window": 50, "hysteresis": 2},
        optimizer={"type": "AdamW", "params": {"lr": 0.5, "betas": [0.8, 0.9]}},
        steps_per_print=10,
        zero_optimization={"stage": 0, "reduce_bucket_size": "auto"},
        fedq={},
    )
    file = DeepSpeedFile.read(path)
    assert file.scaling == {"init_scale": 256.0, "growth_interval": 50}
    assert file.for_engine("fp16", SETTINGS) == {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,
        "steps_per_print": 10,
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "betas": [0.8, 0.9]}},
        "torch_autocast": {"enabled": True, "dtype": "float16"},
    }


def test_the_file_in_the_repository_is_a_job_that_could_start() -> None:
    config = parse_args(["--deepspeed-config", str(ROOT / "deepspeed_config.json")], defaults=Config())
    assert (config.exchange, config.local) == (Config().exchange, Config().local), "it changes nothing but the engine"


# ---- the choice ----


def test_settings_that_do_nothing_with_an_engine_are_refused(tmp_path: Path) -> None:
    make = partial(make_engine, model=model(), make_optimizer=sgd, precision=Precision("fp32", "cpu", True))
    assert isinstance(make("torchrun", settings=SETTINGS), TorchEngine)
    with pytest.raises(FieldError, match="side_by_side=2 is not allowed; allowed: 1 with DeepSpeed"):
        make("deepspeed", settings=SETTINGS | {"side_by_side": 2})
    path = write(tmp_path / "ds.json", optimizer={"type": "SGD"})
    with pytest.raises(FieldError, match="optimizer='adamw' is not allowed; allowed: left out, because"):
        make("torchrun", settings=SETTINGS | {"optimizer": "adamw"}, deepspeed_config=path)


@pytest.mark.parametrize(("library", "launcher"), [("deepspeed", "deepspeed"), ("accelerate", "accelerate")])
def test_a_missing_library_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, library: str, launcher: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(FieldError, match=rf"pip install 'fedq\[{library}\]'"):
        make_engine(launcher, model(), sgd, Precision("fp32", "cpu", True), settings=SETTINGS)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed train.py"),
        ({"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "dynamo_backend='inductor'"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision='fp8'"),
    ],
)
def test_an_accelerate_configuration_that_would_be_ignored_is_refused(environ: dict, said: str) -> None:
    with pytest.raises(FieldError, match=said):
        accelerate_settings(environ)


def test_accelerates_precision_is_a_default() -> None:
    assert accelerate_settings({"ACCELERATE_MIXED_PRECISION": "bf16"}) == {"precision": "bf16"}
    assert accelerate_settings({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}) == {}


def _tracked(_: int, folder: Path) -> None:
    from fedq.engines.accelerator import Trackers
    from fedq.runfolder import RunFolder

    trackers = Trackers("tensorboard", torch.device("cpu"), folder / "theirs", {"local": {"lr": 0.1, "cohort": None}})
    with RunFolder.create(folder / "run", name="") as run:
        run.follow(trackers)
        run.log_metrics(3, val_accuracy=0.5, note="words")


@needs("accelerate")
def test_accelerates_trackers_get_the_numbers_of_a_round(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_group(1, _tracked, tmp_path)
    (file,) = (tmp_path / "theirs" / "fedq").glob("events*")
    events = EventAccumulator(str(file)).Reload().Scalars("val/accuracy")
    assert [(event.step, event.value) for event in events] == [(3, 0.5)]


@needs("accelerate")
def test_a_tracker_that_is_not_installed_is_refused() -> None:
    from fedq.engines.accelerator import make_accelerator

    with pytest.raises(FieldError, match=r"log_with='tensorbord'.*did you mean 'tensorboard'"):
        make_accelerator(torch.device("cpu"), ["tensorbord"])
