"""Half-open byte ranges, and rectangles of array elements.

Law: pure. Offsets and sizes are bytes in a Range, elements in a Region. They are made by the ten thousands, so
Python's garbage collector does not look at them (``gc=False``): it was half of what planning took.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, prod
from typing import Self

from msgspec import Struct

_LITTLE = 0.05
_LITTLE_MORE = 1 / 16


class Range(Struct, frozen=True, order=True, gc=False):
    """The bytes ``start <= i < stop`` of one object."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def intersect(self, other: Self) -> "Range":
        """The bytes in both; an empty range where there are none."""
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.stop, other.stop)))

    def shift(self, by: int) -> "Range":
        """The same bytes, counted from ``-by``."""
        return Range(self.start + by, self.stop + by)


def split(whole: Range, size: int) -> Iterator[Range]:
    """Cuts ``whole`` into ranges of ``size`` bytes; the last may be shorter."""
    for start in range(whole.start, whole.stop, size):
        yield Range(start, min(start + size, whole.stop))


def balanced_size(nbytes: int, *, most: int, ways: int, least: int, unit: int) -> int:
    """The size to cut ``nbytes`` in, so that requests that are sent ``ways`` at a time end about together.

    Args:
        nbytes: in all.
        most: of a piece, but for a sixteenth, so that a little more than a round number makes no round more.
        ways: pieces under way at a time.
        least: of a piece, unless ``most`` is less.
        unit: the size is a multiple of it, unless ``least`` or ``most`` is none.
    """
    rounds = max(1, ceil(nbytes / (most * ways) - _LITTLE_MORE))
    even = ceil(nbytes / (rounds * ways * unit)) * unit
    limit = int(most * (1 + _LITTLE_MORE)) // unit * unit or most
    return max(min(even, limit), min(least, most))


def is_bridged(gap: int, run: int, max_gap: int) -> bool:
    """Whether a gap between two runs is rather fetched than asked around.

    Args:
        gap: bytes that nobody wants.
        run: bytes of the shorter of the two.
        max_gap: bytes that cost as much as a request. Where both runs are at least as long, requests of their own
            are cheap beside them, and a gap is only fetched that adds little to them.
    """
    return gap <= max_gap and (run < max_gap or gap <= _LITTLE * run)


def coalesce(ranges: Iterable[Range], *, max_gap: int, max_size: int) -> Iterator[list[int]]:
    """Groups ranges that are worth one request.

    Args:
        ranges: sorted by start. One that overlaps those before it begins a new group, so that within a
            group every byte is wanted once.
        max_gap: see `is_bridged`.
        max_size: bytes a group may span; a single longer range is a group of its own.

    Yields:
        The indices of each group's ranges, in order.
    """
    group: list[int] = []
    start = stop = before = 0
    for i, r in enumerate(ranges):
        is_near = r.start >= stop and is_bridged(r.start - stop, min(before, len(r)), max_gap)
        before = len(r)
        if group and is_near and r.stop - start <= max_size:
            group.append(i)
            stop = r.stop
            continue
        if group:
            yield group
        group, start, stop = [i], r.start, r.stop
    if group:
        yield group


class Region(Struct, frozen=True, gc=False):
    """A rectangle of elements: one offset and one size for each axis."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many elements it has; 1 for a scalar."""
        return prod(self.sizes)

    def intersect(self, other: Self) -> "Region | None":
        """The elements in both, or None where there are none."""
        offsets = tuple(map(max, self.offsets, other.offsets))
        ends = (
            min(o + s, p + t) for o, s, p, t in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(e - o for e, o in zip(ends, offsets, strict=True))
        return Region(offsets, sizes) if all(s > 0 for s in sizes) else None

    def relative_to(self, origin: Sequence[int]) -> "Region":
        """The same rectangle, counted from ``origin``."""
        return Region(tuple(o - b for o, b in zip(self.offsets, origin, strict=True)), self.sizes)

    def is_inside(self, shape: Sequence[int]) -> bool:
        """Whether an array of ``shape`` has all its elements."""
        return len(shape) == len(self.offsets) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(self.offsets, self.sizes, shape, strict=True)
        )


def strides_of(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The row-major strides of an array, in bytes."""
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def span_of(region: Region, shape: Sequence[int], itemsize: int) -> Range:
    """The bytes from the first to the last element of ``region`` in a row-major array of ``shape``."""
    if not region.numel:
        return Range(0, 0)
    strides = strides_of(shape, itemsize)
    start = sum(o * s for o, s in zip(region.offsets, strides, strict=True))
    last = sum((n - 1) * s for n, s in zip(region.sizes, strides, strict=True))
    return Range(start, start + last + itemsize)


def rectangles(run: Range, shape: Sequence[int]) -> Iterator[Region]:
    """The rectangles that a run of elements makes up, in order.

    Args:
        run: of elements, as they lie in a row-major array.
        shape: of the array, without empty axes.
    """
    if not len(run):
        return
    if not shape:
        yield Region((), ())
        return
    row = prod(shape[1:])
    first, last = -(-run.start // row), run.stop // row
    if first > last:  # all within one row
        yield from _within_row(last, run, shape)
        return
    if run.start < first * row:
        yield from _within_row(first - 1, Range(run.start, first * row), shape)
    if first < last:
        inner = tuple(shape[1:])
        yield Region((first, *(0 for _ in inner)), (last - first, *inner))
    if last * row < run.stop:
        yield from _within_row(last, Range(last * row, run.stop), shape)


def _within_row(row: int, run: Range, shape: Sequence[int]) -> Iterator[Region]:
    inner = shape[1:]
    for region in rectangles(run.shift(-row * prod(inner)), inner):
        yield Region((row, *region.offsets), (1, *region.sizes))
