"""Segments into the parts of a multipart upload: which the server copies, and which pass through here.

Law: pure. Every part but the last has what S3 asks for, 5 MiB at least, and there are at most 10,000.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cloudckpt.engine.framing import MAX_PART_SIZE, MAX_PARTS, MIN_PART_SIZE
from cloudckpt.ranges import Range
from cloudckpt.transfer.segments import Segment, crc32c_of, cut, nbytes_of, runs_of

PART_SIZE = 8 << 20
"""Of what passes through memory, twice that at most: a few of them are under way at a time."""

COPY_SIZE = 128 << 20
"""Of what the server copies, at most: it answers when it is done, and nothing of it lies here."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A part that is read and sent."""

    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Of the part."""
        return nbytes_of(self.segments)


@dataclass(frozen=True, slots=True)
class Copied:
    """A part that the server makes of bytes of an object; ``crc32c`` is None where it is not known."""

    key: str
    at: Range
    crc32c: int | None

    @property
    def nbytes(self) -> int:
        """Of the part."""
        return len(self.at)


PartPlan = Sent | Copied


def plan_parts(
    segments: Iterable[Segment], nbytes: int, *, copies: bool, part_size: int = PART_SIZE
) -> list[PartPlan]:
    """Plans an upload.

    Args:
        segments: of the object, in order.
        nbytes: of all of them.
        copies: whether the server may be asked to copy.
        part_size: bytes of a part that is sent; up to twice that, and more where there would be too many.
    """
    most = -(-nbytes // (MAX_PARTS // 4))
    return list(_parts(segments, copies=copies, sent=max(part_size, most), copied=max(COPY_SIZE, most)))


def _parts(segments: Iterable[Segment], *, copies: bool, sent: int, copied: int) -> Iterator[PartPlan]:
    pending: list[Segment] = []
    nbytes = 0
    for run in runs_of(segments):
        if copies and run[0].key is not None:
            front, rest = cut(run, MIN_PART_SIZE - nbytes if pending else 0)
            if nbytes_of(rest) >= MIN_PART_SIZE:
                pending += front
                if pending:
                    yield Sent(tuple(pending))
                yield from _copied(rest, copied)
                pending, nbytes = [], 0
                continue
        pending += run
        nbytes += nbytes_of(run)
        while nbytes >= 2 * sent:
            front, pending = cut(pending, sent)
            nbytes -= nbytes_of(front)
            yield Sent(tuple(front))
    if pending:
        yield Sent(tuple(pending))


def _copied(run: list[Segment], size: int) -> Iterator[Copied]:
    assert size <= MAX_PART_SIZE  # noqa: S101 - of objects that S3 can have
    while nbytes_of(run) >= size + MIN_PART_SIZE:
        front, rest = cut(run, size)
        if nbytes_of(rest) < MIN_PART_SIZE:  # a grain is larger than it should be
            break
        yield _copy(front)
        run = rest
    yield _copy(run)


def _copy(run: list[Segment]) -> Copied:
    key = run[0].key
    assert key is not None  # noqa: S101 - for the type checker
    return Copied(key, Range(run[0].place.start, run[-1].place.stop), crc32c_of(run))
