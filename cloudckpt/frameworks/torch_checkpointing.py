"""torch_checkpointing's files as objects.

Law: no rename. What lies in a directory is no checkpoint until a mark says that every rank has written its files.
"""

import errno
import io
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from awscrt.checksums import crc32c
from torch_checkpointing.checkpoint_writer import CallbackArgs
from torch_checkpointing.storage.base_storage import ReadArgs, Storage, StorageConfig

from cloudckpt.engine.session import Session
from cloudckpt.engine.view import FileView
from cloudckpt.errors import ObjectNotFoundError
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import Part, Store, Upload
from cloudckpt.store.url import StoreOptions, check_url

_AHEAD = 16 << 20
_MARK = ".complete"


@dataclass
class CloudStorageConfig(StorageConfig):
    """Where checkpoints lie; ids of checkpoints are paths below it.

    Example:
        >>> config = CheckpointManager.Config(
        ...     storage_config=CloudStorageConfig("s3://bucket/run"),
        ...     save=SyncCheckpointSaverConfig(writer_config=CheckpointWriterConfig(write_to_temp_dir=False)),
        ...     finalize_callback=publish,
        ... )

    Attributes:
        root: URL.
        store: how to reach the store.
        part_size: bytes that are sent in one request, and held while a file is written: 5 MiB or more.
    """

    root: str
    store: StoreOptions = field(default_factory=StoreOptions)
    part_size: int = 64 << 20

    def create_storage(self) -> "CloudStorage":
        """The storage."""
        return CloudStorage(self)


def publish(args: CallbackArgs) -> None:
    """Makes the checkpoint exist, as ``finalize_callback``: puts a mark, when all ranks have passed the barrier."""
    storage = args.storage
    assert isinstance(storage, CloudStorage)  # noqa: S101 - for the type checker
    storage.write(Path(args.path, _MARK), b"")


class CloudStorage(Storage):
    """A directory tree of objects below one URL.

    An object appears whole or not at all. A directory of a checkpoint exists when `publish` has marked it, and
    nothing is written to it after.
    """

    def __init__(self, config: CloudStorageConfig) -> None:
        """Opens nothing yet.

        Raises:
            UsageError: no store serves the URL.
        """
        self._session = Session(check_url(config.root), config.store)
        self._part_size = config.part_size

    def stream_read(self, path: Path, read_args: ReadArgs | None = None) -> io.RawIOBase:
        """A seekable file, fetched as it is read.

        Raises:
            FileNotFoundError: no such file.
        """
        key = _key(path)
        size = read_args.known_size_bytes if read_args and read_args.known_size_bytes else self.getsize(path)

        def fetch(at: Range, into: memoryview) -> None:
            self._session.run(lambda store: store.get_range(key, at, [into]))

        return FileView(fetch, size, f"{self._session.url}/{key}", max_ahead=_AHEAD)

    def read(self, path: Path, read_args: ReadArgs | None = None) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: no such file.
        """
        with self.stream_read(path, read_args) as file:
            return file.read()

    def stream_write(self, path: Path) -> io.IOBase:
        """A file to write from beginning to end; it is there when it is closed, unless its ``with`` block failed."""
        return _WrittenFile(self._session, _key(path), self._part_size)

    def write(self, path: Path, data: Any) -> None:
        """Writes a file."""
        with _WrittenFile(self._session, _key(path), self._part_size) as file:
            file.write(data)

    def delete(self, path: Path) -> None:
        """Deletes a file."""
        self._session.run(lambda store: store.delete([_key(path)]))

    def mkdir(self, path: Path, recursive: bool = True) -> None:  # noqa: FBT001, FBT002 - the library's signature
        """Nothing: there are no directories.

        Raises:
            FileExistsError: it lies in a checkpoint that was published.
        """
        del recursive
        for place in (path, *path.parents):
            if self._has(Path(place, _MARK)):
                msg = f"{self._session.url}/{_key(place)} holds a checkpoint; take another id, or remove it (rmdir)"
                raise FileExistsError(errno.EEXIST, msg)

    def rmdir(self, path: Path) -> None:
        """Deletes all that lies there, first the mark."""
        self.delete(Path(path, _MARK))
        keys = self._keys(path)
        self._session.run(lambda store: store.delete(keys))

    def rename(
        self,
        src_path: Path,
        dst_path: Path,
        is_directory: bool = False,  # noqa: FBT001, FBT002 - the library's signature
        background_cleanup: bool = False,  # noqa: FBT001, FBT002
    ) -> NoReturn:
        """Refused.

        Raises:
            OSError: always.
        """
        del src_path, dst_path, is_directory, background_cleanup
        msg = (
            "objects cannot be renamed: save with CheckpointWriterConfig(write_to_temp_dir=False) and "
            "finalize_callback=cloudckpt.frameworks.torch_checkpointing.publish"
        )
        raise OSError(errno.ENOTSUP, msg)

    def ls(self, path: Path) -> list[str]:
        """The names in a directory."""
        prefix = f"{_key(path)}/".removeprefix("/")
        return sorted({key.removeprefix(prefix).partition("/")[0] for key in self._keys(path)})

    def exists(self, path: Path) -> bool:
        """Whether there is such a file, or a checkpoint that was published."""
        return self._has(path) or self._has(Path(path, _MARK))

    def getsize(self, path: Path) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: no such file.
        """
        key = _key(path)
        try:
            return self._session.run(lambda store: store.head(key)).size
        except ObjectNotFoundError as e:
            raise FileNotFoundError(errno.ENOENT, str(e), key) from e

    def isdir(self, path: Path) -> bool:
        """Whether anything lies there."""
        return bool(self._keys(path))

    def remap_path(self, path: Path) -> str:
        """Its URL."""
        return f"{self._session.url}/{_key(path)}"

    def _has(self, path: Path) -> bool:
        try:
            self.getsize(path)
        except FileNotFoundError:
            return False
        return True

    def _keys(self, path: Path) -> list[str]:
        prefix = f"{_key(path)}/".removeprefix("/")

        async def listed(store: Store) -> list[str]:
            return [found.key async for found in store.list_objects(prefix)]

        return self._session.run(listed)


