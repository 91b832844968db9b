"""A proxy in front of an S3 server that breaks the requests it is told to break.

Law: a request that no fault is given for passes unchanged, and is sent to the server once.
"""

import asyncio
import re
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from cloudckpt.testing.faults import Fault
from cloudckpt.testing.http11 import Head, body_of, read_head

_HOST = "127.0.0.1"
_PIECE = 1 << 18
_SLICES_PER_S = 20
_UNBROKEN = Fault(name="none")


@dataclass(slots=True, kw_only=True)
class Request:
    """A request as the proxy saw it.

    Attributes:
        number: from 0, in the order of arrival.
        method: of HTTP.
        key: the path, unquoted, without the bucket.
        query: as it came.
        nbytes: of its body.
        fault: what was done to it.
        status: of the server's answer; None where it gave none, or was not asked.
    """

    number: int
    method: str
    key: str
    query: str
    headers: dict[str, str] = field(repr=False)
    nbytes: int
    fault: Fault | None = None
    status: int | None = None

    @property
    def operation(self) -> str:
        """The S3 operation, such as ``UploadPart``."""
        for pattern, name in _OPERATIONS:
            if re.fullmatch(pattern, f"{self.method} {'/' if not self.key else 'key'}?{self.query}"):
                return name
        return self.method


_OPERATIONS = (
    (r"POST key\?.*uploads.*", "CreateMultipartUpload"),
    (r"PUT key\?.*partNumber=.*", "UploadPart"),
    (r"POST key\?.*uploadId=.*", "CompleteMultipartUpload"),
    (r"DELETE key\?.*uploadId=.*", "AbortMultipartUpload"),
    (r"PUT key\?.*", "PutObject"),
    (r"GET key\?.*", "GetObject"),
    (r"HEAD key\?.*", "HeadObject"),
    (r"DELETE key\?.*", "DeleteObject"),
    (r"GET /\?.*uploads.*", "ListMultipartUploads"),
    (r"GET /\?.*", "ListObjects"),
    (r"POST /\?.*delete.*", "DeleteObjects"),
)

Script = Callable[[Request], Fault | None]


class FaultProxy:
    """Serves on a free port of 127.0.0.1, from a thread of its own, what an S3 server serves.

    Clients sign the proxy's own address, and the server must not mind: moto, SeaweedFS, LocalStack, MinIO and Ceph do
    not; AWS does.

    Attributes:
        url: to give as ``endpoint_url``.
        requests: all that came, in order.
    """

    def __init__(self, endpoint_url: str) -> None:
        """Stands in front of a server; call `fault_proxy`."""
        at = urlsplit(endpoint_url)
        self._server = at.hostname or _HOST, at.port or (443 if at.scheme == "https" else 80)
        self._is_tls = at.scheme == "https"
        self._scripts: list[Script] = []
        self.url = ""
        self.requests: list[Request] = []

    def when(self, claim: Callable[[Request], bool], fault: Fault, *, times: int = 1) -> None:
        """Breaks the next ``times`` requests of which ``claim`` is true."""
        left = times

        def script(request: Request) -> Fault | None:
            nonlocal left
            if not left or not claim(request):
                return None
            left -= 1
            return fault

        self._scripts.append(script)

    def at(self, number: int, fault: Fault) -> None:
        """Breaks the request of that number, counted from 0, from now on."""
        number += len(self.requests)
        self.when(lambda request: request.number == number, fault)

    def each(self, script: Script) -> None:
        """Asks ``script`` for a fault for each request, after what was asked for before."""
        self._scripts.append(script)

    def clear(self) -> None:
        """Forgets all faults, and the requests that came."""
        self._scripts = []
        self.requests = []

    async def _serve(self, connection: socket.socket) -> None:
        client = _Client(*await asyncio.open_connection(sock=connection, limit=_PIECE))
        try:
            while await self._answer(client):
                pass
        except (OSError, EOFError, asyncio.CancelledError) as e:
            client.reset()
            if isinstance(e, asyncio.CancelledError):
                raise
        finally:
            client.writer.close()
            with suppress(OSError):
                await client.writer.wait_closed()

    async def _accept(self, listener: socket.socket) -> None:
        """Serves all connections, until it is cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:

            def accept() -> None:  # asyncio's own loses a connection that comes while it is cancelled
                with suppress(BlockingIOError):
                    connection, _ = listener.accept()
                    task = group.create_task(self._serve(connection))
                    task.add_done_callback(partial(_close, connection))

            loop.add_reader(listener, accept)
            try:
                await asyncio.Event().wait()
            finally:
                loop.remove_reader(listener)

    async def _answer(self, client: "_Client") -> bool:
        """Serves one request; whether the connection may serve another."""
        head = await read_head(client.reader)
        if head is None:
            client.writer.close()
            return False
        method, target, _ = head.first.split(" ")
        path, _, query = target.partition("?")
        request = Request(
            number=len(self.requests),
            method=method,
            key=unquote(path).lstrip("/").partition("/")[2],
            query=query,
            headers=head.headers,
            nbytes=int(head.headers.get("content-length", 0)),
        )
        self.requests.append(request)
        request.fault = next((f for script in self._scripts if (f := script(request)) is not None), None)
        fault = request.fault or _UNBROKEN
        if head.headers.get("expect", "").lower() == "100-continue":
            client.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault.first is not None:
            await asyncio.to_thread(fault.first)
        await asyncio.sleep(fault.delay_s)
        if fault.cuts_request:
            await client.reader.readexactly(request.nbytes // 2)
        elif fault.is_passed_on:
            async with self._passed_on(client, head, request, fault) as (reply, body):
                return await _reply(client, request, fault, reply, body)
        else:
            await client.reader.readexactly(request.nbytes)
        return await _reply(client, request, fault, None, _nothing())

    @asynccontextmanager
    async def _passed_on(
        self, client: "_Client", head: Head, request: Request, fault: Fault
    ) -> AsyncIterator[tuple[Head, AsyncIterator[bytes]]]:
        """The server's answer to a request."""
        reader, writer = await asyncio.open_connection(*self._server, ssl=self._is_tls or None)
        try:
            writer.write(head.encode(without={"expect", "connection"}, more={"Connection": "close"}))
            async for piece in _changed(body_of(head, client.reader, is_reply=False), request.nbytes, fault):
                writer.write(piece)
                await writer.drain()
            reply = await read_head(reader)
            if reply is None:
                raise EOFError
            request.status = int(reply.first.split(" ")[1])
            if fault.then is not None:
                await asyncio.to_thread(fault.then)
            has_body = request.method != "HEAD" and request.status not in {204, 304}
            yield reply, body_of(reply, reader, is_reply=True) if has_body else _nothing()
        finally:
            writer.transport.abort()


