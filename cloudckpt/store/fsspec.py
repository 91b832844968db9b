"""Any fsspec file system that the user has, as a store.

Law: the only file that knows fsspec's interface. Its calls block, so each runs in a worker thread, whole.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, TypeVar

from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from cloudckpt.errors import (
    BucketNotFoundError,
    CheckpointError,
    CredentialsError,
    MissingLibraryError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PreconditionFailedError,
    StoreError,
    StoreUnavailableError,
    UsageError,
)
from cloudckpt.ranges import Range
from cloudckpt.store.addresses import shown
from cloudckpt.store.local import LocalStore, verify
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

T = TypeVar("T")
_VERSIONS = ("generation", "ETag", "etag")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")
"""What file systems call that which changes with an object; the first that one has is taken."""


def fsspec_store(url: str, filesystem: AbstractFileSystem | None) -> "FsspecStore | LocalStore":
    """The store at a URL of a file system.

    Args:
        url: whose scheme is one of the file system's.
        filesystem: made by the user; None makes one of the URL's scheme, with the defaults of its library.

    Raises:
        MissingLibraryError: fsspec knows the scheme, and its library is not installed.
        UsageError: the scheme is another's, or the file system serves event loops only.
    """
    scheme = url.partition("://")[0]
    fs = _made(scheme, url) if filesystem is None else filesystem
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)
    if scheme not in protocols:
        msg = f"filesystem= serves {', '.join(f'{p}://' for p in protocols)} and the URL begins with {scheme}://"
        raise UsageError(msg)
    if getattr(fs, "asynchronous", False):
        msg = "filesystem= was made with asynchronous=True; make one without: it is called from worker threads"
        raise UsageError(msg)
    path = str(fs._strip_protocol(url))
    while isinstance(fs, DirFileSystem):
        path, fs = fs._join(path), fs.fs
    return LocalStore(path) if isinstance(fs, LocalFileSystem) else FsspecStore(fs, path, url)


def _made(scheme: str, url: str) -> AbstractFileSystem:
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except ImportError as e:
        msg = f"{url} needs a library that is not installed: {e}"
        raise MissingLibraryError(msg) from e
    except Exception as e:
        msg = f"{url}: fsspec makes no {scheme} file system without more to go by ({shown(e)}); pass filesystem="
        raise UsageError(msg) from e


@dataclass(slots=True)
class _Writing:
    """An upload under way: a file that is written in order. Parts that come early wait, copied, for those before."""

    file: Any
    next_number: int = 1
    early: dict[int, bytes] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class FsspecStore:
    """Implements `Store` over a directory of a file system.

    An object is put by ``pipe_file``. `IfAbsent` is its ``mode="create"`` where the file system has one of its own,
    and else no condition at all, which those who ask find out. `IfMatch` compares, then writes: two writers that
    replace the same object at the same moment are not kept apart. An upload is one file that is opened with
    ``autocommit=False``: what an interruption leaves of it only the file system knows.
    """

    def __init__(self, filesystem: AbstractFileSystem, path: str, url: str) -> None:
        """Roots a store at a path of a file system; ``url`` is for messages."""
        self._fs = filesystem
        self._root = path.rstrip("/")
        self._creates = _creates(filesystem)
        self._writing: dict[str, _Writing] = {}
        self.url = url.rstrip("/")
        self.identity = f"fsspec {type(filesystem).__name__} {self.url.partition('://')[2].partition('/')[0]}"

    async def get(self, key: str) -> Blob:
        """See `Get.get`. Two requests: what comes with its bytes tells no version."""

        def read() -> Blob:
            info = self._info(key)
            if info["size"] > MAX_GET_NBYTES:
                raise too_large_to_get(f"{self.url}/{key}", MAX_GET_NBYTES)
            return Blob(data=bytes(self._fs.cat_file(self._path(key))), etag=_etag(info))

        return await self._do(key, read)

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `Get.get_range`."""

        def read() -> None:
            data = memoryview(self._fs.cat_file(self._path(key), start=at.start, end=at.stop))
            if len(data) != len(at):
                msg = f"{self.url}/{key} ends before byte {at.stop}"
                raise StoreError(msg)
            for view in into:
                view[:] = data[: len(view)]
                data = data[len(view) :]

        await self._do(key, read)

    async def get_first(self, key: str, nbytes: int) -> bytes:
        """See `Get.get_first`."""

        def read() -> bytes:
            stop = min(nbytes, self._info(key)["size"])  # many refuse a range of an empty object
            return bytes(self._fs.cat_file(self._path(key), start=0, end=stop)) if stop else b""

        return await self._do(key, read)

    async def head(self, key: str) -> ObjectInfo:
        """See `Get.head`."""
        return await self._do(key, lambda: self._told(key, self._info(key)))

    async def put(
        self, key: str, body: Body, *, condition: Condition | None = None, crc32c: int | None = None
    ) -> str:
        """See `Put.put`. The ETag is asked for after, by a request of its own."""

        def write() -> str:
            verify(body, crc32c, f"{self.url}/{key}")
            if isinstance(condition, IfMatch):
                self._check(key, condition)
            mode = {"mode": "create"} if isinstance(condition, IfAbsent) and self._creates else {}
            self._fs.pipe_file(self._path(key), b"".join(body), **mode)
            return _etag(self._info(key))

        return await self._do(key, write, writes=True)

    async def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `List.list_objects`."""
        for found in await self._do(prefix, lambda: self._found(prefix)):
            yield found

    async def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """See `List.list_names`."""
        rest = [info.key[len(prefix) :] for info in await self._do(prefix, lambda: self._found(prefix))]
        for name in sorted({r.partition("/")[0] for r in rest if "/" in r}):
            yield name

    async def delete(self, keys: Sequence[str]) -> None:
        """See `Delete.delete`."""
        for key in keys:
            await self._do(key, lambda key=key: self._remove(key))  # type: ignore[misc]

    async def delete_if(self, key: str, condition: IfMatch) -> None:
        """See `Delete.delete_if`."""

        def remove() -> None:
            self._check(key, condition)
            self._remove(key)

        await self._do(key, remove)

    async def create_upload(self, key: str) -> Upload:
        """See `Multipart.create_upload`."""
        file = await self._do(key, lambda: self._fs.open(self._path(key), "wb", autocommit=False), writes=True)
        upload = Upload(key=key, upload_id=token_hex(8))
        self._writing[upload.upload_id] = _Writing(file)
        return upload

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`. What fails here fails the upload: a file is not written again from its middle."""
        del offset
        part = Part(number=number, etag=f"{crc32c:08x}", crc32c=crc32c)
        await self._do(upload.key, lambda: verify(body, crc32c, f"{self.url}/{upload.key} (part {number})"))
        writing = self._of(upload)
        async with writing.turn:
            if number > writing.next_number:  # to wait here could keep the part before from being sent
                writing.early[number] = b"".join(body)
            elif number == writing.next_number:
                await self._write(upload, writing, body)
        return part

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int | None) -> str:
        """See `Multipart.complete_upload`."""
        del crc32c  # each part was verified before it was written
        writing = self._of(upload)
        missing = {part.number for part in parts} - set(range(1, writing.next_number))
        if missing:
            msg = f"parts {sorted(missing)} of {self.url}/{upload.key} were never written"
            raise StoreError(msg)

        def complete() -> str:
            writing.file.close()
            writing.file.commit()
            self._forget(writing.file)
            return _etag(self._info(upload.key))

        try:
            return await self._do(upload.key, complete)
        finally:
            del self._writing[upload.upload_id]

    async def abort_upload(self, upload: Upload) -> None:
        """See `Multipart.abort_upload`."""
        writing = self._writing.pop(upload.upload_id, None)

        def abort() -> None:
            if writing is not None:
                writing.file.close()  # else it closes itself later, and fails
                writing.file.discard()
                self._forget(writing.file)
                self._remove(upload.key)  # some show a file while it is written

        await self._do(upload.key, abort)

    async def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """See `Multipart.list_uploads`: fsspec knows none."""
        del prefix
        none: tuple[Upload, ...] = ()
        for upload in none:
            yield upload

    async def _write(self, upload: Upload, writing: _Writing, body: Body) -> None:
        def write() -> None:
            for view in body:
                writing.file.write(view)

        try:
            await self._do(upload.key, write)
        except StoreUnavailableError as e:
            msg = f"{self.url}/{upload.key}: the file system failed inside the file: {e}"
            raise StoreError(msg) from e
        writing.next_number += 1
        following = writing.early.pop(writing.next_number, None)
        if following is not None:
            await self._write(upload, writing, [memoryview(following)])

    def _of(self, upload: Upload) -> _Writing:
        try:
            return self._writing[upload.upload_id]
        except KeyError:
            msg = f"no upload {upload.upload_id} to {self.url}/{upload.key} is under way"
            raise ObjectNotFoundError(msg) from None

    async def _do(self, key: str, action: Callable[[], T], *, writes: bool = False) -> T:
        try:
            return await in_thread(action)
        except CheckpointError:
            raise
        except Exception as e:
            raise _told_of(e, f"{self.url}/{key}".rstrip("/"), writes=writes) from e

    def _forget(self, file: Any) -> None:
        """What is opened with ``autocommit=False``, fsspec keeps for the end of a transaction."""
        with suppress(ValueError):
            self._fs.transaction.files.remove(file)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _info(self, key: str) -> dict[str, Any]:
        path = self._path(key)
        self._fs.invalidate_cache(path)
        info: dict[str, Any] = self._fs.info(path)
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return info

    def _told(self, key: str, info: dict[str, Any]) -> ObjectInfo:
        return ObjectInfo(key=key, size=info["size"], etag=_etag(info), modified=_modified(info))

    def _found(self, prefix: str) -> list[ObjectInfo]:
        folder = self._path(prefix).rpartition("/")[0]
        self._fs.invalidate_cache(folder)
        try:
            found = self._fs.find(folder, detail=True)
        except FileNotFoundError:
            return []
        start = len(self._root.lstrip("/")) + 1
        keys = {path.lstrip("/")[start:]: info for path, info in found.items() if info.get("type") == "file"}
        return [self._told(key, keys[key]) for key in sorted(keys) if key.startswith(prefix)]

    def _remove(self, key: str) -> None:
        try:
            self._fs.rm_file(self._path(key))
        except FileNotFoundError:
            return

    def _check(self, key: str, condition: IfMatch) -> None:
        try:
            there = _etag(self._info(key))
        except FileNotFoundError:
            there = None
        if there != condition.etag:
            msg = f"{self.url}/{key} is not the object with ETag {condition.etag} any more"
            raise PreconditionFailedError(msg)


