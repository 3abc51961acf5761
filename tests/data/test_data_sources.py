from __future__ import annotations

import gzip
import io
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import as_file, random_images, write_parquet
from PIL import Image, ImageOps
from properties import few

from fedq.data import DataError, Dataset, load_dataset
from fedq.data.torchvision_files import CIFAR10_CLASSES, load_arrays
from fedq.errors import FieldError

torch.set_num_threads(1)
MNIST_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def load(dataset: object, tmp_path: Path, **options) -> Dataset:
    return load_dataset(str(dataset), data_dir=tmp_path, cache_dir=tmp_path / "cache", val_fraction=0, **options)


def channels_first(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) or grey (N, H, W) to the (N, 3, H, W) that every data set has."""
    images = images if images.ndim == 4 else np.stack([images] * 3, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


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
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 2**70]}, f"row 1: label {2**70} is outside 0..9"),
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
    with pytest.raises(DataError, match="test: no images in this folder's class folders"):
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


# --------------------------------------------------------------------------------------------- which files are the data


def per_class(folder: Path, tmp_path: Path) -> list[int]:
    """Return how many training images each class has; the folder has a test set."""
    return load(folder, tmp_path).train.labels.bincount().tolist()


def pets(tmp_path: Path) -> Path:
    write_images(tmp_path / "pets" / "train", 6)
    write_images(tmp_path / "pets" / "test", 2)
    return tmp_path / "pets"


@pytest.mark.parametrize(
    "hidden",
    [
        "cat/.ipynb_checkpoints/0-checkpoint.png",
        "cat/._0.png",
        "cat/sub/.thumbs/deep/0.png",
        ".cow/0.png",
        "__MACOSX/cat/0.png",
        "cat/@eaDir/0.png/THUMB.jpg",
    ],
)
def test_hidden_paths_and_what_tools_leave_behind_are_left_out(tmp_path, hidden):
    folder = pets(tmp_path)
    (folder / "train" / hidden).parent.mkdir(parents=True, exist_ok=True)
    (folder / "train" / hidden).write_bytes(b"no image")
    assert per_class(folder, tmp_path) == [6, 6]


def test_a_data_set_below_a_hidden_folder_is_read(tmp_path):
    folder = pets(tmp_path).rename(tmp_path / ".cache")
    assert per_class(folder, tmp_path) == [6, 6]


def test_links_to_files_folders_and_classes_are_followed(tmp_path):
    folder, other = pets(tmp_path), tmp_path / "elsewhere"
    write_images(other, 4, names=("more", "bird"))
    (folder / "train" / "bird").symlink_to(other / "bird")
    (folder / "train" / "cat" / "nested").symlink_to(other / "more")
    (folder / "train" / "dog" / "linked.png").symlink_to(other / "more" / "0.png")
    data = load(folder, tmp_path)
    assert data.class_names == ("bird", "cat", "dog")
    assert data.train.labels.bincount().tolist() == [4, 10, 7]


@pytest.mark.parametrize("target", [".", "..", "../..", "sub", "sub/.."])
def test_links_that_go_round_in_circles_end(tmp_path, target):
    folder = pets(tmp_path)
    write_images(folder / "train" / "cat", 3, names=("sub",))
    (folder / "train" / "cat" / "again").symlink_to(folder / "train" / "cat" / target)
    (folder / "train" / "cat" / "sub" / "up").symlink_to("..")
    assert per_class(folder, tmp_path) == [9, 6]


@pytest.mark.parametrize("link", ["train/cat/more", "train/cat/0.png.png", "train/cow", "lost"])
@pytest.mark.parametrize("target", ["nowhere", "self"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, link, target):
    folder = pets(tmp_path)
    (folder / link).symlink_to(Path(link).name if target == "self" else target)
    with pytest.raises(DataError, match=f"{link}: this link leads to .*, where nothing can be read"):
        load(folder, tmp_path)


@pytest.mark.parametrize("link", ["dog/other", "dot"])
def test_a_folder_of_two_classes_is_named(tmp_path, link):
    folder = pets(tmp_path)
    (folder / "train" / link).symlink_to(folder / "train" / "cat")
    with pytest.raises(DataError, match=rf"train/{link[:3]}: .*train/cat belongs to this class and, by a link, to cat"):
        load(folder, tmp_path)


def test_a_link_that_moves_to_another_class_is_noticed(tmp_path):
    """The file, its size and its time stay; the order of the files does too."""
    folder, other = pets(tmp_path), tmp_path / "elsewhere"
    write_images(other, 2, names=("more",))
    (folder / "train" / "cat" / "z.png").symlink_to(other / "more" / "0.png")
    assert per_class(folder, tmp_path) == [7, 6]
    (folder / "train" / "cat" / "z.png").rename(folder / "train" / "dog" / "-.png")
    assert per_class(folder, tmp_path) == [6, 7]


def test_a_link_to_another_file_of_the_same_size_and_time_is_noticed(tmp_path):
    folder, link = pets(tmp_path), tmp_path / "pets" / "train" / "cat" / "0.png"
    pixels = [np.full((32, 32, 3), value, dtype=np.uint8) for value in (10, 20)]
    for value, image in enumerate(pixels):
        (tmp_path / f"{value}.bmp").write_bytes(as_file(image, "BMP"))
        os.utime(tmp_path / f"{value}.bmp", ns=(1, 1))
    for value, image in enumerate(pixels):
        link.unlink()
        link.symlink_to(tmp_path / f"{value}.bmp")
        assert torch.equal(load(folder, tmp_path).train.images[0], channels_first(image[None])[0])


@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("test", ["validation", "valid", "Test", "dev", "eval"])
def test_folders_of_splits_may_have_any_of_the_hubs_names(tmp_path, train, test):
    folder = pets(tmp_path)
    (folder / "train").rename(folder / train)
    (folder / "test").rename(folder / test)
    data = load(folder, tmp_path)
    assert (len(data.train), len(data.test), data.class_names) == (12, 4, ("cat", "dog"))


def test_splits_without_a_training_set_are_no_classes(tmp_path):
    folder = pets(tmp_path)
    (folder / "train").rename(folder / "val")
    with pytest.raises(DataError, match=r"pets/test: a test set without a training set: there is no .*pets/train"):
        load(folder, tmp_path)


def test_a_file_type_that_pillow_reads_is_no_longer_left_out(tmp_path):
    folder = pets(tmp_path)
    frames = [Image.new("L", (32, 32), value) for value in (40, 250)]
    frames[0].save(folder / "train" / "cat" / "-.gif", save_all=True, append_images=frames[1:])
    assert load(folder, tmp_path).train.images[0].unique().tolist() == [40]  # the first frame


# ---------------------------------------------------------------------------------------------- complete sets of shards


MARK = "0a1b2c3d4e5f6071"
COMPLETE = {
    "plain": ["train.parquet"],
    "of": ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
    "fingerprint": [f"train-00000-of-00002-{MARK}.parquet", f"train-00001-of-00002-{MARK[::-1]}.parquet"],
    "named": ["my-set-train-0000-of-0002.parquet", "my-set-train-0001-of-0002.parquet"],
    "config": ["default-train.parquet"],
    "converter": ["train/0000.parquet", "train/0001.parquet"],
    "folder": ["train/train-00000-of-00001.parquet"],
    "numbers": ["train_0.parquet", "train_1.parquet", "train_2.parquet"],
    "from 1": ["train-1-of-2.parquet", "train-2-of-2.parquet"],
    "glued": ["train0.parquet", "train1.parquet"],
    "year": ["train2017.parquet"],
    "ten": [f"train-{number}.parquet" for number in range(11)],
}


@pytest.mark.parametrize("place", ["", "data", "default", "data/default"])
@pytest.mark.parametrize("names", few(COMPLETE.values(), 5), ids=COMPLETE)
def test_complete_sets_are_read_in_order(tmp_path, place, names):
    folder = tmp_path / "set" / place
    for label, name in enumerate(names):
        write_parquet(folder / name, random_images(6, 8, 8, seed=label), [label] * 6)
        write_parquet(folder / name.replace("train", "validation"), random_images(1, 8, 8), [label])
    for hidden in ("._train.parquet", ".cache/train.parquet", "train.parquet.lock"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(b"no Parquet")
    data = load("set", tmp_path)
    assert data.train.labels.tolist() == [label for label in range(len(names)) for _ in range(6)]
    assert data.test.labels.tolist() == list(range(len(names)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"], r"shard 1 of train-\*-of-00003.parquet is"),
        ([f"train-00002-of-00003-{MARK}.parquet"], r"shards 0, 1 of train-\*-of-00003.parquet are missing"),
        (["my-set-train-0001-of-0002.parquet"], r"shard 0 of my-set-train-\*-of-0002.parquet is missing"),
        (["train/0000.parquet", "train/0002.parquet"], r"train: shard 1 of \*.parquet is missing"),
        (["train/0003.parquet"], r"train: shards 0, 1, 2 of \*.parquet are missing"),
        (["train_1.parquet", "train_3.parquet"], r"shard 2 of train_\*.parquet is missing"),
        (["train-00009-of-00009.parquet"], r"shards 1, 2, 3, 4, 5 and more of train-\*-of-00009.parquet are missing"),
        (["train-0-of-1.parquet", "train-1-of-1.parquet"], "train-1-of-1.parquet: its number is beyond 0"),
        (
            [f"train-00000-of-00001-{MARK}.parquet", f"train-00000-of-00001-{MARK[::-1]}.parquet"],
            f"two files of one shard: train-00000-of-00001-{MARK}.parquet, train-00000-of-00001-{MARK[::-1]}.parquet",
        ),
        (
            ["train-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
            "more than one set: set/train-00000-of-00001.parquet, set/train-00000-of-00002.parquet",
        ),
        (
            ["train.parquet", "train-00000-of-00001.parquet"],
            "more than one set: set/train-00000-of-00001.parquet, set/t",
        ),
        (["train.parquet", "train/0000.parquet"], "more than one set: set/train.parquet, train/0000.parquet"),
        (["train-a.parquet", "train-b.parquet"], "more than one set: set/train-a.parquet, set/train-b.parquet"),
        (["training.parquet", "train.parquet"], "more than one set: set/train.parquet, set/training.parquet"),
        (["partial-train/0000.parquet"], "partial-train: only the first part of a split"),
        (
            ["a/train.parquet", "b/train/0000.parquet"],
            r"set: Parquet of more than one data set, in a, b; give the folder",
        ),
        (["train.parquet", "data/train.parquet"], r"set: Parquet of more than one data set, in \., data; give"),
    ],
)
def test_incomplete_and_mixed_sets_are_named(tmp_path, names, message):
    for name in names:
        write_parquet(tmp_path / "set" / name, *good_rows())
    with pytest.raises(DataError, match=message):
        load("set", tmp_path)


def test_an_incomplete_test_set_is_named(tmp_path):
    write_parquet(tmp_path / "set" / "train.parquet", *good_rows())
    write_parquet(tmp_path / "set" / "test-00001-of-00002.parquet", *good_rows())
    with pytest.raises(DataError, match=r"shard 0 of test-\*-of-00002.parquet is missing"):
        load("set", tmp_path)


@pytest.mark.parametrize("name", ["a/b/c/train.parquet", "default/all.parquet", "default/test/0000.parquet"])
def test_parquet_elsewhere_is_named_with_the_places_that_are_searched(tmp_path, name):
    write_parquet(tmp_path / "set" / name, *good_rows())
    with pytest.raises(FieldError, match=f"train/\\*.parquet .* in one sub-folder .* has Parquet elsewhere: {name}"):
        load("set", tmp_path)


def test_a_link_to_a_shard_that_is_not_there_is_named(tmp_path):
    write_parquet(tmp_path / "set" / "train-00000-of-00002.parquet", *good_rows())
    (tmp_path / "set" / "train-00001-of-00002.parquet").symlink_to("../blobs/5f6071")
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: this file .* cannot be read: No such file"):
        load("set", tmp_path)


def test_a_link_beside_other_data_sets_may_lead_nowhere(tmp_path):
    (tmp_path / "old").symlink_to("nowhere")
    write_parquet(tmp_path / "mnist" / "train.parquet", random_images(6, 28, 28), [0, 9] * 3)
    assert load("mnist", tmp_path).name == "mnist"


def test_the_hubs_cache_of_links_is_read(tmp_path):
    write_parquet(tmp_path / "blobs" / "5f6071", *good_rows(10))
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    (tmp_path / "snapshot" / "data" / "train-00000-of-00001.parquet").symlink_to("../../blobs/5f6071")
    assert len(load(tmp_path / "snapshot", tmp_path).train) == 8


@pytest.mark.parametrize("folder", ["default", "cifar10/plain_text"])
def test_cifar10_as_the_hub_converts_it(tmp_path, folder):
    images = random_images(6, 32, 32, 3)
    for name in ("train", "test"):
        write_parquet(tmp_path / folder / name / "0000.parquet", images, [0] * 6, names=list(CIFAR10_CLASSES))
    assert load("cifar10", tmp_path).num_classes == 10


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    "label_type", [pa.int8(), pa.int16(), pa.int32(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.bool_()]
)
def test_labels_of_any_integer_type(tmp_path, label_type):
    labels = [False, True] * 3 if label_type == pa.bool_() else [0, 1] * 3
    write_parquet(tmp_path / "set" / "train.parquet", good_rows()[0], labels, label_type=label_type)
    write_parquet(tmp_path / "set" / "test.parquet", *good_rows(4))
    data = load("set", tmp_path)
    assert (data.train.labels.tolist(), data.train.labels.dtype) == ([0, 1] * 3, torch.int64)


def test_labels_in_a_dictionary(tmp_path):
    images, labels = good_rows()
    for name, values in (("train", labels), ("test", labels)):
        write_parquet(tmp_path / "set" / f"{name}.parquet", images, values)
        table = pq.read_table(tmp_path / "set" / f"{name}.parquet")
        pq.write_table(
            table.set_column(1, "label", table["label"].dictionary_encode()), tmp_path / f"set/{name}.parquet"
        )
    assert load("set", tmp_path).train.labels.tolist() == labels


@pytest.mark.parametrize(
    ("value", "label_type"), [(2**63 + 5, pa.uint64()), (2**64 - 1, pa.uint64()), (-7, pa.int8()), (200, pa.uint8())]
)
@pytest.mark.parametrize("names", [None, ["cat", "dog"]])
def test_a_wrong_label_is_reported_as_it_is_in_the_file(tmp_path, value, label_type, names):
    message = parquet_error(tmp_path, good_rows()[0], [0, 1, 0, value, 0, 1], label_type=label_type, names=names)
    assert message.startswith(f", row 3: label {value} is outside 0..")


def test_labels_of_strings_in_a_dictionary_are_named(tmp_path):
    dictionary = pa.dictionary(pa.int8(), pa.string())
    message = parquet_error(tmp_path, good_rows()[0], ["cat"] * 6, label_type=dictionary)
    assert re.match(r": column label holds dictionary<.*string.*>, not integers", message)


def test_a_test_split_with_hidden_labels_is_passed_over_and_said_so(tmp_path):
    images, labels = good_rows()
    write_parquet(tmp_path / "set" / "train.parquet", images, labels)
    write_parquet(tmp_path / "set" / "test.parquet", images, [-1] * 6)
    with pytest.raises(
        DataError, match=r"test.parquet: every label is -1, that is hidden.* put a validation split beside"
    ):
        load("set", tmp_path)
    write_parquet(tmp_path / "set" / "validation.parquet", images[:2], [1, 1])
    data = load("set", tmp_path)
    assert data.test.labels.tolist() == [1, 1]
    assert re.match(
        r"every label in .*/test.parquet is -1, that is hidden: tested on .*/validation.parquet", data.notes[0]
    )
    write_parquet(tmp_path / "set" / "test.parquet", images, [0, 1, -1, 0, 1, 0])
    with pytest.raises(DataError, match=r"test.parquet, row 2: label -1 is outside 0..1"):
        load("set", tmp_path)


def test_parquet_files_are_matched_by_the_names_of_their_classes(tmp_path):
    images, _ = good_rows()
    write_parquet(tmp_path / "set" / "train-00000-of-00002.parquet", images, [0, 1, 2] * 2, names=["cat", "cow", "dog"])
    write_parquet(tmp_path / "set" / "train-00001-of-00002.parquet", images[:2], [0, 1], names=["dog", "cat"])
    write_parquet(tmp_path / "set" / "test.parquet", images[:3], [1, 0, 1], names=["dog", "cow", "elk"])
    data = load("set", tmp_path)
    assert data.class_names == ("cat", "cow", "dog")
    assert (data.train.labels.tolist()[6:], data.test.labels.tolist()) == ([2, 0], [1, 2, 1])
    write_parquet(tmp_path / "set" / "test.parquet", images[:3], [1, 2, 0], names=["dog", "cow", "elk"])
    with pytest.raises(DataError, match=r"test.parquet, row 1: label 2, elk, is not a class of .*: cat, cow, dog"):
        load("set", tmp_path)


def test_a_parquet_test_set_may_lack_a_class(tmp_path):
    images, _ = good_rows()
    write_parquet(tmp_path / "set" / "train.parquet", images, [0, 1, 2] * 2)
    write_parquet(tmp_path / "set" / "test.parquet", images[:2], [0, 2])
    data = load("set", tmp_path)
    assert (data.num_classes, data.test.labels.tolist()) == (3, [0, 2])


# --------------------------------------------------------------------------------------------------- modes, orientation


def decoded(tmp_path: Path, content: bytes, suffix: str, *, parquet: bool = False, **options) -> torch.Tensor:
    """Return one image, uint8 (3, H, W), as fedq reads it from a class folder or from Parquet."""
    if parquet:
        write_parquet(tmp_path / "one" / "train.parquet", [content] * 5, [0, 1, 0, 1, 0], column="image")
    else:
        for number in range(5):
            (tmp_path / "one" / str(number % 2)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "one" / str(number % 2) / f"{number}{suffix}").write_bytes(content)
    return load(tmp_path / "one", tmp_path, **options).train.images[0]


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(*shape: int) -> np.ndarray:
    """A picture that JPEG keeps to a few levels and that no rotation or mirror maps to itself."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    grey = 40 + 100 * rows / shape[0] + 90 * columns / shape[1] * rows / shape[0]
    return np.rint(np.stack([grey, grey[::-1], grey / 2], axis=-1)).astype(np.uint8)


