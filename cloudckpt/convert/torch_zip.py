"""The zip archive that ``torch.save`` writes, seen through some of its bytes.

Law: pure. Where a record lies is read from the archive's directory and from the record's own header, never assumed.
"""

import io
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Sequence
from typing import NoReturn

from cloudckpt.errors import IntegrityError
from cloudckpt.ranges import Range

LOCAL_HEADER_NBYTES = 30
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # APPNOTE.TXT 4.3.7: signature, lengths of the name and of the extra field
_BROKEN = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, EOFError, IndexError)


class TorchZip:
    """An archive of which some bytes are at hand.

    Attributes:
        records: names without the archive's own, in the order of the directory.
    """

    def __init__(self, nbytes: int, pieces: Sequence[tuple[int, memoryview]], where: str) -> None:
        """Reads the directory.

        Args:
            nbytes: of the archive.
            pieces: bytes of it and where they start; its end must be among them, from the directory on.
            where: it lies, for errors.

        Raises:
            IntegrityError: it is no archive as torch writes them.
        """
        self._where = where
        self._file = _Sparse(nbytes, pieces)
        try:
            with zipfile.ZipFile(self._file) as archive:
                infos, self._stop = archive.infolist(), archive.start_dir
        except _BROKEN as e:
            self._refuse(f"it is no zip archive, as torch.save writes them ({e})")
        pickles = [i.filename for i in infos if i.filename.count("/") == 1 and i.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            self._refuse("it is not of torch.save: it has no record data.pkl")
        self._prefix = pickles[0].removesuffix("data.pkl")
        self.records = {
            i.filename.removeprefix(self._prefix): i for i in infos if i.filename.startswith(self._prefix)
        }
        self._starts = [*sorted(i.header_offset for i in infos if i.header_offset < self._stop), self._stop]
        if len({i.filename for i in infos}) != len(infos):
            self._refuse("two of its records have one name")

    def refuse_other_byte_order(self) -> None:
        """Raises IntegrityError for what was saved on a big-endian machine, where the archive says so."""
        if "byteorder" in self.records and self.read("byteorder") != b"little":
            self._refuse(f"its byte order is {self.read('byteorder')!r}; save it on a little-endian machine")

    def read(self, name: str) -> bytes:
        """A record's bytes, which must be at hand."""
        at = self.payload(name)
        try:
            return self._file.at(at)
        except _BROKEN as e:
            self._refuse(f"its record {name} cannot be read: {e}")

    def header(self, name: str) -> Range:
        """Where the record's own header lies, up to the name in it."""
        info = self._info(name)
        return Range(info.header_offset, info.header_offset + LOCAL_HEADER_NBYTES + len(info.filename.encode()))

    def extent(self, name: str) -> Range:
        """From the record's header to the next, or to the directory: its bytes lie in there."""
        start = self._info(name).header_offset
        return Range(start, self._starts[bisect_right(self._starts, start)] if start < self._stop else start)

    def nbytes(self, name: str) -> int:
        """Of the record."""
        return self._info(name).file_size

    def payload(self, name: str, header: memoryview | None = None) -> Range:
        """Where the record's bytes lie in the archive.

        Args:
            name: of the record.
            header: the bytes of `header`, if they are not among those at hand.

        Raises:
            IntegrityError: it is compressed, or its header is not where the directory says.
        """
        info, at = self._info(name), self.header(name)
        try:
            own = self._file.at(at) if header is None else bytes(header)
            signature, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack_from(own)
        except _BROKEN as e:
            self._refuse(f"the header of its record {name} cannot be read: {e}")
        if signature != b"PK\3\4" or own[LOCAL_HEADER_NBYTES:] != info.filename.encode() or len(own) < len(at):
            self._refuse(f"its record {name} is not where its directory says, at byte {info.header_offset}")
        if name_nbytes != len(at) - LOCAL_HEADER_NBYTES:
            self._refuse(f"the header of its record {name} has another name than its directory")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            self._refuse(f"its record {name} is compressed or encrypted, which torch.save does not do")
        start = at.stop + extra_nbytes
        if start + info.file_size > self.extent(name).stop:
            self._refuse(f"its record {name} does not lie where there is room for it")
        return Range(start, start + info.file_size)

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self.records:
            self._refuse(f"it has no record {name}")
        return self.records[name]

    def _refuse(self, reason: str) -> NoReturn:
        msg = f"{self._where} cannot be read: {reason}"
        raise IntegrityError(msg)


class _Sparse(io.RawIOBase):
    """A file of which only some bytes can be read."""

    def __init__(self, nbytes: int, pieces: Sequence[tuple[int, memoryview]]) -> None:
        super().__init__()
        self._nbytes = nbytes
        self._pieces = pieces
        self._position = 0

    def at(self, at: Range) -> bytes:
        for start, data in self._pieces:
            if start <= at.start and at.stop <= start + len(data):
                return bytes(data[at.start - start : at.stop - start])
        msg = f"bytes {at.start} to {at.stop} are out of place"
        raise OSError(msg)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            msg = f"byte {base + offset} is out of place"
            raise OSError(msg)
        self._position = base + offset
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        stop = self._nbytes if size < 0 else min(self._nbytes, self._position + size)
        data = self.at(Range(self._position, max(stop, self._position)))
        self._position += len(data)
        return data
