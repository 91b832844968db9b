"""A store in this process's memory: the reference that the others are measured against.

Law: as simple as the contract allows. Objects live as long as the process; ``memory://name/...`` URLs of one
process share their objects by name.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import count

from awscrt.checksums import crc32c as crc32c_of

from cloudckpt.errors import (
    ChecksumRefusedError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreError,
)
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import (
    Blob,
    Body,
    Condition,
    IfAbsent,
    IfMatch,
    ObjectInfo,
    Part,
    Upload,
)


@dataclass(frozen=True, slots=True)
class _Object:
    data: bytes
    etag: str
    modified: datetime


@dataclass(frozen=True, slots=True)
class Bucket:
    """The objects and the uploads under way of one ``memory://`` name."""

    objects: dict[str, _Object] = field(default_factory=dict)
    uploads: dict[str, tuple[Upload, dict[int, bytes]]] = field(default_factory=dict)
    upload_ids: "count[int]" = field(default_factory=count)


_buckets: dict[str, Bucket] = {}


class MemoryStore:
    """Implements `Store` over a `Bucket`."""

    def __init__(self, name: str, prefix: str = "", bucket: Bucket | None = None) -> None:
        """Roots a store at ``memory://name/prefix``.

        Args:
            name: of the bucket.
            prefix: empty, or ending in ``/``.
            bucket: in place of the process's own of that name.
        """
        self._bucket = _buckets.setdefault(name, Bucket()) if bucket is None else bucket
        self._prefix = prefix
        self.url = f"memory://{name}/{prefix}".rstrip("/")
        self.identity = f"memory://{name}"

    async def get(self, key: str) -> Blob:
        """See `Get.get`."""
        found = self._find(key)
        return Blob(data=found.data, etag=found.etag)

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `Get.get_range`."""
        data = memoryview(self._find(key).data)[at.start : at.stop]
        if len(data) != len(at):
            msg = f"{self.url}/{key} ends before byte {at.stop}"
            raise StoreError(msg)
        for view in into:
            view[:] = data[: len(view)]
            data = data[len(view) :]

    async def get_first(self, key: str, nbytes: int) -> bytes:
        """See `Get.get_first`."""
        return self._find(key).data[:nbytes]

    async def head(self, key: str) -> ObjectInfo:
        """See `Get.head`."""
        return self._info(self._prefix + key, self._find(key))

    async def put(
        self, key: str, body: Body, *, condition: Condition | None = None, crc32c: int | None = None
    ) -> str:
        """See `Put.put`."""
        self._check(key, condition)
        return self._store(key, b"".join(body), crc32c)

    async def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `List.list_objects`."""
        for key, found in sorted(self._bucket.objects.items()):
            if key.startswith(self._prefix + prefix):
                yield self._info(key, found)

    async def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """See `List.list_names`."""
        start = len(self._prefix + prefix)
        under = [k[start:] for k in self._bucket.objects if k.startswith(self._prefix + prefix)]
        for name in sorted({k.partition("/")[0] for k in under if "/" in k}):
            yield name

    async def delete(self, keys: Sequence[str]) -> None:
        """See `Delete.delete`."""
        for key in keys:
            self._bucket.objects.pop(self._prefix + key, None)

    async def delete_if(self, key: str, condition: IfMatch) -> None:
        """See `Delete.delete_if`."""
        self._check(key, condition)
        del self._bucket.objects[self._prefix + key]

    async def create_upload(self, key: str) -> Upload:
        """See `Multipart.create_upload`."""
        upload = Upload(key=key, upload_id=str(next(self._bucket.upload_ids)), started=datetime.now(UTC))
        full = Upload(key=self._prefix + key, upload_id=upload.upload_id, started=upload.started)
        self._bucket.uploads[upload.upload_id] = full, {}
        return upload

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""
        del offset
        data = b"".join(body)
        self._verify(upload.key, data, crc32c)
        self._parts(upload)[number] = data
        return Part(number=number, etag=_etag(data), crc32c=crc32c)

    def copies_from(self, source: object) -> bool:
        """See `CopiesParts.copies_from`."""
        return isinstance(source, MemoryStore)

    async def put_part_copy(
        self, upload: Upload, number: int, source: object, key: str, at: Range, *, crc32c: int | None
    ) -> Part:
        """See `CopiesParts.put_part_copy`."""
        assert isinstance(source, MemoryStore)  # noqa: S101 - see `copies_from`
        data = bytearray(len(at))
        await source.get_range(key, at, [memoryview(data)])
        found = crc32c_of(data)
        return await self.put_part(upload, number, 0, [memoryview(data)], crc32c=found if crc32c is None else crc32c)

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int | None) -> str:
        """See `Multipart.complete_upload`."""
        sent = self._parts(upload)
        try:
            data = b"".join(sent[part.number] for part in sorted(parts, key=lambda p: p.number))
        except KeyError as e:
            msg = f"part {e} of {self.url}/{upload.key} was never sent"
            raise StoreError(msg) from e
        etag = self._store(upload.key, data, crc32c)
        del self._bucket.uploads[upload.upload_id]
        return etag

    async def abort_upload(self, upload: Upload) -> None:
        """See `Multipart.abort_upload`."""
        self._bucket.uploads.pop(upload.upload_id, None)

    async def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """See `Multipart.list_uploads`."""
        for full, _ in list(self._bucket.uploads.values()):
            if full.key.startswith(self._prefix + prefix):
                key = full.key.removeprefix(self._prefix)
                yield Upload(key=key, upload_id=full.upload_id, started=full.started)

    def _find(self, key: str) -> _Object:
        try:
            return self._bucket.objects[self._prefix + key]
        except KeyError:
            msg = f"there is no object {self.url}/{key}"
            raise ObjectNotFoundError(msg) from None

    def _info(self, full_key: str, found: _Object) -> ObjectInfo:
        key = full_key.removeprefix(self._prefix)
        return ObjectInfo(key=key, size=len(found.data), etag=found.etag, modified=found.modified)

    def _check(self, key: str, condition: Condition | None) -> None:
        there = self._bucket.objects.get(self._prefix + key)
        etag = there.etag if there else None
        if (isinstance(condition, IfAbsent) and there) or (isinstance(condition, IfMatch) and etag != condition.etag):
            msg = f"{self.url}/{key} does not satisfy {condition}"
            raise PreconditionFailedError(msg)

    def _store(self, key: str, data: bytes, crc32c: int | None) -> str:
        self._verify(key, data, crc32c)
        etag = _etag(data)
        self._bucket.objects[self._prefix + key] = _Object(data, etag, datetime.now(UTC))
        return etag

    def _verify(self, key: str, data: bytes, crc32c: int | None) -> None:
        if crc32c is not None and crc32c_of(data) != crc32c:
            msg = f"the body of {self.url}/{key} does not match its CRC32C"
            raise ChecksumRefusedError(msg)

    def _parts(self, upload: Upload) -> dict[int, bytes]:
        try:
            return self._bucket.uploads[upload.upload_id][1]
        except KeyError:
            msg = f"no upload {upload.upload_id} to {self.url}/{upload.key} is under way"
            raise ObjectNotFoundError(msg) from None


def _etag(data: bytes) -> str:
    return f'"{blake2b(data, digest_size=16).hexdigest()}"'
