from __future__ import annotations

import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import few, tried

from fedq.data import Dataset, augment, batches, load_dataset, normalize
from fedq.data.batch import crop_and_flip
from fedq.data.cache import Cache, Examples, channel_sums, default_cache_dir, release
from fedq.data.split import split_indices, stratified
from fedq.errors import FieldError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def digits(cache_dir, **options) -> Dataset:
    return load_dataset("digits", data_dir=cache_dir / "nothing-here", cache_dir=cache_dir, **options)


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def assert_same(first: Dataset, second: Dataset) -> None:
    for one, other in ((first.train, second.train), (first.val, second.val), (first.test, second.test)):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert replace(first, train=None, val=None, test=None) == replace(second, train=None, val=None, test=None)


# ---------------------------------------------------------------------------------------------------------- batches


@tried(100)
@given(num=st.integers(0, 200), size=st.integers(1, 60), seed=st.integers(0, 99))
def test_training_batches_hold_every_example_once_but_a_trailing_one(num, size, seed):
    parts = list(batches(num, size, generator=torch.Generator().manual_seed(seed)))
    seen = torch.cat(parts).tolist() if parts else []
    left_out = num > size > 1 and num % size == 1
    assert len(set(seen)) == len(seen) == num - left_out
    assert set(seen) <= set(range(num))
    assert all(len(part) == size for part in parts[:-1])
    assert size == 1 or num == 1 or all(len(part) > 1 for part in parts)


@tried(100)
@given(num=st.integers(0, 100), size=st.integers(1, 30))
def test_sequential_batches_leave_nothing_out(num, size):
    parts = list(batches(num, size))
    assert [index for part in parts for index in part.tolist()] == list(range(num))
    assert len(parts) == -(-num // size)


def test_a_client_smaller_than_a_batch_gives_one_smaller_batch():
    assert [len(part) for part in batches(7, 32, generator=torch.Generator())] == [7]
    assert [len(part) for part in batches(1, 32, generator=torch.Generator())] == [1]


def test_batches_are_shuffled_by_the_generator_alone():
    first, again, other = (
        torch.cat(list(batches(50, 8, generator=torch.Generator().manual_seed(seed)))) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batch_size_zero_is_refused():
    with pytest.raises(FieldError, match="batch_size=0"):
        batches(10, 0)


# -------------------------------------------------------------------------------------------------- normalize, augment


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2**-24), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_normalize_equals_the_formula_in_float64(dtype, eps, channels_last):
    images, mean, std = random_images(5, 3, 8, 6), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    out = normalize(images, mean, std, dtype=dtype, channels_last=channels_last)
    column = [torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (mean, std)]
    exact = (images.double() / 255 - column[0]) / column[1]
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    # One rounding to dtype (eps relative), and in float32 four roundings of terms that are at most |x*a| + |b| < 9.
    torch.testing.assert_close(out.double(), exact, rtol=eps, atol=4 * 9 * 2**-24)


def slow_crop(image: torch.Tensor, top: int, left: int, flip: int, padding: int) -> torch.Tensor:
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
    padded[:, padding : padding + height, padding : padding + width] = image
    cropped = padded[:, top : top + height, left : left + width]
    return torch.stack(list(cropped.unbind(-1))[:: -1 if flip else 1], dim=-1)


@tried(50)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    padding=st.integers(0, 4),
    data=st.data(),
)
def test_crop_and_flip_equals_one_image_at_a_time(shape, padding, data):
    images = random_images(*shape)
    each = [
        data.draw(st.lists(st.integers(0, most), min_size=shape[0], max_size=shape[0]))
        for most in (2 * padding, 2 * padding, 1)
    ]
    fast = crop_and_flip(images, *map(torch.tensor, each), padding=padding)
    slow = [slow_crop(image, *draws, padding) for image, *draws in zip(images, *each, strict=True)]
    assert torch.equal(fast, torch.stack(slow))


