"""Numeric columns repaired by hand, and what must hold for any column."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.config import ColumnConfig
from rayrec.data.columns import ColumnFit, apply, clip_bounds, interpolate, repair, smooth

NAN = float("nan")


def plain(**settings: Any) -> ColumnConfig:
    """A column that is left alone but for `settings`."""
    return ColumnConfig(**{"fill": "none", "clip": "none", "scale": "none", "smooth": "none", **settings})


# ---------------------------------------------------------------- fill


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        ("constant", [1, 7, 1, 2, 7, 6]),
        ("mean", [1, 2.5, 1, 2, 2.5, 6]),
        ("median", [1, 1.5, 1, 2, 1.5, 6]),
        ("mode", [1, 1, 1, 2, 1, 6]),
        ("interpolate", [1, 1, 1, 2, 4, 6]),
        ("none", [1, NAN, 1, 2, NAN, 6]),
    ],
)
def test_fill(fill: str, expected: list[float]) -> None:
    repaired = repair([1, NAN, 1, 2, NAN, 6], plain(fill=fill, constant=7))
    np.testing.assert_array_equal(repaired.values, expected)
    assert repaired.repairs == ({} if fill == "none" else {"filled": 2})


def test_the_mode_on_a_tie_is_the_smallest() -> None:
    assert repair([5, 3, 5, 3, NAN], plain(fill="mode")).values[-1] == 3


def test_interpolation_is_level_beyond_the_known_values() -> None:
    np.testing.assert_array_equal(interpolate(np.array([NAN, 2, NAN, NAN, 5, NAN])), [2, 2, 3, 4, 5, 5])


def test_infinite_values_count_as_missing() -> None:
    repaired = repair([1, np.inf, 3, -np.inf], plain(fill="mean"))
    np.testing.assert_array_equal(repaired.values, [1, 2, 3, 2])
    assert repaired.repairs == {"filled": 2}


# ---------------------------------------------------------------- drop


def test_a_column_is_dropped_only_above_the_share() -> None:
    half = [1.0, 2.0, NAN, NAN]
    assert repair(half, plain(drop_above=0.5)).fit.kept
    dropped = repair(half, plain(drop_above=0.49))
    assert dropped.repairs == {"dropped": 1}
    assert dropped.values.tolist() == [0, 0, 0, 0]
    assert apply(dropped.fit, [5.0, NAN]).tolist() == [0, 0]


@pytest.mark.parametrize("fill", ["constant", "mean", "median", "mode", "interpolate", "none"])
@pytest.mark.parametrize("smoothing", ["none", "median", "gaussian"])
def test_a_column_without_values_becomes_zeros(fill: str, smoothing: str) -> None:
    config = ColumnConfig(fill=fill, smooth=smoothing, drop_above=1.0)
    assert repair([NAN, NAN], config).values.tolist() == [0, 0]
    assert repair([], config).values.tolist() == []


# ---------------------------------------------------------------- clip


def test_clip_by_interquartile_range() -> None:
    """0..8 has quartiles 2 and 6: with width 1.5 the bounds are -4 and 12."""
    values = [*range(9), 100.0]
    assert clip_bounds(np.arange(9.0), "iqr", 1.5) == (-4, 12)
    repaired = repair(values, plain(clip="iqr", clip_width=1.5))
    assert repaired.repairs == {"clipped": 1}
    assert repaired.values[-1] == 6.75 + 1.5 * 4.5  # quartiles of all ten: 2.25 and 6.75


def test_clip_by_standard_deviations() -> None:
    """-1 and 1 have mean 0 and deviation 1."""
    assert clip_bounds(np.array([-1.0, 1.0]), "zscore", 2.5) == (-2.5, 2.5)
    values = [0.0] * 99 + [100.0]  # mean 1, deviation sqrt(99) = 9.95
    assert repair(values, plain(clip="zscore", clip_width=3)).values[-1] == pytest.approx(1 + 3 * np.sqrt(99))


def test_a_column_whose_quartiles_are_equal_is_not_flattened() -> None:
    values = [9.99] * 8 + [5.0, 20.0]
    assert repair(values, plain(clip="iqr")).values.tolist() == values


# ---------------------------------------------------------------- scale


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("zscore", [-1.5, -0.5, -0.5, -0.5, 0, 0, 1, 2]),  # mean 5, deviation 2
        ("minmax", [0, 2 / 7, 2 / 7, 2 / 7, 3 / 7, 3 / 7, 5 / 7, 1]),
        ("robust", [-5 / 3, -1 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, 5 / 3, 3]),  # median 4.5, quartiles 4 and 5.5
        ("none", [2, 4, 4, 4, 5, 5, 7, 9]),
    ],
)
def test_scale(scale: str, expected: list[float]) -> None:
    repaired = repair([2, 4, 4, 4, 5, 5, 7, 9], plain(scale=scale))
    np.testing.assert_allclose(repaired.values, expected, atol=1e-12)
    assert repaired.repairs == {}


def test_log_scale_is_the_zscore_of_the_logarithm() -> None:
    repaired = repair([0, np.e - 1, np.e**2 - 1], plain(scale="log"))  # logarithms of 1 + x: 0, 1, 2
    np.testing.assert_allclose(repaired.values, [-np.sqrt(1.5), 0, np.sqrt(1.5)], atol=1e-12)


def test_log_scale_takes_negative_values() -> None:
    repaired = repair([-(np.e - 1), 0, np.e - 1], plain(scale="log"))
    np.testing.assert_allclose(repaired.values, [-np.sqrt(1.5), 0, np.sqrt(1.5)], atol=1e-12)


@pytest.mark.parametrize("scale", ["zscore", "minmax", "robust", "log"])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e9])
def test_a_constant_column_becomes_zeros(scale: str, value: float) -> None:
    repaired = repair([value] * 7 + [NAN], plain(fill="mean", scale=scale))
    np.testing.assert_allclose(repaired.values, 0, atol=1e-6)


# ---------------------------------------------------------------- smooth


def test_median_filter_removes_a_spike_and_skips_what_is_missing() -> None:
    repaired = repair([1, 1, NAN, 99, 1, 1], plain(smooth="median", smooth_width=3))
    np.testing.assert_array_equal(repaired.values, [1, 1, NAN, 1, 1, 1])
    assert repaired.repairs == {"smoothed": 1}


def test_an_even_median_window_is_made_odd() -> None:
    values = np.array([1.0, 2, 99, 4, 5])
    np.testing.assert_array_equal(smooth(values, "median", 2), smooth(values, "median", 3))
    np.testing.assert_array_equal(smooth(values, "median", 3), [1, 2, 4, 5, 5])


def test_gaussian_filter_weighs_by_distance_and_skips_what_is_missing() -> None:
    values = np.zeros(41)
    values[20] = 1.0
    smoothed = smooth(values, "gaussian", 1.0)
    weight = np.exp(-0.5 * np.arange(-20, 21) ** 2)
    np.testing.assert_allclose(smoothed, weight / weight.sum(), atol=1e-4)

    with_gap = smooth(np.insert(values, 10, NAN), "gaussian", 1.0)
    assert np.isnan(with_gap[10])
    np.testing.assert_array_equal(np.delete(with_gap, 10), smoothed)


def test_smoothing_does_not_change_its_input() -> None:
    values = np.array([1.0, 50.0, 1.0])
    smooth(values, "median", 3)
    assert values.tolist() == [1, 50, 1]


# ---------------------------------------------------------------- order of the steps, and apply


def test_steps_run_in_order_filter_clip_fill_scale() -> None:
    """The spike is gone before bounds are taken, and the gap is filled from clipped values."""
    config = ColumnConfig(smooth="median", smooth_width=3, clip="zscore", clip_width=1, fill="mean", scale="minmax")
    # Filtered: 0 0 0 | 4 4 4; mean 2, deviation 2: bounds 0 and 4, nothing clipped; mean 2 fills; scaled by 4.
    repaired = repair([0, 900, 0, NAN, 0, 4, 4, 4], config)
    np.testing.assert_allclose(repaired.values[3], repaired.values[[0, 1, 2, 4, 5, 6, 7]].mean())
    assert repaired.values.min() == 0
    assert repaired.values.max() == 1
    assert repaired.repairs["smoothed"] == 1


@pytest.mark.parametrize("fill", ["constant", "mean", "median", "mode"])
@pytest.mark.parametrize("scale", ["zscore", "minmax", "robust", "log", "none"])
@pytest.mark.parametrize("clip", ["iqr", "zscore", "none"])
def test_new_values_are_treated_as_the_column_was(fill: str, scale: str, clip: str) -> None:
    values = np.append(np.random.default_rng(0).lognormal(size=200), [NAN, 1e4, -1e4])
    repaired = repair(values, ColumnConfig(fill=fill, scale=scale, clip=clip))
    saved = ColumnFit(**json.loads(json.dumps(asdict(repaired.fit))))
    np.testing.assert_array_equal(apply(saved, values), repaired.values)


def test_a_new_value_missing_from_an_interpolated_column_is_the_median() -> None:
    fit = repair([1, NAN, 2, 9], plain(fill="interpolate")).fit
    np.testing.assert_array_equal(apply(fit, [NAN, 5]), [2, 5])


def test_a_missing_value_that_is_not_filled_stays_missing() -> None:
    fit = repair([1, NAN, 3], plain(scale="minmax")).fit
    np.testing.assert_array_equal(apply(fit, [NAN, 2]), [NAN, 0.5])


columns = st.lists(st.one_of(st.just(NAN), st.floats(-1e9, 1e9), st.sampled_from([0.0, 1.0, np.inf])), max_size=40)
configs = st.builds(
    ColumnConfig,
    fill=st.sampled_from(["constant", "mean", "median", "mode", "interpolate"]),
    clip=st.sampled_from(["iqr", "zscore", "none"]),
    scale=st.sampled_from(["zscore", "minmax", "robust", "log", "none"]),
    smooth=st.sampled_from(["none", "median", "gaussian"]),
    smooth_width=st.floats(0.5, 9),
)


@given(columns, configs)
def test_any_column_becomes_finite(values: list[float], config: ColumnConfig) -> None:
    repaired = repair(values, config)
    assert repaired.values.shape == (len(values),)
    assert np.isfinite(repaired.values).all()
    assert np.isfinite(apply(repaired.fit, values)).all()
    if config.scale == "minmax" and len(values):
        assert repaired.values.min() >= 0
        assert repaired.values.max() <= 1 + 1e-9
