"""One shard up: stage, checksum, cut, upload.

Law: async; no torch, no S3, no environment. A shard is whole or it is gone.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from awscrt.checksums import combine_crc32c, crc32c

from cloudckpt.engine.budget import Budget, BufferPool
from cloudckpt.engine.framing import HEADER, MIN_PART_SIZE, Segment, ShardPlan, part_size_for, segments
from cloudckpt.engine.loop import shielded
from cloudckpt.errors import StoreError, UsageError
from cloudckpt.manifest import Shard, pack
from cloudckpt.ranges import Range, split
from cloudckpt.store.protocols import Delete, Multipart, Part, Put
from cloudckpt.threads import in_thread

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How shards are written.

    Attributes:
        part_size: bytes of a multipart upload's part; more where an object would have more than 10,000.
            A shard of at most one part is one PutObject. 32 MiB: a request costs about a millisecond of CPU.
        frame_size: bytes under one checksum: the least that a verified read fetches.
        max_inflight_nbytes: the byte budget of a save on this rank.
        concurrency: requests under way at a time, at most.
        overwrite: replace a committed checkpoint at the same URL.
        commit_deadline_s: how long a commit in doubt is looked into.
    """

    part_size: int = 32 << 20
    frame_size: int = 4 << 20
    max_inflight_nbytes: int = 256 << 20
    concurrency: int = 16
    overwrite: bool = False
    commit_deadline_s: float = 120

    def __post_init__(self) -> None:
        if self.part_size < MIN_PART_SIZE:
            msg = f"part_size={self.part_size} is below the {MIN_PART_SIZE} bytes that S3 asks for"
            raise UsageError(msg)
        if not 1 << 12 <= self.frame_size <= 1 << 30:
            msg = f"frame_size={self.frame_size} must lie between 4 KiB and 1 GiB"
            raise UsageError(msg)
        if self.max_inflight_nbytes < self.part_size:
            msg = f"max_inflight_nbytes={self.max_inflight_nbytes} cannot hold one part of {self.part_size}"
            raise UsageError(msg)
        if self.concurrency < 1:
            msg = f"concurrency={self.concurrency} must be at least 1"
            raise UsageError(msg)


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


class Uploads(Put, Multipart, Delete, Protocol):
    """What writing asks of a store."""


@dataclass(slots=True)
class _Checksums:
    """The CRC32C of each segment of a shard, combined into those of frames and of the whole."""

    segments: list[tuple[Segment, int]] = field(default_factory=list)
    parts: list[tuple[int, int, int]] = field(default_factory=list)

    def frames(self, count: int) -> list[int]:
        found = [0] * count
        for segment, crc in sorted(self.segments, key=lambda s: (s[0].frame, s[0].at)):
            if segment.frame != HEADER:
                found[segment.frame] = combine_crc32c(found[segment.frame], crc, len(segment.at))
        return found

    def whole(self) -> int:
        total = 0
        for _, crc, nbytes in sorted(self.parts):
            total = combine_crc32c(total, crc, nbytes)
        return total


