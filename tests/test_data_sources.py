from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedq.data import DataError, Dataset, load_dataset
from fedq.data.torchvision_files import CIFAR10_CLASSES, load_arrays
from fedq.errors import FieldError

torch.set_num_threads(1)
MNIST_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def load(dataset: object, tmp_path: Path, **options) -> Dataset:
    return load_dataset(str(dataset), data_dir=tmp_path, cache_dir=tmp_path / "cache", val_fraction=0, **options)


def random_images(num: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def as_file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def channels_first(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) or grey (N, H, W) to the (N, 3, H, W) that every data set has."""
    images = images if images.ndim == 4 else np.stack([images] * 3, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def write_parquet(
    file: Path,
    images: list[bytes | None] | np.ndarray,
    labels: list,
    *,
    column: str = "img",
    names: list[str] | None = None,
    label_type: pa.DataType | None = None,
    row_group_size: int = 4,
) -> None:
    encoded = [as_file(image) for image in images] if isinstance(images, np.ndarray) else images
    structs = pa.array([{"bytes": item, "path": "x.png"} for item in encoded])
    table = pa.table({column: structs, "label": pa.array(labels, label_type or pa.int64())})
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=row_group_size)


def write_cifar10(folder: Path, rows: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Write the six pickles as Python 2 would be read by torchvision; return all pixels (N, H, W, 3) and labels."""
    folder.mkdir(parents=True)
    images, labels = random_images(6 * rows, 32, 32, 3), np.arange(6 * rows) % 10
    for number, name in enumerate([*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]):
        part = slice(number * rows, (number + 1) * rows)
        write_batch(folder / name, images[part], labels[part].tolist())
    return images, labels


def write_batch(file: Path, images: np.ndarray, labels: list) -> None:
    data = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    file.write_bytes(pickle.dumps({"data": data, "labels": labels, "batch_label": "a batch"}, protocol=2))


def write_mnist(folder: Path, *, zipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    images, labels = random_images(30, 28, 28), (np.arange(30) % 10).astype(np.uint8)
    for name, array in zip(MNIST_NAMES, (images[:20], labels[:20], images[20:], labels[20:]), strict=True):
        raw = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()
        (folder / f"{name}{'.gz' if zipped else ''}").write_bytes(gzip.compress(raw) if zipped else raw)
    return images, labels


def write_images(folder: Path, per_class: int, names: tuple[str, ...] = ("cat", "dog"), size: int = 32) -> None:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index, image in enumerate(random_images(per_class, size, size, 3, seed=number)):
            (folder / name / f"{index}.png").write_bytes(as_file(image))


# ------------------------------------------------------------------------------------------------------ CIFAR pickles


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py", "cifar10"])
@pytest.mark.parametrize("dataset", ["cifar10", "auto"])
def test_cifar10_pickles_are_read_exactly(tmp_path, folder, dataset):
    images, labels = write_cifar10(tmp_path / folder)
    data = load(dataset, tmp_path)
    assert torch.equal(data.train.images, channels_first(images[:50]))
    assert torch.equal(data.test.images, channels_first(images[50:]))
    assert torch.equal(torch.cat([data.train.labels, data.test.labels]), torch.from_numpy(labels))
    assert (data.name, data.class_names, data.flip) == ("cifar10", CIFAR10_CLASSES, True)
    assert data.description.startswith(f"CIFAR-10 from {tmp_path / folder}: 50 train, 0 validation, 10 test images")


def test_pickles_of_python_2_are_read(tmp_path):
    # Python 2 wrote str, and numpy 1 its own module names; this is such a stream, written out by hand.
    file = tmp_path / "batch"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    state = b"(I1\n(I1\nI3\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\x80\\xff'\ntb"
    file.write_bytes(b"(dS'data'\n" + array + state + b"sS'labels'\n(lI7\nas.")
    entry = load_arrays(file)
    assert entry["labels"] == [7]
    assert entry["data"].tolist() == [[1, 128, 255]]


class Malicious:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, protocol):
    file = tmp_path / "batch"
    file.write_bytes(pickle.dumps({"data": Malicious(tmp_path / "harm")}, protocol=protocol))
    with pytest.raises(DataError, match=r"batch: not a readable CIFAR pickle: it asks for \w+.system; only plain"):
        load_arrays(file)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_builtins_that_call_are_refused(tmp_path, name):
    (tmp_path / "batch").write_bytes(f"cbuiltins\n{name}\n(S'1'\ntR.".encode())
    with pytest.raises(DataError, match=f"it asks for builtins.{name}"):
        load_arrays(tmp_path / "batch")


def test_a_missing_batch_is_named_and_is_no_reason_to_fall_back(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    for dataset in ("cifar10", "auto"):
        with pytest.raises(DataError, match="data_batch_3: this file of the data set cannot be read: No such file"):
            load(dataset, tmp_path)


def test_a_truncated_pickle_is_named(tmp_path):
    write_cifar10(tmp_path / "cifar10")
    os.truncate(tmp_path / "cifar10" / "data_batch_2", 5000)
    with pytest.raises(DataError, match="data_batch_2: not a readable CIFAR pickle"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"pixels": 1, "labels": []}, "expected the keys data and labels, found labels, pixels"),
        ([1, 2], "expected the keys data and labels, found list"),
        ({"data": np.zeros((2, 3072)), "labels": [0, 1]}, "data must be a uint8 array"),
        ({"data": np.zeros((2, 100), np.uint8), "labels": [0, 1]}, "data must be a uint8 array"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "2 images but 1 labels"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, "row 1: label 10 is outside 0..9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [-1, 0]}, "row 0: label -1 is outside 0..9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, None]}, "row 1: label None is not an integer"),
    ],
)
def test_a_wrong_batch_names_file_and_row(tmp_path, entry, message):
    write_cifar10(tmp_path / "cifar10")
    (tmp_path / "cifar10" / "data_batch_4").write_bytes(pickle.dumps(entry))
    with pytest.raises(DataError, match=f"data_batch_4(, |: ){message}"):
        load("cifar10", tmp_path)


