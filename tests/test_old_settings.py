"""Settings of earlier versions: flags, files and checkpoints mean what they meant, and the new form is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fedq import configfile
from fedq.cli import parse_args
from fedq.config import Config
from fedq.configfile import load_config, load_deepspeed_config, with_settings
from fedq.errors import FieldError
from fedq.old_settings import modern


@pytest.fixture(autouse=True)
def _told_anew() -> None:
    configfile._tell.cache_clear()


@pytest.mark.parametrize(
    ("flags", "new", "line"),
    [
        ("--momentum 0.5", "--optimizer sgd:momentum=0.5", "optimizer sgd:momentum=0.5 instead of momentum"),
        (
            "--weight-decay 0",
            "--optimizer sgd:weight_decay=0",
            "optimizer sgd:weight_decay=0.0 instead of weight_decay",
        ),
        ("--optimizer adam --weight-decay 0.1", "--optimizer adam:weight_decay=0.1", "adam:weight_decay=0.1 instead"),
        ("--optimizer adam --momentum 0.5", "--optimizer adam", ""),  # it never had any
        ("--optimizer=sgd:momentum=0.5 --weight_decay=0.1", "--optimizer sgd:weight_decay=0.1,momentum=0.5", "instead"),
        ("--max-update-norm 3", "--norm-limit clip:3", "norm_limit clip:3 instead of max_update_norm"),
        ("--norm-rule drop --max-update-norm 1.5", "--norm-limit drop:1.5", "norm_limit drop:1.5 instead of"),
        ("--norm-rule drop", "", ""),  # without a limit it did nothing
        ("--residual-memory 0.5", "--feedback auto:memory=0.5", "feedback auto:memory=0.5 instead of residual_memory"),
        ("--feedback on --residual-memory 0.5", "--feedback on:memory=0.5", "on:memory=0.5"),
        ("--feedback off --residual-memory 0.5", "--feedback off", ""),
    ],
)
def test_an_old_flag_is_read_and_its_new_form_is_said(
    flags: str, new: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        old = parse_args(flags.split(), defaults=Config())
    said = " ".join(record.message for record in caplog.records)
    assert line in said
    assert bool(said) == bool(line)
    expected = parse_args(new.split(), defaults=Config())
    assert modern_of(old) == modern_of(expected)


def modern_of(config: Config) -> dict[str, str]:
    from fedq.federated.local_optimizer import LOCAL_OPTIMIZERS, local_optimizer
    from fedq.specs import spec_of

    optimizer = spec_of(local_optimizer(config.local.optimizer), LOCAL_OPTIMIZERS)
    return {"optimizer": optimizer, "limit": config.clients.norm_limit, "feedback": config.exchange.feedback}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--momentum high", "momentum='high' is not allowed; allowed: a number"),
        ("--momentum 1.5", "momentum=1.5 is not allowed; allowed: 0 or more and below 1"),
        ("--max-update-norm -1", "norm_limit='clip:-1'"),
        ("--norm-rule cut --max-update-norm 2", "norm_limit='cut:2'"),
    ],
)
def test_a_bad_value_of_an_old_flag_is_refused(flags: str, said: str) -> None:
    from fedq.config import validate

    with pytest.raises(FieldError, match=said):
        validate(parse_args(flags.split(), defaults=Config()))


def test_an_old_file_means_what_it_meant_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "local: {optimizer: sgd, momentum: 0.8, weight_decay: 0.0005}\n"
        "clients: {max_update_norm: 2.0, norm_rule: drop}\nexchange: {feedback: on, residual_memory: 0.9}\n"
    )
    with caplog.at_level(logging.WARNING):
        config, _ = load_config(path, Config()), load_config(path, Config())
    assert (config.local.optimizer, config.clients.norm_limit) == ("sgd:momentum=0.8", "drop:2")
    assert config.exchange.feedback == "on:memory=0.9"
    assert [record.message.partition(": ")[2].partition(":")[0] for record in caplog.records] == [
        "local",
        "clients",
        "exchange",
    ]
    path.write_text("local: {optimizer: sgd, momentum: 0.9, weight_decay: 0.0005}\nclients: {max_update_norm: null}\n")
    caplog.clear()
    assert load_config(path, Config()) == Config()
    assert not caplog.records, "nothing to write otherwise"
    path.write_text("data: {momentum: 0.9}\n")
    with pytest.raises(FieldError, match=r"data\.momentum"):
        load_config(path, Config())


def test_a_checkpoint_of_an_earlier_version_says_the_same() -> None:
    old = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "feedback": "auto", "residual_memory": 1.0}
    old |= {"max_update_norm": None, "norm_rule": "clip", "lr": 0.1}
    assert modern(old) == {"optimizer": "sgd", "feedback": "auto", "norm_limit": "none", "lr": 0.1}


@pytest.mark.parametrize("names", [["optimizer", "weight_decay"], ["weight_decay", "optimizer"]])
def test_the_order_of_old_settings_does_not_matter(names: list[str], tmp_path: Path) -> None:
    values = {"optimizer": "adam", "weight_decay": 0.0}
    limits = {"norm_rule": "drop", "max_update_norm": 2.0}
    given = {name: values[name] for name in names} | limits
    assert with_settings(Config(), given).local.optimizer == "adam:weight_decay=0.0"
    (tmp_path / "deepspeed.json").write_text(json.dumps({"fedq": given}))
    config = load_deepspeed_config(tmp_path / "deepspeed.json", Config())
    assert (config.local.optimizer, config.clients.norm_limit) == ("adam:weight_decay=0.0", "drop:2")


def test_deepspeeds_own_keys_are_not_told_how_to_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "deepspeed.json"
    section = {"type": "SGD", "params": {"momentum": 0.5}}
    path.write_text(json.dumps({"optimizer": section}))
    with caplog.at_level(logging.WARNING):
        assert load_deepspeed_config(path, Config()).local.optimizer == "sgd:momentum=0.5"
    assert not caplog.records
    path.write_text(json.dumps({"optimizer": section, "fedq": {"optimizer": "sgd:momentum=0.9"}}))
    with pytest.raises(FieldError, match=r"fedq\.optimizer.*left out, because optimizer.params.momentum says it"):
        load_deepspeed_config(path, Config())
