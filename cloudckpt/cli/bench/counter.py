"""Counts what a server sends: a relay in front of it, in a thread of this process.

Law: passes bytes on as they come, and counts those that come back, headers included.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

_CHUNK = 1 << 20
_REQUESTS = (b"GET ", b"HEAD ")


@dataclass(slots=True)
class Counter:
    """What went through since `reset`.

    Attributes:
        url: to send requests to.
        nbytes: that the server sent.
        requests: that begin a segment with GET or HEAD.
    """

    url: str
    nbytes: int = 0
    requests: int = 0

    def reset(self) -> None:
        """Counts from nothing."""
        self.nbytes = self.requests = 0


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
            async with asyncio.TaskGroup() as group:
                group.create_task(_pass_on(reader, far_writer, lambda data: _count_request(counter, data)))
                group.create_task(_pass_on(far_reader, writer, lambda data: _count_reply(counter, data)))

        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=_CHUNK)
        counter.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        async with server:
            await stop.wait()

    def run() -> None:
        loop.run_until_complete(relay())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield counter
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=10)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, count: object) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_CHUNK):
            count(data)  # type: ignore[operator]
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(ConnectionError):
        writer.close()


def _count_request(counter: Counter, data: bytes) -> None:
    counter.requests += data.startswith(_REQUESTS)


def _count_reply(counter: Counter, data: bytes) -> None:
    counter.nbytes += len(data)