@pytest.mark.parametrize("parquet", [False, True])
@pytest.mark.parametrize(("kind", "apart"), [("JPEG", 6), ("PNG", 0), ("TIFF", 0), ("WEBP", 12)])
@pytest.mark.parametrize("orientation", few(range(1, 9), 3))
def test_images_are_upright_as_their_exif_says(tmp_path, orientation, kind, apart, parquet):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(smooth(32, 48)), kind, exif=exif, **({"quality": 95} if apart else {}))
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    sides = {"image_size": None} if parquet else {"image_size": 32}
    if not parquet:
        expected = np.asarray(ImageOps.fit(Image.fromarray(expected), (32, 32), Image.Resampling.BILINEAR))
    got = decoded(tmp_path, content, f".{kind.lower()}", parquet=parquet, **sides)
    assert torch.equal(got, channels_first(expected[None])[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_large_images_that_are_decoded_small_are_upright_too(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(smooth(640, 960)), "JPEG", exif=exif, quality=95)
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image)
    expected = np.asarray(ImageOps.fit(upright, (32, 32), Image.Resampling.BILINEAR))
    got = decoded(tmp_path, content, ".jpg")
    assert (got.int() - channels_first(expected[None])[0].int()).abs().max() <= 4
    notes = load(tmp_path / "one", tmp_path).notes
    assert notes[0] == f"all images are resized to 32x32, from {'640x960' if orientation >= 5 else '960x640'}"


def test_an_image_with_damaged_exif_is_read_as_it_is_stored(tmp_path):
    content = saved(Image.fromarray(smooth(32, 32)), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage")
    assert torch.equal(decoded(tmp_path, content, ".png"), channels_first(smooth(32, 32)[None])[0])


GREY = np.kron(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8), np.ones((4, 4), dtype=np.uint8))
ALPHA = np.full_like(GREY, 128)


def in_colour(mode: str) -> tuple[Image.Image, np.ndarray]:
    """Return an image of a mode, and the colours that it has by the definition of that mode, (32, 32, 3)."""
    three = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)
    grey = np.stack([GREY] * 3, axis=-1)
    if mode in ("L", "LA"):
        return Image.fromarray(GREY if mode == "L" else np.stack([GREY, ALPHA], axis=-1)), grey
    if mode == "1":
        return Image.fromarray(GREY > 128), np.where(grey > 128, 255, 0)
    if mode in ("P", "PA"):
        image = Image.fromarray(GREY)
        ramp = np.arange(256, dtype=np.uint8)
        image.putpalette(np.stack([ramp, 255 - ramp, ramp // 2], axis=-1).tobytes())
        return image.convert(mode), np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
    if mode == "CMYK":
        image = Image.merge(
            "CMYK", [Image.fromarray(255 - band) for band in (GREY, GREY[::-1], GREY.T)] + [Image.new("L", (32, 32))]
        )
        return image, three
    if mode == "F":
        return Image.fromarray(GREY.astype(np.float32) / 255), grey
    if mode.startswith("I"):
        values = GREY.astype(np.int64) * 256 + 77
        kind = {"I": np.int32, "I;16B": ">u2"}.get(mode, "<u2")
        return Image.frombytes(mode, (32, 32), values.astype(kind).tobytes()), grey
    if mode == "RGBA":
        return Image.fromarray(np.concatenate([three, ALPHA[..., None]], axis=-1)), three
    return Image.fromarray(three).convert(mode), three


@pytest.mark.parametrize(
    ("mode", "kind", "apart"),
    [
        ("1", "PNG", 0),
        ("1", "TIFF", 0),
        ("L", "PNG", 0),
        ("L", "GIF", 0),
        ("LA", "PNG", 0),
        ("LA", "TIFF", 0),
        ("P", "PNG", 0),
        ("P", "GIF", 0),
        ("PA", "TIFF", 0),
        ("RGB", "BMP", 0),
        ("RGBA", "PNG", 0),
        ("RGBA", "TIFF", 0),
        ("RGBX", "TIFF", 0),
        ("CMYK", "TIFF", 0),
        ("CMYK", "JPEG", 24),
        ("YCbCr", "TIFF", 3),
        ("LAB", "TIFF", 40),
        ("F", "TIFF", 0),
        ("I", "TIFF", 0),
        ("I;16", "PNG", 0),
        ("I;16", "TIFF", 0),
        ("I;16B", "TIFF", 0),
    ],
)
def test_every_mode_has_the_colours_of_its_definition(tmp_path, mode, kind, apart):
    image, expected = in_colour(mode)
    suffix = {"TIFF": ".tif", "JPEG": ".jpg"}.get(kind, f".{kind.lower()}")
    content = saved(image, kind, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))
    got = decoded(tmp_path, content, suffix)
    assert (got.int() - channels_first(expected[None])[0].int()).abs().max() <= apart


@pytest.mark.parametrize("mode", ["La", "RGBa", "I;16N", "I;16L", "HSV"])
def test_modes_that_no_file_has_are_read_too(mode):
    from fedq.data.decode import _rgb

    three = np.stack([GREY, GREY, GREY], axis=-1)
    if mode in ("La", "RGBa"):
        bands = [GREY, ALPHA] if mode == "La" else [GREY, GREY, GREY, ALPHA]
        image = Image.fromarray(np.stack(bands, axis=-1)).convert(mode)
    elif mode == "HSV":
        image = Image.fromarray(three).convert("HSV")
    else:
        image = Image.frombytes(mode, (32, 32), (GREY.astype("<u2") * 256).tobytes())
    pixels, (_, _, is_grey) = _rgb(image, None)
    assert np.abs(pixels.astype(int) - three).max() <= 1  # premultiplied by 128 / 255 and back
    assert is_grey == (mode in ("La", "I;16N", "I;16L"))


def grey_tiff(first: int, second: int, *, bits: int, black_is_zero: int = 1) -> bytes:
    """Return a TIFF of one row of two grey pixels of 12 or 16 bits, written by hand."""
    pixels = (first << 20 | second << 8).to_bytes(4, "big") if bits == 12 else struct.pack("<2H", first, second)
    tags = [
        (256, 2),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, black_is_zero),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, bits // 4),
    ]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 12) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_twelve_bits_are_scaled_from_twelve(tmp_path):
    got = decoded(tmp_path, grey_tiff(4095, 2048, bits=12), ".tif", parquet=True)
    assert got.tolist() == [[[255, 128]]] * 3


