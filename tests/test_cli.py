"""Flags over YAML over defaults, and what a user reads when a setting cannot be used."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from properties import few

from fedq.cli import _FIRST_FLAGS, main, parse_args
from fedq.config import (
    ClientsConfig,
    Config,
    DataConfig,
    ExchangeConfig,
    LocalConfig,
    RunConfig,
    parse_lr_schedule,
    validate,
)
from fedq.configfile import config_dict, load_config
from fedq.errors import FieldError

ROOT = Path(__file__).parents[1]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits of ranks that leave the word to another, none of which takes any time."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The jobs that main starts, none of which does any work."""
    started: list[Config] = []
    _replace_job(monkeypatch, started.append)
    return started


def _replace_job(monkeypatch: pytest.MonkeyPatch, job: Any) -> None:
    module = ModuleType("fedq.trainers.run")
    module.run_job = job  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fedq.trainers.run", module)


def _set_rank(monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


# ---- flags ----


def test_flags_have_no_group_prefix() -> None:
    argv = "--data-dir d --no-augment --num-clients 10 --cohort 5 --local-epochs 2 --lr 1e-3 --feedback off --out o"
    config = parse_args(argv.split(), defaults=Config())
    assert config == Config(
        data=DataConfig(data_dir=Path("d"), augment=False),
        clients=ClientsConfig(num_clients=10, cohort=5),
        local=LocalConfig(local_epochs=2, lr=1e-3),
        exchange=ExchangeConfig(feedback="off"),
        run=RunConfig(out=Path("o")),
    )


def test_no_two_groups_share_a_flag() -> None:
    names = [item.name for group in fields(Config) for item in fields(getattr(Config(), group.name))]
    assert len(names) == len(set(names))


def test_help_is_grouped_and_shows_every_flag(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("run: {rounds: 77}")
    with pytest.raises(SystemExit) as caught:
        main(["--help", "--config", str(file)])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for group, values in asdict(Config()).items():
        assert f"{group} options" in text
        assert all(f"--{name.replace('_', '-')}" in text for name in values)
    assert "--config FILE.yaml" in text
    assert "default: 77" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--num-cliants 4", ["--num-cliants", "Perhaps you meant", "--num-clients"]),
        ("--rounds many", ["--rounds", "many"]),
        ("--norm grup", ["--norm", "grup", "batch", "group"]),
        ("--rounds", ["--rounds"]),
        ("--config", ["--config"]),
        ("stray", ["stray"]),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_flag_is_told_once(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
    argv: str,
    words: list[str],
    rank: int,
) -> None:
    _set_rank(monkeypatch, rank, rank)
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.out == ""
    assert all(word in shown.err for word in words) if rank == 0 else shown.err == ""
    assert len(waits) == rank


# ---- the file ----


def test_flags_go_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("schema_version: 1\nlocal:\n  lr: 5e-4\n  batch_size: 8\nexchange: {feedback: off}\nclients:\n")
    defaults = Config(local=LocalConfig(model="resnet50", batch_size=4))
    config = parse_args(["--config", str(file), "--batch-size", "16"], defaults=defaults)
    assert config.local == LocalConfig(model="resnet50", batch_size=16, lr=5e-4)
    assert config.exchange.feedback == "off"
    assert config.clients == ClientsConfig()
    assert parse_args([f"--config={file}"], defaults=defaults).local.batch_size == 8


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    ["off", "no", "1e5", "5e-4", "12", "0x1f", "2024-01-01", "1:30", "null", "~", "true", "a: b", "#", "", ".nan"]
)
trees = st.builds(
    Config,
    data=st.builds(DataConfig, dataset=words, data_dir=st.just(Path("a/b")), image_size=st.none() | st.integers()),
    local=st.builds(LocalConfig, lr=st.floats(allow_nan=False), norm=st.sampled_from(["batch", "group"])),
    exchange=st.builds(ExchangeConfig, feedback=st.sampled_from(["auto", "on", "off"]), uplink=words),
    run=st.builds(RunConfig, name=st.none() | words, out=st.none() | st.just(Path("x")), target_accuracy=st.none()),
)


@given(trees)
def test_what_a_run_writes_is_read_back_the_same(tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(yaml.safe_dump({"schema_version": 1, **config_dict(config)}), encoding="utf-8")
    assert load_config(file, Config(run=RunConfig(rounds=99))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("local: {batchsize: 3}", r"local.batchsize=3 .*did you mean 'batch_size'"),
        ("locl: {}", r"key='locl' .*did you mean 'local'"),
        ("1: {}", r"key=1 "),
        ("local: {batch_size: '3'}", r"local.batch_size='3' .*a whole number"),
        ("local: {batch_size: 3.0}", r"local.batch_size=3.0 .*a whole number"),
        ("local: {batch_size: true}", r"local.batch_size=True .*a whole number"),
        ("local: {batch_size: null}", r"local.batch_size=None .*a whole number$"),
        ("local: {local_steps: x}", r"local.local_steps='x' .*a whole number or null"),
        ("local: {lr: fast}", r"local.lr='fast' .*a number"),
        ("local: {lr: [1]}", r"local.lr=\[1\] .*a number"),
        ("local: {norm: grupp}", r"local.norm='grupp' .*did you mean 'group'"),
        ("local: {model: 18}", r"local.model=18 .*text"),
        ("data: {download: 1}", r"data.download=1 .*true or false"),
        ("data: {download: on}", r"data.download='on' .*true or false"),
        ("data: {data_dir: 5}", r"data.data_dir=5 .*a path"),
        ("local: 3", r"local=3 .*mapping"),
        ("[1]", r"=\[1\] .*mapping"),
        ("schema_version: 2", r"schema_version=2 .*: 1"),
        ("schema_version: true", r"schema_version=True"),
        ("local: {lr: 1, lr: 2}", r"config=.*'lr' is given twice"),
        ("local: {lr: 1", r"config=.*YAML"),
        ("a: !!python/object/apply:os.getcwd []", r"config=.*YAML"),
    ],
)
def test_a_bad_file_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(FieldError, match=message) as caught:
        load_config(file, Config())
    assert str(file) in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=r"config='.*none.yaml' .*No such file"):
        load_config(tmp_path / "none.yaml", Config())
    (tmp_path / "raw.yaml").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(FieldError, match=r"config='.*raw.yaml'"):
        load_config(tmp_path / "raw.yaml", Config())


