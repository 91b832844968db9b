"""Blocking work beside an event loop.

Law: whoever awaits it learns of its end: nothing goes on behind a caller's back, cancelled or not.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


async def in_thread(action: Callable[..., T], *args: Any) -> T:
    """Runs a blocking action in a worker thread of the loop.

    A caller that is cancelled meanwhile waits until the action has ended, for a thread cannot be stopped and
    may be writing into the caller's memory.
    """
    running = asyncio.get_running_loop().run_in_executor(None, action, *args)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # seen, so that asyncio does not tell of it
        raise


class DaemonExecutor(ThreadPoolExecutor):
    """A thread pool that still works while the interpreter waits for other threads to end.

    The standard one refuses work from then on, so a save that a background thread began just before the end of
    the script would be lost.
    """

    def __init__(self, max_workers: int) -> None:
        """Starts the threads: none can be started later than that."""
        super().__init__(max_workers)
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        for i in range(max_workers):
            threading.Thread(target=self._serve, name=f"cloudckpt-{i}", daemon=True).start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """See `concurrent.futures.Executor.submit`."""
        future: Future[Any] = Future()
        self._work.put((future, lambda: fn(*args, **kwargs)))
        return future

    def _serve(self) -> None:
        while True:
            _run(*self._work.get())


def _run(future: "Future[Any]", action: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = action()
    except BaseException as e:
        future.set_exception(e)
    else:
        future.set_result(result)
