"""What downloads cost, against a slow account that keeps every client's own list of what it has not seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedq.errors import FieldError
from fedq.federated.accounting import plain_model
from fedq.federated.downlink import DownlinkCost
from fedq.layout import Layout
from fedq.ledger import Ledger, MessageParts

NUM_CLIENTS = 5
LAYOUT = Layout.of(nn.Linear(9, 3), "int8")
FULL = 4 * (27 + 3)

# a round: who trains in it, and the bytes of the change that it made (None: every client was left out)
ROUNDS = st.lists(
    st.tuples(
        st.sets(st.integers(0, NUM_CLIENTS - 1), min_size=1).map(sorted),
        st.one_of(st.none(), st.integers(1, FULL + 10)),
    ),
    min_size=1,
    max_size=12,
)


def change_of(nbytes: int) -> MessageParts:
    return MessageParts(("weight", ""), ("codes", "framing"), np.array([FULL, 0]), np.array([nbytes - 1, 1]))


def booked(ledger: Ledger) -> dict[tuple[int, int], tuple[int, int]]:
    """Return payload and raw bytes by round and client."""
    sums: dict[tuple[int, int], tuple[int, int]] = {}
    for row in ledger.table().to_pylist():
        assert (row["direction"], row["wire"]) == ("downlink", 0)
        key = row["round"], row["client"]
        payload, raw = sums.get(key, (0, 0))
        sums[key] = payload + row["payload"], raw + row["raw"]
    return {key: value for key, value in sums.items() if value != (0, 0)}


def run(rule: str, rounds: list[tuple[list[int], int | None]]) -> dict[tuple[int, int], tuple[int, int]]:
    ledger = Ledger()
    cost = DownlinkCost(ledger, LAYOUT, rule, NUM_CLIENTS)
    for number, (cohort, nbytes) in enumerate(rounds):
        cost.start_round(number, cohort)
        if nbytes is not None:
            cost.end_round(number, change_of(nbytes))
    return booked(ledger)


@given(ROUNDS)
def test_a_cohort_downloads_what_it_missed_or_the_whole_model(rounds: list) -> None:
    expected = {}
    missed: dict[int, list[int] | None] = dict.fromkeys(range(NUM_CLIENTS))  # None: has no model yet
    for number, (cohort, nbytes) in enumerate(rounds):
        for client in cohort:
            unseen = missed[client]
            if unseen is None:
                expected[number, client] = (FULL, FULL)
            elif unseen:
                expected[number, client] = (min(sum(unseen), FULL), FULL)
            missed[client] = []
        if nbytes is not None:
            for unseen in missed.values():
                if unseen is not None:
                    unseen.append(nbytes)
    assert run("cohort", rounds) == expected


@given(ROUNDS)
def test_all_clients_get_the_model_once_and_every_change_when_it_is_made(rounds: list) -> None:
    expected: dict[tuple[int, int], tuple[int, int]] = {}
    for number, (_, nbytes) in enumerate(rounds):
        for client in range(NUM_CLIENTS):
            first, made = FULL * (number == 0), nbytes is not None
            if first or made:
                expected[number, client] = (first + (nbytes or 0), first + FULL * made)
    assert run("all", rounds) == expected


def test_the_whole_model_is_every_tensor_in_float32() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    rows = plain_model(Layout.of(model, "int4"))
    assert dict(zip(rows.tensors, zip(rows.parts, rows.payload.tolist(), strict=True), strict=True)) == {
        "0.weight": ("codes", 4 * 108),
        "0.bias": ("exempt", 16),
        "1.weight": ("exempt", 16),
        "1.bias": ("exempt", 16),
        "1.running_mean": ("stats", 16),
        "1.running_var": ("stats", 16),
    }
    assert rows.raw_nbytes == rows.nbytes


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(FieldError, match="downlink_to='some' is not allowed; allowed: cohort, all"):
        DownlinkCost(Ledger(), LAYOUT, "some", 2)  # type: ignore[arg-type]
