"""An aiohttp response's body, received by the socket straight into memory.

Law: aiohttp's until its headers are read and again when the body is whole; in between its connection's transport is
told to read into the caller's buffers. Whatever goes wrong, nothing is written there after `receive` has returned.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from cloudckpt.store.silence import heard

_LEAST_NBYTES = 128 << 10
"""Of what is still to come: less is rather copied than received by a protocol of its own."""


async def receive(response: Any, into: Sequence[memoryview], *, silence_s: float | None = None) -> None:
    """Receives a body whose length is that of the buffers.

    Args:
        response: an `aiohttp.ClientResponse`, its body not yet read, neither chunked nor compressed.
        into: filled in order.
        silence_s: see `silence.heard`.

    Raises:
        ConnectionError, TimeoutError, aiohttp.ClientError: the connection was lost, or nothing came for too long; the
            buffers are undefined, and the connection is closed.
    """
    views = _Views(into)
    stream = response.content
    while chunk := stream.read_nowait():
        views.copy(chunk)
    connection = response.connection
    if views.missing > _LEAST_NBYTES and connection is not None and _can_be_lent(connection):
        await _receive_directly(connection, views)
        stream.feed_eof()  # which gives the connection back to its pool
    while views.missing:
        chunk, _ = await heard(stream.readchunk(), silence_s)
        if not chunk:
            msg = "the connection ended inside the body"
            raise ConnectionError(msg)
        views.copy(chunk)
    while not stream.at_eof():  # so that the connection goes back whole
        await heard(stream.readany(), silence_s)


def _can_be_lent(connection: Any) -> bool:
    transport = connection.transport
    return isinstance(transport, asyncio.Transport) and transport.get_protocol() is connection.protocol


async def _receive_directly(connection: Any, views: "_Views") -> None:
    transport, its_own = connection.transport, connection.protocol
    its_own.pause_reading()  # and stops its clock
    receiver = _Receiver(transport, its_own, views)
    transport.set_protocol(receiver)
    transport.resume_reading()
    try:
        await receiver.done
    except BaseException:
        transport.abort()  # which stops it at once
        raise
    finally:
        receiver.stop()


class _Views:
    """Buffers that are filled one after the other."""

    def __init__(self, into: Sequence[memoryview]) -> None:
        self._views = [view for view in into if len(view)]
        self._views.reverse()
        self.missing = sum(map(len, self._views))

    def head(self) -> memoryview:
        """What is to be filled next."""
        return self._views[-1]

    def advance(self, nbytes: int) -> None:
        """Takes note that so much of `head` was filled."""
        view = self._views.pop()
        if nbytes < len(view):
            self._views.append(view[nbytes:])
        self.missing -= nbytes

    def copy(self, data: bytes) -> None:
        """Fills them with ``data``, which is not more than is missing."""
        rest = memoryview(data)
        while rest:
            view = self.head()
            taken = min(len(view), len(rest))
            view[:taken] = rest[:taken]
            self.advance(taken)
            rest = rest[taken:]


class _Receiver(asyncio.BufferedProtocol):
    """Has a transport read into buffers until they are full."""

    def __init__(self, transport: asyncio.Transport, its_own: Any, views: _Views) -> None:
        loop = asyncio.get_running_loop()
        self.done: asyncio.Future[None] = loop.create_future()
        self._transport = transport
        self._its_own = its_own
        self._views = views
        self._timeout_s: float | None = its_own.read_timeout
        self._heard = loop.time()
        self._clock = loop.call_later(self._timeout_s, self._look_at_clock) if self._timeout_s else None

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._views.head()

    def buffer_updated(self, nbytes: int) -> None:
        self._views.advance(nbytes)
        self._heard = self.done.get_loop().time()
        if not self._views.missing:
            self._transport.pause_reading()
            self._transport.set_protocol(self._its_own)
            self._end(None)

    def eof_received(self) -> None:
        self._its_own.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._its_own.connection_lost(exc)
        self._end(exc or ConnectionError("the connection ended inside the body"))

    def pause_writing(self) -> None:
        self._its_own.pause_writing()

    def resume_writing(self) -> None:
        self._its_own.resume_writing()

    def stop(self) -> None:
        """Lets go of the transport."""
        if self._clock is not None:
            self._clock.cancel()
        if self._transport.get_protocol() is self:
            self._transport.set_protocol(self._its_own)

    def _end(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)

    def _look_at_clock(self) -> None:
        assert self._timeout_s is not None  # noqa: S101 - for the type checker
        loop = self.done.get_loop()
        left = self._heard + self._timeout_s - loop.time()
        if left > 0:
            self._clock = loop.call_later(left, self._look_at_clock)
        else:
            self._end(TimeoutError(f"nothing came for {self._timeout_s:g} s"))