# ---------------------------------------------------------------------------------------------------------- MNIST idx


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", ["MNIST/raw", "mnist", "mnist/MNIST/raw"])
def test_mnist_files_become_3x32x32(tmp_path, folder, zipped):
    images, labels = write_mnist(tmp_path / folder, zipped=zipped)
    data = load("mnist", tmp_path)
    assert (data.name, data.image_shape, data.flip) == ("mnist", (3, 32, 32), False)
    assert (len(data.train), len(data.test)) == (20, 10)
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == labels.tolist()
    got = torch.cat([data.train.images, data.test.images])
    exact = torch.nn.functional.interpolate(
        torch.from_numpy(images)[:, None].double(), size=32, mode="bilinear", antialias=True
    )
    # PIL rounds its weights to 22 bits and each of two passes to an integer: at most 1 off.
    assert (got.double() - exact).abs().max() <= 1


def test_mnist_keeps_its_pixels_at_its_own_size(tmp_path):
    images, _ = write_mnist(tmp_path / "mnist")
    assert torch.equal(load("mnist", tmp_path, image_size=28).train.images, channels_first(images[:20]))


def test_a_missing_idx_file_is_named(tmp_path):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / MNIST_NAMES[1]).unlink()
    with pytest.raises(DataError, match=f"{MNIST_NAMES[1]}: this file of the data set cannot be read"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (MNIST_NAMES[0], b"", "not an idx file of unsigned bytes with 3 axes"),
        (MNIST_NAMES[0], struct.pack(">4I", 0x803, 20, 28, 28) + bytes(99), "115 bytes, but its header says 15,696"),
        (MNIST_NAMES[0], struct.pack(">2I", 0x801, 1) + bytes(1), "not an idx file of unsigned bytes with 3 axes"),
        (MNIST_NAMES[1], struct.pack(">2I", 0x801, 3) + bytes(3), "3 labels for 20 images"),
        (MNIST_NAMES[3], struct.pack(">2I", 0x801, 10) + bytes(9) + b"\x0b", "row 9: label 11 is outside 0..9"),
    ],
)
def test_a_wrong_idx_file_is_named(tmp_path, name, content, message):
    write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}(, |: ){message}"):
        load("mnist", tmp_path)


