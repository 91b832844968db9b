"""The only retries of the house: a store that asks another store again.

Law: what is retried is decided by the error's class. A conditional request that may have been carried out is never
retried here, for only `engine.commit` can tell whether a lost put landed.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar, cast

from cloudckpt.errors import (
    ChecksumRefusedError,
    ChecksumsNotKnownError,
    ObjectNotFoundError,
    StaleCredentialsError,
    StoreError,
    StoreUnavailableError,
)
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import (
    Blob,
    Body,
    Condition,
    CopiesParts,
    IfMatch,
    Moves,
    ObjectInfo,
    Part,
    Store,
    Upload,
)
from cloudckpt.store.traffic import Traffic

log = logging.getLogger(__name__)
T = TypeVar("T")
_MANY_NBYTES = 4 << 20
"""Less is not worth a client on another event loop."""
_MOST_DOUBLINGS = 60
"""More would only overflow."""
_NOT_CARRIED_OUT = (StaleCredentialsError, ChecksumsNotKnownError)
"""Refusals after which the next attempt is another: even a conditional request may be made again."""
_RETRIED = (StoreUnavailableError, ChecksumRefusedError, *_NOT_CARRIED_OUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryOptions:
    """How long a store is asked again.

    Attributes:
        retry_deadline_s: from an operation's first failure (of a listing: from the first since its last new result);
            no attempt begins after it.
        retry_base_s, retry_cap_s: the n-th wait is uniform between 0 and
            ``min(retry_cap_s, retry_base_s * 2**n)`` (full jitter:
            aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter), or what the server asks for by
            ``Retry-After`` if that is longer, but not above ``retry_cap_s``.
    """

    retry_deadline_s: float = 60
    retry_base_s: float = 0.1
    retry_cap_s: float = 5


class RetryingStore:
    """Implements `Store` over another. A listing is asked again from its beginning, and yields nothing twice.

    Attributes:
        retries: how often something was asked again so far.
    """

    def __init__(self, store: Store, options: RetryOptions, traffic: Traffic, others: Sequence[Moves] = ()) -> None:
        """Wraps a store.

        Args:
            store: is asked.
            options: how long.
            traffic: what requests for many bytes go through, each attempt for itself.
            others: ways to the same store, which take turns with it at moving many bytes.
        """
        self._store = store
        self._movers: Iterator[Moves] = cycle([store, *others])
        self._options = options
        self._traffic = traffic
        self._keys_of_several: set[str] = set()  # whose uploads may have been begun more than once
        self.retries = 0
        self.url = store.url
        self.identity = store.identity

    async def get(self, key: str) -> Blob:
        """See `Get.get`."""
        return await self._retry(lambda: self._store.get(key))

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `Get.get_range`."""
        await self._retry(lambda: self._traffic.get_range(self._mover(len(at)), key, at, into))

    async def get_first(self, key: str, nbytes: int) -> bytes:
        """See `Get.get_first`."""
        return await self._retry(lambda: self._store.get_first(key, nbytes))

    async def head(self, key: str) -> ObjectInfo:
        """See `Get.head`."""
        return await self._retry(lambda: self._store.head(key))

    async def put(
        self, key: str, body: Body, *, condition: Condition | None = None, crc32c: int | None = None
    ) -> str:
        """See `Put.put`."""
        if condition is not None:
            return await self._retry(
                lambda: self._store.put(key, body, condition=condition, crc32c=crc32c), _NOT_CARRIED_OUT
            )
        return await self._send(key, _nbytes(body), lambda: self._store.put(key, body, crc32c=crc32c))

    def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `List.list_objects`."""
        return self._list(lambda: self._store.list_objects(prefix), lambda found: found.key)

    def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """See `List.list_names`."""
        return self._list(lambda: self._store.list_names(prefix), lambda name: name)

    async def delete(self, keys: Sequence[str]) -> None:
        """See `Delete.delete`."""
        await self._retry(lambda: self._store.delete(keys))

    async def delete_if(self, key: str, condition: IfMatch) -> None:
        """See `Delete.delete_if`."""
        await self._retry(lambda: self._store.delete_if(key, condition), _NOT_CARRIED_OUT)

    async def create_upload(self, key: str) -> Upload:
        """See `Multipart.create_upload`.

        One whose answer was lost may be under way beside the one that this returns; it is aborted when that ends.
        """

        async def attempt() -> Upload:
            try:
                return await self._store.create_upload(key)
            except StoreUnavailableError:
                self._keys_of_several.add(key)
                raise

        return await self._retry(attempt)

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""
        nbytes = _nbytes(body)
        return await self._send(
            f"part {number} of {upload.key}",
            nbytes,
            lambda: self._mover(nbytes).put_part(upload, number, offset, body, crc32c=crc32c),
        )

    def copies_from(self, source: object) -> bool:
        """See `CopiesParts.copies_from`."""
        return hasattr(self._store, "copies_from") and bool(self._store.copies_from(_asked(source)))

    async def put_part_copy(
        self, upload: Upload, number: int, source: object, key: str, at: Range, *, crc32c: int | None
    ) -> Part:
        """See `CopiesParts.put_part_copy`."""
        copying = cast("CopiesParts", self._store)
        return await self._retry(
            lambda: copying.put_part_copy(upload, number, _asked(source), key, at, crc32c=crc32c),
            (StoreUnavailableError, *_NOT_CARRIED_OUT),  # what lies there is the same the next time
        )

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int | None) -> str:
        """See `Multipart.complete_upload`.

        After a lost reply, servers answer a second completion with success or with NoSuchUpload; then the
        key itself tells, for no two uploads of ours share one.
        """
        is_first = True

        async def attempt() -> str:
            nonlocal is_first
            was_first, is_first = is_first, False
            try:
                return await self._store.complete_upload(upload, parts, crc32c=crc32c)
            except ObjectNotFoundError:
                if was_first:
                    raise
                return (await self._store.head(upload.key)).etag

        etag = await self._retry(attempt)
        await self._abort_others(upload)
        return etag

    async def abort_upload(self, upload: Upload) -> None:
        """See `Multipart.abort_upload`."""
        await self._retry(lambda: self._store.abort_upload(upload))
        await self._abort_others(upload)

    def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """See `Multipart.list_uploads`."""
        return self._list(lambda: self._store.list_uploads(prefix), lambda upload: (upload.key, upload.upload_id))

    def _mover(self, nbytes: int) -> Moves:
        return next(self._movers) if nbytes >= _MANY_NBYTES else self._store

    async def _send(self, what: str, nbytes: int, request: Callable[[], Awaitable[T]]) -> T:
        return await self._retry(lambda: self._traffic.send(what, nbytes, request))

    async def _abort_others(self, upload: Upload) -> None:
        """Aborts those that nobody knows of, for the answer with their id was lost. No two of ours share a key."""
        if upload.key not in self._keys_of_several:
            return
        try:
            others = [u async for u in self.list_uploads(upload.key) if u.key == upload.key]
            for other in others:
                if other.upload_id != upload.upload_id:
                    await self._retry(lambda other=other: self._store.abort_upload(other))  # type: ignore[misc]
        except StoreError as e:
            log.warning("an upload to %s may have been left under way; sweep removes it: %s", upload.key, e)
        else:
            self._keys_of_several.discard(upload.key)

    async def _list(
        self, listing: Callable[[], AsyncIterator[T]], identity: Callable[[T], object]
    ) -> AsyncIterator[T]:
        seen: set[object] = set()
        patience = _Patience(self._options)
        while True:
            try:
                async for found in listing():
                    if (this := identity(found)) not in seen:
                        seen.add(this)
                        patience = _Patience(self._options)
                        yield found
                return
            except _RETRIED as e:
                if not await patience.waits_after(e):
                    raise
                self.retries += 1

    async def _retry(
        self, attempt: Callable[[], Awaitable[T]], retried: tuple[type[StoreError], ...] = _RETRIED
    ) -> T:
        patience = _Patience(self._options)
        while True:
            try:
                return await attempt()
            except retried as e:
                if not await patience.waits_after(e):
                    raise
                self.retries += 1


class _Patience:
    """How often, and when, one operation is asked again."""

    def __init__(self, options: RetryOptions) -> None:
        self._options = options
        self._end = math.inf
        self._tries = 0

    async def waits_after(self, error: StoreError) -> bool:
        """Waits for the next attempt, if there is to be one; else the error is told why not."""
        o = self._options
        wait = random.uniform(0, min(o.retry_cap_s, o.retry_base_s * 2 ** min(self._tries, _MOST_DOUBLINGS)))  # noqa: S311 - no secret
        if isinstance(error, StoreUnavailableError) and error.retry_after_s is not None:
            wait = max(wait, min(o.retry_cap_s, error.retry_after_s))
        if not self._tries:
            self._end = time.monotonic() + o.retry_deadline_s
        self._tries += 1
        if time.monotonic() + wait >= self._end:
            error.add_note(f"gave up after {self._tries} attempt(s) in {o.retry_deadline_s:g} s")
            return False
        log.warning("attempt %d failed, next in %.2f s: %s", self._tries, wait, error)
        await asyncio.sleep(wait)
        return True


def _asked(store: object) -> object:
    """The store that is asked again."""
    return store._store if isinstance(store, RetryingStore) else store


def _nbytes(body: Body) -> int:
    return sum(map(len, body))
