"""How long a save may take as a whole, however often its requests are tried again.

Law: what is broken off cleans up as after any other failure. A commit is never broken off: it has a deadline of its
own.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cloudckpt.errors import DeadlineError


class Deadline:
    """A moment, so many seconds from when this is made."""

    def __init__(self, seconds: float) -> None:
        """``inf`` for never."""
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds until then, or 0."""
        return max(0.0, self._end - time.monotonic())

    def __getstate__(self) -> tuple[float, float]:
        """For another process, whose clock may be another: what is left."""
        return self._seconds, self.left_s

    def __setstate__(self, state: tuple[float, float]) -> None:
        self._seconds, left = state
        self._end = time.monotonic() + left

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Breaks off what runs in this context at the deadline.

        Raises:
            DeadlineError: it was broken off.
        """
        left = self.left_s
        limit = asyncio.timeout(left if left != float("inf") else None)
        try:
            async with limit:
                yield
        except TimeoutError as e:
            if not limit.expired():
                raise
            msg = (
                f"not done within deadline_s={self._seconds:g} and broken off; nothing was committed. Allow more "
                "time, or look at why the store is slow (its retries are in the log)"
            )
            raise DeadlineError(msg) from e
