"""What the documents say holds: links lead somewhere, the README's code runs, and evidence tables add up."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from distributed import run_group
from properties import few

import fedq
from fedq.cli import parse_args
from fedq.config import Config, validate
from fedq.sweep import read_plan, table

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks" / "evidence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evidence"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert all((page.parent / target).exists() for target in targets), targets


def test_the_readme_codec_example_runs_and_its_comment_is_true() -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "codec(" in b)
    scope: dict = {}
    exec(block, scope)
    said = int(re.search(r"payload\.nbytes\s+# (\d+)", block)[1])
    assert scope["payload"].nbytes == said
    assert scope["payload"].decode().shape == (512, 512)


@pytest.mark.parametrize("page", ["README.md", "docs/own_training.md"])
def test_ten_lines_of_ones_own_run_and_their_comment_is_true(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S) if "fedq.Client(" in b)
    own = [line for line in block.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
    assert len(own) == 10
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    shards = [(x, x[:, :4].argmax(1)) for x in (torch.randn(160, 20) for _ in range(4))]
    exec(block, {"my_model": model, "shards": shards})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 10
    assert said[0] == block.rstrip().rpartition("# ")[2]


def test_the_interval_of_paired_differences_is_students() -> None:
    # mean 2, standard deviation 1, three seeds: half width t(0.975, 2) / sqrt(3) = 4.3027 / 1.7321 = 2.484
    assert table.interval(np.array([1.0, 2.0, 3.0])) == "+2.00 ± 2.48"
    assert table.interval(np.array([-0.5])) == "-0.50"


def test_a_section_replaces_the_one_of_its_title_and_no_other(evidence: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    for title, text in [("A", "one"), ("B", "two"), ("A", "three")]:
        evidence.replace_section(page, title, f"## {title}\n\n{text}\n")
    assert page.read_text() == "# Results\n\n## A\n\nthree\n\n## B\n\ntwo\n"


def test_what_a_person_wrote_about_a_table_stays(evidence: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("# Results\n\n## One\n\nold\n\nWhat it says:\n\n- much\n\nRe-made by `this`.\n\n## Two\n\nother\n")
    evidence.replace_section(page, "One", "## One\n\nnew\n\nRe-made by `that`.\n")
    assert page.read_text() == (
        "# Results\n\n## One\n\nnew\n\nWhat it says:\n\n- much\n\nRe-made by `that`.\n\n## Two\n\nother\n"
    )


def test_a_row_is_paired_with_the_first_arm() -> None:
    def runs(*accuracies: float) -> list[dict]:
        bytes_ = {"uplink_bytes": 2_000_000, "downlink_bytes": 3_000_000, "uplink_bytes_fp32": 8_000_000}
        metrics = [{"uplink_bytes": n * 1_000_000, "val_accuracy": 0.1 * n} for n in (1, 2)]
        return [
            {"test_accuracy": accuracy, "seed": seed, "seconds": 10.0, "metrics": metrics, **bytes_}
            for seed, accuracy in enumerate(accuracies)
        ]

    first = runs(0.5, 0.6)
    assert table.row("fp32", first, first, []).startswith("| fp32 | 55.00 ± 7.07 |  | 2.0 | 4.0x | 3.0 | 10 |")
    assert "| +1.00 ± 0.00 |" in table.row("int4", runs(0.51, 0.61), first, [])
    assert table.row("int4", first, first, [0.5, 1.0, 9.0]).endswith("| 10 | - | 10.0 | 20.0 |")
    assert "| +2.00 |" in table.row("int4", runs(0.51, 0.62)[1:], first, []), "the second seeds are a pair"
    silent = [run | {"uplink_bytes": 0, "uplink_bytes_fp32": 0} for run in first]
    assert "| 0.0 | - | 3.0 |" in table.row("local", silent, first, [])


def _ddp_example(rank: int) -> int:
    text = (ROOT / "README.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "fedq.hooks" in b)
    scope: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "init_process_group", lambda backend: None)  # there is one already
        exec(block, scope)
    return scope["state"].sent.first


def test_the_readme_ddp_example_runs() -> None:
    sent = run_group(2, _ddp_example)
    assert sent[0] == sent[1] == 20 * 128 + 2 * 20 + 2 * 10, "5,120 weights in 4 bits, a scale for 256, 10 biases"


@pytest.mark.parametrize(
    "plan", few(sorted((ROOT / "benchmarks" / "plans").glob("*.yaml")), 3), ids=lambda plan: plan.name
)
def test_every_arm_of_a_plan_is_a_job_that_could_start(plan: Path) -> None:
    read_plan(plan, lambda flags: validate(parse_args(flags, defaults=Config())))


def test_the_example_of_a_part_runs() -> None:
    text = (ROOT / "docs" / "own_training.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "fedq.Part)" in b)
    clients = [fedq.Client(lambda model, lr: None, num_examples=1) for _ in range(2)]
    scope: dict = {"torch": torch, "fedq": fedq, "model": torch.nn.Linear(4, 4), "clients": clients}
    exec(block, scope)
    before = scope["model"].weight.detach().clone()
    scope["fed"].run(1, 0.1)
    assert 0 < (scope["model"].weight - before).norm() < 0.1, "noise alone"


def test_the_house_has_all_its_rooms() -> None:
    """The page on architecture names every package and module of the first level, and no other."""
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Floors")[2].partition("\n## ")[0]
    package = ROOT / "fedq"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    rooms |= {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py", "cli.py"}
    named = set(re.findall(r"`(\w+/|\w+\.py)`", text))
    assert rooms <= named, rooms - named
    inside = {path.name for path in package.rglob("*.py")} | {f"{path.parent.name}/" for path in package.rglob("*.*")}
    assert named - inside <= {"train.py", "train_resnet50.py", "slurm/"}
