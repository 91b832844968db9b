"""The way down of shards with extensions, planned: regions into stored frames, frames into ranged requests.

Law: pure. Each frame that holds something wanted is asked for once, whoever wants it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cloudckpt.engine.fetching import RegionRead, StoredFrames, frame_range, rows_of
from cloudckpt.ranges import Range, Region, coalesce, rectangles, span_of, strides_of


@dataclass(frozen=True, slots=True)
class FramedRead:
    """A read of a chunk whose frames were transformed."""

    read: RegionRead
    stored: StoredFrames


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
    """Turns reads of shards with extensions into requests.

    Args:
        reads: any number; empty regions ask for nothing.
        max_request_size: stored bytes of a request, and plain bytes that they restore to, at most, unless a single
            frame is larger.
        max_gap: see `ranges.is_bridged`.
    """
    users: dict[str, dict[int, list[int]]] = {}
    for i, framed in enumerate(reads):
        by_number = users.setdefault(framed.read.key, {})
        for index in frames_of(framed.read, framed.read.region):
            by_number.setdefault(framed.stored.first + index, []).append(i)
    fetches: list[FramesFetch] = []
    for key, by_number in users.items():
        frames = [_wanted(reads[mine[0]], number, mine) for number, mine in sorted(by_number.items())]
        for group in coalesce((f.at for f in frames), max_gap=max_gap, max_size=max_request_size):
            fetches += (_fetch(key, some) for some in _limited([frames[i] for i in group], max_request_size))
    return fetches


def _fetch(key: str, frames: Sequence[WantedFrame]) -> FramesFetch:
    return FramesFetch(key, Range(frames[0].at.start, frames[-1].at.stop), tuple(frames))


def _wanted(framed: FramedRead, number: int, users: list[int]) -> WantedFrame:
    index = number - framed.stored.first
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
