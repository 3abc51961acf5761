"""A run goes on with the settings, data and model that it was begun with, or says what differs; on every rank alike."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed import run_group
from jobs import file_hash, flags, small_config
from PIL import Image
from properties import few, is_all
from stopped_jobs import Stop, run_jobs, stopped_run, whole_run

from fedq.checkpoint import Checkpoints
from fedq.cli import main
from fedq.config import Config
from fedq.data import load_dataset
from fedq.errors import FieldError
from fedq.trainers import fingerprint, job
from fedq.trainers.fingerprint import KEY, Fingerprint, check_names, describe_data
from fedq.trainers.run import run_job

FLAGS: dict[str, Any] = {"uplink": "sign", "rounds": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory, **FLAGS)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_run(tmp_path_factory, **FLAGS)


def change_yaml(folder: Path, **changes: Any) -> None:
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    for group in tree.values():
        if isinstance(group, dict):
            group.update({name: value for name, value in changes.items() if name in group})
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


# ---- settings ----


@pytest.mark.parametrize(
    ("name", "before", "now"),
    few(
        [
            ("lr", 0.03, 0.5),
            ("batch_size", 16, 8),
            ("augment", True, False),
            ("seed", 0, 1),
            ("val_fraction", 0.1, 0.2),
        ],
        2,
    ),
)
def test_a_line_of_config_yaml_that_was_changed_by_hand_is_refused(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, before: object, now: object
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    change_yaml(folder, **{name: now})
    left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["--resume", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {name}={now!r} is not allowed; allowed: {before!r}, as when the run in {folder} was"
    )
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == left


def test_the_settings_of_the_command_go_over_a_changed_config_yaml(whole: Path, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    change_yaml(folder, lr=0.5)
    assert main(flags(folder, **FLAGS)) == 0
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")
    assert yaml.safe_load((folder / "config.yaml").read_text())["local"]["lr"] == 0.03


def test_what_is_taken_over_is_told_recorded_and_no_change_any_more(
    whole: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    changed = flags(folder, **FLAGS, lr="0.5", batch_size="8")
    assert main([*changed, "--resume-changed", "lr"]) == 2
    assert "batch_size=8 is not allowed; allowed: 16" in capsys.readouterr().err
    ways = (["--resume-changed", "lr,batch-size"], ["--resume-changed", "lr", "--resume-changed", "batch_size"])
    for how in ways if is_all() else ways[:1]:
        again = shutil.copytree(folder, tmp_path / f"again{len(how)}")
        assert main([*flags(again, **FLAGS, lr="0.5", batch_size="8"), *how]) == 0
        assert "taken over: batch_size 16 -> 8; lr 0.03 -> 0.5\n" in capsys.readouterr().out
        told = json.loads((again / "summary.json").read_text())["changed_on_resume"]
        assert sorted((one["name"], one["before"], one["now"], one["round"]) for one in told) == [
            ("batch_size", 16, 8, 2),
            ("lr", 0.03, 0.5, 2),
        ]
        assert yaml.safe_load((again / "config.yaml").read_text())["local"]["lr"] == 0.5
        assert main(["--resume", str(again), "--rounds", "4"]) == 0
        assert "taken over" not in capsys.readouterr().out
        assert json.loads((again / "summary.json").read_text())["changed_on_resume"] == told
    assert json.loads((whole / "summary.json").read_text())["changed_on_resume"] == []


def test_names_that_cannot_be_taken_over_are_refused_with_those_that_can(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("learning_rate", "server", "num_clients", "exchange", "rounds", "dataset"):
        assert main(["--resume-changed", name]) == 2
        heard = capsys.readouterr().err
        assert f"resume_changed='{name}' is not allowed; allowed: " in heard
        assert " data, " in heard
        assert " lr, " in heard
        assert " model, " in heard
        assert " server" not in heard.partition("allowed: ")[2]
    every = {one.name for part in fields(Config) for one in fields(getattr(Config(), part.name))}
    for name in every - fingerprint._FREE - fingerprint._FIXED:
        check_names(replace(Config(), run=replace(Config().run, resume_changed=(name,))))


def test_a_run_of_older_code_goes_on_and_says_what_it_cannot_know(
    whole: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a fingerprint at all; without a setting that came later; with one that this code does not have."""
    kinds = {"none": None, "later": "prox_mu", "unknown": "warp"}
    for kind, name in kinds.items() if is_all() else (("none", None), ("unknown", "warp")):
        folder = shutil.copytree(stopped, tmp_path / kind)
        checkpoints = Checkpoints(folder / "checkpoints")
        for number in checkpoints.numbers():
            state = checkpoints.load(number).state
            if name is None:
                del state[KEY]
            elif name == "warp":
                state[KEY]["settings"][name] = 9
            else:
                del state[KEY]["settings"][name]
            checkpoints.save(number, state)
        assert main(["--resume", str(folder)]) == 0
        heard = capsys.readouterr().out
        assert ("have no fingerprint: whether its data are the same cannot be told" in heard) == (kind == "none")
        assert ("warp=9 of the run is no setting of this version" in heard) == (kind == "unknown")
        assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")


