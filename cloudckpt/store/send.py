"""A request's body, sent by the socket straight from memory.

Law: aiohttp's but for the body: once its headers are out, the buffers go to the connection's socket as they lie. What
a socket does not take at once of a write, asyncio's transport would copy (CPython 3.11).
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from typing import Any

_LEAST_NBYTES = 128 << 10
"""Less is rather handed to aiohttp, in one piece with the headers."""
_MOST_VIEWS = 512
"""In one system call; Linux takes 1,024 (IOV_MAX, man 2 writev)."""
_SLICE = 256 << 10
"""Bytes handed to a transport at once that cannot be gone around, as with TLS: it copies what waits."""
_SMALL = 64 << 10
"""Buffers below it are joined for such a transport: a write for each would cost more."""


async def send(writer: Any, views: Sequence[memoryview], *, stall_s: float | None) -> None:
    """Sends a body that is a run of buffers.

    Args:
        writer: an `aiohttp.StreamWriter` whose headers are not sent yet, neither chunking nor compressing.
        views: of bytes; not changed until this returns.
        stall_s: how long the server may take nothing; None for ever.

    Raises:
        ConnectionError, TimeoutError: the connection was lost, or the server took nothing for too long.
    """
    nbytes = sum(map(len, views))
    transport = writer.transport
    if nbytes > _LEAST_NBYTES and transport is not None and transport.get_extra_info("ssl_object") is None:
        writer.send_headers()
        if not transport.get_write_buffer_size():
            await _Sender(transport, views, stall_s).run()
            return
    for piece in _pieces(views):
        async with asyncio.timeout(stall_s):
            await writer.write(piece)


def _pieces(views: Sequence[memoryview]) -> "Iterator[bytes | memoryview]":
    small: list[memoryview] = []
    waiting = 0
    for view in views:
        for start in range(0, len(view), _SLICE):
            piece = view[start : start + _SLICE]
            is_small = len(piece) < _SMALL
            if is_small:
                small.append(piece)
                waiting += len(piece)
            if small and (waiting >= _SMALL or not is_small):
                yield b"".join(small)
                small, waiting = [], 0
            if not is_small:
                yield piece
    if small:
        yield b"".join(small)


class _Sender:
    """Writes buffers to a duplicate of a transport's descriptor, whenever the socket takes some."""

    def __init__(self, transport: Any, views: Sequence[memoryview], stall_s: float | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._transport = transport
        self._views = [view for view in reversed(views) if len(view)]
        self._stall_s = stall_s
        self._heard = self._loop.time()

    async def run(self) -> None:
        """Returns when the socket has taken all of it."""
        # A descriptor of its own, for asyncio refuses to watch one that a transport watches.
        fd = os.dup(self._transport.get_extra_info("socket").fileno())
        self._clock = self._loop.call_later(self._stall_s, self._look_at_clock) if self._stall_s else None
        try:
            self._loop.add_writer(fd, self._write, fd)
            await self._done
        finally:
            self._loop.remove_writer(fd)
            os.close(fd)
            if self._clock is not None:
                self._clock.cancel()

    def _write(self, fd: int) -> None:
        if self._done.done():
            return
        try:
            if self._transport.is_closing():
                raise ConnectionResetError("the connection was closed while the body was being sent")
            count = os.writev(fd, self._views[: -_MOST_VIEWS - 1 : -1])
        except BlockingIOError:
            return
        except OSError as e:
            self._done.set_exception(e)
            return
        self._heard = self._loop.time()
        while count:
            view = self._views.pop()
            if count < len(view):
                self._views.append(view[count:])
                break
            count -= len(view)
        if not self._views:
            self._done.set_result(None)

    def _look_at_clock(self) -> None:
        assert self._stall_s is not None  # noqa: S101 - for the type checker
        left = self._heard + self._stall_s - self._loop.time()
        if left > 0:
            self._clock = self._loop.call_later(left, self._look_at_clock)
        elif not self._done.done():
            self._done.set_exception(TimeoutError(f"the server took nothing for {self._stall_s:g} s"))
