"""`fedq convert` and `fedq inspect`: what is written, what is printed, and what a user reads when it cannot be."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedq.cli import main
from fedq.config import Config
from fedq.configfile import config_dict
from fedq.convert import _layers_by_name
from fedq.inspection import inspect, print_rows
from fedq.lowbit import Uniform, deployed_state_dict, load_packed, pack_state, quantizer, save_packed, use_few_bits
from fedq.models import build_model
from fedq.runfolder import RunFolder

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def cnn(norm: str = "batch", model: str = "cnn62k") -> nn.Module:
    torch.manual_seed(0)
    return build_model(model, norm=norm)


@pytest.fixture
def floats(tmp_path: Path) -> dict[str, Tensor]:
    """A float model in the working directory, and its tensors."""
    state = dict(cnn().state_dict())
    save_file(state, tmp_path / "model.safetensors")
    return state


def run(command: str, capsys: Capture) -> list[str]:
    assert main(command.split()) == 0
    found = capsys.readouterr()
    assert found.err == ""
    return found.out.splitlines()


def refused(command: str, capsys: Capture, folder: Path) -> str:
    """Return the one line that a command ends with, which leaves no file behind."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(command.split()) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (line,) = found.err.splitlines()
    return line


# ---- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 17))
def test_every_width_there_and_back(bits: int, floats: dict[str, Tensor], capsys: Capture) -> None:
    lines = run(f"convert model.safetensors --bits {bits}", capsys)
    chosen = quantizer(bits)
    assert lines[0] == f"packed   3 layers: {chosen.spec}"
    assert lines[1] == "float    2 layers: conv1, fc.2"
    assert lines[-1] == "file     model.fedq"
    run("convert model.fedq --out back.safetensors", capsys)
    back = load_file("back.safetensors")
    assert back.keys() == floats.keys()
    for name, tensor in floats.items():
        few = name in ("conv2.weight", "fc.0.weight", "fc.1.weight")
        assert torch.equal(back[name], chosen.quantize(tensor) if few else tensor)
    ideal = sum(
        tensor.numel() * bits / 8 + 4 * chosen.num_scales
        if name in ("conv2.weight", "fc.0.weight", "fc.1.weight")
        else tensor.nbytes
        for name, tensor in floats.items()
    )
    assert Path("model.fedq").stat().st_size <= 1.02 * ideal + 100  # so small a model has a header of 2 percent


def test_the_layers_are_those_of_the_model_named(floats: dict[str, Tensor], capsys: Capture) -> None:
    lines = run("convert model.safetensors --weights head=8,body=1,tail=8 --model cnn62k --out m.fedq", capsys)
    assert lines[:3] == ["packed   5 layers: int8, binary", "float    0 layers", "layers   of cnn62k"]
    specs = {name: weight.quantizer.spec for name, weight in load_packed(Path("m.fedq")).weights.items()}
    assert specs == {
        "conv1.weight": "int8",
        "conv2.weight": "binary",
        "fc.0.weight": "binary",
        "fc.1.weight": "binary",
        "fc.2.weight": "int8",
    }


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_layers_are_those_of_the_run(norm: str, tmp_path: Path, capsys: Capture) -> None:
    model = cnn(norm, "resnet20")
    with RunFolder.create(tmp_path / "run", name="") as folder:
        settings = config_dict(Config())
        settings["local"] |= {"model": "resnet20", "norm": norm}
        folder.write_config(settings)
        folder.save_model(model.state_dict())
    lines = run("convert run/model.safetensors --weights int4:grid=symmetric,per=channel --out m.fedq", capsys)
    assert lines[2] == "layers   of resnet20, as in run/config.yaml"
    packed = load_packed(Path("m.fedq"))
    use_few_bits(model, "int4:grid=symmetric,per=channel")
    expected = deployed_state_dict(model)
    assert list(packed.tensors) == list(expected)
    assert all(torch.equal(values, expected[name]) for name, values in packed.state_dict().items())
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "run" / "model.safetensors").rename(alone / "model.safetensors")
    (alone / "config.yaml").write_text("architecture: mine\n")
    lines = run("convert alone/model.safetensors --weights int4:grid=symmetric,per=channel --out n.fedq", capsys)
    assert lines[2] == "layers   by names and shapes of the tensors, since alone/config.yaml is not of a run"
    again = load_packed(Path("n.fedq"))
    assert again.weights.keys() == packed.weights.keys()
    assert all(torch.equal(values, expected[name]) for name, values in again.state_dict().items())


