"""One plain shard up: stage, checksum, cut, upload. No byte is copied that lies in host memory.

Law: async; a shard is whole or it is gone.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from awscrt.checksums import combine_crc32c, crc32c

from cloudckpt.engine.framing import HEADER, Segment, ShardPlan, part_size_for, segments
from cloudckpt.engine.sources import BytesSource, Source
from cloudckpt.engine.upload import Means, Written, aborting
from cloudckpt.manifest import Shard, pack
from cloudckpt.ranges import Range, split
from cloudckpt.store.protocols import Part
from cloudckpt.threads import in_thread


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


class PlainUpload:
    """Writes one plain shard."""

    def __init__(self, plan: ShardPlan, sources: Sequence[Source], means: Means) -> None:
        """Takes one source for each planned item of the rank."""
        self._plan = plan
        self._sources = sources
        self._means = means
        self._checksums = _Checksums()

    async def run(self) -> Written:
        """Uploads the shard; on failure its upload is aborted."""
        plan = self._plan
        size = part_size_for(plan.size, self._means.part_size)
        if plan.size <= size:
            await self._put_whole()
        else:
            await self._put_parts(size)
        shard = Shard(
            key=plan.key,
            size=plan.size,
            crc32c=self._checksums.whole(),
            frame_size=plan.frame_size,
            frame_checksums=pack(self._checksums.frames(plan.frames[-1])),
        )
        return Written(shard, plan.starts)

    async def _put_whole(self) -> None:
        means, plan = self._means, self._plan
        granted = await means.budget.take(plan.size)
        try:
            staged = await self._stage(Range(0, plan.size))
            await means.store.put(plan.key, staged.body, crc32c=staged.crc32c)
            means.pool.give(staged.scratch)
        finally:
            means.budget.give(granted)

    async def _put_parts(self, size: int) -> None:
        means = self._means
        upload = await means.store.create_upload(self._plan.key)
        async with aborting(means.store, upload):
            tasks: list[asyncio.Task[Part]] = []

            async def put_part(number: int, at: Range) -> Part:
                staged = await self._stage(at)
                part = await means.store.put_part(upload, number, at.start, staged.body, crc32c=staged.crc32c)
                means.pool.give(staged.scratch)
                return part

            async with asyncio.TaskGroup() as group:
                for number, at in enumerate(split(Range(0, self._plan.size), size), start=1):
                    granted = await means.budget.take(len(at))
                    tasks.append(group.create_task(put_part(number, at)))
                    means.budget.give_when_done(tasks[-1], granted)
            parts = [task.result() for task in tasks]
            await means.store.complete_upload(upload, parts, crc32c=self._checksums.whole())

    async def _stage(self, at: Range) -> "_Staged":
        cut = list(segments(self._plan, at))
        header = BytesSource(self._plan.header)
        of = [header if s.item == HEADER else self._sources[s.item] for s in cut]
        needed = sum(source.scratch_nbytes(s.at) for s, source in zip(cut, of, strict=True))
        scratch = self._means.pool.take(needed) if needed else memoryview(b"")
        body, crcs = await in_thread(_stage_and_checksum, cut, of, scratch)
        whole = 0
        for segment, crc in zip(cut, crcs, strict=True):
            whole = combine_crc32c(whole, crc, len(segment.at))
        self._checksums.segments += zip(cut, crcs, strict=True)
        self._checksums.parts.append((at.start, whole, len(at)))
        return _Staged(body, whole, scratch)


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
