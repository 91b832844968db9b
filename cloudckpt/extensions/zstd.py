"""Zstandard compression (RFC 8878).

Law: what is stored is whole Zstandard frames and nothing else; each section of a frame becomes one. No more memory
is taken to restore it than was allowed.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Self, cast

from cloudckpt.errors import IntegrityError, UnknownExtensionError, UsageError
from cloudckpt.extensions.base import Buffer, FrameCodec, FrameContext, FrameTransformExtension
from cloudckpt.extensions.zstd_frames import zstd_frames
from cloudckpt.extensions.zstd_libraries import Compress, Library, library

_STORE_LEVEL = -131072
"""``ZSTD_minCLevel()``: hardly looks at the bytes and keeps them as they are (5.5 GB/s measured)."""

_SAMPLES = 4
_SAMPLE_NBYTES = 1 << 10, 16 << 10
"""Of each sample: at least, and at most."""
_SAMPLED = 64
"""One in so many bytes is tried, as far as that allows."""
_WORTHWHILE = 0.99
"""A plane whose sample stays above this share of its size is kept as it is."""

_LEAST_WINDOW = 8 << 20
"""RFC 8878, section 3.1.1.1.2: what every decoder should support."""

_READ_NBYTES = 64 << 10
_RESTORED_NBYTES = 2 << 10
"""Of a stream, at a time: four bytes may restore to 128 KiB, and nothing bounds what the library makes of a piece."""


@dataclass(frozen=True, slots=True)
class ZStandard(FrameTransformExtension):
    """Compresses with Zstandard; reads what torch's extension of that name wrote, and the other way round.

    After `BytePlane` each plane is compressed alone, in the way that a sample of it shows best: at the level; by
    entropy alone (matches between exponents are chance: on the exponents of bf16 weights level 1 leaves 37.0 % at
    299 MB/s, entropy alone 34.2 % at 917 MB/s); or not at all.

    Attributes:
        level: 1 (fastest) to 22, or -7 to -1 (faster still, compresses less). Not needed to restore. Weights
            hardly shrink further above 1.
    """

    level: int = 1

    def __post_init__(self) -> None:
        if not -7 <= self.level <= 22 or self.level == 0:
            msg = f"ZStandard(level={self.level}): levels are 1 to 22, and -7 to -1"
            raise UsageError(msg)
        library()

    @staticmethod
    def registry_name() -> str:
        """``stream.zstd``, as torch's."""
        return "stream.zstd"

    @classmethod
    def from_descriptor(cls, version: str) -> Self:
        """See `Extension.from_descriptor`."""
        if version.partition(".")[0] != "1":
            msg = f"{cls.registry_name()}/{version} is of a version that this release does not know"
            raise UnknownExtensionError(msg)
        return cls()

    def get_descriptor(self) -> str:
        """See `Extension.get_descriptor`."""
        return f"{self.registry_name()}/1"

    def start_shard(self) -> FrameCodec:
        """See `FrameTransformExtension.start_shard`."""
        return ZstdCodec(self.level, library())

    def open_shard(self, params: Mapping[str, str]) -> FrameCodec:
        """See `FrameTransformExtension.open_shard`."""
        del params
        return self.start_shard()

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """See `StreamTransformExtension.transform_to`."""
        return cast(IO[bytes], _Writer(output, library(), self.level))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:  # noqa: A002 - DCP's name
        """See `StreamTransformExtension.transform_from`."""
        return cast(IO[bytes], _Reader(input, library()))


