"""One shard with extensions up: stage, transform, checksum, cut, upload.

Frames are transformed in threads, some ahead of the upload. They lie in the shard in their order; how long each
becomes shows only then, so parts are cut from what is there.

Law: async; a shard is whole or it is gone. Who waits for the budget holds less than a part and some frames.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from awscrt.checksums import combine_crc32c, crc32c

from cloudckpt.engine.framing import FramesPlan, PlannedFrame
from cloudckpt.engine.sources import Source
from cloudckpt.engine.tracing import CHECKSUM, TRANSFORM, UPLOAD
from cloudckpt.engine.upload import Means, Written, begin_upload
from cloudckpt.extensions.chain import ShardChain
from cloudckpt.manifest import Shard, pack
from cloudckpt.store.protocols import Part, Upload
from cloudckpt.threads import in_thread

_COPIES = 2
"""How often a chain may hold a frame while it works, beside what it makes of it: split, and not yet joined."""

LEAST_FRAMES = 12
"""Frames of memory that one being transformed and one waiting take at most, with what is left of a cut part."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame as it is stored: its sections, in order, the CRC32C of them all, and its bytes before."""

    sections: Sequence[memoryview]
    crc32c: int
    plain_nbytes: int

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.sections))


@dataclass(slots=True)
class _Part:
    """A part being filled: a buffer that is used again, or what many frames held would be scattered over memory.

    Attributes:
        plain_nbytes: of the frames that begin in it.
    """

    buffer: memoryview
    nbytes: int = 0
    plain_nbytes: int = 0

    def fill(self, data: memoryview) -> memoryview:
        """Takes what there is room for, and returns the rest."""
        room = min(len(data), len(self.buffer) - self.nbytes)
        self.buffer[self.nbytes : self.nbytes + room] = data[:room]
        self.nbytes += room
        return data[room:]

    @property
    def is_full(self) -> bool:
        return self.nbytes == len(self.buffer)

    @property
    def data(self) -> memoryview:
        return self.buffer[: self.nbytes]


