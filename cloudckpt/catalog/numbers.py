"""What a tensor's elements are like, and how those of two tensors differ, by parts that add up.

Law: pure. Parts are taken in any order, and what is told of all of them does not hang on it but for rounding.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_Numbers = np.ndarray[Any, Any]

MAX_BINS = 32
"""Of a histogram: as many as a narrow terminal shows."""

_BLOCK = 1 << 16
"""Elements that are looked at together: as 64-bit numbers, and what is made of them, they fit into a CPU's cache."""

_LEAST_EXPONENT = -1000
"""Of a bin's width; less is no number any more."""

_MANTISSA = 52
"""Bits; a bin that is narrower beside the numbers in it than these tell nothing apart."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many numbers lie in each of some bins of equal width, which is a power of two.

    So the bins of two histograms fall on each other once those of the finer one are joined in pairs, again and again:
    they add up exactly.

    Attributes:
        exponent: of the width.
        first: the first bin's number: it begins at so many widths.
        counts: of each bin; neither the first nor the last is empty, and there are at most `MAX_BINS`.
    """

    exponent: int = _LEAST_EXPONENT
    first: int = 0
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, numbers: _Numbers) -> "Histogram":
        """Of finite 64-bit floats."""
        if not numbers.size:
            return cls()
        largest = float(np.abs(numbers).max())
        least = math.frexp(largest)[1] - _MANTISSA if largest else _LEAST_EXPONENT
        low, high = float(numbers.min()), float(numbers.max())
        span = math.frexp(high / MAX_BINS - low / MAX_BINS)[1] if low < high else least
        exponent = max(least, span, _LEAST_EXPONENT)
        scaled = np.ldexp(numbers, -exponent)
        bins = np.floor(scaled).astype(np.int64)
        bins[(scaled == 0) & (numbers < 0)] = -1  # which was too little to be told from 0
        first = int(bins.min())
        counts = np.bincount(bins - first)
        return cls(exponent, first, tuple(counts.tolist()))._fitting()

    def __add__(self, other: "Histogram") -> "Histogram":
        if not self.counts or not other.counts:
            return self if self.counts else other
        exponent = max(self.exponent, other.exponent)
        a, b = self._joined(exponent), other._joined(exponent)
        while max(a._stop, b._stop) - min(a.first, b.first) > MAX_BINS:
            exponent += 1
            a, b = a._joined(exponent), b._joined(exponent)
        first = min(a.first, b.first)
        counts = [0] * (max(a._stop, b._stop) - first)
        for part in (a, b):
            for i, count in enumerate(part.counts, part.first - first):
                counts[i] += count
        return Histogram(exponent, first, tuple(counts))

    @property
    def edges(self) -> tuple[float, ...]:
        """Where bins begin, and where the last one ends."""
        if not self.counts:
            return ()
        with np.errstate(over="ignore"):
            numbers = np.ldexp(np.arange(self.first, self._stop + 1, dtype=np.float64), self.exponent)
        most = np.finfo(np.float64).max
        return tuple(np.clip(numbers, -most, most).tolist())

    @property
    def _stop(self) -> int:
        return self.first + len(self.counts)

    def _fitting(self) -> "Histogram":
        found = self
        while len(found.counts) > MAX_BINS:
            found = found._joined(found.exponent + 1)
        return found

    def _joined(self, exponent: int) -> "Histogram":
        """With bins of that width, which is not less."""
        by = exponent - self.exponent
        first = self.first >> by
        counts = [0] * (((self._stop - 1) >> by) + 1 - first)
        for i, count in enumerate(self.counts, self.first):
            counts[(i >> by) - first] += count
        return Histogram(exponent, first, tuple(counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What a tensor's elements are like; of complex ones their magnitudes.

    Attributes:
        count: elements.
        nan_count, inf_count, zero_count: those of them that are no numbers, infinite, zero.
        minimum, maximum, mean: of the finite ones; None where there are none.
        squares: the sum of the squares of what the finite ones differ from their mean.
        histogram: of the finite ones.
    """

    count: int = 0
    nan_count: int = 0
    inf_count: int = 0
    zero_count: int = 0
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    squares: float = 0.0
    histogram: Histogram = field(default_factory=Histogram)

    @classmethod
    def of(cls, elements: _Numbers) -> "Statistics":
        """Of a flat array of integers, booleans, floats or complex numbers."""
        found = cls()
        for block in _blocks(elements):
            found += cls._of_block(block)
        return found

    @classmethod
    def _of_block(cls, elements: _Numbers) -> "Statistics":
        numbers = _as_numbers(elements)
        numbers = np.abs(numbers) if numbers.dtype.kind == "c" else numbers
        finite = numbers[np.isfinite(numbers)]
        nan_count = int(np.count_nonzero(np.isnan(numbers)))
        is_any = finite.size > 0
        exact = elements if elements.dtype.kind in "iu" else finite  # 64-bit integers have no exact float
        with np.errstate(all="ignore"):
            mean = float(finite.mean()) if is_any else None
            squares = float(np.square(finite - mean).sum()) if is_any else 0.0
        return cls(
            count=numbers.size,
            nan_count=nan_count,
            inf_count=numbers.size - finite.size - nan_count,
            zero_count=int(np.count_nonzero(finite == 0)),
            minimum=exact.min().item() if is_any else None,
            maximum=exact.max().item() if is_any else None,
            mean=mean,
            squares=squares,
            histogram=Histogram.of(finite),
        )

    def __add__(self, other: "Statistics") -> "Statistics":
        mean, squares = self.mean, self.squares + other.squares
        a, b = self.finite_count, other.finite_count
        if mean is None or other.mean is None:
            mean = other.mean if mean is None else mean
        else:  # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
            gap = other.mean - mean
            mean += gap * (b / (a + b))
            squares += gap * gap * (a * b / (a + b))
        return Statistics(
            count=self.count + other.count,
            nan_count=self.nan_count + other.nan_count,
            inf_count=self.inf_count + other.inf_count,
            zero_count=self.zero_count + other.zero_count,
            minimum=min((m for m in (self.minimum, other.minimum) if m is not None), default=None),
            maximum=max((m for m in (self.maximum, other.maximum) if m is not None), default=None),
            mean=mean,
            squares=squares,
            histogram=self.histogram + other.histogram,
        )

    @property
    def finite_count(self) -> int:
        """Elements that are finite."""
        return self.count - self.nan_count - self.inf_count

    @property
    def std(self) -> float | None:
        """The standard deviation of the finite ones, as numpy's: of all there are, not of a sample."""
        return math.sqrt(self.squares / self.finite_count) if self.finite_count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How the elements of two tensors of one shape differ.

    Attributes:
        count: elements.
        changed_count: those that differ by more than was asked for.
        special_count: those of them of which one is NaN or infinite and the other is not the same.
        max_abs: the greatest difference of two finite ones; None where dtypes allow no arithmetic here.
        max_rel: the greatest of these differences beside the right one's magnitude, where that is not 0.
    """

    count: int = 0
    changed_count: int = 0
    special_count: int = 0
    max_abs: float | None = 0
    max_rel: float | None = 0.0

    @classmethod
    def between(cls, left: _Numbers, right: _Numbers, *, rtol: float = 0.0, atol: float = 0.0) -> "Change":
        """Of two flat arrays of one length, as `numpy.isclose` holds them against each other; NaN equals NaN.

        Args:
            left: numbers or booleans; elements of a dtype that numpy does not know are void, and bytes to compare.
            right: likewise, void where ``left`` is.
            rtol: a difference counts if it is more than ``atol + rtol * abs(right)``.
            atol: see ``rtol``.
        """
        found = cls()
        for a, b in zip(_blocks(left), _blocks(right), strict=True):
            found += cls._of_blocks(a, b, rtol, atol)
        return found

    @classmethod
    def _of_blocks(cls, left: _Numbers, right: _Numbers, rtol: float, atol: float) -> "Change":
        if left.dtype == right.dtype and _bytes(left).tobytes() == _bytes(right).tobytes():
            return cls(count=left.size)
        if left.dtype.type is np.void:
            differ = int(np.count_nonzero((_bytes(left) != _bytes(right)).any(axis=1)))
            return cls(count=left.size, changed_count=differ, max_abs=None, max_rel=None)
        a, b = _as_numbers(left), _as_numbers(right)
        with np.errstate(all="ignore"):
            are_finite = np.isfinite(a) & np.isfinite(b)
            delta, size = np.abs(a - b), np.abs(b)
            if left.dtype == right.dtype and left.dtype.kind in "iu":
                delta = _integer_gaps(left, right)
            are_same = (delta == 0) if delta.dtype.kind == "u" else (a == b) | (np.isnan(a) & np.isnan(b))
            are_close = are_same | (are_finite & (delta <= atol + rtol * size))
            finite = delta[are_finite]
            beside = are_finite & (size > 0)
            relative = delta[beside] / size[beside]
        return cls(
            count=left.size,
            changed_count=left.size - int(np.count_nonzero(are_close)),
            special_count=int(np.count_nonzero(~are_same & ~are_finite)),
            max_abs=_told(finite.max().item()) if finite.size else 0,
            max_rel=_told(float(relative.max())) if relative.size else 0.0,
        )

    def __add__(self, other: "Change") -> "Change":
        return Change(
            count=self.count + other.count,
            changed_count=self.changed_count + other.changed_count,
            special_count=self.special_count + other.special_count,
            max_abs=_greater(self.max_abs, other.max_abs),
            max_rel=_greater(self.max_rel, other.max_rel),
        )


def _blocks(elements: _Numbers) -> Iterator[_Numbers]:
    return (elements[i : i + _BLOCK] for i in range(0, elements.size, _BLOCK))


def _as_numbers(elements: _Numbers) -> _Numbers:
    """As 64-bit floats, or pairs of them."""
    return elements.astype(np.complex128 if elements.dtype.kind == "c" else np.float64)


def _bytes(elements: _Numbers) -> _Numbers:
    """One row of bytes for each element."""
    return elements.view(np.uint8).reshape(elements.size, elements.dtype.itemsize)


def _integer_gaps(left: _Numbers, right: _Numbers) -> _Numbers:
    """What integers differ by, exactly: 64-bit arithmetic wraps around to it."""
    high, low = np.maximum(left, right), np.minimum(left, right)
    return high.astype(np.uint64) - low.astype(np.uint64)


def _told(number: float) -> float:
    """The same, or the largest float in place of what is too large for one."""
    return sys.float_info.max if number == math.inf else number


def _greater(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else max(a, b)
