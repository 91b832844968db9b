"""The way down, planned: regions of chunks into pieces, pieces into ranged requests.

Law: pure. Exact rows are asked for; near ranges become one request, long ones several.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from msgspec import Struct

from cloudckpt.extensions.base import FrameContext
from cloudckpt.ranges import Range, Region, coalesce, is_bridged, span_of, strides_of


class Restorer(Protocol):
    """Makes plain bytes of a stored frame."""

    def restore(self, stored: memoryview, frame: FrameContext, nbytes: int) -> memoryview:
        """The frame's ``nbytes`` plain bytes, good until the same thread restores another.

        Raises:
            IntegrityError: it is not what was stored.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFrames:
    """The transformed frames of one chunk.

    Attributes:
        chain: what restores them.
        token: the shard's.
        item: the chunk's name in the shard.
        number_size: bytes of each number in it.
        first: the number of its first frame among the shard's.
        starts: the first byte of each frame in the object, and one past the last of the last.
    """

    chain: Restorer
    token: str
    item: str
    number_size: int
    first: int
    starts: Sequence[int]


class RegionRead(Struct, frozen=True, kw_only=True, gc=False):
    """One rectangle of one chunk, wanted by someone.

    Attributes:
        key: of the shard.
        start: the chunk's first byte in it.
        itemsize: bytes per element.
        shape: elements per axis of the chunk.
        region: what is wanted, counted from the chunk's first element.
        frame_size: bytes per frame of the shard.
        checksums: CRC32C of each of the chunk's frames; none where they are not known.
        is_direct: whether the destination is contiguous memory that a row-major run can be received into.
        stored: where the chunk's frames lie, if they were transformed.
    """

    key: str
    start: int
    itemsize: int
    shape: tuple[int, ...]
    region: Region
    frame_size: int
    checksums: Sequence[int]
    is_direct: bool
    stored: StoredFrames | None = None

    @property
    def nbytes(self) -> int:
        """Bytes wanted."""
        return self.region.numel * self.itemsize


class Piece(Struct, frozen=True, gc=False):
    """A part of a read that arrives in one request.

    Attributes:
        read: index into the planned reads.
        at: the bytes in the shard object, from the first wanted to the last.
        into: where they go in the read's contiguous memory; None where they are placed by `region`.
        region: the rectangle they hold, counted from the chunk's first element; None where ``into`` is set.
    """

    read: int
    at: Range
    into: Range | None
    region: Region | None


@dataclass(frozen=True, slots=True)
class Fetch:
    """One ranged GET and the pieces that it brings, in order, with gaps between them."""

    key: str
    at: Range
    pieces: tuple[Piece, ...]


def plan_fetches(reads: Sequence[RegionRead], *, max_request_size: int, max_gap: int) -> list[Fetch]:
    """Turns reads into requests.

    Args:
        reads: any number; empty regions ask for nothing.
        max_request_size: bytes of a request, at most, unless a single element is larger.
        max_gap: see `ranges.is_bridged`.
    """
    by_key: dict[str, list[Piece]] = {}
    for i, read in enumerate(reads):
        size = max_request_size // read.frame_size * read.frame_size or max_request_size
        pieces = by_key.setdefault(read.key, [])
        pieces += _pieces(i, read, read.region, size, max_gap)
    fetches = []
    for key, pieces in by_key.items():
        pieces.sort(key=lambda p: p.at)
        for group in coalesce((p.at for p in pieces), max_gap=max_gap, max_size=max_request_size):
            some = tuple(pieces[i] for i in group)
            fetches.append(Fetch(key, Range(some[0].at.start, some[-1].at.stop), some))
    return fetches


def _pieces(i: int, read: RegionRead, region: Region, size: int, max_gap: int) -> Iterator[Piece]:
    if not region.numel:
        return
    span = span_of(region, read.shape, read.itemsize)
    if read.is_direct and len(span) == region.numel * read.itemsize:
        yield from _runs(i, read, span, _offset(read, region), size)
        return
    axis = next((a for a, n in enumerate(region.sizes) if n > 1), None)
    if axis is None:
        yield _placed(i, read, region, span)
        return
    stride = strides_of(read.shape, read.itemsize)[axis]
    run = len(span_of(rows_of(region, axis, 0, 1), read.shape, read.itemsize))
    is_joined = is_bridged(stride - run, run, max_gap)
    if is_joined and len(span) <= size:
        yield _placed(i, read, region, span)
        return
    rows = max(1, size // stride) if is_joined else 1
    for row in range(0, region.sizes[axis], rows):
        part = rows_of(region, axis, row, min(rows, region.sizes[axis] - row))
        yield from _pieces(i, read, part, size, max_gap)


def _runs(i: int, read: RegionRead, span: Range, offset: int, size: int) -> Iterator[Piece]:
    """Cuts a contiguous run at multiples of ``size`` of the chunk, which are borders of frames."""
    start = span.start
    while start < span.stop:
        stop = min(span.stop, (start // size + 1) * size)
        into = Range(offset + start - span.start, offset + stop - span.start)
        yield Piece(i, Range(start, stop).shift(read.start), into, None)
        start = stop


def _placed(i: int, read: RegionRead, region: Region, span: Range) -> Piece:
    return Piece(i, span.shift(read.start), None, region)


def rows_of(region: Region, axis: int, first: int, count: int) -> Region:
    """Some of a region's indices along an axis, counted from its own first."""
    offsets, sizes = list(region.offsets), list(region.sizes)
    offsets[axis] += first
    sizes[axis] = count
    return Region(tuple(offsets), tuple(sizes))


def _offset(read: RegionRead, region: Region) -> int:
    """Where ``region`` begins in contiguous memory that holds all of the read's region."""
    strides = strides_of(read.region.sizes, read.itemsize)
    inside = region.relative_to(read.region.offsets)
    return sum(o * s for o, s in zip(inside.offsets, strides, strict=True))


def is_of_whole_frames(read: RegionRead) -> bool:
    """Whether what is wanted is one run of bytes that begins and ends where frames do."""
    span = span_of(read.region, read.shape, read.itemsize)
    is_end = span.stop % read.frame_size == 0 or span.stop == prod(read.shape) * read.itemsize
    return len(span) == read.nbytes and span.start % read.frame_size == 0 and is_end


def frame_range(read: RegionRead, frame: int) -> Range:
    """The bytes of the chunk's frame of that index, counted from the chunk's first byte."""
    nbytes = prod(read.shape) * read.itemsize
    return Range(frame * read.frame_size, min((frame + 1) * read.frame_size, nbytes))
