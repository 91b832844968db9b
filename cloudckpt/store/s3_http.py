"""aiobotocore's HTTP session, with bodies sent as they lie in memory and nothing sent twice.

Law: no S3 here, only HTTP; whatever is not changed is aiobotocore's own.
"""

import asyncio
import io
import ssl
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Self

from aiobotocore.httpsession import AIOHTTPSession
from aiohttp import ClientResponse, ClientResponseError, ClientSession
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload
from botocore.exceptions import BotoCoreError, ConnectionClosedError

from cloudckpt.errors import UsageError
from cloudckpt.store.addresses import shown
from cloudckpt.store.send import send
from cloudckpt.store.silence import heard

_MOST_IN_MEMORY = 64 << 20
"""A page that lists 1,000 keys of 1,024 bytes, each character of them escaped, takes less than a fifth of it."""
_DECLARES = b"<!DOCTYPE"
"""Begins what makes XML grow without end, or name files; botocore's parser knows UTF-8 alone."""
_REDIRECTS = (301, 302, 303, 307, 308)

_AUTHORITIES = "ca_bundle=, AWS_CA_BUNDLE, ca_bundle of AWS's config file, or REQUESTS_CA_BUNDLE"

_contexts: dict[bool | str, ssl.SSLContext] = {}
"""By what they verify against; shared by the sessions of the process."""


class ViewsBody(io.RawIOBase):
    """A request body that is a run of buffers: file-like for botocore, which only measures it.

    The buffers are not copied; they must not change until the request is done.
    """

    def __init__(self, views: Sequence[memoryview]) -> None:
        """Takes views of bytes (``itemsize`` 1)."""
        super().__init__()
        self.views = tuple(views)
        self.nbytes = sum(len(view) for view in views)
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position that the next read starts at."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Moves the position, as `io.IOBase.seek` defines it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.nbytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fills ``buffer`` from the position; for clients that must read, such as a hash."""
        out = memoryview(buffer).cast("B")
        start, filled = self._position, 0
        for view in self.views:
            if start < len(view) and filled < len(out):
                taken = min(len(view) - start, len(out) - filled)
                out[filled : filled + taken] = view[start : start + taken]
                filled += taken
            start = max(0, start - len(view))
        self._position += filled
        return filled


