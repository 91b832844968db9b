"""The event-loop threads of the process: sync above, async below.

Law: the only place that owns loops. A process that forks starts a new one in the child at first use; what
the parent's loop was doing stays the parent's.
"""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import wait
from contextlib import suppress
from typing import Any, TypeVar

from cloudckpt.errors import unwrap
from cloudckpt.threads import DaemonExecutor

T = TypeVar("T")
_WORKERS_OF_OTHERS = 2
_LOOK_S = 1
"""How often a waiting caller looks for signals."""
CLEAN_UP_S = 30
"""How long what failed may take to clean up, and an interrupted caller waits for it."""


class LoopThread:
    """One event loop in a daemon thread."""

    def __init__(self, workers: int) -> None:
        """Starts the thread, and so many for its blocking work."""
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(DaemonExecutor(workers))
        self._thread = threading.Thread(target=self._loop.run_forever, name="cloudckpt-loop", daemon=True)
        self._thread.start()

    def run(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs a coroutine to its end and returns its result.

        An exception group is raised as its first exception, the others in its notes. When the waiting
        thread is interrupted, the coroutine is cancelled and its clean-up awaited before this returns.
        """
        if threading.current_thread() is self._thread:
            msg = "cloudckpt's sync functions cannot be called from its own event loop"
            raise RuntimeError(msg)
        ended = threading.Event()
        future = asyncio.run_coroutine_threadsafe(_unwrapping(main, ended), self._loop)
        try:
            while not wait([future], timeout=_LOOK_S).done:
                pass  # a signal that came just before the wait is seen now
            return future.result()
        except BaseException:  # also what a signal handler raises, such as SystemExit
            if not future.done():
                future.cancel()
                ended.wait(CLEAN_UP_S)
            raise

    async def run_from_loop(self, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Runs a coroutine here for one that runs on another loop.

        When that one is cancelled, so is this; it has ended before this returns.
        """
        caller = asyncio.get_running_loop()
        ended: asyncio.Future[None] = caller.create_future()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(self._loop.create_task(main()))
            tasks[0].add_done_callback(lambda _: caller.call_soon_threadsafe(ended.set_result, None))

        def cancel() -> None:
            tasks[0].cancel()

        self._loop.call_soon_threadsafe(start)
        is_cancelled = False
        while not ended.done():
            try:
                await asyncio.wait([ended])
            except asyncio.CancelledError:
                is_cancelled = True
                self._loop.call_soon_threadsafe(cancel)
        if is_cancelled:
            if not tasks[0].cancelled():
                tasks[0].exception()  # seen, so that asyncio does not tell of it
            raise asyncio.CancelledError
        return tasks[0].result()


async def _unwrapping(main: Callable[[], Coroutine[Any, Any, T]], ended: threading.Event) -> T:
    try:
        return await main()
    except BaseExceptionGroup as group:
        first = unwrap(group)
        raise first from first.__cause__
    finally:
        ended.set()


async def shielded(clean_up: Callable[[], Awaitable[object]]) -> None:
    """Runs a clean-up to its end even if the task that awaits it is cancelled meanwhile."""
    task = asyncio.ensure_future(clean_up())
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        raise


class _Process:
    """What belongs to this process and not to its forks."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads: list[LoopThread] = []


_process = _Process()
os.register_at_fork(after_in_child=_process.__init__)  # type: ignore[misc]


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a coroutine on the process's first loop thread; see `LoopThread.run`."""
    return threads(1)[0].run(main)


def run_on_each(main: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Runs a coroutine on each loop thread that this process has, one after another."""
    for thread in threads(0):
        thread.run(main)


def threads(least: int) -> list[LoopThread]:
    """The loop threads of this process, in the order they were started: ``least`` of them, or more.

    The first has threads for blocking work; the others only move bytes.
    """
    with _process.lock:
        while len(_process.threads) < least:
            workers = _WORKERS_OF_OTHERS if _process.threads else min(32, (os.cpu_count() or 1) + 4)
            _process.threads.append(LoopThread(workers))
        return list(_process.threads)
