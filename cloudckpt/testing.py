"""For testing this project, and training loops that use it.

Law: real parts first (an embedded S3 server), fakes only for what a server cannot be made to do.
"""

import asyncio
import functools
import io
import logging
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from secrets import token_hex
from typing import IO, Any, cast

from cloudckpt.engine import loop
from cloudckpt.errors import UnknownExtensionError
from cloudckpt.extensions import ExtensionRegistry, StreamTransformExtension
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import (
    Blob,
    Body,
    Condition,
    IfMatch,
    ObjectInfo,
    Part,
    Store,
    Upload,
)
from cloudckpt.store.url import StoreOptions, open_store


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedServer:
    """A running S3 server: what to give to `S3Options`, and ``environ`` for other processes."""

    endpoint_url: str
    access_key: str
    secret_key: str

    @property
    def environ(self) -> dict[str, str]:
        """AWS's own environment variables that lead a process to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def embedded_server(*buckets: str) -> Iterator[EmbeddedServer]:
    """Runs moto's S3 server in a thread of this process, on a free port of 127.0.0.1.

    Needs ``cloudckpt[server]``. What is saved to it is gone when the context ends.

    Args:
        *buckets: made at the start.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    info = EmbeddedServer(endpoint_url=f"http://{host}:{port}", access_key="testing", secret_key="testing")  # noqa: S106 - moto asks for none
    try:
        for bucket in buckets:
            _put_bucket(f"{info.endpoint_url}/{bucket}")
        yield info
    finally:
        server.stop()


def _put_bucket(url: str) -> None:
    """Makes a bucket on a server that asks for no signature, past any proxy and any AWS configuration."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, method="PUT")):  # noqa: S310 - http to this machine
        return


def with_temp_prefix(
    root: str, store: StoreOptions | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a test with a fresh prefix under ``root``, given to it as ``prefix=``.

    Where torch.distributed is initialized, all ranks get the one that the first made, and must all run the
    test. Everything under it is removed when the test ends on all ranks, however it ends.
    """

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> Any:
            prefix = _from_first_rank(f"{root.rstrip('/')}/{token_hex(8)}")
            try:
                return test(*args, prefix=prefix, **kwargs)
            finally:
                if _is_last_to_leave():
                    remove_all(prefix, store)

        return run

    return decorate


def with_checkpoint_logging(
    test: Callable[..., Any] | None = None, *, level: int = logging.DEBUG
) -> Callable[..., Any]:
    """Decorates a test so that cloudckpt's log records go to stderr while it runs."""
    if test is None:
        return functools.partial(with_checkpoint_logging, level=level)

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        logger, handler = logging.getLogger("cloudckpt"), logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(level)
        try:
            return test(*args, **kwargs)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)

    return run


def remove_all(prefix: str, store: StoreOptions | None = None) -> None:
    """Removes every object and every upload under way under a URL. For tests: it asks nobody."""

    async def remove() -> None:
        async with open_store(prefix, store) as opened:
            for upload in [u async for u in opened.list_uploads()]:
                await opened.abort_upload(upload)
            await opened.delete([found.key async for found in opened.list_objects()])

    loop.run(remove)