def test_binary_inputs_are_no_other_model(tmp_path: Path, capsys: Capture) -> None:
    model = cnn()
    use_few_bits(model, "binary", activations="binary")
    save_file(deployed_state_dict(model), "model.safetensors")
    run("convert model.safetensors --bits 1 --model cnn62k", capsys)
    packed = load_packed(Path("model.fedq"))
    assert "fc.0.binary_input.threshold" in packed.tensors
    other = cnn()
    use_few_bits(other, "binary", activations="binary")
    packed.load_into(other)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("--keep fc.*", "fc.0, fc.1, fc.2"),
        ("--keep conv1 --keep fc.1.weight", "conv1, fc.1"),
        ("--keep conv?", "conv1, conv2"),
    ],
)
def test_other_layers_can_be_kept(keep: str, kept: str, floats: dict[str, Tensor], capsys: Capture) -> None:
    lines = run(f"convert model.safetensors --bits 4 {keep}", capsys)
    assert lines[1] == f"float    {len(kept.split())} layers: {kept}"
    packed = {name.removesuffix(".weight") for name in load_packed(Path("model.fedq")).weights}
    assert packed == {"conv1", "conv2", "fc.0", "fc.1", "fc.2"} - set(kept.split(", "))


def test_kept_layers_and_bits_by_layer(floats: dict[str, Tensor], capsys: Capture) -> None:
    run("convert model.safetensors --weights head=8,body=1 --keep conv2", capsys)
    specs = {name: weight.quantizer.spec for name, weight in load_packed(Path("model.fedq")).weights.items()}
    assert specs == {"conv1.weight": "int8", **{f"fc.{number}.weight": "binary" for number in range(3)}}


def test_layers_by_name_come_in_their_order_with_the_head_last() -> None:
    shapes = {
        "classifier.weight": (10, 8),
        "features.10.weight": (8, 4, 3, 3),
        "features.2.weight": (4, 3, 3, 3),
        "features.2.bias": (4,),
        "norm.weight": (4,),
        "table": (5, 5),
    }
    state = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in shapes.items()} | {
        "ids.weight": torch.zeros(2, 2).long()
    }
    assert _layers_by_name(state) == ["features.2", "features.10", "classifier"]


def test_the_printed_size_is_that_of_the_files(floats: dict[str, Tensor], capsys: Capture) -> None:
    lines = run("convert model.safetensors --bits 1", capsys)
    packed, raw = Path("model.fedq").stat().st_size, sum(tensor.nbytes for tensor in floats.values())
    assert lines[3] == f"size     {packed / 1e3:.1f} kB, float32 {raw / 1e3:.0f} kB, {raw / packed:.1f}x less"


# ---- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("", "bits=None is not allowed; allowed: 1 to 16, or a spec for --weights"),
        ("--bits 0", "bits=0 is not allowed; allowed: 1 to 16"),
        ("--bits 17", "bits=17"),
        ("--weights int4:grid=best", "int4:grid='best'"),
        ("--weights head=1,tail=40", "bits=40"),
        ("--bits 1 --model resnet99", "model='resnet99'"),
        ("--bits 1 --model resnet20", "which lacks fc.bias, fc.weight, norm1.bias and has conv1.bias, conv2.bias"),
        ("--bits 1 --keep layer*", "keep='layer*' is not allowed; allowed: patterns of layer names, which are conv1"),
        ("--bits 1 --keep *", "patterns that leave a layer to pack"),
        ("--bits 1 --out model.safetensors", "a file *.fedq, since model.safetensors is a float model"),
        ("--bits 1 --out none/model.fedq", "a file that can be written"),
    ],
)
def test_what_cannot_be_converted(
    options: str, says: str, floats: dict[str, Tensor], tmp_path: Path, capsys: Capture
) -> None:
    line = refused(f"convert model.safetensors {options}", capsys, tmp_path)
    assert line.startswith("error: ")
    assert says in line


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("convert none.safetensors --bits 1", "No such file"),
        ("convert text.txt --bits 1", "a safetensors file or a packed model"),
        ("convert cut.fedq", "is cut short"),
        ("inspect cut.fedq", "is cut short"),
        ("convert model.fedq --bits 2", "left out, since model.fedq is packed already"),
        ("convert model.fedq --model cnn62k", "model='cnn62k'"),
        ("inspect model.fedq --keep fc*", "left out, since model.fedq is packed already"),
        ("convert model.fedq --out model.fedq", "a file *.safetensors, since model.fedq is a packed model"),
        ("convert link.fedq --out link.safetensors", "another file than the one that is read"),
        ("convert model.fedq --out none/m.safetensors", "a file that can be written"),
        ("convert flat.safetensors --bits 1", "a model with a layer between its first and its last one"),
        ("inspect model.safetensors --keep fc*", "left out, unless with --bits or --weights"),
        ("inspect model.fedq --against flat.safetensors", "this one has no such tensor"),
        ("inspect model.fedq --against wide.safetensors", "this one has [9, 9]"),
        ("inspect model.fedq --csv none/x.csv", "a file that can be written"),
        ("inspect .", "a file that can be read"),
    ],
)
def test_files_that_do_not_fit(
    command: str, says: str, floats: dict[str, Tensor], tmp_path: Path, capsys: Capture
) -> None:
    save_packed(pack_state(floats, {"fc.1": Uniform(bits=4)}), Path("model.fedq"))
    Path("cut.fedq").write_bytes(Path("model.fedq").read_bytes()[:500])
    Path("text.txt").write_text("weights")
    Path("link.fedq").symlink_to("model.fedq")
    Path("link.safetensors").symlink_to("model.fedq")
    save_file({"bias": torch.zeros(3)}, "flat.safetensors")
    save_file(floats | {"fc.1.weight": torch.zeros(9, 9)}, "wide.safetensors")
    line = refused(command, capsys, tmp_path)
    assert says in line


