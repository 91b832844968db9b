"""What object stores over HTTP have in common: an object is a URL that is got, put and deleted.

Law: one attempt for each request; no cloud is known here. Bodies go out and come in as they lie in memory, over the
session that S3's requests go over.
"""

import asyncio
import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, urlencode
from weakref import WeakKeyDictionary
from xml.etree.ElementTree import Element, ParseError, fromstring

from botocore.awsrequest import AWSPreparedRequest
from botocore.utils import get_environ_proxies

from cloudckpt.errors import (
    BucketNotFoundError,
    CheckpointError,
    CredentialsError,
    NotImplementedByStoreError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PreconditionFailedError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
    unwrap,
)
from cloudckpt.ranges import Range
from cloudckpt.store.addresses import shown
from cloudckpt.store.protocols import (
    MAX_GET_NBYTES,
    Blob,
    Body,
    Condition,
    IfMatch,
    ObjectInfo,
    too_large_to_get,
)
from cloudckpt.store.receive import receive
from cloudckpt.store.s3_errors import translated
from cloudckpt.store.s3_http import OneAttemptSession, ViewsBody
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.silence import heard

Meaning = tuple[type[StoreError], str]
_PIECE_NBYTES = 1 << 20
_DELETES_AT_A_TIME = 16

_BY_STATUS: dict[int, Meaning] = {
    401: (CredentialsError, "the credentials are not accepted"),
    403: (PermissionDeniedError, "the credentials do not allow this request"),
    404: (ObjectNotFoundError, "no such object"),
    409: (PreconditionFailedError, "another write to the same key is under way"),
    412: (PreconditionFailedError, "the condition of the request does not hold"),
    416: (StoreError, "the object is shorter than the range asked for"),
    429: (ThrottledError, "the server asks for fewer requests"),
    501: (NotImplementedByStoreError, "the server does not know this kind of request"),
    503: (ThrottledError, "the server is overloaded"),
}

_Kept = dict[object, OneAttemptSession]
_sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, _Kept] = WeakKeyDictionary()


def _leave_to_parent() -> None:
    """In a forked process: never frees the parent's sessions, for that would close sockets that the parent uses."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(list(_sessions.items())))
    _sessions.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@asynccontextmanager
async def http_session(url: str, options: S3Options, *, is_kept: bool) -> AsyncIterator[OneAttemptSession]:
    """A session to a server.

    Args:
        url: of the server.
        options: timeouts, connections and authorities.
        is_kept: leave it open for the next user on this loop; `close_kept` closes it then.
    """
    o = options
    verify = o.ca_bundle or os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE") or True
    proxies = get_environ_proxies(url)
    made = OneAttemptSession(
        verify=verify,
        proxies=proxies,
        timeout=(o.connect_timeout_s, o.read_timeout_s),
        max_pool_connections=o.max_connections,
    )
    if not is_kept:
        async with made:
            yield made
        return
    kept = _sessions.setdefault(asyncio.get_running_loop(), {})
    key = verify, tuple(sorted(proxies.items())), o.connect_timeout_s, o.read_timeout_s, o.max_connections
    if key not in kept:
        await made.__aenter__()
        if kept.setdefault(key, made) is not made:  # another was opened meanwhile
            await made.__aexit__(None, None, None)
    yield kept[key]


async def close_kept() -> None:
    """Closes the sessions that are kept on this loop."""
    kept = _sessions.get(asyncio.get_running_loop(), {})
    while kept:
        await kept.popitem()[1].__aexit__(None, None, None)


class Reply:
    """A server's answer of success."""

    def __init__(self, reply: Any) -> None:
        """Takes aiobotocore's; its headers are in small letters."""
        self.status: int = reply.status_code
        self.headers: Mapping[str, str] = reply.headers
        self.raw = reply.raw

    def first(self, name: str) -> str:
        """A header that must be there."""
        return self.headers[name]

    def all(self, name: str) -> str:
        """A header that may be there more than once."""
        return ", ".join(self.raw.headers.getall(name, ()))