@pytest.mark.parametrize(("black_is_zero", "expected"), [(1, [255, 16]), (0, [0, 239])])
def test_deep_images_in_which_0_is_white_are_no_negatives(tmp_path, black_is_zero, expected):
    content = grey_tiff(65535, 4096, bits=16, black_is_zero=black_is_zero)
    assert decoded(tmp_path, content, ".tif", parquet=True).tolist() == [[expected]] * 3


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.linspace(0, 255, 64, dtype=np.float32), r"floats are in 0\.\.255; those in 0\.\.1 can be scaled"),
        (np.linspace(-1, 1, 64, dtype=np.float32), r"floats are in -1\.\.1"),
        (np.full(64, np.nan, dtype=np.float32), r"floats are in nan\.\.nan"),
        (np.where(np.arange(64) == 5, np.inf, 0).astype(np.float32), r"floats are in 0\.\.inf"),
        (np.arange(64, dtype=np.int32) * 2000, r"integers are in 0\.\.126000; those in 0\.\.65535 can be scaled"),
        (np.arange(64, dtype=np.int32) - 5, r"integers are in -5\.\.58"),
        (np.arange(64, dtype=np.int32), "at most 63, and all of them are black in 8 bits"),
        (np.arange(64, dtype=np.uint16), "at most 63, and all of them are black in 8 bits"),
        (np.linspace(0, 0.001, 64, dtype=np.float32), "at most 0.001, and all of them are black"),
    ],
)
def test_values_of_which_no_picture_follows_are_refused_by_file_name(tmp_path, pixels, message):
    folder = pets(tmp_path)
    Image.fromarray(pixels.reshape(8, 8)).save(folder / "train" / "dog" / "deep.tif")
    with pytest.raises(DataError, match=f"dog/deep.tif: the image cannot be decoded: its .*{message}"):
        load(folder, tmp_path)