class _Client:
    """A connection to a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def reset(self) -> None:
        sock: Any = self.writer.get_extra_info("socket")
        if sock is not None:
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def end(self, ending: str) -> None:
        if ending == "stall":
            await self.reader.read()  # until the client gives up
        if ending == "close":
            self.writer.close()
        else:
            self.reset()


async def _reply(
    client: _Client, request: Request, fault: Fault, reply: Head | None, body: AsyncIterator[bytes]
) -> bool:
    """Sends what the fault leaves of the server's reply; whether the connection may serve another request."""
    if fault.reply is not None:
        client.writer.write(_error(*fault.reply, is_head=request.method == "HEAD"))
        await client.writer.drain()
        return True
    if reply is None or not fault.reply_share:
        await client.end(fault.ending or "reset")
        return False
    nbytes = int(reply.headers.get("content-length", 0))
    client.writer.write(reply.encode(without={"connection"}, more={}))
    left = int(nbytes * fault.reply_share) if fault.ending else None
    whole = Fault(name="none", bytes_per_s=fault.bytes_per_s) if fault.flips and request.nbytes else fault
    async for piece in _changed(body, nbytes, whole):
        client.writer.write(piece if left is None else piece[:left])
        await client.writer.drain()
        if left is not None:
            left -= min(left, len(piece))
            if not left:
                break
    if fault.ending:
        await client.end(fault.ending)
        return False
    if "content-length" not in reply.headers and "chunked" not in reply.headers.get("transfer-encoding", ""):
        client.writer.close()
        return False
    return True


async def _changed(body: AsyncIterator[bytes], nbytes: int, fault: Fault) -> AsyncIterator[bytes]:
    """A body with a bit of its middle flipped, or slowly."""
    at = 0
    async for piece in body:
        middle = nbytes // 2 - at
        at += len(piece)
        if fault.flips and 0 <= middle < len(piece):
            changed = bytearray(piece)
            changed[middle] ^= 1
            yield bytes(changed)
        elif fault.bytes_per_s is not None:
            size = max(1, int(fault.bytes_per_s / _SLICES_PER_S))
            for start in range(0, len(piece), size):
                yield piece[start : start + size]
                await asyncio.sleep(1 / _SLICES_PER_S)
        else:
            yield piece


async def _nothing() -> AsyncIterator[bytes]:
    for piece in list[bytes]():
        yield piece


def _error(status: int, code: str, *, is_head: bool) -> bytes:
    xml = f"<Error><Code>{code}</Code><Message>by a fault proxy</Message></Error>" if code else ""
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'.encode() if xml else b""
    head = f"HTTP/1.1 {status} Fault\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if is_head else body)


@contextmanager
def fault_proxy(endpoint_url: str) -> Iterator[FaultProxy]:
    """Runs a `FaultProxy` in front of an S3 server, for as long as the context lasts.

    Example:
        >>> with embedded_server("bucket") as server, fault_proxy(server.endpoint_url) as proxy:
        ...     proxy.when(lambda request: request.key.endswith("manifest.json"), lose_reply())
        ...     train(ObjectStoreWriter("s3://bucket/run", endpoint_url=proxy.url))
    """
    proxy = FaultProxy(endpoint_url)
    started = threading.Event()
    ends: list[Callable[[], object]] = []

    async def serve() -> None:
        with socket.create_server((_HOST, 0), backlog=128) as listener:
            listener.settimeout(0)
            proxy.url = f"http://{_HOST}:{listener.getsockname()[1]}"
            async with asyncio.TaskGroup() as group:
                task = group.create_task(proxy._accept(listener))
                ends.append(partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel))
                started.set()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="fault-proxy", daemon=True)
    thread.start()
    started.wait()
    try:
        yield proxy
    finally:
        ends[0]()
        thread.join()


def _close(connection: socket.socket, _: object) -> None:
    """For one whose task was cancelled before it began; closing again does nothing."""
    connection.close()
