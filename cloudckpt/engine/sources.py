"""Items waiting to be staged.

Law: a source hands out its bytes by ranges, from worker threads; whose memory they lie in is its own business.
"""

from typing import Protocol

from cloudckpt.ranges import Range


class Source(Protocol):
    """An item waiting to be staged. Both methods run in worker threads, for several ranges at once."""

    def scratch_nbytes(self, at: Range) -> int:
        """How many bytes of scratch staging that range takes: 0 where the bytes lie in host memory."""
        ...

    def stage(self, at: Range, scratch: memoryview) -> memoryview:
        """The item's bytes in that range, as they lie or copied into ``scratch``; unchanged until sent."""
        ...


class BytesSource:
    """An item whose bytes are there: a shard's header, or a bytes item."""

    def __init__(self, data: bytes | memoryview) -> None:
        """Takes the whole item."""
        self._data = memoryview(data)

    def scratch_nbytes(self, at: Range) -> int:
        """None is needed."""
        del at
        return 0

    def stage(self, at: Range, scratch: memoryview) -> memoryview:
        """See `Source.stage`."""
        del scratch
        return self._data[at.start : at.stop]
