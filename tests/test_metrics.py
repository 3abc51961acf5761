"""What a run is judged by."""

import dataclasses
import math

import pytest

from fedq.errors import FieldError
from fedq.metrics import Metric, digits


def test_a_metric_is_a_name_and_by_default_less_of_it_is_better():
    metric = Metric("loss")

    assert dataclasses.asdict(metric) == {"name": "loss", "unit": "", "better": "lower"}
    assert Metric(**dataclasses.asdict(metric)) == metric


@pytest.mark.parametrize(("better", "a", "b"), [("lower", 1.0, 2.0), ("higher", 2.0, 1.0)])
def test_better_is_one_way_and_strict(better, a, b):
    metric = Metric("m", better=better)

    assert metric.is_better(a, b)
    assert not metric.is_better(b, a)
    assert not metric.is_better(a, a)


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, -math.inf])
def test_no_value_is_worse_than_any(better, nothing):
    metric = Metric("m", better=better)

    assert metric.is_better(1.0, nothing)
    assert not metric.is_better(nothing, 1.0)
    assert not metric.is_better(nothing, nothing)
    assert not metric.is_better(nothing, None)


def test_the_best_of_some_values_leaves_out_what_is_none():
    values = [None, 3.0, math.nan, 1.0, 2.0, -math.inf, math.inf]

    assert Metric("m").best(values) == 1.0
    assert Metric("m", better="higher").best(values) == 3.0
    assert Metric("m").best([None, math.nan]) is None
    assert Metric("m").best([]) is None


def test_a_value_is_shown_with_its_unit():
    assert Metric("mse", "K^2").text(0.25) == "0.2500 K^2"
    assert Metric("loss").text(2.302585) == "2.303"
    assert Metric("loss").text(None) == Metric("loss").text(math.nan) == Metric("loss").text(math.inf) == "-"


def test_a_label_is_the_name_and_the_unit():
    assert Metric("mse", "K^2").label == "mse, K^2"
    assert Metric("loss").label == "loss"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.025, "0.02500"),
        (0.000123, "1.230e-04"),
        (0.00099999, "0.001000"),
        (-1.5, "-1.500"),
        (99.99, "99.99"),
        (999.96, "1,000"),
        (123.44, "123.4"),
        (12345.6, "12,346"),
        (3.2e12, "3.200e+12"),
    ],
)
def test_four_digits(value, text):
    assert digits(value) == text


@pytest.mark.parametrize("name", ["", " loss", "two\nlines", "x" * 65, None, 3])
def test_a_bad_name_is_refused(name):
    with pytest.raises(FieldError, match=r"metric's name=.*1 to 64 characters"):
        Metric(name)


@pytest.mark.parametrize("unit", ["K\t", "x" * 65, None, 3])
def test_a_bad_unit_is_refused(unit):
    with pytest.raises(FieldError, match=r"metric's unit=.*empty, or"):
        Metric("loss", unit)


@pytest.mark.parametrize("better", ["Lower", "less", "", None, 1, True])
def test_a_bad_direction_is_refused(better):
    with pytest.raises(FieldError, match=r"metric's better=.*higher, lower"):
        Metric("loss", "", better)
