from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from fedq.errors import FieldError
from fedq.federated.partition import label_counts, partition

TEN_CLASSES = torch.arange(1000) % 10


def assert_partition(parts: list[torch.Tensor], num_examples: int) -> None:
    """Disjoint and complete: together the parts are every index once."""
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(num_examples))
    for part in parts:
        assert part.dtype == torch.int64
        assert torch.equal(part, part.sort().values)


@tried(60)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=120),
    num_clients=st.integers(1, 8),
    scheme=st.sampled_from(
        ["iid", "dirichlet:alpha=0.05", "dirichlet:alpha=5", "shards:classes=1", "shards:classes=2"]
    ),
    min_examples=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_parts_are_disjoint_complete_and_large_enough(labels, num_clients, scheme, min_examples, seed):
    min_examples = min(min_examples, len(labels) // num_clients)
    per_client = 2 if scheme.endswith("=2") else 1
    if min_examples < 1 or num_clients * per_client > len(labels):
        return
    parts = partition(torch.tensor(labels), num_clients, scheme, seed=seed, min_examples=min_examples)
    assert len(parts) == num_clients
    assert_partition(parts, len(labels))
    assert min(map(len, parts)) >= min_examples


@tried(30)
@given(copies=st.integers(10, 30), num_clients=st.integers(3, 9), seed=st.integers(0, 99))
def test_groups_are_disjoint_complete_and_keep_their_labels(copies, num_clients, seed):
    labels = torch.arange(6).repeat(copies)
    parts = partition(labels, num_clients, "groups:0-1/2+4/3+5", seed=seed, min_examples=1)
    assert_partition(parts, len(labels))
    groups = [{0, 1}, {2, 4}, {3, 5}]
    of_client = np.concatenate([[g] * len(c) for g, c in enumerate(np.array_split(range(num_clients), 3))])
    for part, group in zip(parts, of_client, strict=True):
        assert set(labels[part].tolist()) <= groups[group]


@pytest.mark.parametrize("spec", ["iid", "dirichlet:alpha=0.1", "shards:classes=2", "groups:0-4/5-9"])
def test_the_seed_alone_decides(spec):
    first, again, other = (partition(TEN_CLASSES, 5, spec, seed=seed) for seed in (3, 3, 4))
    assert all(map(torch.equal, first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_sizes_differ_by_at_most_one():
    sizes = [len(part) for part in partition(torch.zeros(103, dtype=torch.int64), 10, "iid", seed=0)]
    assert sorted(sizes) == [10] * 7 + [11] * 3


def test_small_alpha_is_more_skewed_than_large_alpha():
    def largest_share(alpha: float) -> float:
        parts = partition(TEN_CLASSES, 5, f"dirichlet:alpha={alpha}", seed=0)
        counts = label_counts(TEN_CLASSES, parts, 10).double()
        return (counts.max(dim=0).values / counts.sum(dim=0)).mean().item()

    # Dir(0.1) over 5 clients gives one of them about 3/4 of a class; Dir(1000) gives each a fifth, sd below 0.01.
    assert largest_share(0.1) > 0.6
    assert largest_share(1000) < 0.25


def test_dirichlet_without_a_fitting_draw_is_repaired():
    labels = torch.zeros(100, dtype=torch.int64)
    parts = partition(labels, 10, "dirichlet:alpha=0.000001", seed=0, min_examples=10)  # one client gets everything
    assert [len(part) for part in parts] == [10] * 10
    assert_partition(parts, 100)
    assert all(map(torch.equal, parts, partition(labels, 10, "dirichlet:alpha=0.000001", seed=0, min_examples=10)))


def test_a_repair_takes_no_more_than_is_missing():
    labels = torch.zeros(100, dtype=torch.int64)
    sizes = sorted(len(part) for part in partition(labels, 4, "dirichlet:alpha=0.000001", seed=0, min_examples=5))
    assert sizes == [5, 5, 5, 85]


def test_shards_have_few_labels_and_equal_sizes():
    parts = partition(TEN_CLASSES, 10, "shards:classes=2", seed=1)  # 20 shards of 50: no shard has two labels
    assert {len(part) for part in parts} == {100}
    assert label_counts(TEN_CLASSES, parts, 10).count_nonzero(dim=1).max() <= 2


def test_shards_do_not_follow_the_order_of_the_files():
    labels = torch.arange(200) % 2
    part = partition(labels, 10, "shards:classes=1", seed=0)[0]
    assert len(set(labels[part].tolist())) == 1
    assert part.diff().max() > 2  # consecutive images of one label would be exactly 2 apart


def test_tiny_shards_are_repaired():
    labels = torch.zeros(25, dtype=torch.int64)
    for seed in range(20):  # 14 shards, of 1 or 2: some deals leave a client with fewer than 12
        parts = partition(labels, 2, "shards:classes=7", seed=seed, min_examples=12)
        assert sorted(map(len, parts)) == [12, 13]


def test_label_counts_count_each_client():
    labels = torch.tensor([0, 2, 2, 1, 0, 2])
    parts = [torch.tensor([0, 4]), torch.tensor([1, 2, 3]), torch.tensor([5])]
    assert label_counts(labels, parts, 4).tolist() == [[2, 0, 0, 0], [0, 1, 2, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shard:classes=2", "dirichlet, groups, iid, shards \\(did you mean 'shards'\\?\\); for example"),
        ("", "dirichlet, groups, iid, shards"),
        ("iid:alpha=1", "iid, which takes no options"),
        ("dirichlet", "the one option alpha, as in dirichlet:alpha=0.1"),
        ("dirichlet:alhpa=1", "the one option alpha \\(did you mean 'alpha'\\?\\)"),
        ("dirichlet:alpha=1,beta=2", "partition dirichlet:alpha='1,beta=2'"),
        ("dirichlet:alpha=0", "partition dirichlet:alpha='0' is not allowed; allowed: a number above 0"),
        ("dirichlet:alpha=nan", "a number above 0"),
        ("dirichlet:alpha=inf", "at most 1e6"),
        ("shards:classes=0", "an integer from 1 to 200"),
        ("shards:classes=1.5", "an integer from 1 to 200"),
        ("shards:classes=201", "an integer from 1 to 200"),
        ("groups", "groups:0-3/4-6/7-9"),
        ("groups:a-b", "groups:0-3/4-6/7-9"),
        ("groups:3-0/4-9", "groups:0-3/4-6/7-9"),
        ("groups:0-3/3-9", "in two groups: 3"),
        ("groups:0-3/5-9", "in no group: 4"),
        ("groups:0-3/4-11", "without examples: 10, 11"),
        ("groups:0/1/2/3/4/5-9", "at most as many groups as clients \\(5\\)"),
    ],
)
def test_bad_specs_say_what_is_allowed(spec, message):
    with pytest.raises(FieldError, match=message):
        partition(TEN_CLASSES, 5, spec, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clients": 0}, "num_clients=0 .* 1 to 1000"),
        ({"num_clients": 1001}, "num_clients=1001"),
        ({"num_clients": 10, "min_examples": 101}, "min_examples=101 .* 1 to 100 \\(1000 examples, 10 clients\\)"),
        ({"num_clients": 10, "min_examples": 0}, "min_examples=0"),
        ({"num_clients": 10, "seed": -1}, "seed=-1"),
    ],
)
def test_impossible_numbers_say_what_is_allowed(arguments, message):
    with pytest.raises(FieldError, match=message):
        partition(TEN_CLASSES, **{"spec": "iid", "seed": 0} | arguments)


def test_a_group_too_small_for_its_clients_is_an_error():
    labels = torch.tensor([0] * 95 + [1] * 5)
    with pytest.raises(FieldError, match="leave every client 10 examples, not 5"):
        partition(labels, 2, "groups:0/1", seed=0)
