"""Where what is read goes.

Law: a sink is given rectangles; whose memory they lie in is its own business.
"""

from typing import Protocol

from cloudckpt.errors import IntegrityError
from cloudckpt.ranges import Range, Region


class Sink(Protocol):
    """Where a region goes."""

    @property
    def memory(self) -> memoryview | None:
        """The region's bytes in row-major order, to be received into; None where they must be placed."""
        ...

    def place(self, region: Region, data: memoryview) -> None:
        """Copies a rectangle into place; runs in a worker thread.

        Args:
            region: counted from the chunk's first element.
            data: the chunk's bytes from the rectangle's first to its last element, row-major as the chunk.
        """
        ...


class MemorySink:
    """Some of a byte string, received into memory."""

    def __init__(self, memory: memoryview, start: int = 0) -> None:
        """Receives into ``memory`` the bytes from ``start`` on."""
        self.memory = memory
        self._start = start

    def place(self, region: Region, data: memoryview) -> None:
        """See `Sink.place`."""
        start = region.offsets[0] - self._start
        self.memory[start : start + region.sizes[0]] = data


def damaged(name: str, key: str, frame: int, at: Range) -> IntegrityError:
    """The error for a frame of an item that does not match its checksum, asked for twice."""
    return IntegrityError(
        f"{name}: bytes {at.start} to {at.stop} of {key} do not match their checksum, nor did they when they were "
        f"asked for again: frame {frame} of the item is damaged in the store; load an earlier checkpoint"
    )