class ShardWriter:
    """Writes the shards of one rank under one budget."""

    def __init__(self, store: Uploads, options: WriteOptions) -> None:
        """Writes to ``store``."""
        self._store = store
        self._options = options
        self._budget = Budget(options.max_inflight_nbytes, concurrency=options.concurrency)
        self._pool = BufferPool(options.part_size, limit=options.max_inflight_nbytes)

    async def write(self, plans: Sequence[ShardPlan], sources: Sequence[Source]) -> list[Shard]:
        """Uploads all shards, and returns what the manifest says of them.

        On failure every upload of this call is aborted and every shard it completed is deleted.

        Args:
            plans: from `framing.plan_shards`.
            sources: one for each planned item.

        Raises:
            StoreError: the first failure; others are in its notes.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._write_shard(plan, sources)) for plan in plans]
        except BaseException:
            await shielded(lambda: self._remove([plan.key for plan in plans]))
            raise
        return [task.result() for task in tasks]

    async def _write_shard(self, plan: ShardPlan, sources: Sequence[Source]) -> Shard:
        checksums = _Checksums()
        size = part_size_for(plan.size, self._options.part_size)
        if plan.size <= size:
            await self._put_whole(plan, sources, checksums)
        else:
            await self._put_parts(plan, sources, checksums, size)
        return Shard(
            key=plan.key,
            size=plan.size,
            crc32c=checksums.whole(),
            frame_size=plan.frame_size,
            frame_checksums=pack(checksums.frames(plan.frames[-1])),
        )

    async def _put_whole(self, plan: ShardPlan, sources: Sequence[Source], checksums: _Checksums) -> None:
        granted = await self._budget.take(plan.size)
        try:
            staged = await self._stage(plan, Range(0, plan.size), sources, checksums)
            await self._store.put(plan.key, staged.body, crc32c=staged.crc32c)
            self._pool.give(staged.scratch)
        finally:
            self._budget.give(granted)

    async def _put_parts(self, plan: ShardPlan, sources: Sequence[Source], checksums: _Checksums, size: int) -> None:
        upload = await self._store.create_upload(plan.key)
        try:
            tasks: list[asyncio.Task[Part]] = []

            async def put_part(number: int, at: Range) -> Part:
                staged = await self._stage(plan, at, sources, checksums)
                part = await self._store.put_part(upload, number, at.start, staged.body, crc32c=staged.crc32c)
                self._pool.give(staged.scratch)
                return part

            async with asyncio.TaskGroup() as group:
                for number, at in enumerate(split(Range(0, plan.size), size), start=1):
                    granted = await self._budget.take(len(at))
                    tasks.append(group.create_task(put_part(number, at)))
                    self._budget.give_when_done(tasks[-1], granted)
            parts = [task.result() for task in tasks]
            await self._store.complete_upload(upload, parts, crc32c=checksums.whole())
        except BaseException:
            await shielded(lambda: self._quietly_abort(upload))
            raise

    async def _stage(self, plan: ShardPlan, at: Range, sources: Sequence[Source], checksums: _Checksums) -> "_Staged":
        cut = list(segments(plan, at))
        header = BytesSource(plan.header)
        of = [header if s.item == HEADER else sources[s.item] for s in cut]
        needed = sum(source.scratch_nbytes(s.at) for s, source in zip(cut, of, strict=True))
        scratch = self._pool.take(needed) if needed else memoryview(b"")
        body, crcs = await in_thread(_stage_and_checksum, cut, of, scratch)
        whole = 0
        for segment, crc in zip(cut, crcs, strict=True):
            whole = combine_crc32c(whole, crc, len(segment.at))
        checksums.segments += zip(cut, crcs, strict=True)
        checksums.parts.append((at.start, whole, len(at)))
        return _Staged(body, whole, scratch)

    async def _quietly_abort(self, upload: object) -> None:
        try:
            await self._store.abort_upload(upload)  # type: ignore[arg-type]
        except StoreError as e:
            log.warning("could not abort a multipart upload, its parts stay until they are swept: %s", e)

    async def _remove(self, keys: Sequence[str]) -> None:
        try:
            await self._store.delete(keys)
        except StoreError as e:
            log.warning("could not remove shards of a failed save, they stay until they are swept: %s", e)
        for key in keys:  # an upload whose creation's answer was lost is known by its key alone
            try:
                async for upload in self._store.list_uploads(key):
                    await self._store.abort_upload(upload)
            except StoreError as e:
                log.warning("could not look for uploads of a failed save, they stay until they are swept: %s", e)


@dataclass(frozen=True, slots=True)
class _Staged:
    body: list[memoryview]
    crc32c: int
    scratch: memoryview


def _stage_and_checksum(
    cut: Sequence[Segment], of: Sequence[Source], scratch: memoryview
) -> tuple[list[memoryview], list[int]]:
    body, crcs, used = [], [], 0
    for segment, source in zip(cut, of, strict=True):
        nbytes = source.scratch_nbytes(segment.at)
        view = source.stage(segment.at, scratch[used : used + nbytes])
        used += nbytes
        body.append(view)
        crcs.append(crc32c(view))
    return body, crcs