@pytest.mark.parametrize("flip", [False, True])
def test_augment_draws_as_documented(flip):
    images = random_images(16, 3, 32, 32)
    generator = torch.Generator().manual_seed(5)
    out = augment(images, generator=torch.Generator().manual_seed(5), flip=flip)
    tops, lefts = torch.randint(9, (2, 16), generator=generator).tolist()
    flips = torch.randint(2, (16,), generator=generator).tolist() if flip else [0] * 16
    slow = [slow_crop(*each, padding=4) for each in zip(images, tops, lefts, flips, strict=True)]
    assert torch.equal(out, torch.stack(slow))
    assert len(set(flips)) == 1 + flip


def test_augment_takes_every_offset_and_both_sides():
    # An image with one lit pixel in the middle shows where it was moved: 9 x 9 places, equally likely.
    image = torch.zeros(20_000, 1, 9, 9, dtype=torch.uint8)
    image[:, :, 4, 4] = 1
    counts = augment(image, generator=torch.Generator().manual_seed(0), flip=True).sum(dim=0).flatten()
    assert counts.sum() == 20_000
    # mean 246.9, standard deviation 15.6: five of them on each side
    assert 169 < counts.min() <= counts.max() < 325


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_augmented_bits():
    images = random_images(64, 3, 32, 32)
    cpu, gpu = (
        augment(images.to(device), generator=torch.Generator().manual_seed(1), flip=True) for device in ("cpu", "cuda")
    )
    assert torch.equal(cpu, gpu.cpu())


# ------------------------------------------------------------------------------------------------------------- splits


@tried(100)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), data=st.data())
def test_a_stratified_subset_keeps_the_proportions(labels, data):
    num = data.draw(st.integers(0, len(labels)))
    chosen = stratified(np.array(labels), num, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == len(chosen) == num
    for label in set(labels):
        exact = labels.count(label) * num / len(labels)
        assert abs(sum(labels[index] == label for index in chosen) - exact) < 1  # largest remainders


@tried(100)
@given(
    num=st.integers(6, 80),
    num_test=st.integers(0, 3),
    val_fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**40),
)
def test_splits_are_disjoint_and_complete(num, num_test, val_fraction, seed):
    labels = np.arange(num) % 3
    train, val, test = split_indices(labels, num_test, val_fraction=val_fraction, train_examples=None, seed=seed)
    assert sorted(np.concatenate([train, val, test]).tolist()) == list(range(num))
    assert len(train) >= 1
    assert (len(val) >= 1) == (val_fraction > 0)
    if num_test:
        assert test.tolist() == list(range(num - num_test, num))
    else:
        assert len(test) == round(num / 5)


