"""A save told to stop by another thread.

Law: what is broken off cleans up as after any other failure; what does not run here, a commit above all, is never
broken off.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from cloudckpt.errors import SaveCancelledError


class Cancellation:
    """Tells what runs under it to stop, now or when it begins. Safe to use from any thread."""

    def __init__(self) -> None:
        """Nothing is cancelled yet."""
        self._lock = threading.Lock()
        self._is_cancelled = False
        self._running: set[Callable[[], object]] = set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    def cancel(self) -> None:
        """Stops what runs under this, and whatever would begin to. Does not wait. May be called again."""
        with self._lock:
            self._is_cancelled = True
            running = list(self._running)
        for stop in running:
            stop()

    def refuse(self) -> None:
        """Raises if it is cancelled.

        Raises:
            SaveCancelledError: it is.
        """
        if self._is_cancelled:
            msg = "the save was cancelled before its commit; nothing was committed"
            raise SaveCancelledError(msg)

    @contextmanager
    def told(self, stop: Callable[[], object]) -> Iterator[None]:
        """Has ``stop`` called, from whichever thread cancels, while this context lasts.

        Raises:
            SaveCancelledError: it is cancelled already.
        """
        with self._lock:
            self.refuse()
            self._running.add(stop)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(stop)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Breaks off what runs in this context.

        Raises:
            SaveCancelledError: it was broken off.
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None  # noqa: S101 - a coroutine that is awaited runs in a task
        has_ended = False

        def stop() -> None:
            if not has_ended:
                task.cancel()

        try:
            with self.told(lambda: loop.call_soon_threadsafe(stop)):
                yield
        except asyncio.CancelledError:
            if not self._is_cancelled:
                raise
            task.uncancel()
            self.refuse()
        finally:
            has_ended = True
