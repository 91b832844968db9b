"""Bytes in flight, and the buffers they lie in.

Law: never wait for the budget while holding some of it. Used from one event loop only.
"""

import asyncio
from collections import deque

import numpy as np

AHEAD = 4
"""Takers beside those whose requests are under way: what they stage, or place, keeps no connection idle."""

_LEAST_SHARE = 16 << 20
"""Bytes of a request that are worth its round trip (docs/tuning.md)."""

_LEAST_KEPT = 64 << 10
"""Bytes of a buffer that is worth keeping: the allocator keeps small ones by itself."""


def share_of(limit: int, concurrency: int) -> int:
    """Bytes of a request that takes memory, so that the budget has room for all that are under way, or for most."""
    return min(limit, max(_LEAST_SHARE, limit // concurrency))


class Budget:
    """A number of bytes that tasks take from and give back, first come, first served."""

    def __init__(self, limit: int, *, concurrency: int) -> None:
        """Starts with everything free.

        Args:
            limit: bytes in flight at any time.
            concurrency: takers at any time: each takes at least ``limit // concurrency``.
        """
        self._limit = limit
        self._least = max(1, limit // concurrency)
        self._free = limit
        self._slots = concurrency
        self._waiting: deque[tuple[int, int, asyncio.Future[None]]] = deque()

    @property
    def is_whole(self) -> bool:
        """Whether everything was given back."""
        return self._free == self._limit

    async def take(self, nbytes: int) -> int:
        """Waits for ``nbytes`` and returns how many were taken: what must be given back.

        A request of more than the whole limit gets the whole limit, and runs alone.
        """
        granted = min(max(nbytes, self._least), self._limit)
        await self._acquire(granted, slots=1)
        return granted

    async def hold(self, nbytes: int) -> None:
        """Waits for just ``nbytes``, at most the limit, and is no taker: `release` them in any portions."""
        await self._acquire(nbytes, slots=0)

    def give_when_done(self, task: "asyncio.Task[object]", granted: int) -> None:
        """Gives back what `take` returned when ``task`` is done, also if it is cancelled before its first step."""
        task.add_done_callback(lambda _: self.give(granted))

    def give(self, granted: int) -> None:
        """Gives back what `take` returned."""
        self._slots += 1
        self.release(granted)

    def release(self, nbytes: int) -> None:
        """Gives back bytes that were held."""
        self._free += nbytes
        self._serve()

    async def _acquire(self, nbytes: int, *, slots: int) -> None:
        if not self._waiting and self._free >= nbytes and self._slots >= slots:
            self._free -= nbytes
            self._slots -= slots
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, slots, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # granted and cancelled at once
                self._slots += slots
                self._free += nbytes
            self._serve()  # those behind it may go
            raise

    def _serve(self) -> None:
        while self._waiting:
            nbytes, slots, turn = self._waiting[0]
            if turn.cancelled():
                self._waiting.popleft()
            elif self._slots >= slots and nbytes <= self._free:
                self._waiting.popleft()
                self._free -= nbytes
                self._slots -= slots
                turn.set_result(None)
            else:
                return


class BufferPool:
    """Buffers that are used again: touching fresh pages costs more than the copy into them."""

    def __init__(self, limit: int) -> None:
        """Makes an empty pool, which keeps at most ``limit`` bytes; buffers are made when they are first needed."""
        self._limit = limit
        self._kept = 0
        self._out = 0
        self._free: list[memoryview] = []

    def take(self, nbytes: int) -> memoryview:
        """A buffer of at least ``nbytes`` and less than twice that, contents undefined."""
        self._out += nbytes
        for i, buffer in enumerate(self._free):
            if nbytes <= len(buffer) < 2 * nbytes:
                self._kept -= len(buffer)
                self._out += len(buffer) - nbytes
                return self._free.pop(i)
        self._make_room()
        return np.empty(nbytes, np.uint8).data if nbytes else memoryview(b"")

    def give(self, buffer: memoryview) -> None:
        """Takes a buffer back; a small one, or one too many, is dropped."""
        self._out -= len(buffer)
        if len(buffer) >= _LEAST_KEPT:
            self._kept += len(buffer)
            self._free.append(buffer)
            self._make_room()

    def _make_room(self) -> None:
        while self._free and self._out + self._kept > self._limit:
            self._kept -= len(self._free.pop(0))
