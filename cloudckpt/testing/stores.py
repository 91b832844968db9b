"""Stores around another store, for what a server cannot be made to do.

Law: every request is passed on, or fails as the class says; nothing else changes.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

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

    async def get_first(self, key: str, nbytes: int) -> bytes:
        """See `Get.get_first`."""
        reply: bytes = await self._request("get_first", key, key, nbytes)
        return reply

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

    def copies_from(self, source: object) -> bool:
        """See `CopiesParts.copies_from`."""
        return hasattr(self._store, "copies_from") and bool(self._store.copies_from(source))

    async def put_part_copy(
        self, upload: Upload, number: int, source: object, key: str, at: Range, *, crc32c: int | None
    ) -> Part:
        """See `CopiesParts.put_part_copy`."""
        args = upload, number, source, key, at
        reply: Part = await self._request("put_part_copy", upload.key, *args, crc32c=crc32c)
        return reply

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int | None) -> str:
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
