"""Numeric columns repaired and scaled: filter, clip, fill, scale, in this order.

In: one column as float64, NaN where unknown, and its settings. Out: the repaired column, what was repaired, and the
fitted parameters, so that a new value is treated the same way later. It must not know which column it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from rayrec.config import ColumnConfig

Floats: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ColumnFit:
    """What was learnt from a column; plain numbers, so that it can be saved as JSON.

    kept     False: too sparse, the column was dropped and every value becomes 0
    low, high  clipping bounds; None for none
    fill     what stands in for a missing value; None leaves it NaN
    logs     take sign(x) * log(1 + |x|) before centring
    center, width  the scaled value is (x - center) / width; width is never 0
    """

    kept: bool
    low: float | None
    high: float | None
    fill: float | None
    logs: bool
    center: float
    width: float


@dataclass(frozen=True)
class Repaired:
    """A repaired column.

    values   [N] float64  scaled; NaN only where the settings leave missing values unfilled
    fit      the parameters for `apply`
    repairs  how many values were smoothed, clipped and filled, and whether the column was dropped; no zeros
    """

    values: Floats
    fit: ColumnFit
    repairs: dict[str, int]


def repair(values: npt.ArrayLike, config: ColumnConfig) -> Repaired:
    """Repair and scale one column ([N], NaN or infinite where unknown), and learn how.

    A column with a larger share of missing values than `drop_above`, or with none known, is dropped: it becomes all 0.

    >>> repair([1.0, np.nan, 3.0], ColumnConfig(fill="mean", clip="none", scale="minmax")).values.tolist()
    [0.0, 0.5, 1.0]
    """
    raw = _known_or_nan(values)
    missing = np.isnan(raw)
    if missing.all() or missing.mean() > config.drop_above:
        fit = ColumnFit(kept=False, low=None, high=None, fill=None, logs=False, center=0.0, width=1.0)
        return Repaired(np.zeros(len(raw)), fit, {"dropped": 1} if len(raw) else {})

    smoothed = smooth(raw, config.smooth, config.smooth_width)
    low, high = clip_bounds(smoothed, config.clip, config.clip_width)
    clipped = np.clip(smoothed, low, high)
    stand_in = fill_value(clipped, config.fill, config.constant)
    filled = interpolate(clipped) if config.fill == "interpolate" else np.where(missing, stand_in, clipped)
    logs = config.scale == "log"
    center, width = center_and_width(signed_log(filled) if logs else filled, config.scale)

    fit = ColumnFit(
        kept=True,
        low=None if np.isinf(low) else low,
        high=None if np.isinf(high) else high,
        fill=None if np.isnan(stand_in) else stand_in,
        logs=logs,
        center=center,
        width=width,
    )
    counts = {
        "smoothed": int(np.sum(smoothed[~missing] != raw[~missing])),
        "clipped": int(np.sum(clipped[~missing] != smoothed[~missing])),
        "filled": int(np.sum(missing & ~np.isnan(filled))),
    }
    return Repaired(_scaled(filled, fit), fit, {what: n for what, n in counts.items() if n})


def apply(fit: ColumnFit, values: npt.ArrayLike) -> Floats:
    """New values ([N], NaN where unknown) clipped, filled and scaled as `fit` learnt. [N] float64.

    Smoothing and interpolation need neighbours, which a new value has not: it is taken as it is, and a missing one
    becomes the median.
    """
    known = _known_or_nan(values)
    if not fit.kept:
        return np.zeros(len(known))
    low = -np.inf if fit.low is None else fit.low
    high = np.inf if fit.high is None else fit.high
    clipped = np.clip(known, low, high)
    return _scaled(clipped if fit.fill is None else np.where(np.isnan(clipped), fit.fill, clipped), fit)


def smooth(values: Floats, kind: str, width: float) -> Floats:
    """`values` through a median filter (window of `width` values, made odd) or a Gaussian one (sigma `width`).

    Missing values stay missing and are skipped: the neighbours of a value are the nearest known ones.
    """
    known = ~np.isnan(values)
    if kind == "none" or not known.any():
        return values
    series = values[known]
    if kind == "median":
        series = ndimage.median_filter(series, size=int(width) | 1, mode="nearest")
    else:
        series = ndimage.gaussian_filter1d(series, sigma=width, mode="nearest")
    smoothed = values.copy()
    smoothed[known] = series
    return smoothed


def clip_bounds(values: Floats, kind: str, width: float) -> tuple[float, float]:
    """The lowest and highest value that are no outliers: infinite for `none`.

    iqr: `width` interquartile ranges beyond the quartiles (Tukey 1977). zscore: `width` standard deviations from the
    mean. Where that spread is 0 nothing is clipped: half the values being equal does not make the others wrong.
    """
    if kind == "iqr":
        low, high = np.nanquantile(values, [0.25, 0.75])
        spread = high - low
    elif kind == "zscore":
        low = high = np.nanmean(values)
        spread = np.nanstd(values)
    else:
        return -np.inf, np.inf
    if spread == 0:
        return -np.inf, np.inf
    return float(low - width * spread), float(high + width * spread)


def fill_value(values: Floats, kind: str, constant: float) -> float:
    """What stands in for one missing value: NaN for `none`, and the median for `interpolate`.

    The mode is the most frequent value, the smallest of them on a tie.
    """
    known = values[~np.isnan(values)]
    if kind == "none":
        return np.nan
    if kind == "constant":
        return constant
    if kind == "mean":
        return float(known.mean())
    if kind == "mode":
        distinct, count = np.unique(known, return_counts=True)
        return float(distinct[count.argmax()])
    return float(np.median(known))


def interpolate(values: Floats) -> Floats:
    """Missing values on the line between the nearest known ones; beyond the first or last, equal to it."""
    known = ~np.isnan(values)
    place = np.arange(len(values))
    return np.interp(place, place[known], values[known])


def center_and_width(values: Floats, scale: str) -> tuple[float, float]:
    """`center` and `width` of a scale: zscore and log by mean and deviation, minmax, or robust by median and IQR.

    A constant column gets width 1, and so becomes all 0.
    """
    if scale == "none":
        return 0.0, 1.0
    center: float
    width: float
    if scale == "minmax":
        center = float(np.nanmin(values))
        width = float(np.nanmax(values)) - center
    elif scale == "robust":
        first, center, third = np.nanquantile(values, [0.25, 0.5, 0.75]).tolist()
        width = third - first
    else:
        center, width = float(np.nanmean(values)), float(np.nanstd(values))
    # The deviation of equal values is rounding error, not always 0.
    if width <= 1e-12 * abs(center):
        width = 1.0
    return center, width


def signed_log(values: Floats) -> Floats:
    """sign(x) * log(1 + |x|): a logarithm that is defined for 0 and negative values."""
    logs: Floats = np.sign(values) * np.log1p(np.abs(values))
    return logs


def _scaled(values: Floats, fit: ColumnFit) -> Floats:
    return ((signed_log(values) if fit.logs else values) - fit.center) / fit.width


def _known_or_nan(values: npt.ArrayLike) -> Floats:
    array = np.asarray(values, np.float64)
    return np.where(np.isfinite(array), array, np.nan)
