"""Every byte of many objects, read once: the checksums of the runs that they are cut in.

Law: async; memory under one budget. What cannot be read of an object is told of that object, and the others are
read on.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from awscrt.checksums import combine_crc32c, crc32c

from cloudckpt.engine.budget import AHEAD, Budget, BufferPool, share_of
from cloudckpt.engine.read import ReadOptions
from cloudckpt.errors import ObjectNotFoundError, StoreError
from cloudckpt.ranges import Range, split
from cloudckpt.store.protocols import GetRange
from cloudckpt.threads import in_thread

_REQUEST_SIZE = 16 << 20


@dataclass(slots=True)
class Stream:
    """An object to read.

    Attributes:
        key: of the object.
        nbytes: to read of it, from its start.
        cuts: sorted positions that no run goes across.
        runs: once it was read: where each run begins and ends, and its CRC32C; in order.
        failure: why some of it could not be read.
    """

    key: str
    nbytes: int
    cuts: Sequence[int]
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    failure: StoreError | None = None

    def crc32c(self, at: Range) -> int:
        """The CRC32C of bytes between two cuts; all of them were read."""
        found, position = 0, at.start
        for start, stop, crc in self.runs[bisect_left(self.runs, (at.start,)) :]:
            if position == at.stop:
                break
            if start != position or stop > at.stop:
                raise AssertionError((self.key, at, start, stop))
            found, position = combine_crc32c(found, crc, stop - start), stop
        return found


async def read_streams(store: GetRange, streams: Sequence[Stream], options: ReadOptions) -> None:
    """Reads all of ``streams`` and fills in what they hold.

    Raises:
        StoreError: the store cannot be asked: not because of one of the objects.
    """
    size = min(_REQUEST_SIZE, share_of(options.max_inflight_nbytes, options.concurrency))
    budget = Budget(options.max_inflight_nbytes, concurrency=options.concurrency + AHEAD)
    requests = asyncio.Semaphore(options.concurrency)
    pool = BufferPool(options.max_inflight_nbytes)
    async with asyncio.TaskGroup() as group:
        for stream in streams:
            for at in split(Range(0, stream.nbytes), size):
                granted = await budget.take(len(at))
                task = group.create_task(_read(store, stream, at, requests, pool))
                budget.give_when_done(task, granted)
    for stream in streams:
        stream.runs.sort()


async def _read(store: GetRange, stream: Stream, at: Range, requests: asyncio.Semaphore, pool: BufferPool) -> None:
    if stream.failure is not None:
        return
    buffer = pool.take(len(at))
    view = buffer[: len(at)]
    try:
        async with requests:
            await store.get_range(stream.key, at, [view])
    except StoreError as e:
        if not isinstance(e, ObjectNotFoundError) and type(e) is not StoreError:
            raise
        stream.failure = e
        return
    inside = stream.cuts[bisect_left(stream.cuts, at.start + 1) : bisect_left(stream.cuts, at.stop)]
    stream.runs += await in_thread(_checksums, view, at, [at.start, *inside, at.stop])
    pool.give(buffer)


def _checksums(view: memoryview, at: Range, bounds: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(start, stop, crc32c(view[start - at.start : stop - at.start])) for start, stop in pairwise(bounds)]
