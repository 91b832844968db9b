"""A TCP server in front of an S3 server that counts the requests it sees, and can lose answers."""

import asyncio
import contextlib
from collections.abc import Callable


class CountingProxy:
    """Passes whole HTTP/1.1 requests on, one connection to the server for each.

    ``lose(method, path)`` says of each request whether its answer is lost: the server carries it out, the
    client's connection is closed without a byte.
    """

    def __init__(self, host: str, port: int, lose: Callable[[str, str], bool] = lambda *_: False):
        self.requests: list[tuple[str, str]] = []
        self._to = host, port
        self._lose = lose

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while await self._one(reader, writer):
                pass
        writer.close()

    async def _one(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        self.requests.append((method, path))
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head.decode().split("\r\n")[1:-2])
        }
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        lines = [
            line
            for line in head.decode().split("\r\n")[:-2]
            if not line.lower().startswith(("expect:", "connection:"))
        ]
        head = "\r\n".join([*lines, "Connection: close", "", ""]).encode()
        upstream_reader, upstream = await asyncio.open_connection(*self._to)
        upstream.write(head + body)
        reply = await upstream_reader.read()
        upstream.close()
        if self._lose(method, path):
            writer.transport.abort()
            return False
        writer.write(reply)
        await writer.drain()
        return False
