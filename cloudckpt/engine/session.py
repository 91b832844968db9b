"""A store for callers above the loop: opened for each call, of clients that are kept between them.

Law: owns nothing. What took long to make belongs to the store's own room, which knows forks and event loops.
"""

import atexit
import os
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

from cloudckpt.engine import loop
from cloudckpt.engine.lanes import other_lanes
from cloudckpt.engine.tracing import Recorder
from cloudckpt.errors import UsageError
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, close_kept_clients, open_store

T = TypeVar("T")


class Session:
    """A way to a store; a context manager. Safe to use from several threads, and after a fork.

    Attributes:
        url: that the store is rooted at.
        options: how to reach it.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        """Opens nothing yet."""
        self.url = url
        self.options = options
        self._is_closed = False

    def run(self, action: Callable[[Store], Coroutine[Any, Any, T]], recorder: Recorder | None = None) -> T:
        """Runs a coroutine with the store to its end, and returns its result.

        Args:
            action: the coroutine.
            recorder: counts the requests that were made again.

        Raises:
            UsageError: the session was closed.
        """
        if self._is_closed:
            msg = f"{self.url} was closed; open it again"
            raise UsageError(msg)
        _used_by.add(os.getpid())

        async def with_store() -> T:
            async with (
                other_lanes(self.url, self.options) as others,
                open_store(self.url, self.options, keeps_client=True, others=others) as store,
            ):
                try:
                    return await action(store)
                finally:
                    if recorder is not None:
                        recorder.retries += getattr(store, "retries", 0)

        return loop.run(with_store)

    def close(self) -> None:
        """Refuses what is asked of it later. May be called again."""
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_used_by: set[int] = set()
"""Processes in which a store was opened: this one, and those it was forked from."""


def _close_kept_clients() -> None:
    if os.getpid() in _used_by:
        loop.run_on_each(close_kept_clients)


atexit.register(_close_kept_clients)
