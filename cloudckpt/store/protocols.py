"""What the engine asks of a store.

Law: contracts only. Every implementation runs the one conformance suite in ``tests/test_store.py``.

A store is rooted at a URL and all keys are relative to it. Every method is one request to the server (a
listing: one per page; a deletion: one per batch, or per key where the server knows no batches), is never re-sent by
the store, and raises a `StoreError`
whose class says what to do: `ObjectNotFoundError`, `BucketNotFoundError`, `CredentialsError`,
`PermissionDeniedError`, `PreconditionFailedError`, `ChecksumRefusedError`, `NotImplementedByStoreError`,
`StaleCredentialsError` and `ChecksumsNotKnownError` (may be asked again; nothing was carried out),
`StoreUnavailableError` (may be asked again; the request may have been carried out), or `StoreError` itself.

Bodies are runs of buffers, sent in order as they lie; the caller keeps them unchanged until the call returns.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from cloudckpt.errors import StoreError
from cloudckpt.ranges import Range

Body = Sequence[memoryview]

MAX_GET_NBYTES = 1 << 30
"""Of an object that is read whole into memory. A manifest of a million chunks takes an eighth of that."""


@dataclass(frozen=True, slots=True)
class IfAbsent:
    """Put only where no object has the key (``If-None-Match: *``)."""


@dataclass(frozen=True, slots=True)
class IfMatch:
    """Put or delete only the object with that ETag (``If-Match``)."""

    etag: str


Condition = IfAbsent | IfMatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """What a listing says of an object; ``modified`` is by the server's clock."""

    key: str
    size: int
    etag: str
    modified: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A small object, whole."""

    data: bytes
    etag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A multipart upload under way.

    Attributes:
        key: of the object that it becomes.
        upload_id: the store's name for it.
        started: by the server's clock, where a listing tells.
        has_checksums: whether it was begun as one whose parts carry checksums: they are sent and named, or not.
    """

    key: str
    upload_id: str
    started: datetime | None = None
    has_checksums: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part that the server acknowledged: what completing the upload needs to name.

    Attributes:
        number: from 1.
        etag: of the part, as the server spelled it.
        crc32c: of its bytes; None of those that the server copied and neither it nor the caller knows.
    """

    number: int
    etag: str
    crc32c: int | None


class GetRange(Protocol):
    """Reading some of an object."""

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """Receives the bytes ``at`` into the buffers, one after the other.

        The buffers hold ``len(at)`` bytes in all. On failure their contents are undefined, and nothing
        writes to them any more once this has raised.

        Raises:
            ObjectNotFoundError: no such object.
            StoreError: the object is shorter than ``at.stop``.
        """
        ...


class Get(GetRange, Protocol):
    """Reading."""

    async def get(self, key: str) -> Blob:
        """The whole object; for small ones.

        Raises:
            ObjectNotFoundError: no such object.
            StoreError: it has more than `MAX_GET_NBYTES`, or does not end.
        """
        ...

    async def get_first(self, key: str, nbytes: int) -> bytes:
        """The first bytes of an object: so many, or as many as it has.

        Raises:
            ObjectNotFoundError: no such object.
        """
        ...

    async def head(self, key: str) -> ObjectInfo:
        """What a listing would say of the object."""
        ...


class Put(Protocol):
    """Writing an object in one request: whole or not at all."""

    async def put(
        self, key: str, body: Body, *, condition: Condition | None = None, crc32c: int | None = None
    ) -> str:
        """Puts the object and returns its ETag.

        Raises:
            PreconditionFailedError: the condition does not hold; nothing changed.
            ChecksumRefusedError: the server found that the body has not that CRC32C; nothing changed.
        """
        ...


class List(Protocol):
    """Looking around."""

    def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """Yields the objects whose keys begin with ``prefix``, in order of their keys."""
        ...

    def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """Yields the first path segment after ``prefix`` of keys that have a ``/`` behind it, each once."""
        ...


class Delete(Protocol):
    """Removing."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Removes the objects, in batches; keys that no object has are no error."""
        ...

    async def delete_if(self, key: str, condition: IfMatch) -> None:
        """Removes the object if it is still the one with that ETag.

        Raises:
            PreconditionFailedError: it is another; nothing changed.
            NotImplementedByStoreError: the store deletes without conditions only; nothing changed.
        """
        ...


class Multipart(Protocol):
    """Writing an object in parts: it appears, whole, when the upload is completed."""

    async def create_upload(self, key: str) -> Upload:
        """Begins an upload."""
        ...

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """Sends a part; a part sent again replaces the one of that number.

        Args:
            upload: from `create_upload`.
            number: from 1 to 10,000; parts are assembled in its order.
            offset: where the part begins in the object, for stores that write in place.
            body: 5 MiB or more unless it is the last part; all but the last are of one size.
            crc32c: of the body.
        """
        ...

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int | None) -> str:
        """Makes the object of the parts and returns its ETag; ``crc32c`` is the whole object's, if it is known."""
        ...

    async def abort_upload(self, upload: Upload) -> None:
        """Discards the upload and its parts; one that is gone is no error."""
        ...

    def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """Yields the uploads under way whose keys begin with ``prefix``."""
        ...


class CopiesParts(Protocol):
    """Filling parts with what lies on the server already: their bytes do not pass through here."""

    def copies_from(self, source: object) -> bool:
        """Whether parts can be filled from that store: it is one of the same server."""
        ...

    async def put_part_copy(
        self, upload: Upload, number: int, source: object, key: str, at: Range, *, crc32c: int | None
    ) -> Part:
        """Makes a part of some bytes of an object; see `Multipart.put_part`.

        Args:
            upload: from `create_upload`.
            number: see `Multipart.put_part`.
            source: a store that `copies_from` allows.
            key: of the object in it.
            at: the bytes, 5 MiB to 5 GiB unless it is the last part.
            crc32c: that they should have, if it is known.

        Raises:
            ObjectNotFoundError: there is no such object, or no such upload.
            ChecksumRefusedError: the server copied bytes with another CRC32C.
            NotImplementedByStoreError, PermissionDeniedError: copying is not known here, or not allowed.
        """
        ...


class Moves(GetRange, Protocol):
    """What moves the bytes of checkpoints."""

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""
        ...


class Store(Get, Put, List, Delete, Multipart, Protocol):
    """All of it.

    Attributes:
        url: where the store is rooted, for messages.
        identity: the bucket and the server it is on: what "does this store honour conditions" is known for.
    """

    @property
    def url(self) -> str:
        """Where the store is rooted, without credentials."""
        ...

    @property
    def identity(self) -> str:
        """Names the server and bucket: stores with equal identities share their properties."""
        ...


def too_large_to_get(where: str, most: int) -> StoreError:
    """What `Get.get` raises of an object with more bytes than ``most``."""
    return StoreError(
        f"{where} has more than {most} bytes: too many for what is read whole (a manifest, a tombstone, an index). "
        "It is not what it is named after; check who wrote it, and the endpoint"
    )