def test_a_truncated_gzip_is_named(tmp_path):
    write_mnist(tmp_path / "mnist", zipped=True)
    os.truncate(tmp_path / "mnist" / f"{MNIST_NAMES[2]}.gz", 200)
    with pytest.raises(DataError, match=f"{MNIST_NAMES[2]}.gz: not a readable file"):
        load("mnist", tmp_path)


# ------------------------------------------------------------------------------------------------------------ Parquet


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("sub_folder", ["", "data"])
def test_parquet_is_read_exactly(tmp_path, column, sub_folder):
    images, labels = random_images(30, 10, 12, 3), [index % 3 for index in range(30)]
    folder = tmp_path / "flowers" / sub_folder
    for shard, part in enumerate((slice(0, 9), slice(9, 20))):
        file = folder / f"train-0000{shard}-of-00002.parquet"
        write_parquet(file, images[part], labels[part], column=column, names=["rose", "lily", "iris"])
    write_parquet(folder / "test-00000-of-00001.parquet", images[20:], labels[20:], column=column)
    data = load("flowers", tmp_path)
    assert torch.equal(data.train.images, channels_first(images[:20]))
    assert torch.equal(data.test.images, channels_first(images[20:]))
    assert torch.cat([data.train.labels, data.test.labels]).tolist() == labels
    assert (data.name, data.class_names, data.flip) == ("flowers", ("rose", "lily", "iris"), True)


def test_parquet_without_class_names_counts_the_labels_and_does_not_flip(tmp_path):
    write_parquet(tmp_path / "set" / "train.parquet", random_images(8, 4, 4), [0, 1, 2, 3] * 2)
    data = load(tmp_path / "set", tmp_path)
    assert (data.class_names, data.flip, data.image_shape) == (("0", "1", "2", "3"), False, (3, 4, 4))
    assert (len(data.train), len(data.test)) == (6, 2)  # no test file: a fifth of 8


@pytest.mark.parametrize("folder", ["", "data", "plain_text", "cifar10", "cifar10/data"])
def test_auto_finds_cifar10_in_parquet(tmp_path, folder):
    images = random_images(6, 32, 32, 3)
    for name in ("train", "test"):
        write_parquet(tmp_path / folder / f"{name}.parquet", images, [0] * 6, names=list(CIFAR10_CLASSES))
    data = load("auto", tmp_path)
    assert (data.name, data.num_classes) == ("cifar10", 10)
    assert torch.equal(data.test.images, channels_first(images))


def test_parquet_of_other_classes_is_not_cifar10(tmp_path):
    write_parquet(tmp_path / "train.parquet", random_images(6, 32, 32, 3), [0] * 6, names=["a", "b"])
    assert load("auto", tmp_path).name == "digits"
    with pytest.raises(FieldError, match="dataset='cifar10'"):
        load("cifar10", tmp_path)


def test_mnist_in_parquet_becomes_3x32x32(tmp_path):
    write_parquet(tmp_path / "mnist" / "train.parquet", random_images(6, 28, 28), [0, 9] * 3, column="image")
    assert load("mnist", tmp_path).image_shape == (3, 32, 32)


def good_rows(num: int = 6) -> tuple[list[bytes | None], list]:
    return [as_file(image) for image in random_images(num, 8, 8, 3)], [index % 2 for index in range(num)]


def parquet_error(tmp_path: Path, images: list, labels: list, **options) -> str:
    write_parquet(tmp_path / "set" / "train.parquet", images, labels, **options)
    with pytest.raises(DataError) as caught:
        load("set", tmp_path)
    assert caught.value.file == tmp_path / "set" / "train.parquet"
    return str(caught.value).removeprefix(str(caught.value.file))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("row", [0, 5])
def test_a_truncated_image_names_file_and_row(tmp_path, kind, row):
    images, labels = good_rows()
    images[row] = as_file(random_images(1, 8, 8, 3)[0], kind)[:-40]
    assert parquet_error(tmp_path, images, labels).startswith(f", row {row}: the image cannot be decoded: ")


