"""All shards of one rank up, under one budget.

Law: async; no torch, no S3, no environment. All of them are whole or none is left.
"""

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cloudckpt.engine.budget import AHEAD, Budget, BufferPool, share_of
from cloudckpt.engine.framing import (
    MAX_FRAME_SIZE,
    MIN_PART_SIZE,
    AnyPlan,
    Item,
    ShardPlan,
    planned_frames,
)
from cloudckpt.engine.loop import CLEAN_UP_S, shielded
from cloudckpt.engine.sources import Source
from cloudckpt.engine.tracing import Recorder
from cloudckpt.engine.upload import Means, Uploads, Written
from cloudckpt.engine.write_frames import LEAST_FRAMES, FramesUpload
from cloudckpt.engine.write_plain import PlainUpload
from cloudckpt.errors import StoreError, UsageError
from cloudckpt.extensions.chain import Extensions, Rules
from cloudckpt.extensions.scratch import Scratch
from cloudckpt.store.url import check_url
from cloudckpt.threads import in_thread

log = logging.getLogger(__name__)
_SMALL = 1 << 15
"""What an extension may add to a frame however small (see `FrameCodec.max_stored_size`), per copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteOptions:
    """How shards are written.

    Attributes:
        part_size: bytes of a multipart upload's part, at most, but for a sixteenth, or where an object would have
            more than 10,000. Parts are made even and as few as keep ``concurrency`` requests under way, so that
            they end together, and of 8 MiB at least; a shard of up to twice that is one PutObject. Figures in
            docs/tuning.md.
        frame_size: bytes under one checksum: the least that a verified read fetches.
        max_inflight_nbytes: the byte budget of a save on this rank: memory that it takes beside the state dict.
            Bytes that are sent from the state dict's own memory take none.
        concurrency: requests under way at a time, at most; how many really are, `TrafficOptions` says.
        overwrite: replace a committed checkpoint at the same URL.
        commit_deadline_s: how long a commit in doubt is looked into.
        deadline_s: for a save as a whole, on each rank from its beginning there; what is not up by then is broken
            off. Without it only each request has a deadline (`RetryOptions.retry_deadline_s`).
        extensions: what items go through on their way, first applied first: for all of them, or by pattern of
            their keys, ``{"optim.*": [BytePlane(), ZStandard()], "*": []}`` (see `extensions.chain.Rules`).
        transform_threads: frames that are transformed at a time.
        trace: URL below which each rank leaves a trace of the save, outside the checkpoint (docs/observing.md).
    """

    part_size: int = 64 << 20
    frame_size: int = 4 << 20
    max_inflight_nbytes: int = 256 << 20
    concurrency: int = 32
    overwrite: bool = False
    commit_deadline_s: float = 120
    deadline_s: float = math.inf
    extensions: Extensions = ()
    transform_threads: int = 4
    trace: str | None = None

    def __post_init__(self) -> None:
        if self.trace is not None:
            check_url(self.trace)
        if self.part_size < MIN_PART_SIZE:
            msg = f"part_size={self.part_size} is below the {MIN_PART_SIZE} bytes that S3 asks for"
            raise UsageError(msg)
        if not 1 << 12 <= self.frame_size <= MAX_FRAME_SIZE:
            msg = f"frame_size={self.frame_size} must lie between 4 KiB and 1 GiB"
            raise UsageError(msg)
        if self.max_inflight_nbytes < MIN_PART_SIZE:
            msg = f"max_inflight_nbytes={self.max_inflight_nbytes} cannot hold one part of {MIN_PART_SIZE}"
            raise UsageError(msg)
        if self.commit_deadline_s <= 0 or self.deadline_s <= 0:
            msg = f"commit_deadline_s={self.commit_deadline_s} and deadline_s={self.deadline_s} must be positive"
            raise UsageError(msg)
        if self.concurrency < 1 or self.transform_threads < 1:
            msg = f"concurrency={self.concurrency} and transform_threads={self.transform_threads} must be at least 1"
            raise UsageError(msg)
        if self.has_extensions and self._lookahead < 1:
            msg = (
                f"max_inflight_nbytes={self.max_inflight_nbytes} is too little for extensions: it must hold two "
                f"parts of part_size={self.part_size}, or of 32 MiB if that is less, and {LEAST_FRAMES} frames of "
                f"frame_size={self.frame_size}"
            )
            raise UsageError(msg)

    @property
    def has_extensions(self) -> bool:
        """Whether some items go through extensions."""
        return any(chain.extensions for chain in Rules(self.extensions).chains)

    @property
    def frames_part_size(self) -> int:
        """Bytes of a part of a shard with extensions: it lies in memory until it is sent."""
        return min(self.part_size, 32 << 20)

    @property
    def _lookahead(self) -> int:
        """Runs of frames that may be transformed ahead; none where the budget could be used up by waiting."""
        room = (self.max_inflight_nbytes - 2 * self.frames_part_size) // (self.frame_size + _SMALL)
        return min(2 * self.transform_threads, room // (LEAST_FRAMES // 2) - 1)


class ShardWriter:
    """Writes the shards of one rank under one budget."""

    def __init__(self, store: Uploads, options: WriteOptions, recorder: Recorder | None = None) -> None:
        """Writes to ``store``; ``recorder`` is the save's."""
        self._store = store
        self._scratch = Scratch()
        share = share_of(options.max_inflight_nbytes, options.concurrency)
        if options.has_extensions:  # a shard with them holds some of the budget while it waits behind plain parts
            share = min(share, options.frames_part_size * 16 // 17)
        self._means = Means(
            store=store,
            budget=Budget(options.max_inflight_nbytes, concurrency=options.concurrency + AHEAD),
            pool=BufferPool(options.max_inflight_nbytes),
            part_size=options.part_size,
            staged_part_size=min(options.part_size, share),
            frames_part_size=options.frames_part_size,
            ways=options.concurrency,
            filling=asyncio.Lock(),
            workers=asyncio.Semaphore(options.transform_threads),
            lookahead=max(1, options._lookahead),
            requests=asyncio.Semaphore(options.concurrency),
            recorder=recorder or Recorder(),
        )

    async def write(
        self, plans: Sequence[AnyPlan], items: Sequence[Item], sources: Sequence[Source]
    ) -> list[Written]:
        """Uploads all shards, and returns what the manifest says of them.

        On failure every upload of this call is aborted and every shard it completed is deleted.

        Args:
            plans: from `framing.plan_shards` and `framing.plan_frames`.
            items: that were planned.
            sources: one for each of them.

        Raises:
            EncryptionKeyError: a key is missing; nothing was written.
            StoreError: the first failure; others are in its notes.
        """
        self._means.recorder.expect(sum(_plain_nbytes(plan, items) for plan in plans))
        uploads = await in_thread(lambda: [self._upload(plan, items, sources) for plan in plans])
        try:
            async with asyncio.TaskGroup() as group:  # what takes longest first
                order = sorted(uploads, key=lambda upload: isinstance(upload, PlainUpload))
                tasks = {upload: group.create_task(upload.run()) for upload in order}
        except BaseException:
            await shielded(lambda: self.remove([plan.key for plan in plans]))
            raise
        return [tasks[upload].result() for upload in uploads]

    def _upload(self, plan: AnyPlan, items: Sequence[Item], sources: Sequence[Source]) -> PlainUpload | FramesUpload:
        if isinstance(plan, ShardPlan):
            return PlainUpload(plan, sources, self._means)
        return FramesUpload(
            plan, plan.chain.start_shard(self._scratch), planned_frames(plan, items), sources, self._means
        )

    async def remove(self, keys: Sequence[str]) -> None:
        """Deletes these shards, and aborts uploads of them. What cannot be removed stays, and is told in the log."""
        try:
            async with asyncio.timeout(CLEAN_UP_S):
                await self._store.delete(keys)
        except (StoreError, TimeoutError) as e:
            log.warning("could not remove shards of a failed save, they stay until they are swept: %s", e)
        try:
            async with asyncio.timeout(CLEAN_UP_S):
                for key in keys:  # an upload whose creation's answer was lost is known by its key alone
                    async for upload in self._store.list_uploads(key):
                        await self._store.abort_upload(upload)
        except (StoreError, TimeoutError) as e:
            log.warning("could not look for uploads of a failed save, they stay until they are swept: %s", e)


def _plain_nbytes(plan: AnyPlan, items: Sequence[Item]) -> int:
    return plan.size if isinstance(plan, ShardPlan) else sum(items[i].header.nbytes for i in plan.items)
