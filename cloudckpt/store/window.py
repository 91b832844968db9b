"""How many requests to one server are under way at a time: more while that helps, fewer when it asks for fewer.

Law: counts, and sends nothing. Used from one event loop only.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cloudckpt.errors import ThrottledError

T = TypeVar("T")
_HELPS = 1.1
"""Times the bytes a second of the round before: a larger window that brings less is given up again."""
_REST = 16
"""Rounds after which a larger window is tried again that did not help, or that the server refused."""


class Window:
    """Lets requests through, first come, first served.

    A round is as many requests as the window is large. While requests wait, each round is held against the one
    before: at first the window doubles as long as that helps, and, once the server has refused, grows by one (slow
    start; additive increase, multiplicative decrease: RFC 5681, 3.1). A refusal halves it, once for all requests that
    were under way.

    Attributes:
        limit: requests under way at a time.
    """

    def __init__(self, *, start: int, most: int, clock: Callable[[], float]) -> None:
        """Begins with ``start`` requests at a time, and never has more than ``most``; the clock gives seconds."""
        self.limit = min(start, most)
        self._most = most
        self._clock = clock
        self._free = asyncio.Semaphore(self.limit)
        self._excess = 0  # places that are given up as they come free
        self._under_way = 0
        self._refusals = 0
        self._rest = 0
        self._before: tuple[int, float] | None = None  # the limit and rate of the round before, while more is tried
        self._begin_round()

    async def run(self, nbytes: int, request: Callable[[], Awaitable[T]]) -> T:
        """Waits for a place and sends a request.

        Args:
            nbytes: that it moves.
            request: sends it; a `ThrottledError` of it makes the window smaller.
        """
        await self._free.acquire()
        while self._excess:  # this place is one of those that are given up
            self._excess -= 1
            await self._free.acquire()
        if not self._under_way:
            self._begin_round()
        self._under_way += 1
        refusals = self._refusals
        try:
            result = await request()
        except ThrottledError:
            if refusals == self._refusals:
                self._shrink()
            raise
        finally:
            self._under_way -= 1
            self._leave()
        self._count(nbytes)
        return result

    def _leave(self) -> None:
        if self._excess:
            self._excess -= 1
        else:
            self._free.release()

    def _begin_round(self) -> None:
        self._since = self._clock()
        self._done = self._moved = 0

    def _count(self, nbytes: int) -> None:
        self._done += 1
        self._moved += nbytes
        if self._done < self.limit:
            return
        if self._free.locked():  # who does not wait shows nothing of how many are best
            self._judge(self._moved / max(1e-9, self._clock() - self._since))
        self._begin_round()

    def _judge(self, rate: float) -> None:
        if self._before is not None:
            limit, least = self._before[0], self._before[1] * _HELPS
            self._before = None
            if rate < least:
                self._resize(limit)
                self._rest = _REST
        if self._rest:
            self._rest -= 1
        elif self.limit < self._most:
            self._before = self.limit, rate
            self._resize(min(self._most, self.limit + 1 if self._refusals else 2 * self.limit))

    def _shrink(self) -> None:
        self._refusals += 1
        self._before = None
        self._rest = _REST
        self._resize(max(1, self.limit // 2))
        self._begin_round()

    def _resize(self, limit: int) -> None:
        more = limit - self.limit
        self.limit = limit
        if more < 0:
            self._excess -= more
            return
        for _ in range(more):
            self._leave()  # a place more is a place that comes free
