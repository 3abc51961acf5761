"""Which client holds which training examples: seeded, disjoint, complete partitions of labels. No images here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fedq.errors import FieldError, one_of

MAX_DRAWS = 100
_SCHEMES = ("dirichlet:alpha=0.1", "groups:0-3/4-6/7-9", "iid", "shards:classes=2")
_Number = TypeVar("_Number", int, float)


def partition(labels: Tensor, num_clients: int, spec: str, *, seed: int, min_examples: int = 10) -> list[Tensor]:
    """Deal examples to clients; every example goes to exactly one of them.

    Schemes:

    - ``iid``: sizes equal to within one.
    - ``dirichlet:alpha=0.1``: each class is dealt in shares drawn from Dir(alpha, ..., alpha) over the clients
      (Yurochkin et al. 2019; alpha as in Hsu et al. 2019). A draw that leaves a client with fewer than
      ``min_examples`` is drawn again, up to 100 times.
    - ``shards:classes=2``: examples sorted by label are cut into ``num_clients * classes`` shards, equal to within one,
      and each client gets ``classes`` of them (McMahan et al. 2017).
    - ``groups:0-3/4-6/7-9``: clients are divided evenly, in order, over groups of labels (``0+2/1+3`` works too); those
      of a group share its examples as in ``iid``.

    Where the last dirichlet draw, or tiny shards, still leave a client short, it receives random examples, one at a
    time, from the client that is the largest at that moment.

    Args:
        labels: Labels of the examples, int64 (N,), on any device.
        num_clients: Number of clients, 1 or more.
        spec: Scheme with its option, as above.
        seed: Random seed, 0 or more; with the other arguments it alone decides the parts.
        min_examples: Fewest examples a client may hold, 1 or more.

    Returns:
        One sorted int64 index tensor a client, on the CPU.

    Raises:
        FieldError: An unknown scheme or option, or more examples asked for than there are.
    """
    _check(len(labels), num_clients, seed, min_examples)
    scheme, _, option = spec.partition(":")
    held = labels.cpu().numpy()
    rng = np.random.default_rng(seed)
    if scheme == "iid":
        if option:
            raise FieldError("partition", spec, "iid, which takes no options")
        parts = _deal(np.arange(len(held)), num_clients, rng)
    elif scheme == "dirichlet":
        alpha = _option(spec, "alpha", float, lambda value: 0 < value <= 1e6, "a number above 0, at most 1e6")
        parts = _dirichlet(held, num_clients, alpha, min_examples, rng)
    elif scheme == "shards":
        most = len(held) // num_clients
        num_shards = _option(spec, "classes", int, lambda value: 1 <= value <= most, f"an integer from 1 to {most}")
        parts = _shards(held, num_clients, num_shards, rng)
    elif scheme == "groups":
        parts = _groups(held, num_clients, spec, min_examples, rng)
    else:
        names = one_of((known.partition(":")[0] for known in _SCHEMES), scheme)
        raise FieldError("partition", spec, f"{names}; for example {', '.join(_SCHEMES)}")
    return [torch.from_numpy(np.sort(part)) for part in _repaired(parts, min_examples, rng)]


def label_counts(labels: Tensor, parts: list[Tensor], num_classes: int) -> Tensor:
    """Return int64 (num_clients, num_classes): how many examples of each label a client holds."""
    known = labels.cpu()
    return torch.stack([torch.bincount(known[part], minlength=num_classes) for part in parts])


def _check(num_examples: int, num_clients: int, seed: int, min_examples: int) -> None:
    if not 1 <= num_clients <= num_examples:
        raise FieldError("num_clients", num_clients, f"1 to {num_examples}, the number of training examples")
    if seed < 0:
        raise FieldError("seed", seed, "0 or more")
    most = num_examples // num_clients
    if not 1 <= min_examples <= most:
        raise FieldError("min_examples", min_examples, f"1 to {most} ({num_examples} examples, {num_clients} clients)")


def _option(
    spec: str, name: str, convert: Callable[[str], _Number], fits: Callable[[_Number], bool], allowed: str
) -> _Number:
    scheme, _, text = spec.partition(":")
    given, _, value = text.partition("=")
    if given != name:
        raise FieldError("partition", spec, f"the one option {one_of([name], given)}, as in {_like(scheme)}")
    try:
        number = convert(value)
    except ValueError:
        number = None
    if number is None or not fits(number):
        raise FieldError(f"partition {scheme}:{name}", value, allowed)
    return number


def _like(scheme: str) -> str:
    return next((known for known in _SCHEMES if known.startswith(f"{scheme}:")), scheme)


def _deal(indices: np.ndarray, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(rng.permutation(indices), num_clients)


def _dirichlet(
    labels: np.ndarray, num_clients: int, alpha: float, min_examples: int, rng: np.random.Generator
) -> list[np.ndarray]:
    classes, counts = np.unique(labels, return_counts=True)
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet(np.full(num_clients, alpha), size=len(classes))
        cuts = np.floor(np.cumsum(shares, axis=1) * counts[:, None]).astype(np.int64)
        cuts[:, -1] = counts  # a sum of shares may round to just below one
        sizes = np.diff(cuts, prepend=0, axis=1).sum(axis=0)
        if sizes.min() >= min_examples:
            break
    dealt = [
        np.split(rng.permutation(np.flatnonzero(labels == label)), row[:-1])
        for label, row in zip(classes, cuts, strict=True)
    ]
    return [np.concatenate(parts) for parts in zip(*dealt, strict=True)]


def _shards(labels: np.ndarray, num_clients: int, num_shards: int, rng: np.random.Generator) -> list[np.ndarray]:
    shuffled = rng.permutation(len(labels))  # else the shards of a class would follow the order of the files
    shards = np.array_split(shuffled[np.argsort(labels[shuffled], kind="stable")], num_clients * num_shards)
    hands = rng.permutation(len(shards)).reshape(num_clients, num_shards)
    return [np.concatenate([shards[shard] for shard in hand]) for hand in hands]


def _groups(
    labels: np.ndarray, num_clients: int, spec: str, min_examples: int, rng: np.random.Generator
) -> list[np.ndarray]:
    groups = _parse_groups(spec, sorted(set(labels.tolist())))
    if len(groups) > num_clients:
        raise FieldError("partition", spec, f"at most as many groups as clients ({num_clients})")
    clients = np.array_split(np.arange(num_clients), len(groups))
    members = [np.flatnonzero(np.isin(labels, group)) for group in groups]
    parts = [part for own, who in zip(members, clients, strict=True) for part in _deal(own, len(who), rng)]
    smallest = min(map(len, parts))
    if smallest < min_examples:  # no repair: it would mix the groups
        raise FieldError("partition", spec, f"groups that leave every client {min_examples} examples, not {smallest}")
    return parts


def _parse_groups(spec: str, present: list[int]) -> list[list[int]]:
    try:
        groups = [_label_list(text) for text in spec.partition(":")[2].split("/")]
    except ValueError:
        raise FieldError("partition", spec, "groups:0-3/4-6/7-9 or groups:0+2/1+3, labels from 0") from None
    listed = sorted(label for group in groups for label in group)
    if listed != present:
        twice = sorted({label for label in listed if listed.count(label) > 1})
        wrong = {"in two groups": twice, "in no group": sorted(set(present) - set(listed))}
        wrong["without examples"] = sorted(set(listed) - set(present))
        found = "; ".join(f"{what}: {', '.join(map(str, which))}" for what, which in wrong.items() if which)
        raise FieldError("partition", spec, f"groups that hold every label of the data once ({found})")
    return groups


def _label_list(text: str) -> list[int]:
    labels: list[int] = []
    for item in text.split("+"):
        first, dash, last = item.partition("-")
        span = range(int(first), int(last if dash else first) + 1)
        if not span or len(span) > 1_000_000:
            raise ValueError(text)
        labels += span
    return labels


def _repaired(parts: list[np.ndarray], min_examples: int, rng: np.random.Generator) -> list[np.ndarray]:
    sizes = np.array([len(part) for part in parts])
    short = np.flatnonzero(sizes < min_examples)
    if not short.size:
        return parts
    hands = [part.tolist() for part in parts]
    for client in short:
        while sizes[client] < min_examples:  # ends: the mean is at least min_examples, so the largest is above it
            donor = int(sizes.argmax())
            hands[client].append(hands[donor].pop(int(rng.integers(sizes[donor]))))
            sizes[client] += 1
            sizes[donor] -= 1
    return [np.array(hand, dtype=np.int64) for hand in hands]
