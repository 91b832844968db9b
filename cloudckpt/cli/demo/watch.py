"""What a save has brought to the store so far.

Law: looks, and changes nothing.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from cloudckpt.engine import loop
from cloudckpt.errors import PermissionDeniedError
from cloudckpt.layout import MANIFEST, SHARDS
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, open_store

_EVERY_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """The objects of one checkpoint, at one moment.

    Attributes:
        shards: complete shard objects.
        nbytes: of them.
        is_committed: the manifest is there.
    """

    shards: int
    nbytes: int
    is_committed: bool

    def is_mid_save(self, ranks: int) -> bool:
        """Some ranks' shards are there, some are not, and nothing is committed."""
        return 0 < self.shards < ranks and not self.is_committed


def look(url: str, store: StoreOptions) -> Sighting:
    """Lists the checkpoint at ``url``."""

    async def once() -> Sighting:
        async with open_store(url, store) as opened:
            return await _list(opened)

    return loop.run(once)


def wait_for_shard(url: str, store: StoreOptions, *, is_running: Callable[[], bool]) -> None:
    """Lists the checkpoint at ``url`` again and again, until it holds a shard or nobody is running to write one."""

    async def watch() -> None:
        async with open_store(url, store) as opened:
            while not (await _list(opened)).shards and is_running():  # noqa: ASYNC110 - another process's event
                await asyncio.sleep(_EVERY_S)

    loop.run(watch)


def is_used(root: str, store: StoreOptions) -> bool:
    """Whether any object lies under ``root``."""

    async def find() -> bool:
        async with open_store(root, store) as opened:
            return bool([info async for info in opened.list_objects()])

    return loop.run(find)


def unfinished_uploads(url: str, store: StoreOptions) -> int | None:
    """How many multipart uploads are open under ``url``; None where we may not know."""

    async def count() -> int | None:
        async with open_store(url, store) as opened:
            try:
                return len([upload async for upload in opened.list_uploads(SHARDS)])
            except PermissionDeniedError:
                return None

    return loop.run(count)


async def _list(store: Store) -> Sighting:
    found = [info async for info in store.list_objects()]
    shards = [info for info in found if info.key.startswith(SHARDS)]
    return Sighting(
        shards=len(shards),
        nbytes=sum(info.size for info in shards),
        is_committed=any(info.key == MANIFEST for info in found),
    )