def test_fewer_training_examples_move_neither_validation_nor_test():
    labels = np.arange(100) % 4
    train, val, test = split_indices(labels, 20, val_fraction=0.25, train_examples=None, seed=3)
    fewer, same_val, same_test = split_indices(labels, 20, val_fraction=0.25, train_examples=30, seed=3)
    assert (len(train), len(val), len(test), len(fewer)) == (60, 20, 20, 30)
    assert set(fewer) < set(train)
    assert np.array_equal(val, same_val)
    assert np.array_equal(test, same_test)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_examples": 1295}, "train_examples=1295 is not allowed; allowed: 1 to 1294"),
        ({"train_examples": 0}, "train_examples=0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"val_fraction": -0.1}, "val_fraction=-0.1"),
        ({"val_fraction": float("nan")}, "val_fraction=nan"),
        ({"image_size": 0}, "image_size=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings_name_field_value_and_what_is_allowed(shared_cache, options, message):
    with pytest.raises(FieldError, match=message):
        digits(shared_cache, **options)


# ------------------------------------------------------------------------------------------------- digits and Dataset


def test_digits_are_the_real_ones(shared_cache):
    from sklearn.datasets import load_digits

    data = digits(shared_cache)
    assert (data.name, data.num_classes, data.image_shape, data.flip) == ("digits", 10, (3, 32, 32), False)
    assert data.description == (
        "handwritten digits from scikit-learn: 1,294 train, 144 validation, 359 test images, 3x32x32"
    )
    labels = torch.cat([data.train.labels, data.val.labels, data.test.labels])
    original = load_digits()
    assert torch.equal(labels.bincount(), torch.from_numpy(original.target).bincount())
    images = torch.cat([data.train.images, data.val.images, data.test.images])
    assert torch.equal(images[:, 0], images[:, 1])
    # Every image is found again in the originals: the nearest 8x8 mean-pooled original has its label.
    pooled = torch.nn.functional.avg_pool2d(images[:, 0].float(), 4).flatten(1)
    nearest = torch.cdist(pooled, torch.from_numpy(original.images).float().flatten(1) * 255 / 16).argmin(dim=1)
    assert torch.equal(torch.from_numpy(original.target)[nearest], labels)
    assert len(set(nearest.tolist())) > 1790  # all but the few that are nearly alike


def test_the_test_set_of_digits_does_not_depend_on_the_seed(shared_cache):
    first, second = digits(shared_cache, seed=0), digits(shared_cache, seed=1)
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.val.labels, second.val.labels)


def test_mean_and_std_are_those_of_the_training_split(shared_cache):
    data = digits(shared_cache, train_examples=100)
    pixels = data.train.images.double().transpose(0, 1).flatten(1) / 255
    # float64 over 10^5 pixels on both sides: far below 1e-9
    assert data.mean == pytest.approx(pixels.mean(dim=1).tolist(), abs=1e-9)
    assert data.std == pytest.approx(pixels.std(dim=1, correction=0).tolist(), abs=1e-9)
    assert len(data.train) == 100


def test_to_moves_every_split(shared_cache):
    moved = digits(shared_cache).to("meta")
    assert {split.images.device.type for split in (moved.train, moved.val, moved.test)} == {"meta"}
    assert {split.labels.device.type for split in (moved.train, moved.val, moved.test)} == {"meta"}


def test_image_size_is_honoured(shared_cache):
    assert digits(shared_cache, image_size=16).image_shape == (3, 16, 16)


# -------------------------------------------------------------------------------------------------------------- cache


def cached_files(folder) -> list:
    return sorted(folder.glob("*"))


def test_the_second_time_nothing_is_decoded(tmp_path, monkeypatch):
    first = digits(tmp_path)
    monkeypatch.setattr("fedq.data.load.decode", None)
    assert_same(first, digits(tmp_path))


@pytest.mark.parametrize("position", few([0, 1_000_000, -100, -12, -6, -1], 2))
def test_a_damaged_cache_is_decoded_again_with_a_warning(tmp_path, caplog, position):
    first = digits(tmp_path)
    (file,) = cached_files(tmp_path)
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        second = digits(tmp_path)
    assert "checksum" in caplog.text
    assert str(file) in caplog.text
    assert_same(first, second)
    caplog.clear()
    digits(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("size", few([0, 5, 100_000], 1))
def test_a_truncated_cache_is_decoded_again_with_a_warning(tmp_path, caplog, size):
    first = digits(tmp_path)
    (file,) = cached_files(tmp_path)
    os.truncate(file, size)
    assert_same(first, digits(tmp_path))
    assert "cannot be used" in caplog.text


def test_a_cache_that_cannot_be_written_costs_one_warning(tmp_path, shared_cache, caplog):
    (tmp_path / "file").write_text("not a folder")
    data = digits(tmp_path / "file", memory_limit_bytes=0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be written" in caplog.text
    assert_same(data, digits(shared_cache))


def test_a_full_disk_while_writing_costs_a_warning_and_leaves_nothing(tmp_path, shared_cache, caplog, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedq.data.cache._write", full)
    data = digits(tmp_path)
    assert "No space left" in caplog.text
    assert cached_files(tmp_path) == []
    monkeypatch.undo()
    assert_same(data, digits(shared_cache))


def test_a_mapped_set_that_does_not_fit_on_the_disk_stays_in_memory(tmp_path, shared_cache, caplog, monkeypatch):
    from collections import namedtuple

    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("Usage", "free")(10))
    data = digits(tmp_path, memory_limit_bytes=0)
    assert "10 bytes free" in caplog.text
    assert_same(data, digits(shared_cache))


def is_mapped(tensor: torch.Tensor) -> bool:
    with open("/proc/self/maps") as maps:
        spans = [line.split() for line in maps if ".examples" in line]
    ends = [[int(end, 16) for end in span[0].split("-")] for span in spans]
    return any(start <= tensor.data_ptr() < end for start, end in ends)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux to see what is mapped")
def test_above_the_limit_every_split_is_mapped_and_equal(tmp_path, shared_cache):
    in_memory = digits(shared_cache, seed=2)
    for _ in range(2):  # once built, once loaded
        mapped = digits(tmp_path, seed=2, memory_limit_bytes=1000)
        assert all(is_mapped(split.images) for split in (mapped.train, mapped.val, mapped.test))
        assert not is_mapped(in_memory.train.images)
        assert_same(in_memory, mapped)


def test_one_order_of_a_mapped_set_is_kept_and_earlier_ones_stay_readable(tmp_path, shared_cache):
    first = digits(tmp_path, seed=1, memory_limit_bytes=0)
    second = digits(tmp_path, seed=2, memory_limit_bytes=0)
    assert len(cached_files(tmp_path)) == 2  # decoded, and in the order of seed 2
    assert_same(first, digits(shared_cache, seed=1))
    assert_same(second, digits(shared_cache, seed=2))


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def broken(allocate):
        allocate((4, 3, 2, 2))
        raise RuntimeError("stop")

    for limit in (0, 1000):
        with pytest.raises(RuntimeError, match="stop"):
            Cache(tmp_path, limit).build("name", broken)
    assert cached_files(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_the_cache_returns_what_it_was_given(tmp_path, limit):
    images = random_images(7, 3, 5, 4).numpy()

    def make(allocate) -> Examples:
        array = allocate(images.shape)
        array[:] = images
        return Examples(array, np.arange(7), channel_sums(images), (5, 2), ("a", "ß"))

    cache = Cache(tmp_path, limit)
    for examples in (cache.build("one", make), cache.load("one")):
        assert np.array_equal(examples.images, images)
        assert np.array_equal(examples.labels, np.arange(7))
        assert examples.sums[..., 0].tolist() == images.sum((2, 3), int).tolist()
        assert examples.sums[..., 1].tolist() == (images.astype(int) ** 2).sum((2, 3)).tolist()
        assert (examples.counts, examples.class_names) == ((5, 2), ("a", "ß"))
    assert cache.load("two") is None


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "fedq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "fedq"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_dataset("digits", data_dir=tmp_path)
    assert len(cached_files(tmp_path / "fedq")) == 1


def _resident_bytes(path):
    """Pages of a mapped file that count as this process's memory."""
    with open("/proc/self/smaps") as maps:
        lines = iter(maps)
        return sum(1024 * int(next(x for x in lines if x.startswith("Rss:")).split()[1]) for m in lines if path in m)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux to see what is resident")
def test_released_pages_are_given_back_and_stay_readable(tmp_path):
    values = np.arange(1 << 22, dtype=np.uint32).view(np.uint8)
    values.tofile(tmp_path / "file")
    images = np.memmap(tmp_path / "file", np.uint8, "r")[8:].reshape(-1, 8)
    total = images.sum(dtype=np.int64)
    assert _resident_bytes(str(tmp_path / "file")) > values.nbytes // 2
    release(images)
    assert _resident_bytes(str(tmp_path / "file")) == 0
    assert images.sum(dtype=np.int64) == total
    in_memory = np.ones(10, dtype=np.uint8)
    release(in_memory)
    assert in_memory.sum() == 10