# ---- what can be known before work ----


@pytest.mark.parametrize(
    ("group", "key", "bad", "good"),
    [
        ("data", "val_fraction", [-0.1, 0.51, float("nan")], [0.0, 0.5]),
        ("data", "image_size", [0], [None, 1]),
        ("data", "train_examples", [0], [None, 1]),
        ("clients", "num_clients", [0, -1], [1]),
        ("clients", "cohort", [0, 5], [None, 1, 4]),
        ("clients", "min_examples", [0], [1]),
        ("local", "model", ["resnet19"], ["cnn62k"]),
        ("local", "batch_size", [0], [1]),
        ("local", "local_epochs", [0], [1]),
        ("local", "local_steps", [0], [None, 1]),
        ("local", "lr", [0.0, -1.0, float("nan"), float("inf")], [1e-9]),
        ("local", "lr_schedule", ["", "steps", "steps:at=9+9,factor=1", "steps:at=0,factor=1"], ["constant"]),
        (
            "local",
            "optimizer",
            [
                "sgd:momentum=-0.1",
                "sgd:momentum=1",
                "adamw:weight_decay=-0.1",
                "adam:momentum=0.9",
                "sgf",
                "sgd:nesterov",
            ],
            ["sgd:momentum=0", "sgd:momentum=0.99,weight_decay=0", "adam:weight_decay=0.01", "AdamW"],
        ),
        ("clients", "norm_limit", ["clip", "clip:0", "clip:nan", "cut:3", "drop:-1", "none:3"], ["none", "drop:1.5"]),
        ("exchange", "feedback", ["of", "on:memory=1.1", "off:memory=0.5", "auto:memory=x"], ["off", "on:memory=0.5"]),
        ("local", "prox_mu", [-0.1], [0.0]),
        ("exchange", "uplink", ["int44", "", "int4:blok=2"], ["sign"]),
        ("exchange", "downlink", ["int44", "", "int4:blok=2"], ["sign"]),
        ("exchange", "server", ["fedsgd", "fedadam:rate=1", "lbfgs"], ["fedadam:lr=0.01", "SGD:lr=1"]),
        ("run", "rounds", [0], [1]),
        ("run", "seed", [-1], [0]),
        ("run", "target_accuracy", [0.0, 1.01], [None, 1.0]),
        ("run", "eval_every", [0], [1]),
        ("run", "histogram_every", [-1], [0]),
        ("run", "threads", [0], [None, 1]),
        ("run", "memory_limit_gib", [0.0], [0.5]),
    ],
)
def test_every_limit_is_checked_and_named(group: str, key: str, bad: list, good: list) -> None:
    def with_value(value: Any) -> Config:
        return replace(Config(), **{group: replace(getattr(Config(), group), **{key: value})})

    for value in bad:
        with pytest.raises(FieldError) as caught:
            validate(with_value(value))
        assert caught.value.field == key
        assert repr(value) in str(caught.value)
    for value in good:
        validate(with_value(value))


