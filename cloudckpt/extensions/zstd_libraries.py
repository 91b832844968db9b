"""The two libraries that know Zstandard, behind one face.

Law: imported when first needed, `zstandard` before `pyzstd`; their errors leave here as ValueError.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from cloudckpt.errors import MissingLibraryError
from cloudckpt.extensions.base import Buffer

Compress = Callable[[Buffer], bytes]
"""One shot, the size in the frame's header. Not to be used by two threads at once."""


class Compressing(Protocol):
    """A frame in the making: of unknown size."""

    def compress(self, data: Buffer, /) -> bytes:
        """Takes bytes and returns some of the frame."""
        ...

    def flush(self) -> bytes:
        """Ends the frame and returns the rest of it."""
        ...


class Decompressing(Protocol):
    """A frame being restored, piece by piece."""

    @property
    def eof(self) -> bool:
        """Whether its end was reached."""
        ...

    @property
    def unused_data(self) -> bytes:
        """What was given beyond its end."""
        ...

    def decompress(self, data: Buffer, /) -> bytes:
        """Takes some of the frame and returns what that restores to."""
        ...


class Library(ABC):
    """What is asked of a library."""

    @abstractmethod
    def compressor(self, level: int, *, is_entropy_only: bool = False) -> Compress:
        """Compresses at a level; with ``is_entropy_only`` hardly looking for matches."""

    @abstractmethod
    def decompress(self, frame: memoryview, into: memoryview) -> int:
        """Restores one whole frame and returns how many bytes it made.

        Raises:
            ValueError: it is damaged, or makes more than there is room for, or other than it says.
        """

    @abstractmethod
    def compressing(self, level: int) -> Compressing:
        """Begins a frame."""

    @abstractmethod
    def decompressing(self) -> Decompressing:
        """Begins to restore a frame."""

    @property
    @abstractmethod
    def error(self) -> type[Exception]:
        """What `decompressing` raises for damaged bytes."""


_ENTROPY_ONLY = 6, 7
"""Of ``hashLog`` and ``minMatch``: the least and the greatest that the format's strategies allow."""


class Zstandard(Library):
    """Of the package ``zstandard``."""

    def __init__(self) -> None:
        """Imports it."""
        import zstandard

        self._zstd: Any = zstandard

    def compressor(self, level: int, *, is_entropy_only: bool = False) -> Compress:
        """See `Library.compressor`."""
        compressor = self._zstd.ZstdCompressor(level=level)
        if is_entropy_only:
            hash_log, min_match = _ENTROPY_ONLY
            params = self._zstd.ZstdCompressionParameters.from_level(level, hash_log=hash_log, min_match=min_match)
            compressor = self._zstd.ZstdCompressor(compression_params=params)
        made: Compress = compressor.compress
        return made

    def decompress(self, frame: memoryview, into: memoryview) -> int:
        """See `Library.decompress`."""
        try:
            with self._zstd.ZstdDecompressor().stream_reader(frame, closefd=False) as reader:
                nbytes: int = reader.readinto(into) if len(into) else 0
                more: bytes = reader.read(1)
        except self._zstd.ZstdError as e:
            raise ValueError(str(e)) from e
        return _checked(nbytes, more)

    def compressing(self, level: int) -> Compressing:
        """See `Library.compressing`."""
        made: Compressing = self._zstd.ZstdCompressor(level=level).compressobj()
        return made

    def decompressing(self) -> Decompressing:
        """See `Library.decompressing`."""
        made: Decompressing = self._zstd.ZstdDecompressor().decompressobj()
        return made

    @property
    def error(self) -> type[Exception]:
        """See `Library.error`."""
        error: type[Exception] = self._zstd.ZstdError
        return error


class Pyzstd(Library):
    """Of the package ``pyzstd``."""

    def __init__(self) -> None:
        """Imports it."""
        import pyzstd

        self._zstd: Any = pyzstd

    def compressor(self, level: int, *, is_entropy_only: bool = False) -> Compress:
        """See `Library.compressor`."""
        options = {self._zstd.CParameter.compressionLevel: level}
        if is_entropy_only:
            options[self._zstd.CParameter.hashLog], options[self._zstd.CParameter.minMatch] = _ENTROPY_ONLY
        return partial(self._zstd.compress, level_or_option=options)

    def decompress(self, frame: memoryview, into: memoryview) -> int:
        """See `Library.decompress`."""
        decompressor = self._zstd.ZstdDecompressor()
        try:
            plain: bytes = decompressor.decompress(frame, len(into)) if len(into) else b""
            more: bytes = b"" if decompressor.eof else decompressor.decompress(b"" if len(into) else frame, 1)
        except self._zstd.ZstdError as e:
            raise ValueError(str(e)) from e
        into[: len(plain)] = plain
        return _checked(len(plain), more)

    def compressing(self, level: int) -> Compressing:
        """See `Library.compressing`."""
        made: Compressing = self._zstd.ZstdCompressor(level)
        return made

    def decompressing(self) -> Decompressing:
        """See `Library.decompressing`."""
        made: Decompressing = self._zstd.ZstdDecompressor()
        return made

    @property
    def error(self) -> type[Exception]:
        """See `Library.error`."""
        error: type[Exception] = self._zstd.ZstdError
        return error


def _checked(nbytes: int, more: bytes) -> int:
    if more:
        msg = f"it restores to more than the {nbytes} bytes there should be"
        raise ValueError(msg)
    return nbytes


def library() -> Library:
    """The library that is installed.

    Raises:
        MissingLibraryError: neither is.
    """
    for kind in (Zstandard, Pyzstd):
        try:
            return kind()
        except ImportError:
            continue
    msg = "Zstandard compression needs a library: pip install 'cloudckpt[zstd]' (zstandard, or pyzstd)"
    raise MissingLibraryError(msg)