class _ViewsPayload(Payload):
    """The same body as aiohttp wants it."""

    def __init__(self, body: ViewsBody, stall_s: float | None) -> None:
        super().__init__(body.views)
        self._size = body.nbytes
        self._stall_s = stall_s
        self.is_sent = False

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        del encoding, errors
        raise TypeError("a body of bytes is not text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        await send(writer, self._value, stall_s=self._stall_s)
        self.is_sent = True

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        del content_length  # botocore took it from this very body
        await self.write(writer)


class UnfitReplyError(Exception):
    """A reply that is not read to its end, or not understood."""


class _BoundedResponse(ClientResponse):
    """A reply that is read whole, as all are but an object's bytes: only up to a size, and only if it is plain."""

    def __init__(self, *args: Any, silence_s: float | None, **more: Any) -> None:
        super().__init__(*args, **more)
        self._silence_s = silence_s

    async def read(self) -> bytes:
        if self._body is None:
            try:
                body = await _read_at_most(_MOST_IN_MEMORY, self._next)
                self._body = _plain(body, is_success=self.status < 300)
            except BaseException:
                self.close()
                raise
        return await super().read()

    async def _next(self) -> bytes:
        return await heard(self.content.readany(), self._silence_s)


async def _read_at_most(most: int, read: Callable[[], Awaitable[bytes]]) -> bytes:
    pieces, nbytes = [], 0
    while piece := await read():
        pieces.append(piece)
        nbytes += len(piece)
        if nbytes > most:
            msg = f"the server's answer has more than {most} bytes; it may not speak S3"
            raise UnfitReplyError(msg)
    return b"".join(pieces)


def _plain(body: bytes, *, is_success: bool) -> bytes:
    if _DECLARES not in body:
        return body
    if is_success:
        msg = "the server's answer declares a document type; it may not speak S3"
        raise UnfitReplyError(msg)
    return b""  # a page of HTML, mostly, of which the status says what is to be known


class RedirectedError(BotoCoreError):  # type: ignore[misc]
    """The server sends the request elsewhere, and not to another region of S3."""

    fmt = "the server redirects to {location} (HTTP {status}); if that is the right one, pass it as endpoint_url="


class _WithoutRedirects:
    """An aiohttp session, of which aiobotocore uses one method, that follows no redirect.

    aiohttp would take the session token to the other server, and a signature that is not for it; botocore goes to the
    region that a redirect names.
    """

    def __init__(self, session: ClientSession) -> None:
        self._session = session

    async def request(self, method: str, **more: Any) -> ClientResponse:
        return await self._session.request(method, allow_redirects=False, **more)


class OneAttemptSession(AIOHTTPSession):  # type: ignore[misc]
    """Sends each request once; `ViewsBody` bodies go out by their views."""

    async def __aenter__(self) -> Self:
        if not self._verify:  # by an empty AWS_CA_BUNDLE or REQUESTS_CA_BUNDLE, which not every botocore refuses
            msg = f"certificates are always verified: {_AUTHORITIES} is empty; unset it, or name the file"
            raise UsageError(msg)
        try:
            await asyncio.to_thread(self._build_ssl_contexts, None)
        except OSError as e:
            msg = f"the certificate authorities cannot be read ({e.strerror or e}); see {_AUTHORITIES}"
            raise UsageError(msg) from e
        await super().__aenter__()
        return self

    async def _get_session(self, proxy_url: str | None) -> "_WithoutRedirects":
        session: ClientSession = await super()._get_session(proxy_url)
        # aiohttp re-sends idempotent requests, PUT among them, when a kept-alive connection was lost: a
        # conditional PUT that had landed would then be answered 412. aiohttp's own test client uses this switch.
        session._retry_connection = False
        session._response_class = partial(_BoundedResponse, silence_s=self._timeout.sock_read)  # type: ignore[assignment]
        return _WithoutRedirects(session)

    def _build_ssl_contexts(self, proxy_url: str | None) -> tuple[ssl.SSLContext, ssl.SSLContext | None]:
        # Reading the certificate authorities takes tens of milliseconds, for plain http too. A context that
        # carries a client's certificate, or a proxy's, is not shared.
        if proxy_url or self._cert_file:
            own: tuple[ssl.SSLContext, ssl.SSLContext | None] = super()._build_ssl_contexts(proxy_url)
            return own
        if self._verify not in _contexts:
            _contexts[self._verify] = super()._build_ssl_contexts(None)[0]
        return _contexts[self._verify], None

    async def send(self, request: Any) -> Any:
        """Sends a prepared request; see `AIOHTTPSession.send`."""
        reply = await self._send_tellably(request)
        # botocore goes to the region that a redirect names; where none is named it asks HEAD for one, which is
        # redirected too, without end.
        if reply.status_code in _REDIRECTS and "x-amz-bucket-region" not in reply.headers:
            await reply.content  # so that the connection goes back
            location = reply.headers.get("location", "").partition("?")[0]  # the rest may be a signature
            raise RedirectedError(location=shown(location), status=reply.status_code)
        return reply

    async def _send_tellably(self, request: Any) -> Any:
        # aiohttp's error shows the request's headers, and a proxy's password: what it was is told without it.
        try:
            return await self._send_once(request)
        except BotoCoreError as e:
            cause = e.kwargs.get("error")
            if not isinstance(cause, ClientResponseError):
                raise
            failed = type(e)(**e.kwargs | {"error": f"{type(cause).__name__}: {cause.status}, {cause.message}"})
        raise failed

    async def _send_once(self, request: Any) -> Any:
        body = request.body
        if not isinstance(body, ViewsBody):
            return await super().send(request)
        # aiohttp waits for "100 Continue" without end, and not every gateway sends it.
        request.headers.pop("Expect", None)
        request.body = payload = _ViewsPayload(body, self._timeout.sock_read)
        try:
            reply = await super().send(request)
        finally:
            request.body = body  # botocore rewinds it to follow a redirect to another region
        if body.nbytes and not payload.is_sent and reply.status_code < 300:
            raise ConnectionClosedError(endpoint_url=request.url)  # aiohttp stops sending once it has the answer
        return reply
