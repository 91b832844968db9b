"""What the shards of one rank share on their way up, and the end of an upload that failed.

Law: an upload is completed or it is aborted.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from cloudckpt.engine.budget import Budget, BufferPool
from cloudckpt.engine.loop import CLEAN_UP_S, shielded
from cloudckpt.engine.tracing import Recorder
from cloudckpt.errors import StoreError
from cloudckpt.manifest import Shard
from cloudckpt.store.protocols import Delete, Multipart, Put, Upload

log = logging.getLogger(__name__)


class Uploads(Put, Multipart, Delete, Protocol):
    """What writing asks of a store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What the shards of one rank share.

    Attributes:
        pool: of buffers for staging, and for parts that are gathered.
        part_size: bytes of a part, at most, but for objects that would have too many.
        staged_part_size: the same, for parts that take memory.
        frames_part_size: bytes of a part of a shard with extensions.
        ways: requests that the parts of an object are divided among.
        filling: held by the shard with extensions that has a part which is not full; one at a time, or each could
            hold a part's bytes and none could go on.
        workers: frames that are transformed at a time.
        lookahead: runs of frames that are transformed before they are waited for.
        requests: that are under way at a time; the budget lets some more be staged meanwhile.
        recorder: of the save.
    """

    store: Uploads
    budget: Budget
    pool: BufferPool
    part_size: int
    staged_part_size: int
    frames_part_size: int
    ways: int
    filling: asyncio.Lock
    workers: asyncio.Semaphore
    lookahead: int
    requests: asyncio.Semaphore
    recorder: Recorder


@dataclass(frozen=True, slots=True)
class Written:
    """A shard that is up.

    Attributes:
        shard: what the manifest says of it.
        starts: the first byte of each of its items in the object, and at last the object's size.
        etag: of the object, as the store told when it was up.
    """

    shard: Shard
    starts: tuple[int, ...]
    etag: str


@asynccontextmanager
async def aborting(store: Uploads, upload: Upload) -> AsyncIterator[None]:
    """Aborts the upload if what runs in this context fails."""
    try:
        yield
    except BaseException:
        await shielded(lambda: _quietly_abort(store, upload))
        raise


async def begin_upload(store: Uploads, key: str, clean_up: AsyncExitStack) -> Upload:
    """Begins an upload that is aborted if what runs in ``clean_up`` fails, or if this is cancelled."""
    begun: list[Upload] = []

    async def begin() -> None:
        begun.append(await store.create_upload(key))
        await clean_up.enter_async_context(aborting(store, begun[0]))

    await shielded(begin)  # broken off, it could be carried out after the clean-up
    return begun[0]


async def _quietly_abort(store: Uploads, upload: Upload) -> None:
    try:
        async with asyncio.timeout(CLEAN_UP_S):
            await store.abort_upload(upload)
    except (StoreError, TimeoutError) as e:
        log.warning("could not abort a multipart upload, its parts stay until they are swept: %s", e)