@pytest.mark.parametrize("command", ["convert", "convert a --bits many", "convert a --bits 1 --weights 2", "inspect"])
def test_flags_that_cannot_be_read(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


# ---- inspect -----------------------------------------------------------------------------------------------------


def test_a_packed_file_is_shown_layer_by_layer(floats: dict[str, Tensor], capsys: Capture) -> None:
    run("convert model.safetensors --bits 2", capsys)
    lines = run("inspect model.fedq --csv rows.csv", capsys)
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["layer", "shape", "weights", "bits", "packed", "float32", "error", "range", "values"]
    table = {line.split()[0]: line.split()[1:] for line in lines[1:-1]}
    assert list(table) == ["conv1", "conv2", "fc.0", "fc.1", "fc.2", "5", "total"]
    values = Uniform(bits=2).quantize(floats["fc.1.weight"])
    error = (values - floats["fc.1.weight"]).square().sum() / floats["fc.1.weight"].square().sum()
    expected = f"84x120 int2 2 2.52 kB 40.3 kB {error:.2g} {values.min():.3g}..{values.max():.3g} 4"
    assert table["fc.1"] == expected.split()
    assert table["conv1"][1:3] == ["float32", "32"]
    assert table["5"] == ["others", "944", "B", "944", "B"]  # 6 + 16 + 120 + 84 + 10 biases of 4 bytes
    assert lines[-1] == f"model.fedq: {Path('model.fedq').stat().st_size:,} bytes on disk"
    with open("rows.csv", newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert len(rows) == 10
    assert int(rows["fc.1"]["packed_bytes"]) == 84 * 120 // 4 + 4
    assert float(rows["fc.1"]["min"]) == float(values.min())
    assert float(rows["fc.1"]["nmse"]) == pytest.approx(float(error), rel=6e-3)  # stored with three digits
    assert rows["fc.1.bias"]["nmse"] == ""


def test_a_float_file_is_shown_as_it_would_be(floats: dict[str, Tensor], capsys: Capture) -> None:
    plain = run("inspect model.safetensors", capsys)
    assert all("float32" in line for line in plain[:6])
    would = run("inspect model.safetensors --bits 2", capsys)
    run("convert model.safetensors --bits 2", capsys)
    assert would[:-1] == run("inspect model.fedq", capsys)[:-1]


def test_errors_are_against_the_file_named(floats: dict[str, Tensor], capsys: Capture) -> None:
    packed = pack_state(floats, {"fc.1": Uniform(bits=4)})
    save_packed(packed, Path("model.fedq"))
    other = {name: 2 * tensor if name == "fc.1.weight" else tensor for name, tensor in floats.items()}
    rows = {row.name: row for row in inspect(packed, other)}
    values, original = packed.state_dict()["fc.1.weight"], other["fc.1.weight"]
    assert rows["fc.1"].nmse == pytest.approx(float((values - original).square().sum() / original.square().sum()))
    assert rows["fc.0"].nmse == 0
    save_file(other, "other.safetensors")
    (line,) = [line for line in run("inspect model.fedq --against other.safetensors", capsys) if line[:4] == "fc.1"]
    assert f" {rows['fc.1'].nmse:.2g} " in line
    lines = run("inspect model.safetensors --against model.fedq", capsys)
    assert [line.split()[-3] for line in lines[1:6] if not line.startswith("fc.1")] == ["0"] * 4


def test_odd_tensors_can_be_shown(capsys: Capture) -> None:
    model = pack_state({"empty": torch.zeros(0, 3), "mask": torch.tensor([True, False]), "count": torch.tensor(7)}, {})
    rows = {row.name: row for row in inspect(model)}
    assert (rows["empty"].min, rows["empty"].num_values) == (None, 0)
    assert (rows["mask"].bits, rows["mask"].max, rows["mask"].num_values) == (8, 1, 2)
    assert (rows["count"].shape, rows["count"].min) == ("", 7)
    print_rows(list(rows.values()))
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "empty",
        "0x3",
        "float32",
        "32",
        *["0", "B", "0", "B", "-", "-", "0"],
    ]