class ZstdCodec(FrameCodec):
    """Zstandard at work on frames."""

    is_optional = True

    def __init__(self, level: int, zstd: Library) -> None:
        """Makes no context yet."""
        self._zstd = zstd
        self._ways = (
            _Pool(lambda: zstd.compressor(level, is_entropy_only=True)),
            _Pool(lambda: zstd.compressor(level)),
            _Pool(lambda: zstd.compressor(_STORE_LEVEL)),
        )

    def transform(self, sections: Sequence[memoryview], frame: FrameContext) -> Sequence[Buffer]:
        """See `FrameCodec.transform`."""
        del frame
        _, at_level, _ = self._ways
        if len(sections) == 1:
            return [at_level(sections[0])]
        return [self._best_way(section)(section) for section in sections]

    def _best_way(self, section: memoryview) -> "_Pool":
        *compressing, store = self._ways
        sample = _sample(section)
        size, way = min(((len(way(sample)), way) for way in compressing), key=lambda found: found[0])
        return way if size <= len(sample) * _WORTHWHILE else store

    def max_stored_size(self, nbytes: int) -> int:
        """See `FrameCodec.max_stored_size`: ``ZSTD_COMPRESSBOUND`` for each of at most 17 sections."""
        return nbytes + (nbytes >> 8) + 17 * 128

    def restore(self, stored: memoryview, frame: FrameContext, *, limit: int) -> Buffer:
        """See `FrameCodec.restore`."""
        del frame
        frames = list(zstd_frames(stored))
        for part in frames:
            if part.window > max(_LEAST_WINDOW, 2 * limit):
                msg = f"it asks for {part.window} bytes of memory"
                raise ValueError(msg)
            if part.size is not None and part.size > part.max_size:
                msg = f"it claims to restore to {part.size} bytes, its blocks to no more than {part.max_size}"
                raise ValueError(msg)
        claimed = sum(part.size or 0 for part in frames)
        if claimed > limit:
            msg = f"it claims to restore to {claimed} bytes, where there should be {limit}"
            raise ValueError(msg)
        plain = self.scratch.take(
            min(limit, sum(part.max_size if part.size is None else part.size for part in frames))
        )
        filled = 0
        for part in frames:
            room = plain[filled:] if part.size is None else plain[filled : filled + part.size]
            filled += self._zstd.decompress(part.data, room)
        return plain[:filled]


class _Pool:
    """Compressors of one kind, each used by one thread at a time: they are not safe for more, and costly to make."""

    def __init__(self, make: Callable[[], Compress]) -> None:
        self._make = make
        self._free: list[Compress] = []

    def __call__(self, data: memoryview) -> bytes:
        try:
            compress = self._free.pop()
        except IndexError:
            compress = self._make()
        compressed = compress(data)
        self._free.append(compress)
        return compressed


def _sample(section: memoryview) -> memoryview:
    least, most = _SAMPLE_NBYTES
    nbytes = min(most, max(least, len(section) // (_SAMPLED * _SAMPLES)))
    if len(section) <= _SAMPLES * nbytes:
        return section
    step = (len(section) - nbytes) // (_SAMPLES - 1)
    return memoryview(b"".join(section[i * step : i * step + nbytes] for i in range(_SAMPLES)))


class _Writer(io.RawIOBase):
    def __init__(self, output: IO[bytes], zstd: Library, level: int) -> None:
        self._output = output
        self._frame = zstd.compressing(level)

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:  # type: ignore[override]
        self._output.write(self._frame.compress(data))
        return memoryview(data).nbytes

    def close(self) -> None:
        if not self.closed:
            self._output.write(self._frame.flush())
            self._output.close()
        super().close()


class _Reader(io.RawIOBase):
    def __init__(self, source: IO[bytes], zstd: Library) -> None:
        self._source = source
        self._zstd = zstd
        self._frame = zstd.decompressing()
        self._is_at_edge = True
        self._stored = memoryview(b"")
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        into = memoryview(buffer)
        while not len(self._plain):
            data = memoryview(self._frame.unused_data if self._frame.eof else b"") or self._next()
            if not data and not self._is_at_edge:
                msg = "a Zstandard stream is cut off"
                raise IntegrityError(msg)
            if not data:
                return 0
            self._restore(data)
        count = min(len(into), len(self._plain))
        into[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _next(self) -> memoryview:
        self._stored = self._stored or memoryview(self._source.read(_READ_NBYTES))
        data, self._stored = self._stored[:_RESTORED_NBYTES], self._stored[_RESTORED_NBYTES:]
        return data

    def _restore(self, data: memoryview) -> None:
        if self._frame.eof:
            self._frame = self._zstd.decompressing()
        try:
            self._plain = memoryview(self._frame.decompress(data))
        except self._zstd.error as e:
            msg = f"a Zstandard stream is damaged: {e}"
            raise IntegrityError(msg) from e
        self._is_at_edge = self._frame.eof