def test_rows_are_counted_across_batches(tmp_path):
    images, labels = good_rows(1300)
    images[1234] = b"not an image"
    assert parquet_error(tmp_path, images, labels, row_group_size=500).startswith(", row 1234: ")


def test_an_image_without_bytes_names_file_and_row(tmp_path):
    images, labels = good_rows()
    images[3] = None
    assert parquet_error(tmp_path, images, labels) == ", row 3: the image has no bytes"


def test_an_image_of_another_size_names_file_and_row(tmp_path):
    images, labels = good_rows()
    images[4] = as_file(random_images(1, 7, 9, 3)[0])
    message = ", row 4: the image is 9x7, expected 8x8; --image-size resizes"
    assert parquet_error(tmp_path, images, labels) == message
    assert load("set", tmp_path, image_size=8).image_shape == (3, 8, 8)


def test_cifar10_in_parquet_must_be_32x32(tmp_path):
    write_parquet(tmp_path / "cifar10" / "train.parquet", random_images(6, 28, 28, 3), [0] * 6)
    with pytest.raises(DataError, match="row 0: the image is 28x28, expected 32x32"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, None, 1, 0, 1], None, ", row 2: the label is null"),
        ([0, 1, 0, 1, -1, 1], None, ", row 4: label -1 is outside 0..5"),
        ([0, 1, 0, 1, 0, 77], None, ", row 5: label 77 is outside 0..5"),
        ([0, 1, 2, 1, 0, 1], ["cat", "dog"], ", row 2: label 2 is outside 0..1"),
    ],
)
def test_a_wrong_label_names_file_and_row(tmp_path, labels, names, message):
    assert parquet_error(tmp_path, good_rows()[0], labels, names=names) == message


def test_a_test_label_that_training_does_not_know_names_file_and_row(tmp_path):
    images, labels = good_rows()
    write_parquet(tmp_path / "set" / "train.parquet", images, labels)
    write_parquet(tmp_path / "set" / "test.parquet", images, [0, 0, 0, 4, 0, 0])
    with pytest.raises(DataError, match=r"test.parquet, row 3: label 4 is outside 0..1"):
        load("set", tmp_path)


def test_labels_must_be_integers(tmp_path):
    message = parquet_error(tmp_path, good_rows()[0], ["cat"] * 6, label_type=pa.string())
    assert message == ": column label holds string, not integers"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b""], "label": [0]}, "no column img or image; columns found: picture, label"),
        ({"img": [{"bytes": b""}], "fine_label": [0]}, "no column label; columns found: img, fine_label"),
        ({"img": [b""], "label": [0]}, "column img holds binary, not a struct with bytes"),
        ({"img": [{"path": "x"}], "label": [0]}, "column img holds struct<path: string>, not a struct with bytes"),
    ],
)
def test_wrong_columns_are_listed(tmp_path, columns, message):
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "set" / "train.parquet")
    with pytest.raises(DataError, match=f"train.parquet: {message}"):
        load("set", tmp_path)


@pytest.mark.parametrize("content", [b"", b"not parquet"])
def test_a_file_that_is_not_parquet_is_named(tmp_path, content):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"train.parquet: not a readable Parquet file"):
        load("set", tmp_path)


