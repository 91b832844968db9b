"""Objects made of segments: parts that the server copies, and parts that are read, checked and sent.

Law: an object appears whole or not at all. Async; knows no format.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Protocol, cast

from awscrt.checksums import combine_crc32c, crc32c

from cloudckpt.engine.budget import AHEAD, Budget, BufferPool
from cloudckpt.engine.upload import Uploads, begin_upload
from cloudckpt.errors import IntegrityError, NotImplementedByStoreError, PermissionDeniedError, leaves
from cloudckpt.store.protocols import CopiesParts, Part, Store, Upload
from cloudckpt.threads import in_thread
from cloudckpt.transfer.parts import Copied, PartPlan, Sent, plan_parts
from cloudckpt.transfer.segments import Segment, nbytes_of

log = logging.getLogger(__name__)
_MAX_INFLIGHT_NBYTES = 64 << 20
_CONCURRENCY = 16
_NOT_COPIED = (NotImplementedByStoreError, PermissionDeniedError)

Advance = Callable[[int], None]
"""Is told of bytes that are where they belong, as they come to be; of fewer than none where they are sent again."""


class Reads(Protocol):
    """Where segments that are no bytes at hand are read from."""

    async def read(self, wanted: Sequence[tuple[Segment, memoryview]]) -> None:
        """Reads each into its memory, which is as long.

        Raises:
            IntegrityError, StoreError: the bytes could not be had.
        """
        ...


@dataclass(slots=True)
class Moved:
    """What was done, counting up.

    Attributes:
        sent_nbytes: bytes that passed through here.
        copied_nbytes: bytes that the server copied by itself.
        requests: parts and objects that were written.
    """

    sent_nbytes: int = 0
    copied_nbytes: int = 0
    requests: int = 0


class Assembler:
    """Makes objects in one store of what lies in another, under one budget.

    Attributes:
        moved: by all that it made.
    """

    def __init__(
        self,
        target: Store,
        source: Store,
        reads: Reads,
        *,
        server_side: bool = True,
        advance: Advance = lambda _: None,
    ) -> None:
        """Prepares; nothing is asked yet.

        Args:
            target: objects are made here.
            source: that the keys of segments are of.
            reads: reads them.
            server_side: let the server copy what it can.
            advance: see `Advance`.
        """
        self._target = target
        self._source = source
        self._reads = reads
        self._advance = advance
        self._copies = server_side and hasattr(target, "copies_from") and bool(target.copies_from(source))
        self._budget = Budget(_MAX_INFLIGHT_NBYTES, concurrency=_CONCURRENCY + AHEAD)
        self._pool = BufferPool(_MAX_INFLIGHT_NBYTES)
        self.moved = Moved()

    async def _put(self, key: str, segments: Sequence[Segment], expected: int | None) -> None:
        nbytes = nbytes_of(segments)
        granted = await self._budget.take(nbytes)
        try:
            data = await self._read(segments, nbytes)
            crc = await in_thread(crc32c, data)
            self._refuse_other(key, crc, expected)
            await self._target.put(key, [data], crc32c=crc)
            self._pool.give(data)
        finally:
            self._budget.give(granted)
        self._sent(nbytes)

    async def make(
        self,
        key: str,
        segments: Sequence[Segment],
        *,
        expected: int | None = None,
        before_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Makes an object; on failure it is as it was before.

        Args:
            key: of the object.
            segments: its bytes, in order.
            expected: its CRC32C, if it is known.
            before_end: called when all is there but the object itself; raising keeps it from appearing.

        Raises:
            IntegrityError: what was read is not what is expected.
            StoreError: a store refused.
        """
        nbytes = nbytes_of(segments)
        parts = plan_parts(segments, nbytes, copies=self._copies)
        if not parts or (len(parts) == 1 and isinstance(parts[0], Sent)):
            if before_end is not None:
                await before_end()
            await self._put(key, segments, expected)
            return
        before = replace(self.moved)
        try:
            await self._upload(key, parts, expected, before_end)
        except BaseExceptionGroup as group:
            refused = next((e for e in leaves(group) if isinstance(e, _NOT_COPIED)), None)
            if refused is None or not any(isinstance(part, Copied) for part in parts):
                raise
            log.info("the server does not copy parts (%s); their bytes are read and sent", refused)
            self._copies = False
            done = self.moved.sent_nbytes - before.sent_nbytes + self.moved.copied_nbytes - before.copied_nbytes
            self.moved = before
            self._advance(-done)
            await self._upload(key, plan_parts(segments, nbytes, copies=False), expected, before_end)

    async def _upload(
        self,
        key: str,
        plans: Sequence[PartPlan],
        expected: int | None,
        before_end: Callable[[], Awaitable[None]] | None,
    ) -> None:
        async with AsyncExitStack() as clean_up:
            upload = await begin_upload(cast("Uploads", self._target), key, clean_up)
            tasks: list[asyncio.Task[Part]] = []
            offset = 0
            async with asyncio.TaskGroup() as group:
                for number, plan in enumerate(plans, start=1):
                    granted = await self._budget.take(plan.nbytes if isinstance(plan, Sent) else 0)
                    task = group.create_task(self._part(upload, number, offset, plan))
                    self._budget.give_when_done(task, granted)
                    tasks.append(task)
                    offset += plan.nbytes
            parts = [task.result() for task in tasks]
            found = _whole([(part.crc32c, plan.nbytes) for part, plan in zip(parts, plans, strict=True)])
            self._refuse_other(key, found, expected)
            if before_end is not None:
                await before_end()
            await self._target.complete_upload(upload, parts, crc32c=expected if found is None else found)

    def _refuse_other(self, key: str, found: int | None, expected: int | None) -> None:
        if None not in (found, expected) and found != expected:
            msg = f"{self._target.url}/{key} was not made: its bytes have CRC32C {found:08x}, not {expected:08x}"
            raise IntegrityError(msg)

    async def _part(self, upload: Upload, number: int, offset: int, plan: PartPlan) -> Part:
        if isinstance(plan, Copied):
            copying = cast("CopiesParts", self._target)
            part = await copying.put_part_copy(upload, number, self._source, plan.key, plan.at, crc32c=plan.crc32c)
            self.moved.copied_nbytes += plan.nbytes
            self.moved.requests += 1
            self._advance(plan.nbytes)
            return part
        data = await self._read(plan.segments, plan.nbytes)
        crc = await in_thread(crc32c, data)
        part = await self._target.put_part(upload, number, offset, [data], crc32c=crc)
        self._pool.give(data)
        self._sent(plan.nbytes)
        return part

    async def _read(self, segments: Sequence[Segment], nbytes: int) -> memoryview:
        memory = self._pool.take(nbytes)[:nbytes]
        wanted, position = [], 0
        for segment in segments:
            view = memory[position : position + len(segment.at)]
            position += len(segment.at)
            if isinstance(segment.source, bytes):
                view[:] = segment.source[segment.at.start : segment.at.stop]
            else:
                wanted.append((segment, view))
        if wanted:
            await self._reads.read(wanted)
        return memory

    def _sent(self, nbytes: int) -> None:
        self.moved.sent_nbytes += nbytes
        self.moved.requests += 1
        self._advance(nbytes)


def _whole(parts: Sequence[tuple[int | None, int]]) -> int | None:
    """The CRC32C of all parts together, if each one's is known."""
    found = 0
    for crc, nbytes in parts:
        if crc is None:
            return None
        found = combine_crc32c(found, crc, nbytes)
    return found
