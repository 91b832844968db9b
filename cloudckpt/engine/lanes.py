"""One store reached over several event loops: where one thread cannot keep up with the network, more take turns.

Law: only bytes move here; everything is decided on the caller's loop.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from cloudckpt.engine import loop
from cloudckpt.engine.loop import LoopThread
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import Body, Moves, Part, Store, Upload
from cloudckpt.store.url import StoreOptions, open_once

T = TypeVar("T")


class _Lane:
    """Implements `Moves` on another loop, which keeps clients of its own."""

    def __init__(self, thread: LoopThread, url: str, options: StoreOptions) -> None:
        self._thread = thread
        self._url = url
        self._options = options

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `GetRange.get_range`."""
        await self._run(lambda store: store.get_range(key, at, into))

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""
        return await self._run(lambda store: store.put_part(upload, number, offset, body, crc32c=crc32c))

    async def _run(self, request: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
        async def there() -> T:
            async with open_once(self._url, self._options, keeps_client=True) as store:
                return await request(store)

        return await self._thread.run_from_loop(there)


def other_lanes(url: str, options: StoreOptions) -> list[Moves]:
    """The lanes to a store beside the first loop's own; none where its scheme keeps no thread busy."""
    count = options.traffic.lanes if url.startswith("s3://") else 1
    return [_Lane(thread, url, options) for thread in loop.threads(count)[1:count]]