def test_a_fingerprint_or_checkpoint_of_later_code_is_refused(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("fedq.checkpoint.FORMAT", 0)  # this code is older than what it finds
        assert main(["--resume", str(folder)]) == 2
    assert "format 1; this version reads 0" in capsys.readouterr().err
    monkeypatch.setattr(fingerprint, "_VERSION", 0)
    assert main(["--resume", str(folder)]) == 2
    assert "version 0 or less, not 1" in capsys.readouterr().err


# ---- data and model ----


def write_images(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(40):
            pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")
    return folder


def one_pixel(folder: Path) -> None:
    path = folder / "cat" / "000.png"
    image = Image.open(path)
    image.putpixel((3, 3), (1, 2, 3))
    image.save(path)


def another_label(folder: Path) -> None:
    (folder / "cat" / "000.png").rename(folder / "dog" / "999.png")


def another_name(folder: Path) -> None:
    (folder / "dog").rename(folder / "fox")


def one_less(folder: Path) -> None:
    (folder / "dog" / "039.png").unlink()


def job_of(images: Path, out: Path, **changes: Any) -> Config:
    given = {"dataset": str(images), "train_examples": None, "num_clients": 2, "cohort": 2, "image_size": 16}
    return small_config(out, **FLAGS | given | changes)


@pytest.fixture(scope="module")
def with_images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Images, a run that was stopped, and one that was not."""
    base = tmp_path_factory.mktemp("images")
    images = write_images(base / "images")
    (whole,) = run_jobs(0, [(job_of(images, base / "whole"), None)])
    assert isinstance(whole[0], dict)
    assert run_jobs(0, [(job_of(images, base / "run"), Stop(2, "begin"))])[0][0] == "Stopped: "
    return images, base / "run", base / "whole"


@pytest.mark.parametrize("world_size", few([1, 2], 1))
def test_data_that_have_only_moved_are_the_same(
    with_images: tuple[Path, Path, Path], tmp_path: Path, world_size: int
) -> None:
    images, stopped, whole = with_images
    moved, folder = shutil.copytree(images, tmp_path / "elsewhere"), shutil.copytree(stopped, tmp_path / "run")
    for seen in run_group(world_size, run_jobs, [(job_of(moved, folder, resume=folder), None)]):
        assert isinstance(seen[0][0], dict), seen
    assert file_hash(folder / "model.safetensors") == file_hash(whole / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (one_pixel, "images of 3x16x16, checksum "),
        pytest.param(another_label, "images of 3x16x16, checksum ", marks=pytest.mark.slow),
        (another_name, "classes: 2, cat, "),
        pytest.param(one_less, "images of 3x16x16, checksum ", marks=pytest.mark.slow),
    ],
)
def test_other_data_are_refused_or_taken_over(
    with_images: tuple[Path, Path, Path], tmp_path: Path, change: Any, differs: str
) -> None:
    images, stopped, _ = with_images
    other, folder = shutil.copytree(images, tmp_path / "images"), shutil.copytree(stopped, tmp_path / "run")
    before = (folder / "config.yaml").read_bytes()
    change(other)
    config = job_of(other, folder, resume=folder)
    (told, _), (again, heard) = run_jobs(
        0, [(config, None), (replace(config, run=replace(config.run, resume_changed=("data",))), None)]
    )
    assert isinstance(told, str)
    assert told.startswith("FieldError: data='")
    assert told.count(differs) >= 2, "both values"
    assert f"as when the run in {folder} was started (or --resume-changed data)" in told
    assert before != (folder / "config.yaml").read_bytes(), "written by the second"
    assert isinstance(again, dict)
    assert again["changed_on_resume"][0]["name"] == "data"
    assert "taken over: data " in heard


def with_other_data_on(rank: int, config: Config, liar: int) -> str:
    load = job.load_dataset

    def other(*given: Any, **options: Any) -> Any:
        data = load(*given, **options)
        if rank == liar:
            data = replace(data, train=replace(data.train, labels=data.train.labels.flip(0)))
        return data

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        patch.setattr(job, "load_dataset", other)
        with pytest.raises(FieldError) as caught:
            run_job(config)
        return str(caught.value)


@pytest.mark.parametrize("liar", few([1, 0], 1))
def test_data_that_differ_on_one_rank_are_refused_on_all(stopped: Path, tmp_path: Path, liar: int) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    config = small_config(folder, **FLAGS, resume=folder)
    before = (folder / "metrics.jsonl").read_bytes()
    told = run_group(2, with_other_data_on, config, liar)
    assert told[0] == told[1]
    assert told[0].startswith("data of rank 1='train: 280 images")
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_ranks_with_different_data_do_not_begin(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", **FLAGS)
    told = run_group(2, with_other_data_on, config, 1)
    assert told[0] == told[1]
    assert told[0].startswith("data of rank 1='train: 280 images")
    assert "as on rank 0" in told[0]


def test_other_settings_are_refused_on_all_ranks(stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    config = small_config(folder, **FLAGS, resume=folder, lr=0.5)
    told = [seen[0][0] for seen in run_group(2, run_jobs, [(config, None)])]
    assert told[0] == told[1]
    assert told[0].startswith("FieldError: lr=")


def test_the_words_for_data_are_those_of_their_content(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    given = {"data_dir": tmp_path, "image_size": 16}
    data = load_dataset(str(images), **given)
    words = describe_data(data)
    assert words == describe_data(load_dataset(str(shutil.copytree(images, tmp_path / "copy")), **given))
    for change in (one_pixel, another_label, another_name, one_less):
        other = shutil.copytree(images, tmp_path / change.__name__)
        change(other)
        assert describe_data(load_dataset(str(other), **given)) != words
    assert describe_data(load_dataset(str(images), **given, seed=1)) != words


def tiny(num_classes: int, width: int = 4) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, width, 3, stride=4), torch.nn.Flatten(), torch.nn.Linear(width * 64, num_classes)
    )


def renamed(num_classes: int) -> torch.nn.Module:
    return tiny(num_classes)


def test_another_model_is_refused_by_its_name_and_by_its_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    own = FLAGS | {"model": "test_fingerprint:tiny"}
    assert run_jobs(0, [(small_config(folder, **own), Stop(2, "begin"))])[0][0] == "Stopped: "
    assert main(flags(folder, **own | {"model": "test_fingerprint:renamed"})) == 2
    assert "model='test_fingerprint:renamed' is not allowed; allowed: 'test_fingerprint:tiny', as" in (
        capsys.readouterr().err
    )
    with monkeypatch.context() as patch:  # the code has changed, not its name
        patch.setattr(tiny, "__defaults__", (8,))
        for more in ([], ["--resume-changed", "model"]):
            assert main([*flags(folder, **own), *more]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "model='test_fingerprint:tiny with 0.weight 8x3x3x3 and 2 more' is not allowed" in line
            assert "allowed: test_fingerprint:tiny with 0.weight 4x3x3x3 and 2 more, as when" in line
    taken = flags(folder, **own | {"model": "test_fingerprint:renamed"})
    assert main([*taken, "--resume-changed", "model"]) == 0
    assert "taken over: model 'test_fingerprint:tiny' -> 'test_fingerprint:renamed'" in capsys.readouterr().out


def test_epochs_of_shared_gradients_have_a_fingerprint_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(tmp_path / "run", exchange="step", rounds=2)
    del given[given.index("--cohort") : given.index("--cohort") + 2]
    del given[given.index("--local-steps") : given.index("--local-steps") + 2]
    assert main(given) == 0
    kept = Fingerprint.kept(tmp_path / "run", Config)
    assert kept.data is not None
    assert kept.settings["exchange"] == "step"
    assert main([*given, "--on-existing", "resume", "--rounds", "3", "--batch-size", "8"]) == 2
    assert "batch_size=8" in capsys.readouterr().err
    for name in ("momentum", "uplink"):
        assert main([*given, "--on-existing", "resume", "--rounds", "3", "--resume-changed", name]) == 2
        assert f"resume_changed='{name}'" in capsys.readouterr().err