def _creates(fs: AbstractFileSystem) -> bool:
    """Whether it has a way of its own to put what is not there; fsspec's looks first, and writes all the same."""
    kind = type(fs)
    way = getattr(kind, "_pipe_file", kind.pipe_file)
    return way is not AbstractFileSystem.pipe_file and "mode" in inspect.signature(way).parameters


def _etag(info: dict[str, Any]) -> str:
    version = next((str(info[name]).strip('"') for name in _VERSIONS if info.get(name)), None)
    changed = None if version else _time(info)
    if changed is not None:
        version = f"{round(changed.timestamp() * 1e6):x}"
    return f'"{info["size"]:x}-{version or ""}"'


def _modified(info: dict[str, Any]) -> datetime:
    return _time(info) or datetime.now(UTC)  # what tells no time is never old enough to be swept


def _time(info: dict[str, Any]) -> datetime | None:
    """Some spell it one way where an object is looked at, and another where it is listed."""
    told = next((info[name] for name in _TIMES if info.get(name)), None)
    if isinstance(told, str):
        told = datetime.fromisoformat(told)
    if isinstance(told, int | float):
        told = datetime.fromtimestamp(told, UTC)
    if not isinstance(told, datetime):
        return None
    return told if told.tzinfo else told.replace(tzinfo=UTC)


def _told_of(error: Exception, where: str, *, writes: bool) -> CheckpointError:
    told = f"{type(error).__name__}: {shown(error)}"
    match error:
        case FileNotFoundError() if writes:
            return BucketNotFoundError(
                f"{where} cannot be written, for the bucket or directory above it is not there: create it ({told})"
            )
        case FileNotFoundError() | IsADirectoryError() | NotADirectoryError():
            return ObjectNotFoundError(f"there is no object {where}")
        case FileExistsError():
            return PreconditionFailedError(f"{where} is there already")
        case PermissionError():
            return PermissionDeniedError(f"{where}: the file system does not allow it ({told})")
        case ConnectionError() | TimeoutError():
            return StoreUnavailableError(f"{where}: no answer ({told})")
        case _ if _status(error.__cause__) in {409, 412}:
            return PreconditionFailedError(f"{where}: the condition does not hold ({told})")
        case _ if "Credential" in type(error).__name__:
            return CredentialsError(f"{where}: {told}")
        case _:
            return StoreError(f"{where}: {told}")


def _status(error: BaseException | None) -> object:
    """Of the reply that an error of botocore's holds, which s3fs tells in other words."""
    reply = getattr(error, "response", None)
    return reply.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(reply, dict) else None
