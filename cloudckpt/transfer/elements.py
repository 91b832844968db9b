"""Elements of a checkpoint as segments: the runs in which they lie, or what has to be gathered.

Law: pure, but for reading. A run is as long as the chunks allow; only what is scattered is gathered.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
from msgspec import Struct

from cloudckpt.array import ArrayTarget, chunks_of
from cloudckpt.convert.files import Elements, Piece
from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.contents import Ask, Contents, Located
from cloudckpt.engine.fetching import RegionRead, rows_of
from cloudckpt.engine.framing import MIN_PART_SIZE
from cloudckpt.engine.read import ReadOptions, Stats, Wanted, read_regions
from cloudckpt.engine.sinks import MemorySink
from cloudckpt.manifest import BytesEntry, Chunk, OpenEntry, TensorEntry
from cloudckpt.ranges import Range, Region, rectangles, span_of
from cloudckpt.store.protocols import Get
from cloudckpt.threads import in_thread
from cloudckpt.transfer.segments import Segment, given

_Part = tuple[Chunk, Region]
"""A chunk, and what it holds of a rectangle, counted from the tensor's first element."""


class Source(Struct, frozen=True, gc=False):
    """What a segment's bytes are of: a rectangle of a tensor, row-major, or a byte string (without one)."""

    key: str
    region: Region | None


def asks_of(entries: Mapping[str, OpenEntry]) -> list[Ask]:
    """For all that has bytes."""
    asks = []
    for key, entry in entries.items():
        if isinstance(entry, TensorEntry):
            asks += [Ask(key, chunk, Region((0,) * len(chunk.sizes), chunk.sizes)) for chunk in entry.chunks]
        elif isinstance(entry, BytesEntry):
            asks.append(Ask(key, entry, Region((0,), (entry.nbytes,))))
    return asks


async def located(contents: Contents, store: Get, asks: Sequence[Ask], options: ReadOptions, stats: Stats) -> Located:
    """Where everything lies, and no guess; raises as `Contents.locate`."""
    while True:
        found = await contents.locate(store, asks, options, stats)
        checks = await in_thread(found.checks)
        if not checks:
            return found
        await read_regions(store, checks, options, stats)
        if await in_thread(found.is_proven):
            return found


def segments_of(piece: Piece, entries: Mapping[str, OpenEntry], found: Located) -> Iterator[Segment]:
    """The segments of a piece of a file, in order."""
    if isinstance(piece, bytes):
        yield given(piece)
        return
    entry = entries[piece.key]
    if isinstance(entry, BytesEntry):
        whole = Region((0,), (entry.nbytes,))
        yield _segment(Source(piece.key, None), found.read_bytes(piece.key, entry, whole), entry.nbytes)
        return
    assert isinstance(entry, TensorEntry)  # noqa: S101 - values have no bytes
    yield from _tensor_segments(piece, entry, found)


def _tensor_segments(piece: Elements, entry: TensorEntry, found: Located) -> Iterator[Segment]:
    itemsize = DTYPES[entry.dtype].itemsize
    region = piece.region or Region((0,) * len(entry.shape), entry.shape)
    if not region.numel:
        return
    for run, chunk in _runs(region, list(chunks_of(entry, region, piece.key)), itemsize):
        source, nbytes = Source(piece.key, run), run.numel * itemsize
        if chunk is None:
            yield Segment(source=source, whole=nbytes, at=Range(0, nbytes), grain=itemsize)
            continue
        inside = run.relative_to(chunk.offsets)
        yield _segment(source, found.read_chunk(piece.key, entry, chunk, inside, is_direct=True), nbytes)


