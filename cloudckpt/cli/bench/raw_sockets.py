"""The ceiling: blocking sockets in threads that send from prepared memory and receive into it.

Law: no client, no checksum, no retry, no copy. Requests are signed and connections made before the clock starts.
"""

import os
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar
from urllib.parse import urlsplit

from cloudckpt.cli.bench.figures import Operation
from cloudckpt.cli.bench.raw import Cut, bucket_and_key, flat_memory
from cloudckpt.cli.bench.workloads import State
from cloudckpt.ranges import Range, split

_MOST_HEAD_NBYTES = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """One operation that is ready to run."""

    connections: Sequence["_Connection"]
    targets: Sequence[str]
    closing_target: str = ""


@dataclass(kw_only=True)
class RawSockets:
    """One object in the parts that a save of ours sends, and in the ranges that a load of ours asks for.

    Attributes:
        name: see `Contender.name`.
        modules: see `Contender.modules`.
        connections: each in a thread of its own.
        cut: in which requests.
        addressing_style: see `S3Options`.
    """

    is_raw: ClassVar[bool] = True

    name: str = "raw-sockets"
    modules: tuple[str, ...] = ("botocore",)
    connections: int = 8
    cut: Cut = field(default_factory=Cut)
    addressing_style: Any = "auto"
    _plan: _Plan | None = field(default=None, init=False, repr=False)

    def settings(self) -> dict[str, Any]:
        """See `Contender.settings`."""
        return {"connections": self.connections, "cut": asdict(self.cut)}

    def prepare(self, operation: Operation, state: State, url: str) -> None:
        """See `Prepares.prepare`: signs, and connects."""
        self.close()
        bucket, key = bucket_and_key(url)
        at = {"Bucket": bucket, "Key": key}
        if operation == "save":
            at["UploadId"] = self._client.create_multipart_upload(**at)["UploadId"]
            count = len(self._ranges(state, self.cut.part_size))
            targets = [self._signed("upload_part", {**at, "PartNumber": n + 1}) for n in range(count)]
            closing = self._signed("complete_multipart_upload", at)
        else:
            targets = [self._signed("get_object", at)] * len(self._ranges(state, self.cut.range_size))
            closing = ""
        host = urlsplit(targets[0])
        count = min(self.connections, len(targets))
        connections = [_Connection(host.scheme, host.netloc, host.hostname or "", host.port) for _ in range(count)]
        self._plan = _Plan(
            connections=connections,
            targets=[target.removeprefix(f"{host.scheme}://{host.netloc}") for target in targets],
            closing_target=closing.removeprefix(f"{host.scheme}://{host.netloc}"),
        )

    def save(self, state: State, url: str) -> None:
        """See `Contender.save`."""
        del url
        plan, memory = self._ready(), flat_memory(state)

        def send(connection: _Connection, number: int, at: Range) -> str:
            return connection.put(plan.targets[number], memory[at.start : at.stop])

        etags = _in_threads(plan.connections, self._ranges(state, self.cut.part_size), send)
        parts = "".join(f"<Part><PartNumber>{n + 1}</PartNumber><ETag>{e}</ETag></Part>" for n, e in enumerate(etags))
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>"
        plan.connections[0].post(plan.closing_target, body.encode())

    def load(self, state: State, url: str) -> None:
        """See `Contender.load`."""
        del url
        plan, memory = self._ready(), flat_memory(state)

        def receive(connection: _Connection, number: int, at: Range) -> None:
            connection.get(plan.targets[number], at, memory[at.start : at.stop])

        _in_threads(plan.connections, self._ranges(state, self.cut.range_size), receive)

    def close(self) -> None:
        """See `Prepares.close`."""
        if self._plan is not None:
            for connection in self._plan.connections:
                connection.close()
        self._plan = None

    def _ready(self) -> _Plan:
        if self._plan is None:
            msg = "prepare comes first"
            raise RuntimeError(msg)
        return self._plan

    def _ranges(self, state: State, size_for: Callable[[int], int]) -> Sequence[Range]:
        nbytes = len(flat_memory(state))
        return list(split(Range(0, nbytes), size_for(nbytes)))

    def _signed(self, method: str, params: dict[str, Any]) -> str:
        url: str = self._client.generate_presigned_url(method, Params=params)
        return url

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        s3 = {"addressing_style": self.addressing_style}
        return boto3.client(
            "s3", config=Config(signature_version="s3v4", request_checksum_calculation="when_required", s3=s3)
        )


