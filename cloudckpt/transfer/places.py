"""From one place to another: both opened, and neither left with half of anything.

Law: async, but for what is refused before anything is asked.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from cloudckpt.engine.lanes import other_lanes
from cloudckpt.engine.loop import CLEAN_UP_S, shielded
from cloudckpt.errors import ObjectNotFoundError, StoreError, UsageError
from cloudckpt.store.protocols import Delete, Get, Store
from cloudckpt.store.url import StoreOptions, open_store

log = logging.getLogger(__name__)
_CONCURRENCY = 16


@asynccontextmanager
async def open_both(
    url: str, store: StoreOptions, to_url: str, to_store: StoreOptions
) -> AsyncIterator[tuple[Store, Store]]:
    """The stores rooted at two URLs."""
    async with AsyncExitStack() as stack:
        opened = []
        for where, options in ((url, store), (to_url, to_store)):
            others = await stack.enter_async_context(other_lanes(where, options))
            opening = open_store(where, options, keeps_client=True, others=others)
            opened.append(await stack.enter_async_context(opening))
        yield opened[0], opened[1]


def refuse_inside(source: str, target: str) -> None:
    """Raises where the target is the source or lies in it, or the other way round.

    Raises:
        UsageError: it does.
    """
    if f"{target}/".startswith(f"{source}/") or f"{source}/".startswith(f"{target}/"):
        msg = f"{target} and {source} lie in one another, and a checkpoint's place is its own; give another"
        raise UsageError(msg)


async def etags(store: Get, keys: Iterable[str]) -> dict[str, str | None]:
    """The ETag of each object; None where there is none."""
    slots = asyncio.Semaphore(_CONCURRENCY)

    async def look(key: str) -> str | None:
        async with slots:
            try:
                return (await store.head(key)).etag
            except ObjectNotFoundError:
                return None

    async with asyncio.TaskGroup() as group:
        tasks = {key: group.create_task(look(key)) for key in keys}
    return {key: task.result() for key, task in tasks.items()}


@asynccontextmanager
async def removing_on_failure(store: Delete, keys: Sequence[str]) -> AsyncIterator[None]:
    """Deletes these objects if what runs in this context fails: they are half of something."""
    try:
        yield
    except BaseException:
        await shielded(lambda: _quietly_delete(store, keys))
        raise


async def _quietly_delete(store: Delete, keys: Sequence[str]) -> None:
    try:
        async with asyncio.timeout(CLEAN_UP_S):
            await store.delete(keys)
    except (StoreError, TimeoutError) as e:
        log.warning("could not remove what had been written: %s", e)