def test_parquet_with_damaged_pages_is_named(tmp_path):
    images, labels = good_rows(50)
    file = tmp_path / "set" / "train.parquet"
    write_parquet(file, images, labels, row_group_size=50)
    content = bytearray(file.read_bytes())
    content[4:3000] = bytes(2996)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train.parquet.*: (column img cannot be read|the image cannot be decoded)"):
        load("set", tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_parquet(tmp_path / "set" / "train-00000-of-00002.parquet", *good_rows())
    with pytest.raises(DataError, match=r"set: shard 1 of train-\*-of-00002.parquet is missing"):
        load("set", tmp_path)


def test_an_empty_test_file_is_named(tmp_path):
    write_parquet(tmp_path / "set" / "train.parquet", *good_rows())
    write_parquet(tmp_path / "set" / "test.parquet", [as_file(random_images(1, 8, 8)[0])], [0])
    table = pq.read_table(tmp_path / "set" / "test.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "set" / "test.parquet")
    with pytest.raises(DataError, match=r"test.parquet: no rows"):
        load("set", tmp_path)


def test_too_few_training_images_are_an_error(tmp_path):
    write_parquet(tmp_path / "set" / "train.parquet", *good_rows(2))
    with pytest.raises(FieldError, match=r"dataset='set' .* 3 or more training images"):
        load("set", tmp_path)


# -------------------------------------------------------------------------------------------------------- ImageFolder


@pytest.mark.parametrize("test_name", ["test", "val"])
def test_an_image_folder_with_a_test_folder(tmp_path, test_name):
    write_images(tmp_path / "pets" / "train", 6)
    write_images(tmp_path / "pets" / test_name, 2)
    data = load("pets", tmp_path)
    assert (len(data.train), len(data.test), data.class_names, data.flip) == (12, 4, ("cat", "dog"), True)
    expected = np.concatenate([random_images(6, 32, 32, 3, seed=label) for label in (0, 1)])
    assert torch.equal(data.train.images, channels_first(expected))
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6


def test_an_image_folder_without_one_gives_a_seeded_stratified_fifth(tmp_path):
    write_images(tmp_path / "pets", 10)
    (tmp_path / "pets" / ".hidden").mkdir()
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not an image")
    first, again, other = (load(tmp_path / "pets", tmp_path, seed=seed) for seed in (0, 0, 1))
    assert first.test.labels.tolist() == [0, 0, 1, 1]
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.test.images, other.test.images)


def test_images_of_any_size_and_mode_are_cropped_and_resized(tmp_path):
    write_images(tmp_path / "pets", 3, size=20)
    grey = np.full((40, 80), 200, dtype=np.uint8)
    grey[:, :20] = grey[:, 60:] = 0  # outside of the crop about the centre
    Image.fromarray(grey).save(tmp_path / "pets" / "cat" / "a.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "pets" / "cat" / "b.png", transparency=b"\x00\x80")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "pets" / "cat" / "c.png")
    Image.fromarray(np.stack([grey] * 4, axis=-1)).save(tmp_path / "pets" / "cat" / "d.png")
    big = Image.fromarray(grey).resize((1600, 800), Image.Resampling.NEAREST)
    big.save(tmp_path / "pets" / "cat" / "e.jpg", quality=95)
    data = load("pets", tmp_path)
    assert data.image_shape == (3, 32, 32)
    cats = torch.cat([data.train.images[data.train.labels == 0], data.test.images[data.test.labels == 0]])
    inner = cats[:, :, :, 1:-1].int()  # the resampling filter reaches a little over the cut at both sides
    flat = [image for image in inner if image.float().std() < 5]  # the five above; the others are noise
    assert len(flat) == 5
    assert (torch.stack(flat) - 200).abs().max() <= 3  # JPEG at quality 95; the others are exact
    assert load("pets", tmp_path, image_size=16).image_shape == (3, 16, 16)


def test_a_broken_image_file_is_named(tmp_path):
    write_images(tmp_path / "pets", 5)
    os.truncate(tmp_path / "pets" / "dog" / "3.png", 300)
    with pytest.raises(DataError, match=r"dog/3.png: the image cannot be decoded"):
        load("pets", tmp_path)


def test_changed_files_are_decoded_again(tmp_path):
    write_images(tmp_path / "pets", 5)
    before = load("pets", tmp_path)
    (tmp_path / "pets" / "cat" / "extra.png").write_bytes(as_file(random_images(1, 32, 32, 3, seed=9)[0]))
    assert len(load("pets", tmp_path).train) == len(before.train) + 1


@pytest.mark.parametrize("empty", ["train/bird", "test/cat"])
def test_an_empty_class_is_an_error_in_training_only(tmp_path, empty):
    write_images(tmp_path / "pets" / "train", 3)
    write_images(tmp_path / "pets" / "test", 1, names=("dog",))
    (tmp_path / "pets" / empty).mkdir()
    if empty.startswith("test"):
        assert load("pets", tmp_path).test.labels.tolist() == [1]
    else:
        with pytest.raises(DataError, match="train/bird: no image of this class"):
            load("pets", tmp_path)


def test_a_test_class_that_training_does_not_know_is_named(tmp_path):
    write_images(tmp_path / "pets" / "train", 3)
    write_images(tmp_path / "pets" / "test", 1, names=("cat", "cow"))
    with pytest.raises(DataError, match="test/cow: not a class of the training folder: cat, dog"):
        load("pets", tmp_path)


def test_an_empty_test_folder_is_named(tmp_path):
    write_images(tmp_path / "pets" / "train", 3)
    (tmp_path / "pets" / "test").mkdir()
    with pytest.raises(DataError, match="test: no images in this folder"):
        load("pets", tmp_path)


def test_one_class_is_an_error(tmp_path):
    write_images(tmp_path / "pets", 3, names=("cat",))
    with pytest.raises(DataError, match=r"pets: only one class folder \(cat\); expected two or more"):
        load("pets", tmp_path)


# --------------------------------------------------------------------------------------------------- names, downloads


def test_an_empty_folder_says_which_layouts_are_accepted(tmp_path):
    (tmp_path / "pets").mkdir()
    with pytest.raises(FieldError, match=r"dataset='pets' .* a sub-folder of images for every class.* train\*.parq"):
        load("pets", tmp_path)


def test_an_unknown_name_gets_a_suggestion(tmp_path):
    with pytest.raises(FieldError, match=r"auto, cifar10, digits, mnist \(did you mean 'cifar10'\?\), or a folder"):
        load("cifar1", tmp_path)


@pytest.mark.parametrize(("dataset", "layout"), [("cifar10", "cifar-10-batches-py/"), ("mnist", "MNIST/raw/")])
def test_an_explicit_name_never_falls_back(tmp_path, dataset, layout):
    with pytest.raises(FieldError) as caught:
        load(dataset, tmp_path)
    for words in (f"dataset='{dataset}'", str(tmp_path / dataset), layout, "train*.parquet", "--download"):
        assert words in str(caught.value)


def test_auto_without_cifar10_takes_digits_and_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", None)
    assert load("auto", tmp_path).name == "digits"


@pytest.mark.parametrize("dataset", ["auto", "cifar10"])
def test_download_fetches_what_is_missing(tmp_path, monkeypatch, dataset):
    calls = []

    def fetch(root, *, download):
        calls.append((Path(root), download))
        write_cifar10(Path(root) / "cifar-10-batches-py")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fetch)
    for _ in range(2):
        assert load(dataset, tmp_path, download=True).name == "cifar10"
    assert calls == [(tmp_path, True)]


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    def fetch(root, *, download):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST", fetch)
    with pytest.raises(FieldError, match=r"download=True .*MNIST could not be fetched: no route to host"):
        load("mnist", tmp_path, download=True)


def test_progress_is_shown_on_standard_error(tmp_path, capsys):
    write_images(tmp_path / "pets", 5)
    load("pets", tmp_path, progress=True)
    assert capsys.readouterr().out == ""


# -------------------------------------------------------------------------------------------------------- real images


@pytest.mark.skipif("FEDQ_TEST_DATA" not in os.environ, reason="FEDQ_TEST_DATA names no folder with real data sets")
@pytest.mark.parametrize(("dataset", "num_test"), [("cifar10", 10_000), ("mnist", 2_000)])
def test_real_images(tmp_path, dataset, num_test):
    data = load_dataset(dataset, data_dir=Path(os.environ["FEDQ_TEST_DATA"]), cache_dir=tmp_path)
    assert len(data.test) == num_test
    assert (data.num_classes, data.image_shape) == (10, (3, 32, 32))
    assert data.train.labels.bincount().min() > 600
    if dataset == "cifar10":  # the published mean of CIFAR-10, of which this is 90 % of the images, re-encoded
        assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