def _group() -> Any:
    """torch.distributed where it is in use, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _from_first_rank(text: str) -> str:
    dist = _group()
    if dist is None:
        return text
    shared = [text]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _is_last_to_leave() -> bool:
    dist = _group()
    if dist is None:
        return True
    dist.barrier()
    return bool(dist.get_rank() == 0)


_ROT13 = bytes.maketrans(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", b"NOPQRSTUVWXYZABCDEFGHIJKLMnopqrstuvwxyzabcdefghijklm"
)


class Rot13(StreamTransformExtension):
    """An example of a stream extension, as one would write it for torch: turns each ASCII letter by 13 places.

    torch's own example of the name ``stream.rot13`` does something else (it swaps case), hence the domain.
    """

    @staticmethod
    def registry_name() -> str:
        """``stream.rot13@cloudckpt``."""
        return "stream.rot13@cloudckpt"

    @staticmethod
    def from_descriptor(version: str) -> "Rot13":
        """See `Extension.from_descriptor`."""
        if version != "1":
            msg = f"stream.rot13@cloudckpt/{version} is of a version that this release does not know"
            raise UnknownExtensionError(msg)
        return Rot13()

    def get_descriptor(self) -> str:
        """See `Extension.get_descriptor`."""
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """See `StreamTransformExtension.transform_to`."""
        return cast(IO[bytes], _Rot13Stream(output))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:  # noqa: A002 - DCP's name
        """See `StreamTransformExtension.transform_from`."""
        return cast(IO[bytes], _Rot13Stream(input))


class _Rot13Stream(io.RawIOBase):
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._stream.write(bytes(data).translate(_ROT13))

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data.translate(_ROT13)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def get_test_extension_registry() -> ExtensionRegistry:
    """A registry that knows `Rot13` too."""
    registry = ExtensionRegistry()
    registry.register(Rot13)
    return registry


class WrappedStore:
    """Implements `Store` over another; subclasses look at each request before it is made and after."""

    def __init__(self, store: Store) -> None:
        """Wraps ``store``."""
        self._store = store
        self.url = store.url
        self.identity = store.identity

    async def before(self, method: str, key: str) -> None:
        """Called before a request; raising keeps it from being made."""

    async def after(self, method: str, key: str) -> None:
        """Called after the store answered; raising loses the answer."""

    async def _request(self, method: str, key: str, *args: Any, **kwargs: Any) -> Any:
        await self.before(method, key)
        reply = await getattr(self._store, method)(*args, **kwargs)
        await self.after(method, key)
        return reply

    async def get(self, key: str) -> Blob:
        """See `Get.get`."""
        reply: Blob = await self._request("get", key, key)
        return reply

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `Get.get_range`."""
        await self._request("get_range", key, key, at, into)

    async def head(self, key: str) -> ObjectInfo:
        """See `Get.head`."""
        reply: ObjectInfo = await self._request("head", key, key)
        return reply

    async def put(
        self, key: str, body: Body, *, condition: Condition | None = None, crc32c: int | None = None
    ) -> str:
        """See `Put.put`."""
        reply: str = await self._request("put", key, key, body, condition=condition, crc32c=crc32c)
        return reply

    async def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `List.list_objects`."""
        await self.before("list_objects", prefix)
        async for found in self._store.list_objects(prefix):
            yield found

    async def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """See `List.list_names`."""
        await self.before("list_names", prefix)
        async for name in self._store.list_names(prefix):
            yield name

    async def delete(self, keys: Sequence[str]) -> None:
        """See `Delete.delete`."""
        await self._request("delete", ",".join(keys), keys)

    async def delete_if(self, key: str, condition: IfMatch) -> None:
        """See `Delete.delete_if`."""
        await self._request("delete_if", key, key, condition)

    async def create_upload(self, key: str) -> Upload:
        """See `Multipart.create_upload`."""
        reply: Upload = await self._request("create_upload", key, key)
        return reply

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""
        reply: Part = await self._request("put_part", upload.key, upload, number, offset, body, crc32c=crc32c)
        return reply

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int) -> str:
        """See `Multipart.complete_upload`."""
        reply: str = await self._request("complete_upload", upload.key, upload, parts, crc32c=crc32c)
        return reply

    async def abort_upload(self, upload: Upload) -> None:
        """See `Multipart.abort_upload`."""
        await self._request("abort_upload", upload.key, upload)

    async def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """See `Multipart.list_uploads`."""
        await self.before("list_uploads", prefix)
        async for upload in self._store.list_uploads(prefix):
            yield upload


class RecordingStore(WrappedStore):
    """Remembers every request as ``(method, key)`` in ``requests``."""

    def __init__(self, store: Store) -> None:
        """Wraps ``store``."""
        super().__init__(store)
        self.requests: list[tuple[str, str]] = []

    async def before(self, method: str, key: str) -> None:
        """See `WrappedStore.before`."""
        self.requests.append((method, key))


class FailingStore(RecordingStore):
    """Fails request ``at`` (counted from 0), and no other.

    With ``is_reply_lost`` the store carries the request out first, and its answer is lost.
    """

    def __init__(self, store: Store, at: int, error: Exception, *, is_reply_lost: bool = False) -> None:
        """Wraps ``store``."""
        super().__init__(store)
        self._at = at
        self._error = error
        self._is_reply_lost = is_reply_lost
        self._losing: tuple[str, str] | None = None

    async def before(self, method: str, key: str) -> None:
        """See `WrappedStore.before`."""
        await super().before(method, key)
        if len(self.requests) == self._at + 1:
            if not self._is_reply_lost:
                raise self._error
            self._losing = method, key

    async def after(self, method: str, key: str) -> None:
        """See `WrappedStore.after`."""
        if self._losing == (method, key):
            self._losing = None
            raise self._error


class SlowStore(WrappedStore):
    """Answers each request after ``delay_s``."""

    def __init__(self, store: Store, delay_s: float) -> None:
        """Wraps ``store``."""
        super().__init__(store)
        self._delay_s = delay_s

    async def before(self, method: str, key: str) -> None:
        """See `WrappedStore.before`."""
        del method, key
        await asyncio.sleep(self._delay_s)
