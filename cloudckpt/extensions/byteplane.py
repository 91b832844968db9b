"""Byte planes: the first bytes of all numbers together, then the second bytes, and so on.

Law: moves bytes about, neither adds nor takes away any. Exponents then meet exponents, which compress, and the
lower bits of mantissas, which do not, keep to themselves.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Self, cast

import numpy as np

from cloudckpt.errors import UnknownExtensionError, UsageError
from cloudckpt.extensions.base import Buffer, FrameCodec, FrameContext, FrameTransformExtension

Take = Callable[[int], memoryview]

_WIDTHS = (1, 2, 4, 8, 16)
_BLOCK_NBYTES = 1 << 20
"""Plain bytes that a stream splits together."""

_VERSION, _WITH_WIDTH = "1", "1+width="


@dataclass(frozen=True, slots=True)
class BytePlane(FrameTransformExtension):
    """Splits each number's bytes into planes; put a compressor after it.

    Attributes:
        width: bytes of a number, 1, 2, 4, 8 or 16; each item's own if not given. torch's writer says nothing of
            dtypes: there it must be given.
    """

    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and self.width not in _WIDTHS:
            msg = f"BytePlane(width={self.width}): a number has {', '.join(map(str, _WIDTHS))} bytes"
            raise UsageError(msg)

    @staticmethod
    def registry_name() -> str:
        """``stream.byteplane``."""
        return "stream.byteplane"

    @classmethod
    def from_descriptor(cls, version: str) -> Self:
        """See `Extension.from_descriptor`."""
        if version == _VERSION:
            return cls()
        width = version.removeprefix(_WITH_WIDTH)
        if version.startswith(_WITH_WIDTH) and width in map(str, _WIDTHS):
            return cls(int(width))
        msg = f"{cls.registry_name()}/{version} is of a version that this release does not know"
        raise UnknownExtensionError(msg)

    def get_descriptor(self) -> str:
        """See `Extension.get_descriptor`."""
        return f"{self.registry_name()}/{_VERSION if self.width is None else f'{_WITH_WIDTH}{self.width}'}"

    def start_shard(self) -> FrameCodec:
        """See `FrameTransformExtension.start_shard`."""
        return BytePlaneCodec(self.width)

    def open_shard(self, params: Mapping[str, str]) -> FrameCodec:
        """See `FrameTransformExtension.open_shard`."""
        del params
        return self.start_shard()

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """See `StreamTransformExtension.transform_to`."""
        return cast(IO[bytes], _Writer(output, self._given_width()))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:  # noqa: A002 - DCP's name
        """See `StreamTransformExtension.transform_from`."""
        return cast(IO[bytes], _Reader(input, self._given_width()))

    def _given_width(self) -> int:
        if self.width is None:
            msg = "torch's writer and reader say nothing of dtypes: give the width, as in BytePlane(width=2)"
            raise UsageError(msg)
        return self.width


class BytePlaneCodec(FrameCodec):
    """Byte planes at work on frames."""

    reuses_memory = True

    def __init__(self, width: int | None) -> None:
        """Splits by ``width``, or by each item's own."""
        self._width = width

    def stored_size(self, nbytes: int) -> int:
        """See `FrameCodec.stored_size`."""
        return nbytes

    def transform(self, sections: Sequence[memoryview], frame: FrameContext) -> Sequence[Buffer]:
        """See `FrameCodec.transform`."""
        plain = sections[0] if len(sections) == 1 else memoryview(b"".join(sections))
        return split(plain, self._width or frame.width, self.scratch.take)

    def restore(self, stored: memoryview, frame: FrameContext, *, limit: int) -> Buffer:
        """See `FrameCodec.restore`."""
        del limit
        return join(stored, self._width or frame.width, self.scratch.take)


def split(plain: memoryview, width: int, take: Take) -> list[memoryview]:
    """The planes, lowest byte first, and what is less than a number at the end; without those that are empty.

    Args:
        plain: to be split.
        width: bytes of a number.
        take: gives memory for the planes; is not asked where there are none.
    """
    count = len(plain) // width
    if width == 1 or not count:
        return [plain]
    numbers = np.frombuffer(plain, np.uint8, count * width)
    planes = np.frombuffer(take(count * width), np.uint8).reshape(width, count)
    if width == 2:  # 1.4 times as fast as a strided copy
        for i, plane in enumerate(planes):
            np.right_shift(numbers.view("<u2"), 8 * i, out=plane, casting="unsafe")
    else:
        planes[:] = numbers.reshape(count, width).T
    rest = plain[count * width :]
    return [*(plane.data for plane in planes), *([rest] if len(rest) else [])]


def join(stored: memoryview, width: int, take: Take) -> memoryview:
    """The inverse of `split`, of its sections joined; the numbers will lie in memory that ``take`` gives."""
    count = len(stored) // width
    if width == 1 or not count:
        return stored
    into = take(len(stored))
    plain = np.frombuffer(into, np.uint8)
    planes = np.frombuffer(stored, np.uint8, count * width).reshape(width, count)
    numbers: np.ndarray[Any, Any] = plain[: count * width].reshape(count, width)
    for i in range(width):
        numbers[:, i] = planes[i]
    plain[count * width :] = np.frombuffer(stored, np.uint8)[count * width :]
    return into


def _fresh(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


class _Writer(io.RawIOBase):
    def __init__(self, output: IO[bytes], width: int) -> None:
        self._output = output
        self._width = width
        self._waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:  # type: ignore[override]
        self._waiting += data
        whole = len(self._waiting) // _BLOCK_NBYTES * _BLOCK_NBYTES
        self._send(whole)
        return memoryview(data).nbytes

    def close(self) -> None:
        if not self.closed:
            self._send(len(self._waiting))
            self._output.close()
        super().close()

    def _send(self, nbytes: int) -> None:
        for start in range(0, nbytes, _BLOCK_NBYTES):
            block = memoryview(bytes(self._waiting[start : min(nbytes, start + _BLOCK_NBYTES)]))
            self._output.write(b"".join(split(block, self._width, _fresh)))
        del self._waiting[:nbytes]


class _Reader(io.RawIOBase):
    def __init__(self, source: IO[bytes], width: int) -> None:
        self._source = source
        self._width = width
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        into = memoryview(buffer)
        if not len(self._plain):
            block = memoryview(_read_block(self._source))
            self._plain = join(block, self._width, _fresh)
        count = min(len(into), len(self._plain))
        into[:count], self._plain = self._plain[:count], self._plain[count:]
        return count


def _read_block(source: IO[bytes]) -> bytes:
    block = bytearray()
    while len(block) < _BLOCK_NBYTES and (data := source.read(_BLOCK_NBYTES - len(block))):
        block += data
    return bytes(block)
