"""One store, open from its first use on, for callers above the loop.

Law: what was opened in a process is used and closed there. A fork opens its own; of its parent's it touches nothing,
for both hold the same sockets and the same epoll set.
"""

import asyncio
import atexit
import ctypes
import os
import weakref
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, Self, TypeVar

from cloudckpt.engine import loop
from cloudckpt.errors import UsageError
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, close_kept_clients, open_store

T = TypeVar("T")


class _Opened:
    """A store that this process opened; used on its loop only."""

    def __init__(self, opening: AbstractAsyncContextManager[Store]) -> None:
        self.pid = os.getpid()
        self._opening = opening
        self._stack = AsyncExitStack()
        self._lock = asyncio.Lock()
        self._store: Store | None = None

    async def store(self) -> Store:
        async with self._lock:
            if self._store is None:
                self._store = await self._stack.enter_async_context(self._opening)
            return self._store

    async def close(self) -> None:
        async with self._lock:
            await self._stack.aclose()


class _Holder:
    """What a session has opened; outlives it until that is closed."""

    def __init__(self) -> None:
        self.opened: _Opened | None = None

    def take(self) -> _Opened | None:
        """What this process has opened, which the holder lets go of."""
        opened, self.opened = self.opened, None
        if opened is not None and opened.pid != os.getpid():
            # The parent's. Freed, it would close sockets that the parent uses, so it is never freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(opened))
            return None
        return opened

    def leave(self) -> None:
        """Closes it some time; for the garbage collector."""
        opened = self.take()
        if opened is not None:
            loop.run_later(opened.close)


class Session:
    """A store that is opened when it is first asked for; a context manager. Safe to use from several threads."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        """Opens nothing yet."""
        self._url = url
        self._options = options
        self._holder = _Holder()
        self._is_closed = False
        weakref.finalize(self, self._holder.leave).atexit = False
        _sessions.add(self)

    def run(self, action: Callable[[Store], Coroutine[Any, Any, T]]) -> T:
        """Runs a coroutine with the store to its end, and returns its result.

        Raises:
            UsageError: the session was closed.
        """
        if self._is_closed:
            msg = f"{self._url} was closed; open it again"
            raise UsageError(msg)

        async def with_store() -> T:
            return await action(await self._store())

        return loop.run(with_store)

    def close(self) -> None:
        """Closes what was opened. May be called again."""
        self._is_closed = True
        opened = self._holder.take()
        if opened is not None:
            loop.run(opened.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _store(self) -> Store:
        holder = self._holder
        if holder.opened is None or holder.opened.pid != os.getpid():
            holder.take()
            _used_by.add(os.getpid())
            holder.opened = _Opened(open_store(self._url, self._options, keeps_client=True))
        return await holder.opened.store()


_used_by: set[int] = set()
"""Processes in which a store was opened: this one, and those it was forked from."""

_sessions: "weakref.WeakSet[Session]" = weakref.WeakSet()


def _close_all() -> None:
    for session in list(_sessions):
        session.close()
    if os.getpid() in _used_by:
        loop.run(close_kept_clients)


atexit.register(_close_all)
