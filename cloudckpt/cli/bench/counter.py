"""Counts what goes to a server and comes from it: a relay in front of it, in a thread of this process.

Law: passes bytes on as they come, and counts them in both directions, headers included.
"""

import asyncio
import contextlib
import re
import threading
from collections import Counter as Counts
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_CHUNK = 1 << 20
PART = "PART"
"""A PUT that is a part of a multipart upload."""


@dataclass(slots=True)
class Counter:
    """What went through since `reset`.

    Attributes:
        url: to send requests to.
        sent, received: bytes to the server, and from it.
        methods: requests by their method; parts of multipart uploads are told apart as `PART`.
    """

    url: str
    sent: int = 0
    received: int = 0
    methods: Counts[str] = field(default_factory=Counts)

    @property
    def requests(self) -> int:
        """All of them."""
        return self.methods.total()

    def reset(self) -> None:
        """Counts from nothing."""
        self.sent = self.received = 0
        self.methods = Counts()


class RequestParser:
    """Finds the requests in what a client sends on one connection, however it was cut in pieces. Pure."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self._is_chunked = False

    def feed(self, data: bytes) -> Iterator[str]:
        """Takes the next bytes, and yields the method of each request whose head ends in them."""
        while data:
            skipped = min(self._left, len(data))
            self._left -= skipped
            data = data[skipped:]
            if not data:
                return
            head, end, rest = (self._head + data).partition(b"\r\n\r\n")
            if not end:
                self._head = head
                return
            self._head, data = b"", rest
            if self._is_chunked and not re.match(rb"[A-Z]+ \S+ HTTP/", head):
                continue  # the end of a body whose length was not told
            yield self._method(head)

    def _method(self, head: bytes) -> str:
        length = re.search(rb"(?im)^content-length: *(\d+)", head)
        self._left = int(length[1]) if length else 0
        self._is_chunked = bool(re.search(rb"(?im)^transfer-encoding: *chunked", head))
        method, target, *_ = head.split(b" ", 2)
        return PART if method == b"PUT" and b"partNumber=" in target else method.decode()


@contextlib.contextmanager
def counting(endpoint: str) -> Iterator[Counter]:
    """Relays to an endpoint (``http://host:port``) while the context lasts."""
    at = urlsplit(endpoint)
    loop = asyncio.new_event_loop()
    counter = Counter("")
    ready = threading.Event()
    stop = asyncio.Event()

    async def relay() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(at.hostname, at.port or 80, limit=_CHUNK)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_pass_on(reader, far_writer, _counts_requests(counter)))
                    group.create_task(_pass_on(far_reader, writer, _counts_replies(counter)))
            finally:
                far_writer.transport.abort()
                writer.transport.abort()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=_CHUNK)
        counter.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        async with server:
            await stop.wait()

    def run() -> None:
        loop.run_until_complete(relay())
        loop.run_until_complete(_end_connections())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield counter
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)


async def _end_connections() -> None:
    connections = asyncio.all_tasks() - {asyncio.current_task()}
    for task in connections:
        task.cancel()
    await asyncio.gather(*connections, return_exceptions=True)
    await asyncio.sleep(0)  # for transports to let go of their sockets


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: Callable[[bytes], None]
) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_CHUNK):
            count(data)
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(ConnectionError):
        writer.close()


def _counts_requests(counter: Counter) -> Callable[[bytes], None]:
    parser = RequestParser()

    def count(data: bytes) -> None:
        counter.sent += len(data)
        counter.methods.update(parser.feed(data))

    return count


def _counts_replies(counter: Counter) -> Callable[[bytes], None]:
    def count(data: bytes) -> None:
        counter.received += len(data)

    return count
