"""Directories of this machine, ``file://``: commits by temporary file and link.

Law: calls block, so each runs in a worker thread, whole.
"""

import os
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from secrets import token_hex
from typing import IO, Any, TypeVar

from awscrt.checksums import crc32c as crc32c_of
from fsspec.implementations.local import LocalFileSystem

from cloudckpt.errors import (
    ChecksumRefusedError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PreconditionFailedError,
    StoreError,
)
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import (
    MAX_GET_NBYTES,
    Blob,
    Body,
    Condition,
    IfAbsent,
    IfMatch,
    ObjectInfo,
    Part,
    Upload,
    too_large_to_get,
)
from cloudckpt.threads import in_thread

_TEMPORARY = ".cloudckpt-"
"""Begins the names of files that are not objects yet; listings leave them out."""

T = TypeVar("T")


class LocalStore:
    """Implements `Store` over a directory.

    An object is a file; one that is put appears whole, by link (which fails where the name is taken) or by
    rename. An upload is a temporary file that parts are written into at their offsets. ETags are made of
    inode, size and modification time. `IfAbsent` keeps any number of writers apart; `IfMatch` compares, then
    renames, so two processes that replace the same object at the same moment are not kept apart. Directories
    that deletions leave empty stay.
    """

    def __init__(self, path: str, filesystem: LocalFileSystem | None = None) -> None:
        """Roots a store at a directory, which need not exist yet."""
        self._fs = filesystem or LocalFileSystem(auto_mkdir=True)
        self._root = os.path.abspath(path)
        self.url = f"file://{self._root}"
        self.identity = "file://"

    async def get(self, key: str) -> Blob:
        """See `Get.get`."""

        def read() -> Blob:
            with self._open(key) as f:
                stat = os.fstat(f.fileno())
                if stat.st_size > MAX_GET_NBYTES:
                    raise too_large_to_get(f"{self.url}/{key}", MAX_GET_NBYTES)
                return Blob(data=f.read(stat.st_size), etag=_etag(stat))

        return await self._do(key, read)

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `Get.get_range`."""

        def read() -> None:
            with self._open(key) as f:
                f.seek(at.start)
                for view in into:
                    if f.readinto(view) != len(view):  # type: ignore[attr-defined]
                        msg = f"{self.url}/{key} ends before byte {at.stop}"
                        raise StoreError(msg)

        await self._do(key, read)

    async def get_first(self, key: str, nbytes: int) -> bytes:
        """See `Get.get_first`."""

        def read() -> bytes:
            with self._open(key) as f:
                return f.read(nbytes)

        return await self._do(key, read)

    async def head(self, key: str) -> ObjectInfo:
        """See `Get.head`."""

        def look() -> ObjectInfo:
            if self._fs.isdir(self._path(key)):
                raise IsADirectoryError(key)
            return self._info(key)

        return await self._do(key, look)

    async def put(
        self, key: str, body: Body, *, condition: Condition | None = None, crc32c: int | None = None
    ) -> str:
        """See `Put.put`."""

        def write() -> str:
            if isinstance(condition, IfMatch):
                self._check(key, condition)
            verify(body, crc32c, f"{self.url}/{key}")
            temporary = self._temporary(key)
            try:
                with self._fs.open(temporary, "wb") as f:
                    _write(f, body)
                return self._publish(temporary, key, condition)
            finally:
                _unlink(temporary)

        return await self._do(key, write)

    async def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `List.list_objects`."""
        for key in await self._do(prefix, lambda: self._keys(prefix)):
            try:
                yield await self._do(key, lambda key=key: self._info(key))  # type: ignore[misc]
            except ObjectNotFoundError:
                continue  # removed since it was listed

    async def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """See `List.list_names`."""
        rest = [k[len(prefix) :] for k in await self._do(prefix, lambda: self._keys(prefix))]
        for name in sorted({r.partition("/")[0] for r in rest if "/" in r}):
            yield name

    async def delete(self, keys: Sequence[str]) -> None:
        """See `Delete.delete`."""

        def remove() -> None:
            for key in keys:
                _unlink(self._path(key))

        await self._do("", remove)

    async def delete_if(self, key: str, condition: IfMatch) -> None:
        """See `Delete.delete_if`."""

        def remove() -> None:
            self._check(key, condition)
            _unlink(self._path(key))

        await self._do(key, remove)

    async def create_upload(self, key: str) -> Upload:
        """See `Multipart.create_upload`."""

        def create() -> Upload:
            temporary = self._temporary(key)
            self._fs.touch(temporary)
            return Upload(key=key, upload_id=os.path.basename(temporary), started=datetime.now(UTC))

        return await self._do(key, create)

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""

        def write() -> Part:
            verify(body, crc32c, f"{self.url}/{upload.key}")
            with self._fs.open(self._upload_path(upload), "r+b") as f:
                f.seek(offset)
                _write(f, body)
            return Part(number=number, etag=f'"{crc32c:08x}"', crc32c=crc32c)

        return await self._do(upload.key, write)

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int | None) -> str:
        """See `Multipart.complete_upload`."""
        del parts, crc32c  # each part was verified, and lies where it belongs
        return await self._do(upload.key, lambda: self._publish(self._upload_path(upload), upload.key, None))

    async def abort_upload(self, upload: Upload) -> None:
        """See `Multipart.abort_upload`."""

        def remove() -> None:
            _unlink(self._upload_path(upload))

        await self._do(upload.key, remove)

    async def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """See `Multipart.list_uploads`."""
        for upload in await self._do(prefix, lambda: self._uploads(prefix)):
            yield upload

    async def _do(self, key: str, action: Callable[[], T]) -> T:
        """Runs a blocking action in a thread and says in our words what it failed of."""
        try:
            return await in_thread(action)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
            msg = f"there is no file {self.url}/{key}"
            raise ObjectNotFoundError(msg) from e
        except FileExistsError as e:
            msg = f"{self.url}/{key} is there already"
            raise PreconditionFailedError(msg) from e
        except PermissionError as e:
            msg = f"{self.url}/{key}: {e.strerror}"
            raise PermissionDeniedError(msg) from e
        except OSError as e:
            msg = f"{self.url}/{key}: {e.strerror or e}"
            raise StoreError(msg) from e

    def _path(self, key: str) -> str:
        return os.path.join(self._root, key)

    def _temporary(self, key: str) -> str:
        folder, name = os.path.split(self._path(key))
        return os.path.join(folder, f"{_TEMPORARY}{token_hex(8)}-{name}")

    def _upload_path(self, upload: Upload) -> str:
        return os.path.join(os.path.dirname(self._path(upload.key)), upload.upload_id)

    def _open(self, key: str) -> IO[bytes]:
        opened: IO[bytes] = self._fs.open(self._path(key), "rb")
        return opened

    def _files(self, prefix: str) -> list[str]:
        folder = os.path.dirname(self._path(prefix + "x"))
        return sorted(self._fs.find(folder, withdirs=False))

    def _keys(self, prefix: str) -> list[str]:
        paths = (p for p in self._files(prefix) if not os.path.basename(p).startswith(_TEMPORARY))
        return [k for k in (os.path.relpath(p, self._root) for p in paths) if k.startswith(prefix)]

    def _uploads(self, prefix: str) -> list[Upload]:
        found = []
        for path in self._files(prefix):
            folder, name = os.path.split(path)
            base = name.removeprefix(_TEMPORARY).partition("-")[2]
            key = os.path.relpath(os.path.join(folder, base), self._root)
            if name.startswith(_TEMPORARY) and key.startswith(prefix):
                started = datetime.fromtimestamp(os.stat(path).st_mtime, UTC)
                found.append(Upload(key=key, upload_id=name, started=started))
        return found

    def _info(self, key: str) -> ObjectInfo:
        stat = os.stat(self._path(key))
        modified = datetime.fromtimestamp(stat.st_mtime, UTC)
        return ObjectInfo(key=key, size=stat.st_size, etag=_etag(stat), modified=modified)

    def _check(self, key: str, condition: IfMatch) -> None:
        if not os.path.exists(self._path(key)) or self._info(key).etag != condition.etag:
            msg = f"{self.url}/{key} is not the object with ETag {condition.etag} any more"
            raise PreconditionFailedError(msg)

    def _publish(self, temporary: str, key: str, condition: Condition | None) -> str:
        path = self._path(key)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
            etag = _etag(os.fstat(f.fileno()))
        if isinstance(condition, IfAbsent):
            os.link(temporary, path)
        else:
            if condition is not None:  # looked at again, since what was written until now took its time
                self._check(key, condition)
            os.replace(temporary, path)
        _sync_folders(os.path.dirname(path), os.path.dirname(self._root))
        return etag


def _write(f: IO[Any], body: Body) -> None:
    for view in body:
        f.write(view)


def _sync_folders(folder: str, top: str) -> None:
    """Makes a file's name durable, and those of the folders above it, which may be as new as it is."""
    while True:
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
        if folder in {top, os.path.dirname(folder)}:
            return
        folder = os.path.dirname(folder)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def verify(body: Body, crc32c: int | None, where: str) -> None:
    """Looks whether a body has that CRC32C, in place of a server.

    Raises:
        ChecksumRefusedError: it has another.
    """
    if crc32c is None:
        return
    found = 0
    for view in body:
        found = crc32c_of(view, found)
    if found != crc32c:
        msg = f"the body of {where} does not match its CRC32C"
        raise ChecksumRefusedError(msg)


def _etag(stat: os.stat_result) -> str:
    return f'"{stat.st_ino:x}-{stat.st_size:x}-{stat.st_mtime_ns:x}"'