def _segment(source: Source, read: RegionRead, nbytes: int) -> Segment:
    """Of a rectangle that is one run of bytes in its chunk."""
    span = span_of(read.region, read.shape, read.itemsize)
    whole = prod(read.shape) * read.itemsize
    size = read.frame_size
    is_framed = span.start % size == 0 and size % read.itemsize == 0 and (span.stop % size == 0 or span.stop == whole)
    is_plain = read.stored is None
    return Segment(
        source=source,
        whole=nbytes,
        at=Range(0, nbytes),
        key=read.key if is_plain else None,
        start=read.start + span.start if is_plain else 0,
        grain=size if is_framed and size > 1 else read.itemsize,
        checksums=read.checksums[span.start // size :] if is_framed and is_plain else (),
    )


def _runs(region: Region, parts: Sequence[_Part], itemsize: int) -> Iterator[tuple[Region, Chunk | None]]:
    """Cuts a rectangle, in order, into such as one chunk holds in one run, and such as are scattered."""
    if len(parts) == 1:
        chunk = parts[0][0]
        span = span_of(region.relative_to(chunk.offsets), chunk.sizes, itemsize)
        yield region, chunk if len(span) == region.numel * itemsize else None
        return
    axis = next(a for a, n in enumerate(region.sizes) if n > 1)
    start, count = region.offsets[axis], region.sizes[axis]
    borders = sorted({b for _, held in parts for b in (held.offsets[axis], held.offsets[axis] + held.sizes[axis])})
    if len(borders) == 2:
        if region.numel // count * itemsize < MIN_PART_SIZE:
            yield region, None
            return
        borders = list(range(start, start + count + 1))
    of_slab: dict[int, list[_Part]] = defaultdict(list)
    for chunk, held in parts:
        first, stop = held.offsets[axis], held.offsets[axis] + held.sizes[axis]
        for i in range(bisect_left(borders, first), bisect_left(borders, stop)):
            of_slab[i].append((chunk, rows_of(held, axis, borders[i] - first, borders[i + 1] - borders[i])))
    for i, (low, high) in enumerate(pairwise(borders)):
        yield from _runs(rows_of(region, axis, low - start, high - low), of_slab[i], itemsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementReads:
    """Implements `assembly.Reads` over a checkpoint."""

    store: Get
    entries: Mapping[str, OpenEntry]
    found: Located
    options: ReadOptions
    stats: Stats

    async def read(self, wanted: Sequence[tuple[Segment, memoryview]]) -> None:
        """See `assembly.Reads.read`."""
        reads = await in_thread(lambda: [w for segment, into in wanted for w in self._wanted(segment, into)])
        await read_regions(self.store, reads, self.options, self.stats)

    def _wanted(self, segment: Segment, into: memoryview) -> Iterator[Wanted]:
        source, at = segment.source, segment.at
        entry = self.entries[source.key]
        name = repr(source.key)
        if isinstance(entry, BytesEntry):
            region = Region((at.start,), (len(at),))
            yield Wanted(name, self.found.read_bytes(source.key, entry, region), MemorySink(into, at.start))
            return
        assert isinstance(entry, TensorEntry)  # noqa: S101 - values have no bytes
        itemsize = DTYPES[entry.dtype].itemsize
        flat = np.frombuffer(into, np.dtype((np.void, itemsize)))
        position = 0
        for some in rectangles(Range(at.start // itemsize, at.stop // itemsize), source.region.sizes):
            place = flat[position : position + some.numel].reshape(some.sizes)
            position += some.numel
            yield from self._reads(source, entry, some, ArrayTarget(place))

    def _reads(self, source: Source, entry: TensorEntry, some: Region, target: ArrayTarget) -> Iterator[Wanted]:
        """Reads of a rectangle, counted from the source's first element."""
        assert source.region is not None  # noqa: S101 - it is of a tensor
        offsets = tuple(map(sum, zip(some.offsets, source.region.offsets, strict=True)))
        region = Region(offsets, some.sizes)
        for chunk, held in chunks_of(entry, region, source.key):
            inside = held.relative_to(chunk.offsets)
            sink = target.sink(held.relative_to(region.offsets), chunk.sizes, inside)
            read = self.found.read_chunk(source.key, entry, chunk, inside, is_direct=sink.memory is not None)
            yield Wanted(repr(source.key), read, sink)