class RestStore(ABC):
    """What of `Store` is the same for all: subclasses tell how requests are signed and what headers are called.

    Attributes:
        url: see `Store.url`.
        identity: see `Store.identity`.
    """

    def __init__(self, scheme: str, bucket: str, prefix: str, endpoint_url: str, session: OneAttemptSession) -> None:
        """Roots a store at ``scheme://bucket/prefix``; the prefix is empty, or ends in ``/``."""
        self._bucket_url = f"{endpoint_url.rstrip('/')}/{bucket}"
        self._prefix = prefix
        self._session = session
        self.url = f"{scheme}://{bucket}/{prefix}".rstrip("/")
        self.identity = self._bucket_url

    @abstractmethod
    async def _signed(self, method: str, url: str, headers: dict[str, str], body: Body) -> tuple[str, dict[str, str]]:
        """The URL and the headers to send, with what shows who asks."""

    @abstractmethod
    def _code(self, reply: Any, body: bytes) -> str:
        """What the server calls the error that it answered."""

    @abstractmethod
    def _meaning(self, code: str) -> Meaning | None:
        """What that means, unless its status says so."""

    @abstractmethod
    def _etag(self, headers: Mapping[str, str]) -> str:
        """What tells an object's versions apart, and conditions take."""

    @abstractmethod
    def _conditions(self, condition: Condition | None) -> dict[str, str]:
        """The headers of a conditional request."""

    @abstractmethod
    async def _checksums(self, body: Body, crc32c: int | None, where: str) -> dict[str, str]:
        """The headers by which the server verifies a body."""

    def _put_headers(self) -> dict[str, str]:
        """What all puts of objects carry."""
        return {}

    async def get(self, key: str) -> Blob:
        """See `Get.get`."""
        async with self._streamed(key, {}) as reply:
            pieces, nbytes = [], 0
            while piece := await self._heard(reply.raw.content.read(_PIECE_NBYTES)):
                pieces.append(piece)
                nbytes += len(piece)
                if nbytes > MAX_GET_NBYTES:
                    raise too_large_to_get(self._where(key), MAX_GET_NBYTES)
            return Blob(data=b"".join(pieces), etag=self._etag(reply.headers))

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `Get.get_range`."""
        async with self._streamed(key, {"Range": f"bytes={at.start}-{at.stop - 1}"}) as reply:
            if reply.status != 206 or int(reply.first("content-length")) != len(at):
                msg = f"{self._where(key)} ends before byte {at.stop}, or its server does not serve ranges"
                raise StoreError(msg)
            await receive(reply.raw, into, silence_s=self._session._timeout.sock_read)

    async def get_first(self, key: str, nbytes: int) -> bytes:
        """See `Get.get_first`."""
        if not nbytes:
            await self.head(key)
            return b""
        async with self._streamed(key, {"Range": f"bytes=0-{nbytes - 1}"}, also={416}) as reply:
            if reply.status == 416:
                return b""  # no range of an empty object can be satisfied: RFC 9110, 14.1.2
            data = bytearray()
            while len(data) < nbytes and (piece := await self._heard(reply.raw.content.read(nbytes - len(data)))):
                data += piece
            return bytes(data)

    async def head(self, key: str) -> ObjectInfo:
        """See `Get.head`."""
        reply = await self._ask("HEAD", key)
        with self._understood(self._where(key)):
            return ObjectInfo(
                key=key,
                size=int(reply.first("content-length")),
                etag=self._etag(reply.headers),
                modified=parsedate_to_datetime(reply.first("last-modified")),
            )

    async def put(
        self, key: str, body: Body, *, condition: Condition | None = None, crc32c: int | None = None
    ) -> str:
        """See `Put.put`."""
        headers = self._put_headers() | self._conditions(condition)
        headers |= await self._checksums(body, crc32c, self._where(key))
        reply = await self._ask("PUT", key, headers=headers, body=body)
        with self._understood(self._where(key)):
            return self._etag(reply.headers)

    async def delete(self, keys: Sequence[str]) -> None:
        """See `Delete.delete`: a request for each key, some at a time."""
        waiting = iter(keys)

        async def remove() -> None:
            for key in waiting:
                await self._ask("DELETE", key, also={404})

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(len(keys), _DELETES_AT_A_TIME)):
                    group.create_task(remove())
        except BaseExceptionGroup as e:
            raise unwrap(e) from None

    async def delete_if(self, key: str, condition: IfMatch) -> None:
        """See `Delete.delete_if`."""
        await self._ask("DELETE", key, headers=self._conditions(condition))

    async def _ask(
        self,
        method: str,
        key: str | None = None,
        *,
        query: Mapping[str, str | int] | None = None,
        headers: dict[str, str] | None = None,
        body: Body = (),
        also: Collection[int] = (),
    ) -> Reply:
        """Sends a request and reads its answer whole.

        Args:
            method: of HTTP.
            key: of the object; None for the bucket.
            query: behind the ``?``.
            headers: beside those of who asks.
            body: to send.
            also: statuses that are as good as success.
        """
        where = self._where(key)
        with translated(where), self._understood(where):
            reply = await self._send(method, key, query or {}, headers or {}, body, is_streamed=False)
            content = await reply.content
            if reply.status_code >= 300:
                refused = self._refused(reply, content, key)
                if reply.status_code not in also or isinstance(refused, BucketNotFoundError):
                    raise refused
            return Reply(reply)

    async def _ask_xml(self, method: str, key: str | None, query: Mapping[str, str | int]) -> Element:
        """As `_ask`, and the answer parsed: it was read within bounds, and refused if it declares a document type."""
        reply = await self._ask(method, key, query=query)
        with self._understood(self._where(key)):
            root = fromstring(await reply.raw.read())  # noqa: S314 - see above
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
        return root

    @asynccontextmanager
    async def _streamed(self, key: str, headers: dict[str, str], also: Collection[int] = ()) -> AsyncIterator[Reply]:
        """An object's bytes on their way; its connection is closed unless they are read to the end."""
        where = self._where(key)
        with translated(where), self._understood(where):
            reply = await self._send("GET", key, {}, headers, (), is_streamed=True)
            async with reply.raw:
                if reply.status_code >= 300 and reply.status_code not in also:
                    raise self._refused(reply, await reply.content, key)
                yield Reply(reply)

    async def _send(
        self,
        method: str,
        key: str | None,
        query: Mapping[str, str | int],
        headers: dict[str, str],
        body: Body,
        *,
        is_streamed: bool,
    ) -> Any:
        path = "" if key is None else "/" + quote(self._prefix + key, safe="/~")
        asked = f"?{urlencode(query, quote_via=quote)}" if query else ""
        headers = headers | ({"Content-Length": str(sum(map(len, body)))} if method in {"PUT", "POST"} else {})
        url, headers = await self._signed(method, f"{self._bucket_url}{path}{asked}", headers, body)
        sent = ViewsBody(body) if body else None
        return await self._session.send(AWSPreparedRequest(method, url, headers, sent, is_streamed))

    def _refused(self, reply: Any, body: bytes, key: str | None) -> StoreError:
        status, code = reply.status_code, self._code(reply, body)
        kind, meaning = self._meaning(code) or _BY_STATUS.get(status) or (None, "")
        if kind is None:
            kind = StoreUnavailableError if status >= 500 or status == 408 else StoreError
            meaning = "the server had an error of its own" if status >= 500 else "the server refused the request"
        if kind is ObjectNotFoundError and key is None:
            kind, meaning = BucketNotFoundError, "no such bucket; create it, or check the URL"
        told = kind(f"{self._where(key)}: {meaning} ({shown(code) or 'no code'}, HTTP {status})")
        if isinstance(told, StoreUnavailableError):
            told.retry_after_s = _seconds(reply.headers.get("retry-after", ""))
        return told

    @contextmanager
    def _understood(self, where: str) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except (KeyError, ValueError, ParseError, OverflowError) as e:
            msg = f"{where}: the server's answer makes no sense ({type(e).__name__}: {shown(e)}); check the endpoint"
            raise StoreError(msg) from e

    async def _heard(self, reading: Any) -> bytes:
        data: bytes = await heard(reading, self._session._timeout.sock_read)
        return data

    def _where(self, key: str | None) -> str:
        return self.url if key is None else f"{self.url}/{key}"

    def _own(self, full: str, prefix: str) -> str:
        """A listed key, relative to the root."""
        if not full.startswith(self._prefix + prefix) or ".." in full.split("/"):
            msg = f"{self.url}: the server lists {full!r}, which is not below what was asked for"
            raise StoreError(msg)
        return full.removeprefix(self._prefix)

    def _name(self, full: str, prefix: str) -> str:
        """A listed common prefix, as the path segment that it is."""
        return self._own(full, prefix)[len(prefix) :].removesuffix("/")


def text(element: Element, path: str) -> str:
    """What stands in an element that must be there."""
    found = element.findtext(path)
    if found is None:
        raise KeyError(path)
    return found


def time_of(told: str) -> datetime:
    """A time as either kind of listing spells it."""
    return parsedate_to_datetime(told) if "," in told else datetime.fromisoformat(told).astimezone(UTC)


def next_page(asked: str, following: str | None, where: str) -> str | None:
    """What to ask the next page with; None at the end.

    Raises:
        StoreError: a page names itself as the next.
    """
    if following and following == asked:
        msg = f"{where}: the listing does not end: each page names itself as the next"
        raise StoreError(msg)
    return following or None


def _seconds(told: str) -> float | None:
    return float(told) if told.isdecimal() else None
