"""One store reached over several event loops: where one thread cannot keep up with the network, more take turns.

Law: only bytes move here; everything is decided on the caller's loop.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

from cloudckpt.engine import loop
from cloudckpt.engine.loop import LoopThread, shielded
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import Body, Moves, Part, Store, Upload
from cloudckpt.store.url import StoreOptions, open_once

T = TypeVar("T")


class _Lane:
    """Implements `Moves` on another loop, where the store is opened at first use: all requests go to the same."""

    def __init__(self, thread: LoopThread, url: str, options: StoreOptions) -> None:
        self._thread = thread
        self._url = url
        self._options = options
        self._opening = asyncio.Lock()
        self._store: Store | None = None
        self._exit = AsyncExitStack()

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `GetRange.get_range`."""
        await self._run(lambda store: store.get_range(key, at, into))

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""
        return await self._run(lambda store: store.put_part(upload, number, offset, body, crc32c=crc32c))

    async def close(self) -> None:
        """Closes the store, if it was opened."""
        if self._store is not None:
            await self._thread.run_from_loop(self._exit.aclose)

    async def _run(self, request: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
        async def there() -> T:
            return await request(await self._opened())

        return await self._thread.run_from_loop(there)

    async def _opened(self) -> Store:
        async with self._opening:
            if self._store is None:
                opening = open_once(self._url, self._options, keeps_client=True)
                self._store = await self._exit.enter_async_context(opening)
            return self._store


@asynccontextmanager
async def other_lanes(url: str, options: StoreOptions) -> AsyncIterator[list[Moves]]:
    """The lanes to a store beside the first loop's own; none where its scheme keeps no thread busy."""
    count = options.traffic.lanes if url.startswith("s3://") and options.filesystem is None else 1
    lanes = [_Lane(thread, url, options) for thread in loop.threads(count)[1:count]]
    try:
        yield list(lanes)
    finally:
        for lane in lanes:
            await shielded(lane.close)