def _in_threads(
    connections: Sequence["_Connection"], ranges: Sequence[Range], act: Callable[["_Connection", int, Range], Any]
) -> list[Any]:
    """Each connection, in a thread of its own, takes the next range when it is done with one."""
    todo = deque(range(len(ranges)))
    found: list[Any] = [None] * len(ranges)

    def work(connection: _Connection) -> None:
        for number in _taken(todo):
            found[number] = act(connection, number, ranges[number])

    with ThreadPoolExecutor(len(connections)) as pool:
        for _ in pool.map(work, connections):
            pass
    return found


def _taken(todo: deque[int]) -> Iterator[int]:
    with suppress(IndexError):
        while True:
            yield todo.popleft()


class _Connection:
    """Speaks just enough HTTP/1.1, on one connection."""

    def __init__(self, scheme: str, netloc: str, host: str, port: int | None) -> None:
        with ExitStack() as stack:
            connection = stack.enter_context(
                socket.create_connection((host, port or (443 if scheme == "https" else 80)), timeout=60)
            )
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(None)  # with a timeout Python's sockets do not block, and MSG_WAITALL means nothing
            self._is_tls = scheme == "https"
            if self._is_tls:
                tls = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
                connection = stack.enter_context(tls.wrap_socket(connection, server_hostname=host))
            self._socket = connection
            self._netloc = netloc
            stack.pop_all()

    def put(self, target: str, body: memoryview) -> str:
        """Sends a body as it lies, and returns the ETag."""
        self._send_head("PUT", target, f"Content-Length: {len(body)}\r\n")
        self._socket.sendall(body)
        head, _ = self._reply(200)
        found = re.search(rb"(?im)^etag: *(\S+)", head)
        return found[1].decode() if found else ""

    def post(self, target: str, body: bytes) -> None:
        """Sends a small body."""
        self._send_head("POST", target, f"Content-Length: {len(body)}\r\n")
        self._socket.sendall(body)
        self._reply(200)

    def get(self, target: str, at: Range, into: memoryview) -> None:
        """Receives a range into memory."""
        self._send_head("GET", target, f"Range: bytes={at.start}-{at.stop - 1}\r\n")
        head, begun = self._read_head()
        _check(head, 206)
        into[: len(begun)] = begun
        filled = len(begun)
        while filled < len(into):
            count = self._receive(into[filled:])
            if not count:
                msg = "the server ended the connection in a body"
                raise EOFError(msg)
            filled += count

    def close(self) -> None:
        """Ends it."""
        self._socket.close()

    def _receive(self, into: memoryview) -> int:
        if self._is_tls:
            return self._socket.recv_into(into)
        return self._socket.recv_into(into, len(into), socket.MSG_WAITALL)

    def _send_head(self, method: str, target: str, more: str) -> None:
        self._socket.sendall(f"{method} {target} HTTP/1.1\r\nHost: {self._netloc}\r\n{more}\r\n".encode())

    def _reply(self, status: int) -> tuple[bytes, bytes]:
        """A reply whose body is small."""
        head, body = self._read_head()
        found = re.search(rb"(?im)^content-length: *(\d+)", head)
        nbytes = int(found[1]) if found else 0
        if re.search(rb"(?im)^transfer-encoding: *chunked", head):
            while not body.endswith(b"0\r\n\r\n"):
                body += self._more()
        while len(body) < nbytes:
            body += self._more()
        _check(head, status, body)
        return head, body

    def _read_head(self) -> tuple[bytes, bytes]:
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                data += self._more()
            head, _, rest = data.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 100"):
                return head, rest
            data = rest

    def _more(self) -> bytes:
        data = self._socket.recv(_MOST_HEAD_NBYTES)
        if not data:
            msg = "the server ended the connection"
            raise EOFError(msg)
        return data


def _check(head: bytes, status: int, body: bytes = b"") -> None:
    if not head.startswith(f"HTTP/1.1 {status}".encode()) or b"<Error>" in body:
        raise RuntimeError(f"the server replied {head[:200].decode(errors='replace')} {body[:400]!r}")