class FramesUpload:
    """Writes one shard of transformed frames."""

    def __init__(
        self,
        plan: FramesPlan,
        chain: ShardChain,
        frames: Iterator[PlannedFrame],
        sources: Sequence[Source],
        means: Means,
    ) -> None:
        """Takes the chain at work on this shard, all its frames, and a source for each planned item of the rank."""
        self._plan = plan
        self._chain = chain
        self._frames = frames
        self._sources = sources
        self._means = means
        self._held = 0
        self._open = _Part(memoryview(b""))
        self._sizes: list[int] = []
        self._checksums: list[int] = []
        self._upload: Upload | None = None
        self._parts: list[asyncio.Task[Part]] = []

    async def run(self) -> Written:
        """Uploads the shard; on failure its upload is aborted."""
        try:
            async with AsyncExitStack() as clean_up:
                async with asyncio.TaskGroup() as group, self._means.filling:
                    await self._fill(group, clean_up)
                etag = await self._complete()
        finally:
            self._release(self._held)
        return self._written(etag)

    async def _fill(self, group: asyncio.TaskGroup, clean_up: AsyncExitStack) -> None:
        """Transforms all frames, and sends every full part on its way, and the last."""
        self._open = self._new_part()
        pending: deque[asyncio.Task[list[_Frame]]] = deque()
        for job in _jobs(self._frames, self._plan.frame_size):
            if len(pending) >= self._means.lookahead:
                await self._absorb(pending.popleft(), group, clean_up)
            cost = sum(map(self._cost, job))
            await self._means.budget.hold(cost)
            self._held += cost
            pending.append(group.create_task(self._work(job, cost)))
        while pending:
            await self._absorb(pending.popleft(), group, clean_up)
        if self._upload is not None and self._open.nbytes:
            await self._send(group, clean_up)

    def _cost(self, frame: PlannedFrame) -> int:
        nbytes = len(frame.at)
        scratch = self._sources[frame.item].scratch_nbytes(frame.at)
        return scratch + _COPIES * nbytes + self._chain.max_stored_size(nbytes)

    async def _work(self, job: Sequence[PlannedFrame], cost: int) -> list[_Frame]:
        async with self._means.workers:
            nbytes = sum(len(frame.at) for frame in job)
            frames: list[_Frame] = await in_thread(
                self._means.recorder.timed, TRANSFORM, nbytes, self._plan.key, self._transform, job
            )
        self._release(cost - sum(frame.nbytes for frame in frames))
        return frames

    def _transform(self, job: Sequence[PlannedFrame]) -> list[_Frame]:
        frames = []
        for frame in job:
            source = self._sources[frame.item]
            scratch = np.empty(source.scratch_nbytes(frame.at), np.uint8).data
            stored = self._chain.transform(source.stage(frame.at, scratch), frame.context)
            checksum = 0
            for section in stored:
                checksum = crc32c(section, checksum)
            frames.append(_Frame(stored, checksum, len(frame.at)))
        return frames

    async def _absorb(
        self, job: "asyncio.Task[list[_Frame]]", group: asyncio.TaskGroup, clean_up: AsyncExitStack
    ) -> None:
        await asyncio.wait([job])  # if it failed, the group cancels us here, and tells of it once
        for frame in job.result():
            self._sizes.append(frame.nbytes)
            self._checksums.append(frame.crc32c)
            self._open.plain_nbytes += frame.plain_nbytes
            for section in frame.sections:
                rest = self._open.fill(section)
                while self._open.is_full:
                    await self._send(group, clean_up)
                    rest = self._open.fill(rest)

    async def _send(self, group: asyncio.TaskGroup, clean_up: AsyncExitStack) -> None:
        if self._upload is None:
            with self._means.recorder.step(UPLOAD, 0, self._plan.key):
                self._upload = await begin_upload(self._means.store, self._plan.key, clean_up)
        part, self._open = self._open, self._new_part()
        self._parts.append(group.create_task(self._put_part(self._upload, len(self._parts), part)))

    async def _put_part(self, upload: Upload, index: int, part: _Part) -> Part:
        means, offset = self._means, index * self._means.frames_part_size
        async with means.requests:
            timed = means.recorder.timed
            checksum = await in_thread(timed, CHECKSUM, part.nbytes, upload.key, crc32c, part.data)
            with means.recorder.step(UPLOAD, part.nbytes, upload.key):
                done = await means.store.put_part(upload, index + 1, offset, [part.data], crc32c=checksum)
        means.recorder.advance(part.plain_nbytes)
        means.pool.give(part.buffer)
        self._release(part.nbytes)
        return done

    async def _complete(self) -> str:
        store, recorder, key, whole = self._means.store, self._means.recorder, self._plan.key, self._crc32c()
        if self._upload is None:
            with recorder.step(UPLOAD, self._open.nbytes, key):
                etag = await store.put(key, [self._open.data], crc32c=whole)
            recorder.advance(self._open.plain_nbytes)
        else:
            parts = [part.result() for part in self._parts]
            with recorder.step(UPLOAD, 0, key):
                etag = await store.complete_upload(self._upload, parts, crc32c=whole)
        self._means.pool.give(self._open.buffer)
        return etag

    def _new_part(self) -> _Part:
        size = self._means.frames_part_size
        return _Part(self._means.pool.take(size)[:size])

    def _release(self, nbytes: int) -> None:
        self._held -= nbytes
        self._means.budget.release(nbytes)

    def _crc32c(self) -> int:
        return _combined(zip(self._checksums, self._sizes, strict=True))

    def _written(self, etag: str) -> Written:
        starts = [0, *accumulate(self._sizes)]
        shard = Shard(
            key=self._plan.key,
            size=starts[-1],
            crc32c=self._crc32c(),
            frame_size=self._plan.frame_size,
            frame_checksums=pack(self._checksums),
            extensions=self._chain.descriptors,
            extension_params=self._chain.params,
            frame_sizes=pack(self._sizes),
        )
        return Written(shard, tuple(starts[frame] for frame in self._plan.frames), etag)


def _combined(runs: Iterable[tuple[int, int]]) -> int:
    total = 0
    for crc, nbytes in runs:
        total = combine_crc32c(total, crc, nbytes)
    return total


def _jobs(frames: Iterable[PlannedFrame], nbytes: int) -> Iterator[list[PlannedFrame]]:
    """Runs of frames of ``nbytes`` together, or of one: small ones are not worth a thread each."""
    job: list[PlannedFrame] = []
    filled = 0
    for frame in frames:
        if job and filled + len(frame.at) > nbytes:
            yield job
            job, filled = [], 0
        job.append(frame)
        filled += len(frame.at)
    if job:
        yield job
