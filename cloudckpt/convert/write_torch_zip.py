"""The zip archive that ``torch.save`` writes, planned around storages whose bytes nobody here has.

Law: pure. Laid out as torch does it, to the byte, so that it finds storages in every way it has: by the directory, by
``mmap``, by offsets that it works out itself. The CRC-32 of a storage is not known and stands there as 0, as torch
writes it under ``torch.serialization.set_crc32_options(False)``: torch does not look at it; other programs that
unpack zip archives call such a storage damaged. Those of all other records are right.
"""

import struct
import zlib
from collections.abc import Sequence
from hashlib import blake2b

_ALIGNMENT = 64
"""Of what is in a record, in the file; ``mmap`` needs it (torch 2.13, ``torch.utils.serialization.config.save``)."""

_U16 = 0xFFFF
_U32 = 0xFFFFFFFF

# APPNOTE.TXT 4.3, with the fields that torch fills: it leaves out versions, times and, before a record, sizes.
_LOCAL = struct.Struct("<4s2xH18x2H")
_DESCRIPTOR = struct.Struct("<4sLLL")
_DESCRIPTOR_64 = struct.Struct("<4sLQQ")
_CENTRAL = struct.Struct("<4s4xH6x3L2H10xL")
_END_64 = struct.Struct("<4sQHH8x4Q")
_LOCATOR = struct.Struct("<4s4xQL")
_END = struct.Struct("<4s4x2H2L2x")

_IS_UTF8 = 0x800
_HAS_DESCRIPTOR = 0x8


def archive(pickled: bytes, storages: Sequence[int]) -> list[bytes]:
    """What stands around the storages of a file of ``torch.save``.

    Args:
        pickled: the object, which names its storages by their index.
        storages: bytes of each.

    Returns:
        One text more than there are storages: before the first, between each two, behind the last.
    """
    planned = _Archive()
    planned.add("data.pkl", pickled)
    planned.add(".format_version", b"1")
    planned.add(".storage_alignment", b"%d" % _ALIGNMENT)
    planned.add("byteorder", b"little")
    for i, nbytes in enumerate(storages):
        planned.leave_room(f"data/{i}", nbytes)
    planned.add("version", b"3\n")
    planned.add(".data/serialization_id", planned.serialization_id())
    return planned.close()


class _Archive:
    def __init__(self) -> None:
        self._texts: list[bytes] = []
        self._text = bytearray()
        self._directory = bytearray()
        self._position = 0
        self._count = 0

    def add(self, name: str, content: bytes) -> None:
        """A record."""
        crc = zlib.crc32(content)
        descriptor = self._begin(name, len(content), crc)
        self._write(content)
        self._write(descriptor)

    def leave_room(self, name: str, nbytes: int) -> None:
        """A record that somebody else fills."""
        descriptor = self._begin(name, nbytes, 0)
        self._texts.append(bytes(self._text))
        self._text.clear()
        self._position += nbytes
        self._write(descriptor)

    def serialization_id(self) -> bytes:
        """Forty digits for the archive; torch's are a hash of names and one of contents."""
        halves = struct.unpack("<QQ", blake2b(self._directory, digest_size=16).digest())
        return b"%020d%020d" % halves

    def close(self) -> list[bytes]:
        """The texts, complete with the directory."""
        start, nbytes, count = self._position, len(self._directory), self._count
        self._write(self._directory)
        made_by, needs = 0x31E, 45  # as miniz says it, torch's library for zip archives
        self._write(_END_64.pack(b"PK\6\6", _END_64.size - 12, made_by, needs, count, count, nbytes, start))
        self._write(_LOCATOR.pack(b"PK\6\7", start + nbytes, 1))
        counts = min(count, _U16), min(count, _U16)
        self._write(_END.pack(b"PK\5\6", *counts, min(nbytes, _U32), min(start, _U32)))
        return [*self._texts, bytes(self._text)]

    def _begin(self, name: str, nbytes: int, crc: int) -> bytes:
        """Writes the record's header, and notes it in the directory; returns what stands behind the record."""
        at, own, flags = self._position, b"archive/" + name.encode(), _IS_UTF8 | (_HAS_DESCRIPTOR if nbytes else 0)
        large = _large(nbytes, nbytes, at)
        padding = _padding(at + _LOCAL.size + len(own) + len(large))
        self._write(_LOCAL.pack(b"PK\3\4", flags, len(own), len(large) + len(padding)))
        self._write(own + _large(nbytes, 0, at) + padding)  # how long it came out, torch cannot know here
        size, offset = min(nbytes, _U32), min(at, _U32)
        self._directory += _CENTRAL.pack(b"PK\1\2", flags, crc, size, size, len(own), len(large), offset)
        self._directory += own + large
        self._count += 1
        if not nbytes:
            return b""
        return (_DESCRIPTOR_64 if large else _DESCRIPTOR).pack(b"PK\7\b", crc, nbytes, nbytes)

    def _write(self, data: bytes | bytearray) -> None:
        self._text += data
        self._position += len(data)


def _large(nbytes: int, stored: int, at: int) -> bytes:
    """The extra field for numbers that 32 bits do not hold."""
    numbers = ((nbytes, stored) if nbytes >= _U32 else ()) + ((at,) if at >= _U32 else ())
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


def _padding(start: int) -> bytes:
    """The extra field that lets what follows it begin at a multiple of the alignment; ``start`` is its own place."""
    nbytes = -(start + 4) % _ALIGNMENT
    return struct.pack("<2sH", b"FB", nbytes) + b"Z" * nbytes
