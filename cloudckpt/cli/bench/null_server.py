"""A server that speaks S3 and keeps next to nothing, so that the client is what is measured.

Law: one blocking thread a connection, no byte of a large body copied. Signatures and checksums are not looked at.
"""

import os
import re
import socket
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, sleep
from urllib.parse import parse_qsl, unquote, urlsplit

from cloudckpt.cli.bench.null_objects import Found, NullObjects

_CHUNK = 1 << 20
_HEAD_NBYTES = 64 << 10
_PACED_CHUNK = 512 << 10
_MOST_CREDIT_S = 0.05
_RANGE = re.compile(r"bytes=(\d+)-(\d+)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a network would do.

    Attributes:
        latency_s: before the reply to each request.
        bytes_per_s: of each connection, in either direction; None where nothing holds them up.
        total_bytes_per_s: of all connections together, likewise.
    """

    latency_s: float = 0.0
    bytes_per_s: float | None = None
    total_bytes_per_s: float | None = None


CLOUD = Shape(latency_s=0.02, bytes_per_s=90e6)
"""A cloud's bucket, seen from a host in the same region: docs.aws.amazon.com/AmazonS3/latest/userguide/
optimizing-performance-design-patterns.html gives 85 to 90 MB/s for one connection."""


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]

    @property
    def nbytes(self) -> int:
        return int(self.headers.get("content-length", 0))

    @property
    def is_for_bucket(self) -> bool:
        return "/" not in self.path.strip("/")


@dataclass(frozen=True, slots=True)
class _Reply:
    """Status, headers, and a body: bytes, or some of an object."""

    status: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | tuple[Found, int, int] = b""

    @property
    def nbytes(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body[2] - self.body[1]


class NullServer:
    """Listens on a free port of 127.0.0.1 from the start on; `serve` answers until the process ends."""

    def __init__(self, shape: Shape, tls: ssl.SSLContext | None) -> None:
        """Binds the port."""
        self._shape = shape
        self._tls = tls
        self._objects = NullObjects()
        self._line = Line(shape.total_bytes_per_s)
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._socket.getsockname()[1]}"

    def serve(self) -> None:
        """Answers each connection in a thread of its own."""
        while True:
            connection, _ = self._socket.accept()
            threading.Thread(target=self._serve_one, args=(connection,), daemon=True).start()

    def _serve_one(self, connection: socket.socket) -> None:
        with suppress(OSError, EOFError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                _Connection(connection, self._shape, self._line, self._objects).serve()


class _Connection:
    def __init__(self, connection: socket.socket, shape: Shape, line: "Line", objects: NullObjects) -> None:
        self._socket = connection
        self._latency_s = shape.latency_s
        self._pace = Pace(shape.bytes_per_s)
        self._line = line
        is_paced = shape.bytes_per_s is not None or shape.total_bytes_per_s is not None
        self._chunk = _PACED_CHUNK if is_paced else _CHUNK
        # man 7 tcp: not copied; man 2 recv: woken once for all of it, which on a slow line comes in many pieces
        self._waste_flags = socket.MSG_TRUNC | (socket.MSG_WAITALL if shape.total_bytes_per_s else 0)
        self._objects = objects
        self._unread = b""
        self._waste = memoryview(bytearray(_CHUNK))

    def serve(self) -> None:
        """Answers one request after another; raises EOFError or OSError when the connection ends."""
        while True:
            request = self._read_head()
            if request.headers.get("expect", "").lower() == "100-continue":
                self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            kept = self._read_body(request)
            reply = self._answer(request, kept)
            if self._latency_s:
                sleep(self._latency_s)
            self._send(reply, has_body=request.method != "HEAD")

    def _read_head(self) -> _Request:
        data = self._unread
        while b"\r\n\r\n" not in data:
            more = self._socket.recv(_HEAD_NBYTES)
            if not more:
                raise EOFError
            data += more
        head, _, self._unread = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        at = urlsplit(target)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        query = dict(parse_qsl(at.query, keep_blank_values=True))
        return _Request(method, unquote(at.path), query, headers)

    def _read_body(self, request: _Request) -> bytes:
        """Takes a body and returns its first bytes, as many as the objects keep."""
        most = min(request.nbytes, self._objects.most_kept if request.query.get("partNumber", "1") == "1" else 0)
        kept = memoryview(bytearray(most))
        begun = self._unread[: request.nbytes]
        self._unread = self._unread[len(begun) :]
        kept[: min(len(begun), most)] = begun[:most]
        taken = len(begun)
        self._pace.begin(monotonic())
        while taken < request.nbytes:
            wanted = min(request.nbytes - taken, self._chunk)
            is_kept = taken < most
            count = self._socket.recv_into(kept[taken : taken + wanted]) if is_kept else self._waste_some(wanted)
            if not count:
                raise EOFError
            taken += count
            self._wait(count)
        return bytes(kept)

    def _wait(self, nbytes: int) -> None:
        now = monotonic()
        delay_s = max(self._pace.spend(nbytes, now), self._line.spend(nbytes, now))
        if delay_s:
            sleep(delay_s)

    def _waste_some(self, nbytes: int) -> int:
        if isinstance(self._socket, ssl.SSLSocket):
            return self._socket.recv_into(self._waste, nbytes)
        return self._socket.recv_into(self._waste, nbytes, self._waste_flags)

    def _answer(self, request: _Request, kept: bytes) -> _Reply:
        query, objects = request.query, self._objects
        if request.is_for_bucket:
            if request.method == "POST" and "delete" in query:
                objects.delete(request.path, re.findall(rb"<Key>(.*?)</Key>", kept))
                return _xml("<DeleteResult/>")
            if request.method == "GET" and "uploads" not in query:
                return _xml(objects.listing(request.path, query.get("prefix", "")))
            bucket = f"<Bucket>{request.path.strip('/')}</Bucket>"
            return _xml(f"<ListMultipartUploadsResult>{bucket}</ListMultipartUploadsResult>")
        match request.method:
            case "PUT":
                return self._put(request, kept)
            case "POST" if "uploads" in query:
                return _xml(f"<R><UploadId>{objects.create_upload()}</UploadId></R>")
            case "POST":
                etag = objects.complete_upload(query["uploadId"], request.path)
                return _xml(f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>")
            case "DELETE":
                if "uploadId" not in query:
                    objects.delete("", [request.path.encode()])
                return _Reply("204 No Content")
            case _:
                return self._get(request)

    def _put(self, request: _Request, kept: bytes) -> _Reply:
        if "aws-chunked" in request.headers.get("content-encoding", ""):
            return _error("501 Not Implemented", "NotImplemented")  # its frames would be kept as if they were data
        size = request.nbytes
        if "uploadId" in request.query:
            number = int(request.query["partNumber"])
            return _Reply("200 OK", {"ETag": self._objects.put_part(request.query["uploadId"], number, size, kept)})
        if "if-none-match" in request.headers and self._objects.find(request.path):
            return _error("412 Precondition Failed", "PreconditionFailed")
        return _Reply("200 OK", {"ETag": self._objects.put(request.path, size, kept)})

    def _get(self, request: _Request) -> _Reply:
        found = self._objects.find(request.path)
        if found is None:
            return _error("404 Not Found", "NoSuchKey")
        headers = {"ETag": found.etag, "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        at = _RANGE.match(request.headers.get("range", ""))
        if at is None:
            return _Reply("200 OK", headers, (found, 0, found.size))
        start, stop = int(at[1]), min(int(at[2] or found.size) + 1, found.size)
        if start >= stop:
            return _error("416 Range Not Satisfiable", "InvalidRange")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{found.size}"
        return _Reply("206 Partial Content", headers, (found, start, stop))

    def _send(self, reply: _Reply, *, has_body: bool) -> None:
        headers = {**reply.headers, "Content-Length": str(reply.nbytes), "Server": "null"}
        lines = [f"HTTP/1.1 {reply.status}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        head = "\r\n".join(lines).encode()
        if not has_body or isinstance(reply.body, bytes):
            self._socket.sendall(head + (reply.body if has_body and isinstance(reply.body, bytes) else b""))
            return
        found, start, stop = reply.body
        self._pace.begin(monotonic())
        kept = found.kept[start : min(stop, start + self._chunk)]
        self._socket.sendall(head + kept)
        self._wait(len(kept))
        start += len(kept)
        while start < len(found.kept) and start < stop:
            piece = found.kept[start : min(stop, start + self._chunk)]
            self._socket.sendall(piece)
            self._wait(len(piece))
            start += len(piece)
        while start < stop:
            start += self._send_some(found, start, min(stop - start, self._chunk))

    def _send_some(self, found: Found, start: int, nbytes: int) -> int:
        """Sends some of what the server did not keep."""
        offset = found.offset_in_rest(start)
        if isinstance(self._socket, ssl.SSLSocket):
            self._socket.sendall(found.rest[offset : offset + nbytes])
            count = nbytes
        else:
            count = os.sendfile(self._socket.fileno(), found.rest_file, offset, nbytes)
        self._wait(count)
        return count


class Pace:
    """How long to wait so that no more bytes pass in a second than the rate allows. Pure: it is told the time."""

    def __init__(self, bytes_per_s: float | None) -> None:
        """Takes the rate; None where nothing is held up."""
        self._s_per_byte = 1 / bytes_per_s if bytes_per_s else 0.0
        self._due = 0.0

    def begin(self, now: float) -> None:
        """A body begins: what was not used before it is lost."""
        self._due = now

    def spend(self, nbytes: int, now: float) -> float:
        """Takes note of bytes that passed, and returns how long to wait; what was overslept is made up for."""
        self._due = max(self._due, now - _MOST_CREDIT_S) + nbytes * self._s_per_byte
        return max(0.0, self._due - now)


class Line:
    """A `Pace` that all connections share, as they would a network: who sends first goes first."""

    def __init__(self, bytes_per_s: float | None) -> None:
        """Takes the rate; None where nothing is held up."""
        self._pace = Pace(bytes_per_s)
        self._lock = threading.Lock()

    def spend(self, nbytes: int, now: float) -> float:
        """See `Pace.spend`."""
        with self._lock:
            return self._pace.spend(nbytes, now)


def _xml(text: str) -> _Reply:
    return _Reply("200 OK", {"Content-Type": "application/xml"}, text.encode())


def _error(status: str, code: str) -> _Reply:
    return _Reply(status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())