class _WrittenFile(io.RawIOBase):
    """Uploads what is written, in one request or in parts; at most a part's bytes are held."""

    def __init__(self, session: Session, key: str, part_size: int) -> None:
        super().__init__()
        self._session = session
        self._key = key
        self._part_size = part_size
        self._held = bytearray()
        self._upload: Upload | None = None
        self._parts: list[Part] = []
        self._checksum = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        """Takes all of it."""
        with memoryview(data).cast("B") as view:
            for start in range(0, len(view), self._part_size):
                self._held += view[start : start + self._part_size]
                if len(self._held) >= self._part_size:
                    self._send(self._part_size)
            return len(view)

    def close(self) -> None:
        """Makes the file exist."""
        if self.closed:
            return
        try:
            self._finish()
        except BaseException:
            self._abort()
            raise
        finally:
            super().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not self.closed:
            self._abort()
            super().close()
        self.close()

    def __del__(self) -> None:
        """Nothing: who forgets to close has written nothing."""

    def _finish(self) -> None:
        if self._upload is None:
            body = [memoryview(self._held)]
            checksum = crc32c(self._held)
            self._session.run(lambda store: store.put(self._key, body, crc32c=checksum))
            return
        upload = self._upload
        if self._held:
            self._send(len(self._held))
        self._session.run(lambda store: store.complete_upload(upload, self._parts, crc32c=self._checksum))

    def _send(self, nbytes: int) -> None:
        if self._upload is None:
            self._upload = self._session.run(lambda store: store.create_upload(self._key))
        upload, body = self._upload, bytes(self._held[:nbytes])  # a retry may still be reading what was sent
        number, checksum = len(self._parts) + 1, crc32c(body)
        offset = self._part_size * (number - 1)
        part = self._session.run(
            lambda store: store.put_part(upload, number, offset, [memoryview(body)], crc32c=checksum)
        )
        self._parts.append(part)
        self._checksum = crc32c(body, self._checksum)
        del self._held[:nbytes]

    def _abort(self) -> None:
        if self._upload is not None:
            upload = self._upload
            self._session.run(lambda store: store.abort_upload(upload))


def _key(path: Path) -> str:
    return path.as_posix().strip("/")
