"""The requests that move bytes to and from one server: how many at a time, and what becomes of the late ones.

Law: memory has one writer: what is fetched a second time is fetched into memory of its own, and the loser has ended
before a range counts as there. Used from one event loop only.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cloudckpt.errors import UsageError
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import GetRange
from cloudckpt.store.tails import Tails
from cloudckpt.store.window import Window
from cloudckpt.threads import in_thread

log = logging.getLogger(__name__)
T = TypeVar("T")
_LOOKS = 4
"""How often a request is looked at in the least time after which it can be late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficOptions:
    """How a server is asked for bytes.

    Attributes:
        first_concurrency: requests under way at a time before it is known whether more help; 16 connections of a
            cloud's bucket carry about 1.4 GB/s.
        lanes: event loops, each in a thread of its own, that move bytes to and from servers (docs/tuning.md).
        late_factor: a request is late that takes so many times what its peers take. A late GET is sent again beside
            the first, and the faster one counts; a late part is broken off and sent again. ``inf`` never.
        late_least_s: no request is late before.
        late_share: of all requests that may be sent again for being late, beside two.
    """

    first_concurrency: int = 16
    lanes: int = 2
    late_factor: float = 4
    late_least_s: float = 1
    late_share: float = 0.05

    def __post_init__(self) -> None:
        if (
            min(self.first_concurrency, self.lanes, self.late_factor) < 1
            or self.late_least_s <= 0
            or self.late_share < 0
        ):
            msg = (
                f"first_concurrency={self.first_concurrency}, lanes={self.lanes} and "
                f"late_factor={self.late_factor} must be at least 1, "
                f"late_least_s={self.late_least_s} more than 0, late_share={self.late_share} at least 0"
            )
            raise UsageError(msg)


_MOST_SPARE_NBYTES = 128 << 20
"""Of memory that late ranges are fetched into again, at a time; none of it is counted by a budget."""


class Traffic:
    """What the stores of one server share."""

    def __init__(self, options: TrafficOptions, *, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Lets at most ``most`` requests through at a time."""
        o = options
        self._clock = clock
        self._spare_nbytes = 0
        self._look_s = o.late_least_s / _LOOKS
        self._window = Window(start=o.first_concurrency, most=most, clock=clock)
        self._gets, self._puts = (
            Tails(factor=o.late_factor, least_s=o.late_least_s, share=o.late_share) for _ in range(2)
        )

    async def get_range(self, store: GetRange, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `Get.get_range`."""
        await self._window.run(len(at), lambda: self._get_range(store, key, at, into))

    async def send(self, what: str, nbytes: int, request: Callable[[], Awaitable[T]]) -> T:
        """Sends a body of so many bytes; ``request`` may be called again, ``what`` is for the log."""
        return await self._window.run(nbytes, lambda: self._send(what, nbytes, request))

    async def _get_range(self, store: GetRange, key: str, at: Range, into: Sequence[memoryview]) -> None:
        def get(views: Sequence[memoryview]) -> "Coroutine[Any, Any, Exception | None]":
            return self._outcome(self._gets, len(at), lambda: store.get_range(key, at, views))

        spare: asyncio.Task[Exception | None] | None = None
        try:
            async with asyncio.TaskGroup() as group:
                direct = group.create_task(get(into))
                if await self._is_late(self._gets, len(at), direct, spare_nbytes=len(at)):
                    log.warning("bytes %d to %d of %s are late; asked for again", at.start, at.stop, key)
                    self._spare_nbytes += len(at)
                    import numpy as np  # late: the command line starts in less than half the time without

                    memory = np.empty(len(at), np.uint8).data
                    spare = group.create_task(get([memory]))
                    done, others = await asyncio.wait({direct, spare}, return_when=asyncio.FIRST_COMPLETED)
                    if others and not any(map(_is_well, done)):
                        await asyncio.wait(others)
                    direct.cancel()
                    spare.cancel()
            if spare is None or _is_well(direct):
                _unpack(direct.result())
            else:
                _unpack(spare.result())
                await in_thread(_spread, memory, into)
        finally:
            self._spare_nbytes -= 0 if spare is None else len(at)

    async def _send(self, what: str, nbytes: int, request: Callable[[], Awaitable[T]]) -> T:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(self._outcome(self._puts, nbytes, request))
            if await self._is_late(self._puts, nbytes, first):
                log.warning("%s is late; sent again", what)
                first.cancel()
        return _unpack(await self._outcome(self._puts, nbytes, request) if first.cancelled() else first.result())

    async def _outcome(self, tails: Tails, nbytes: int, request: Callable[[], Awaitable[T]]) -> T | Exception:
        """What a request brings, or how it failed: as a value, for its group to go on without it."""
        began = self._clock()
        try:
            result = await request()
        except Exception as e:
            return e
        tails.answered(nbytes, self._clock() - began)
        return result

    async def _is_late(self, tails: Tails, nbytes: int, task: "asyncio.Task[Any]", *, spare_nbytes: int = 0) -> bool:
        """Waits until the task is done, or is to be done again."""
        began = self._clock()
        while True:
            await asyncio.wait({task}, timeout=self._look_s)
            if task.done():
                return False
            has_room = self._spare_nbytes + spare_nbytes <= _MOST_SPARE_NBYTES
            if has_room and tails.repeats(nbytes, self._clock() - began):
                return True


def _is_well(task: "asyncio.Task[Any]") -> bool:
    return not task.cancelled() and not isinstance(task.result(), Exception)


def _unpack(outcome: T | Exception) -> T:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _spread(memory: memoryview, into: Sequence[memoryview]) -> None:
    start = 0
    for view in into:
        view[:] = memory[start : start + len(view)]
        start += len(view)
