"""The bytes of an object to be made, as segments: what they are, and where they lie already.

Law: pure.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from awscrt.checksums import combine_crc32c, crc32c
from msgspec import Struct

from cloudckpt.ranges import Range


class Segment(Struct, frozen=True, kw_only=True, gc=False):
    """Some bytes of a source.

    Attributes:
        source: bytes at hand, or whatever whoever reads it knows by this.
        whole: how many bytes the source has.
        at: those of them that this is.
        key: of the object that the source lies in, as it is; None where it lies nowhere in one piece.
        start: the source's first byte in that object.
        grain: it is cut at multiples of this, counted from the source's first byte.
        checksums: the CRC32C of each grain of the source; none where they are not known.
    """

    source: Any
    whole: int
    at: Range
    key: str | None = None
    start: int = 0
    grain: int = 1
    checksums: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.at)

    @property
    def place(self) -> Range:
        """Where its bytes lie in the object."""
        return self.at.shift(self.start)

    @property
    def crc32c(self) -> int | None:
        """Of its bytes, if it is known without reading them."""
        if isinstance(self.source, bytes):
            own: int = crc32c(memoryview(self.source)[self.at.start : self.at.stop])
            return own
        is_whole = self.at.start % self.grain == 0 and (self.at.stop % self.grain == 0 or self.at.stop == self.whole)
        if not self.checksums or not is_whole:
            return None
        found = 0
        for i in range(self.at.start // self.grain, -(-self.at.stop // self.grain)):
            nbytes = min(self.grain, self.whole - i * self.grain)
            found = combine_crc32c(found, self.checksums[i], nbytes)
        return found

    def cut(self, nbytes: int) -> "tuple[Segment, Segment | None]":
        """Its first ``nbytes``, or as few more as its grain asks for, and what is left."""
        border = -(-(self.at.start + nbytes) // self.grain) * self.grain
        if border >= self.at.stop:
            return self, None
        return self._of(Range(self.at.start, border)), self._of(Range(border, self.at.stop))

    def _of(self, at: Range) -> "Segment":
        return Segment(
            source=self.source,
            whole=self.whole,
            at=at,
            key=self.key,
            start=self.start,
            grain=self.grain,
            checksums=self.checksums,
        )


def given(data: bytes) -> Segment:
    """Bytes at hand."""
    return Segment(source=data, whole=len(data), at=Range(0, len(data)))


def nbytes_of(segments: Iterable[Segment]) -> int:
    """Of all of them."""
    return sum(len(segment.at) for segment in segments)


def crc32c_of(segments: Iterable[Segment]) -> int | None:
    """Of all of them one after another, if it is known without reading them."""
    found = 0
    for segment in segments:
        crc = segment.crc32c
        if crc is None:
            return None
        found = combine_crc32c(found, crc, len(segment.at))
    return found


def runs_of(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Groups what lies in one object, one after another there too; what lies nowhere is in groups of its own."""
    run: list[Segment] = []
    for segment in segments:
        if not len(segment.at):
            continue
        last = run[-1] if run else None
        is_next = (
            last is not None
            and last.key == segment.key
            and (segment.key is None or last.place.stop == segment.place.start)
        )
        if run and not is_next:
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


def cut(segments: Sequence[Segment], nbytes: int) -> tuple[list[Segment], list[Segment]]:
    """The first ``nbytes`` of several, or as few more as their grains ask for, and what is left."""
    front: list[Segment] = []
    left = nbytes
    for i, segment in enumerate(segments):
        if left <= 0:
            return front, list(segments[i:])
        first, rest = segment.cut(left)
        front.append(first)
        left -= len(first.at)
        if rest is not None:
            return front, [rest, *segments[i + 1 :]]
    return front, []
