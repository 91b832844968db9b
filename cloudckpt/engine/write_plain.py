"""One plain shard up: stage, checksum, cut, upload. No byte is copied that lies in host memory.

Law: async; a shard is whole or it is gone.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from awscrt.checksums import combine_crc32c, crc32c

from cloudckpt.engine.framing import HEADER, LEAST_PART_SIZE, Segment, ShardPlan, part_size_for, segments
from cloudckpt.engine.sources import BytesSource, Source
from cloudckpt.engine.tracing import STAGE, UPLOAD
from cloudckpt.engine.upload import Means, Written, begin_upload
from cloudckpt.manifest import Shard, pack
from cloudckpt.ranges import Range, split
from cloudckpt.store.protocols import Part, Upload
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
        plan, means = self._plan, self._means
        is_staged = any(self._sources[i].scratch_nbytes(Range(0, 1)) for i in plan.items)
        most = means.staged_part_size if is_staged else means.part_size
        size = part_size_for(plan.size, most=most, ways=means.ways)
        is_small = plan.size <= max(size, min(most, 2 * LEAST_PART_SIZE))
        etag = await self._put_whole() if is_small else await self._put_parts(size)
        shard = Shard(
            key=plan.key,
            size=plan.size,
            crc32c=self._checksums.whole(),
            frame_size=plan.frame_size,
            frame_checksums=pack(self._checksums.frames(plan.frames[-1])),
        )
        return Written(shard, plan.starts, etag)

    async def _put_whole(self) -> str:
        means, plan = self._means, self._plan
        cut = self._cut(Range(0, plan.size))
        granted = await means.budget.take(cut.scratch_nbytes)
        try:
            staged = await self._stage(cut)
            async with means.requests:
                with means.recorder.step(UPLOAD, plan.size, plan.key):
                    etag = await means.store.put(plan.key, staged.body, crc32c=staged.crc32c)
            means.recorder.advance(plan.size)
            means.pool.give(staged.scratch)
            return etag
        finally:
            means.budget.give(granted)

    async def _put_parts(self, size: int) -> str:
        means, key = self._means, self._plan.key
        async with AsyncExitStack() as clean_up:

            async def begin() -> Upload:
                with means.recorder.step(UPLOAD, 0, key):
                    return await begin_upload(means.store, key, clean_up)

            async def put_part(number: int, cut: _Cut) -> Part:
                staged = await self._stage(cut)
                upload = await creating  # the first parts are staged meanwhile
                async with means.requests:
                    with means.recorder.step(UPLOAD, len(cut.at), key):
                        part = await means.store.put_part(
                            upload, number, cut.at.start, staged.body, crc32c=staged.crc32c
                        )
                means.recorder.advance(len(cut.at))
                means.pool.give(staged.scratch)
                return part

            tasks: list[asyncio.Task[Part]] = []
            async with asyncio.TaskGroup() as group:
                creating = group.create_task(begin())
                for number, at in enumerate(split(Range(0, self._plan.size), size), start=1):
                    cut = self._cut(at)
                    granted = await means.budget.take(cut.scratch_nbytes)
                    tasks.append(group.create_task(put_part(number, cut)))
                    means.budget.give_when_done(tasks[-1], granted)
            parts = [task.result() for task in tasks]
            with means.recorder.step(UPLOAD, 0, key):
                return await means.store.complete_upload(creating.result(), parts, crc32c=self._checksums.whole())

    def _cut(self, at: Range) -> "_Cut":
        cut = list(segments(self._plan, at))
        header = BytesSource(self._plan.header)
        of = [header if s.item == HEADER else self._sources[s.item] for s in cut]
        return _Cut(at, cut, of, sum(source.scratch_nbytes(s.at) for s, source in zip(cut, of, strict=True)))

    async def _stage(self, cut: "_Cut") -> "_Staged":
        scratch, timed = self._means.pool.take(cut.scratch_nbytes), self._means.recorder.timed
        body, crcs = await in_thread(
            timed, STAGE, len(cut.at), self._plan.key, _stage_and_checksum, cut.segments, cut.sources, scratch
        )
        whole = 0
        for segment, crc in zip(cut.segments, crcs, strict=True):
            whole = combine_crc32c(whole, crc, len(segment.at))
        self._checksums.segments += zip(cut.segments, crcs, strict=True)
        self._checksums.parts.append((cut.at.start, whole, len(cut.at)))
        return _Staged(body, whole, scratch)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Some of the object, not staged yet: its segments, where each comes from, and the memory that staging takes."""

    at: Range
    segments: Sequence[Segment]
    sources: Sequence[Source]
    scratch_nbytes: int


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
