"""Which image is trained on, chosen by, or reported: seeded stratified subsets of labels. No pixels here."""

from __future__ import annotations

import numpy as np

from fedq.errors import FieldError

FOLDER_TEST_FRACTION = 0.2
_TEST, _VAL, _SUBSET = range(3)  # one random stream each, so that no choice moves another


def stratified(labels: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """Choose ``num`` examples with the classes in their proportions.

    A class of n among N gives floor(num * n / N) examples; the rest goes one each to the largest remainders, the lower
    class first among equals.

    Returns:
        Sorted int64 indices into ``labels``.
    """
    classes, counts = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(counts * num, max(len(labels), 1))
    quotas[np.argsort(-remainders, kind="stable")[: num - quotas.sum()]] += 1
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:quota] for label, quota in zip(classes, quotas, strict=True)
    ]
    return np.sort(np.concatenate([np.empty(0, dtype=np.int64), *chosen]))


def split_indices(
    labels: np.ndarray, num_test: int, *, val_fraction: float, train_examples: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split examples into training, validation and test set; every choice is seeded and stratified.

    The test set is the last ``num_test`` examples, or a fifth where that is 0. The validation set is ``val_fraction``
    of the others, rounded half to even; it has and leaves at least one example, unless the fraction is 0.
    ``train_examples`` are taken from what is left, so they move neither of the other two.

    Returns:
        Sorted int64 indices of the training, validation and test set.
    """
    everything = np.arange(len(labels))
    test = everything[len(labels) - num_test :]
    if num_test == 0:
        test = stratified(labels, _share(FOLDER_TEST_FRACTION, len(labels)), np.random.default_rng([_TEST, seed]))
    rest = np.setdiff1d(everything, test)
    val = rest[stratified(labels[rest], _share(val_fraction, len(rest)), np.random.default_rng([_VAL, seed]))]
    train = np.setdiff1d(rest, val)
    if train_examples is not None:
        if train_examples > len(train):
            raise FieldError("train_examples", train_examples, f"1 to {len(train)}, what validation leaves")
        train = train[stratified(labels[train], train_examples, np.random.default_rng([_SUBSET, seed]))]
    return train, val, test


def _share(fraction: float, num: int) -> int:
    return 0 if fraction == 0 else min(max(round(fraction * num), 1), num - 1)