def test_black_images_of_any_depth_are_black(tmp_path):
    folder = pets(tmp_path)
    for number, kind in enumerate((np.uint16, np.int32, np.float32)):
        Image.fromarray(np.zeros((8, 8), dtype=kind)).save(folder / "train" / "cat" / f"-{number}.tif")
    assert not load(folder, tmp_path).train.images[:3].any()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_shape_in_transparency_alone_is_refused_by_file_name(tmp_path, mode):
    folder, icon = pets(tmp_path), Image.new("RGBA", (32, 32))
    icon.putalpha(Image.fromarray(GREY))
    if mode == "P":
        icon = icon.quantize(8)
    icon.convert(mode).save(folder / "test" / "dog" / "icon.png")
    with pytest.raises(DataError, match=r"dog/icon.png: .* one colour, and its shape in its transparency alone"):
        load(folder, tmp_path)


def test_a_transparent_image_keeps_its_colours(tmp_path):
    folder, pixels = pets(tmp_path), random_images(1, 32, 32, 4)[0]
    pixels[:16, :, 3] = 0
    (folder / "train" / "cat" / "-.png").write_bytes(as_file(pixels))
    assert torch.equal(load(folder, tmp_path).train.images[0], channels_first(pixels[None, ..., :3])[0])


# ----------------------------------------------------------------------------------------------- what a user must know


