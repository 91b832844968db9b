"""The way down by whole frames, planned: regions into stored frames, frames into ranged requests.

Law: pure. Each frame that holds something wanted is asked for once, whoever wants it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd, prod

from awscrt.checksums import combine_crc32c
from msgspec.structs import replace

from cloudckpt.engine.fetching import RegionRead, StoredFrames, frame_range, rows_of
from cloudckpt.extensions.base import FrameContext
from cloudckpt.ranges import Range, Region, coalesce, rectangles, span_of, strides_of


@dataclass(frozen=True, slots=True)
class FramedRead:
    """A read of a chunk by whole frames, because they were transformed or because nothing less can be verified.

    Attributes:
        read: whose frames are those of the shard, or several of them joined.
        stored: where they lie.
        joined: how many of the shard's are one here.
    """

    read: RegionRead
    stored: StoredFrames
    joined: int = 1


class _AsStored:
    """Restores frames that were not transformed."""

    def restore(self, stored: memoryview, frame: FrameContext, nbytes: int) -> memoryview:
        """See `Restorer.restore`."""
        del frame, nbytes
        return stored


def by_frames(read: RegionRead) -> FramedRead:
    """The same read of a plain shard, by whole frames.

    Frames that begin within an element are taken several at a time, as many as begin and end between elements.
    """
    joined = read.itemsize // gcd(read.frame_size, read.itemsize)
    frame_size = joined * read.frame_size
    nbytes = prod(read.shape) * read.itemsize
    checksums = read.checksums
    if joined > 1:
        sizes = [len(frame_range(read, i)) for i in range(len(checksums))]
        checksums = [
            reduce(lambda crc, i: combine_crc32c(crc, read.checksums[i], sizes[i]), some, 0)
            for some in (range(i, min(i + joined, len(sizes))) for i in range(0, len(sizes), joined))
        ]
    stored = StoredFrames(
        chain=_AsStored(),
        token="",
        item="",
        number_size=1,
        first=read.start,
        starts=(*range(read.start, read.start + nbytes, frame_size), read.start + nbytes),
    )
    return FramedRead(replace(read, frame_size=frame_size, checksums=checksums), stored, joined)


@dataclass(frozen=True, slots=True)
class WantedFrame:
    """A stored frame and who wants something of it.

    Attributes:
        at: the stored bytes, in the shard object.
        index: of the frame among its chunk's.
        nbytes: plain.
        reads: indices into the planned reads, all of the same chunk.
    """

    at: Range
    index: int
    nbytes: int
    reads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FramesFetch:
    """One ranged GET and the frames that it brings, in order, with gaps between them."""

    key: str
    at: Range
    frames: tuple[WantedFrame, ...]


def plan_frame_fetches(reads: Sequence[FramedRead], *, max_request_size: int, max_gap: int) -> list[FramesFetch]:
    """Turns reads by whole frames into requests.

    Args:
        reads: any number; empty regions ask for nothing.
        max_request_size: stored bytes of a request, and plain bytes that they restore to, at most, unless a single
            frame is larger.
        max_gap: see `ranges.is_bridged`.
    """
    users: dict[str, dict[tuple[int, int, int], list[int]]] = {}
    for i, framed in enumerate(reads):
        by_place = users.setdefault(framed.read.key, {})
        for index in frames_of(framed.read, framed.read.region):
            place = framed.stored.first + index, framed.read.start, framed.read.frame_size
            by_place.setdefault(place, []).append(i)
    fetches: list[FramesFetch] = []
    for key, by_place in users.items():
        frames = [
            wanted_frame(reads[mine[0]], number - reads[mine[0]].stored.first, mine)
            for (number, _, _), mine in sorted(by_place.items())
        ]
        for group in coalesce((f.at for f in frames), max_gap=max_gap, max_size=max_request_size):
            fetches += (_fetch(key, some) for some in _limited([frames[i] for i in group], max_request_size))
    return fetches


def _fetch(key: str, frames: Sequence[WantedFrame]) -> FramesFetch:
    return FramesFetch(key, Range(frames[0].at.start, frames[-1].at.stop), tuple(frames))


def wanted_frame(framed: FramedRead, index: int, users: Sequence[int]) -> WantedFrame:
    """The chunk's frame of that index, wanted by the reads of the indices ``users``."""
    at = Range(framed.stored.starts[index], framed.stored.starts[index + 1])
    return WantedFrame(at, index, len(frame_range(framed.read, index)), tuple(users))


def _limited(frames: Sequence[WantedFrame], nbytes: int) -> Iterator[list[WantedFrame]]:
    """Cuts a run of frames so that each restores to at most ``nbytes``, or is one frame."""
    some: list[WantedFrame] = []
    filled = 0
    for frame in frames:
        if some and filled + frame.nbytes > nbytes:
            yield some
            some, filled = [], 0
        some.append(frame)
        filled += frame.nbytes
    if some:
        yield some


def frames_of(read: RegionRead, region: Region) -> Iterator[int]:
    """The chunk's frames that hold something of ``region``, in order, each once."""
    before = -1
    for span in _spans(read, region):
        first = max(before + 1, span.start // read.frame_size)
        stop = -(-span.stop // read.frame_size)
        yield from range(first, stop)
        before = max(before, stop - 1)


def _spans(read: RegionRead, region: Region) -> Iterator[Range]:
    """Byte ranges of the chunk that together hold ``region``; what lies between its bytes there fills no frame."""
    if not region.numel:
        return
    axis = next((a for a, n in enumerate(region.sizes) if n > 1), None)
    span = span_of(region, read.shape, read.itemsize)
    if axis is None:
        yield span
        return
    row = rows_of(region, axis, 0, 1)
    gap = strides_of(read.shape, read.itemsize)[axis] - len(span_of(row, read.shape, read.itemsize))
    if gap < read.frame_size:
        yield span
        return
    for i in range(region.sizes[axis]):
        yield from _spans(read, rows_of(region, axis, i, 1))


def placements(read: RegionRead, frame: Range) -> Iterator[tuple[Region, Range]]:
    """What of the read's region lies in a frame.

    Args:
        read: of the chunk.
        frame: its plain bytes, counted from the chunk's first; begins and ends between elements.

    Yields:
        Rectangles, counted from the chunk's first element, and where they lie in the frame, from their first
        element to their last.
    """
    elements = Range(frame.start // read.itemsize, frame.stop // read.itemsize)
    for rectangle in rectangles(elements, read.shape):
        common = rectangle.intersect(read.region)
        if common is not None:
            yield common, span_of(common, read.shape, read.itemsize).shift(-frame.start)
