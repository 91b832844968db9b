"""An HTTP/1.1 server that does to each request what a test's script says, and remembers what it was sent.

Law: on loopback and in the test's own event loop; nothing happens that was not scripted. What an answer leaves unread
stays unread, and a connection that it neither closes nor finishes stays open until the server ends.
"""

import asyncio
import datetime as dt
import ipaddress
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import md5
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOST = "127.0.0.1"


@dataclass(kw_only=True)
class Request:
    """A request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    connection: int
    """Which of the server's connections it came on, from 1."""
    host: str
    """The server's address that it came to."""
    body: bytes | None = None
    """None while not all of it was read."""

    @property
    def nbytes(self) -> int:
        return int(self.headers.get("content-length", 0))


class Exchange:
    """What an answer can do to the client: one request, and the connection that it came on."""

    def __init__(self, server: "RudeServer", request: Request, reader: Any, writer: Any) -> None:
        self.server = server
        self.request = request
        self._reader, self._writer = reader, writer

    async def read_body(self) -> bytes:
        """Reads the body to its end."""
        self.request.body = await self._reader.readexactly(self.request.nbytes)
        return self.request.body

    async def read(self, nbytes: int) -> bytes:
        """Reads so much of the body."""
        return await self._reader.readexactly(nbytes)

    async def send(self, data: bytes) -> None:
        """Sends bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def half_close(self) -> None:
        """Sends no more, and may go on to read."""
        self._writer.write_eof()

    async def close(self) -> None:
        """Closes the connection; if bytes lie unread, the system makes that a reset."""
        self._writer.close()
        raise ConnectionError

    async def reset(self) -> None:
        """Resets the connection."""
        option = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
        self._writer.transport.abort()
        raise ConnectionError

    async def hang(self) -> None:
        """Does nothing more with this connection, and keeps it open."""
        await asyncio.Event().wait()

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Goes on in TLS, as a proxy's tunnel does."""
        await self._writer.start_tls(context)


Answer = Callable[[Exchange], Awaitable[None]]


@dataclass
class RudeServer:
    """Answers the first requests by the script, one answer each, and all others as a small S3 would.

    Attributes:
        script: answers by the order in which requests arrive.
        tls: serve TLS with this context.
        hosts: loopback addresses to listen on, all with the same port.
    """

    script: Sequence[Answer] = ()
    tls: ssl.SSLContext | None = None
    hosts: Sequence[str] = (HOST,)
    requests: list[Request] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    connections: int = 0
    most_connections: int = 0
    """At one time."""

    async def __aenter__(self) -> Self:
        self._script = list(self.script)
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self.port = 0
        for host in self.hosts:
            sock = socket.create_server((host, self.port), backlog=100)
            # Little waits in the system, so that a body which is not read is not sent either.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
            self.port = sock.getsockname()[1]
            self._servers.append(await asyncio.start_server(self._serve, sock=sock, ssl=self.tls))
        self.url = f"{'https' if self.tls else 'http'}://{self.hosts[0]}:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def asked(self, target: str) -> list[str]:
        """The methods of the requests whose target contains ``target``."""
        return [request.method for request in self.requests if target in request.target]

    async def _serve(self, reader: Any, writer: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        number = self.connections
        self.most_connections = max(self.most_connections, len(self._tasks))
        try:
            while True:
                await self._answer(reader, writer, number)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            writer.close()
        except asyncio.CancelledError:  # the server ends; asyncio's streams would log it
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _answer(self, reader: Any, writer: Any, connection: int) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, target, _ = lines[0].split(" ")
        split = (line.partition(":") for line in lines[1:-2])
        headers = {name.lower(): value.strip() for name, _, value in split}
        host = writer.get_extra_info("sockname")[0]
        request = Request(method=method, target=target, headers=headers, connection=connection, host=host)
        self.requests.append(request)
        exchange = Exchange(self, request, reader, writer)
        answer = self._script.pop(0) if self._script else serve
        await answer(exchange)
        if request.body is None and request.nbytes:
            await exchange.hang()


async def serve(e: Exchange) -> None:
    """Answers as a small S3 would: objects, ranges, and 404 for what is not there."""
    body = await e.read_body()
    path = e.request.target.partition("?")[0]
    method = e.request.method
    if e.request.headers.get("expect", "").lower() == "100-continue":
        await e.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    if method == "PUT":
        e.server.objects[path] = body
        await e.send(head(200, 0, ETag=etag(body)))
        return
    data = e.server.objects.get(path)
    if data is None:
        await refuse(404, "NoSuchKey")(e)
        return
    more = {"ETag": etag(data), "Last-Modified": formatdate(0, usegmt=True)}
    if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", e.request.headers.get("range", "")):
        piece = data[int(asked[1]) : int(asked[2]) + 1]
        await e.send(head(206, len(piece), **more) + piece)
    else:
        await e.send(head(200, len(data), **more) + (b"" if method == "HEAD" else data))


def head(status: int, nbytes: int | None, **headers: str) -> bytes:
    """A reply's head; ``nbytes`` None leaves the length out."""
    length = [] if nbytes is None else [f"Content-Length: {nbytes}"]
    lines = [f"HTTP/1.1 {status} Whatever", *length, *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def chunked(body: bytes, size: int) -> bytes:
    """A body in chunks of that size, and the last chunk of all."""
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def etag(body: bytes) -> str:
    """As S3's, quotes included."""
    return f'"{md5(body, usedforsecurity=False).hexdigest()}"'


def error_xml(code: str, more: str = "") -> bytes:
    """The body of S3's errors."""
    xml = f"<Error><Code>{code}</Code><Message>so it is</Message>{more}<RequestId>1</RequestId></Error>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'.encode()


def saying(data: bytes, *, reads: bool = True) -> Answer:
    """An answer that sends these bytes, after it has read the body or in place of that."""

    async def answer(e: Exchange) -> None:
        if reads:
            await e.read_body()
        await e.send(data)

    return answer


def refuse(status: int, code: str, *, reads: bool = True, **headers: str) -> Answer:
    """An answer that is S3's error of that code; to a HEAD without its body."""

    async def answer(e: Exchange) -> None:
        if reads:
            await e.read_body()
        body = error_xml(code)
        sent = b"" if e.request.method == "HEAD" else body
        await e.send(head(status, len(body), Content_Type="application/xml", **headers) + sent)

    return answer


def certificate(file: Any) -> None:
    """Writes a private key and a certificate for 127.0.0.1, its own authority, into one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rude server")])
    now = dt.datetime.now(dt.UTC)
    names = [x509.IPAddress(ipaddress.ip_address(HOST)), x509.DNSName("s3.invalid")]
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))


def server_side(file: Any) -> ssl.SSLContext:
    """The TLS context of a server with the certificate in ``file``."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    return context