def test_what_happens_to_images_is_said_and_kept(tmp_path):
    write_images(tmp_path / "pets", 6)
    assert load("pets", tmp_path).notes == ()
    Image.new("RGB", (64, 64)).save(tmp_path / "pets" / "cat" / "large.png")
    assert load("pets", tmp_path).notes == ("1 of 13 images are resized to 32x32, from 64x64",)
    Image.new("L", (32, 16)).save(tmp_path / "pets" / "cat" / "wide.png")
    expected = (
        "2 of 14 images are resized to 32x32, from widths of 32 to 64 and heights of 16 to 64",
        "1 of 14 images are cropped about their centre to that shape, the rest of the longer side is lost",
        "1 of 14 images are grey, and repeated in three channels",
    )
    for _ in range(2):  # the second time from the cache
        assert load("pets", tmp_path).notes == expected
    assert load("pets", tmp_path, memory_limit_bytes=1000).notes == expected


def test_digits_are_said_to_be_small_and_grey(tmp_path):
    assert load("digits", tmp_path).notes == (
        "all images are resized to 32x32, from 8x8",
        "all images are grey, and repeated in three channels",
    )


# -------------------------------------------------------------------------------------------------------- real images


@pytest.mark.skipif("FEDQ_TEST_DATA" not in os.environ, reason="FEDQ_TEST_DATA names no folder with real data sets")
@pytest.mark.parametrize(("dataset", "num_test"), few([("mnist", 2_000), ("cifar10", 10_000)], 1))
def test_real_images(tmp_path, dataset, num_test):
    data = load_dataset(dataset, data_dir=Path(os.environ["FEDQ_TEST_DATA"]), cache_dir=tmp_path)
    assert len(data.test) == num_test
    assert (data.num_classes, data.image_shape) == (10, (3, 32, 32))
    assert data.train.labels.bincount().min() > 600
    if dataset == "cifar10":  # the published mean of CIFAR-10, of which this is 90 % of the images, re-encoded
        assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=2e-3)
