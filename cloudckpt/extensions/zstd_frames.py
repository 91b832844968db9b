"""Where the Zstandard frames of a byte string begin and end, without restoring a byte.

Law: pure. Follows RFC 8878, section 3.1.1; whatever is not a whole frame is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass

MAGIC = b"\x28\xb5\x2f\xfd"
BLOCK_NBYTES = 128 << 10
"""What a block restores to at most (``Block_Maximum_Size``)."""


@dataclass(frozen=True, slots=True)
class ZstdFrame:
    """One frame.

    Attributes:
        data: all of it.
        size: what it restores to, where it says so.
        max_size: what its blocks can restore to.
        window: bytes of memory that restoring takes, where ``size`` is not known to be enough.
    """

    data: memoryview
    size: int | None
    max_size: int
    window: int


def zstd_frames(stored: memoryview) -> Iterator[ZstdFrame]:
    """Yields all frames of ``stored``.

    Raises:
        ValueError: what is there is no frame, or not all of one, or a kind that `ZStandard` never writes.
    """
    while len(stored):
        size, window, has_checksum, position = _header(stored)
        count, is_last = 0, False
        while not is_last:
            block = int.from_bytes(_take(stored, position, 3), "little")
            is_last, kind, nbytes = bool(block & 1), block >> 1 & 3, block >> 3
            if kind == 3 or nbytes > BLOCK_NBYTES:
                msg = "it has a block that cannot be"
                raise ValueError(msg)
            position += 3 + (1 if kind == 1 else nbytes)
            count += 1
        position += 4 if has_checksum else 0
        _take(stored, position, 0)
        yield ZstdFrame(stored[:position], size, count * BLOCK_NBYTES, window)
        stored = stored[position:]


def _header(stored: memoryview) -> tuple[int | None, int, bool, int]:
    """The content's size if it is told, the window's, whether a checksum follows, and where the blocks begin."""
    if stored[:4] != MAGIC:
        msg = "it is not a Zstandard frame, or other bytes follow the last one"
        raise ValueError(msg)
    descriptor = _take(stored, 4, 1)[0]
    is_single = bool(descriptor & 0x20)
    if descriptor & 0x0B:
        msg = "its frame header has reserved bits, or asks for a dictionary"
        raise ValueError(msg)
    position, window = 5, 0
    if not is_single:
        window_byte = _take(stored, position, 1)[0]
        base = 1 << 10 + (window_byte >> 3)
        window = base + (base >> 3) * (window_byte & 7)
        position += 1
    width = (1 if is_single else 0, 2, 4, 8)[descriptor >> 6]
    size = int.from_bytes(_take(stored, position, width), "little") + (256 if width == 2 else 0)
    return (size if width else None), (size if is_single else window), bool(descriptor & 4), position + width


def _take(stored: memoryview, start: int, nbytes: int) -> memoryview:
    if start + nbytes > len(stored):
        msg = "it is cut off"
        raise ValueError(msg)
    return stored[start : start + nbytes]