def test_a_cohort_larger_than_the_clients_is_explained() -> None:
    with pytest.raises(FieldError, match=r"cohort=5 .*1 to 4, the number of clients"):
        validate(Config(clients=ClientsConfig(cohort=5)))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("cosine", ("cosine", (), 1.0)),
        ("steps:at=20+30,factor=0.1", ("steps", (20, 30), 0.1)),
        ("steps:at=7,factor=5e-1", ("steps", (7,), 0.5)),
    ],
)
def test_schedules(spec: str, expected: tuple) -> None:
    assert parse_lr_schedule(spec) == expected


# ---- the program ----


def test_main_runs_the_job_with_the_settings(jobs: list[Config]) -> None:
    defaults = Config(local=LocalConfig(model="cnn62k"))
    assert main(["--rounds", "3"], defaults=defaults) == 0
    assert jobs == [replace(defaults, run=RunConfig(rounds=3))]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_bad_settings_are_one_line_from_rank_0(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, jobs: list[Config], rank: int
) -> None:
    _set_rank(monkeypatch, rank, rank % 2)
    assert main(["--rounds", "0"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == ("error: rounds=0 is not allowed; allowed: 1 or more\n" if rank == 0 else "")
    assert jobs == []


@pytest.mark.parametrize(("rank", "heading"), [(0, "error: "), (1, None), (2, "error on rank 2: "), (3, None)])
def test_a_setting_that_fails_on_a_machine_is_told_once_there(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    waits: list[float],
    rank: int,
    heading: str | None,
) -> None:
    def job(config: Config) -> None:
        raise FieldError("out", "/x", "a folder that can be written")

    _replace_job(monkeypatch, job)
    _set_rank(monkeypatch, rank, rank % 2)
    assert main([]) == 2
    message = "out='/x' is not allowed; allowed: a folder that can be written\n"
    assert capsys.readouterr().err == ("" if heading is None else heading + message)
    assert len(waits) == (1 if heading is None else 0)


def test_other_exceptions_keep_the_traceback_and_name_the_rank(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(config: Config) -> None:
        raise ZeroDivisionError("deep inside")

    _replace_job(monkeypatch, job)
    _set_rank(monkeypatch, 3, 1)
    with pytest.raises(ZeroDivisionError):
        main([])
    assert capsys.readouterr().err == "rank 3 of 4 failed: ZeroDivisionError: deep inside\n"


def test_a_broken_launcher_environment_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, jobs: list[Config]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE='two' is not allowed")
    assert jobs == []


@pytest.mark.slow
@pytest.mark.parametrize(("script", "model"), few([("train_resnet50.py", "resnet50"), ("train.py", "resnet18")], 1))
def test_the_scripts_differ_in_their_model(script: str, model: str) -> None:
    done = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert f"usage: {script}" in done.stdout
    assert f"default: {model})" in done.stdout


def test_help_begins_with_what_a_newcomer_needs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"], defaults=Config())
    head = capsys.readouterr().out.partition("All flags:")[0]
    named = re.findall(r"^  (--[a-z-]+)  ", head, re.MULTILINE)
    assert named == list(_FIRST_FLAGS)
    assert len(named) == 8
    flags = {item.name for group in fields(Config) for item in fields(getattr(Config(), group.name))}
    assert {name.removeprefix("--").replace("-", "_") for name in named} < flags
