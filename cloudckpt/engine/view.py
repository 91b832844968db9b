"""A seekable file over bytes in object storage: what DCP calls a reader view.

Law: the contract is `io.RawIOBase`'s, to the letter. What is asked for is fetched, and little else: ahead of a reader
that goes on where it stopped, never around one that jumps.
"""

import io
import threading
from collections.abc import Callable
from typing import Any

from cloudckpt.engine.memory import buffer_for
from cloudckpt.ranges import Range

_FIRST_AHEAD = 64 << 10
"""Bytes read ahead when a reader goes on for the first time; doubled each time it does again."""

Fetch = Callable[[Range, memoryview], None]
"""Brings the bytes of a range into memory of its size."""


class FileView(io.RawIOBase):
    """Reads a byte string of known size by ranges. Safe to use from several threads, as files are.

    Attributes:
        name: what it is of, for messages.
        mode: ``rb``.
    """

    mode = "rb"

    def __init__(self, fetch: Fetch, nbytes: int, name: str, *, max_ahead: int) -> None:
        """Opens the view; nothing is fetched yet.

        Args:
            fetch: is asked for ranges within ``nbytes``.
            nbytes: of the file.
            name: see the class.
            max_ahead: bytes that are read ahead at most.
        """
        super().__init__()
        self.name = name
        self._fetch = fetch
        self._nbytes = nbytes
        self._max_ahead = max_ahead
        self._position = 0
        self._expected: int | None = None
        self._ahead = 0
        self._kept = memoryview(b"")
        self._kept_at = Range(0, 0)
        self._lock = threading.RLock()

    def readable(self) -> bool:
        """True."""
        self._check_open()
        return True

    def seekable(self) -> bool:
        """True."""
        self._check_open()
        return True

    def tell(self) -> int:
        """Where the next read starts; beyond the end where it was put there."""
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Moves to ``offset`` from the start, the position or the end, and returns where that is.

        Raises:
            ValueError: that is before the start, or ``whence`` is none of the three.
        """
        self._check_open()
        with self._lock:
            bases = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes}
            if whence not in bases:
                msg = f"whence is {whence!r}, not one of 0, 1 and 2"
                raise ValueError(msg)
            position = bases[whence] + offset
            if position < 0:
                msg = f"cannot seek to {position}, before the start of {self.name}"
                raise ValueError(msg)
            self._position = position
            return position

    def read(self, size: int | None = -1, /) -> bytes:
        """``size`` bytes from the position on, fewer only at the end; all of them where it is negative or None.

        Raises:
            TooLargeError: this process cannot hold so many; nothing was fetched.
        """
        self._check_open()
        if size is None or size < 0:
            return self.readall()
        data = self._buffer(min(size, self._nbytes - self._position))
        return bytes(data[: self.readinto(data)])

    def write(self, data: Any, /) -> int:
        """Not supported."""
        del data
        msg = f"{self.name} is not writable"
        raise io.UnsupportedOperation(msg)

    def readinto(self, buffer: Any, /) -> int:
        """Fills ``buffer`` from the position on; fewer bytes than it holds only at the end.

        Raises:
            IntegrityError, StoreError: the bytes could not be had; the position is where it was.
        """
        self._check_open()
        out = memoryview(buffer).cast("B")
        with self._lock:
            stop = min(self._nbytes, self._position + len(out))
            if stop <= self._position:
                return 0
            wanted = Range(self._position, stop)
            self._read(wanted, out[: len(wanted)])
            self._position = stop
            return len(wanted)

    def readall(self) -> bytes:
        """Everything from the position to the end, in one piece.

        Raises:
            TooLargeError: see `read`.
        """
        self._check_open()
        with self._lock:
            data = self._buffer(self._nbytes - self._position)
            self.readinto(data)
            return bytes(data)

    def close(self) -> None:
        """Lets go of what was read ahead."""
        self._kept, self._kept_at = memoryview(b""), Range(0, 0)
        super().close()

    def _read(self, wanted: Range, out: memoryview) -> None:
        held = Range(wanted.start, wanted.start)
        if self._kept_at.start <= wanted.start < self._kept_at.stop:
            held = wanted.intersect(self._kept_at)
            inside = held.shift(-self._kept_at.start)
            out[: len(held)] = self._kept[inside.start : inside.stop]
        rest = Range(held.stop, wanted.stop)
        if len(rest):
            self._ahead = self._next_ahead() if wanted.start == self._expected else 0
            self._bring(rest, out[len(held) :])
        self._expected = wanted.stop

    def _next_ahead(self) -> int:
        return min(self._max_ahead, max(_FIRST_AHEAD, 2 * self._ahead))

    def _bring(self, rest: Range, out: memoryview) -> None:
        if not self._ahead or len(rest) >= self._max_ahead:
            self._fetch(rest, out)
            return
        block = Range(rest.start, min(self._nbytes, rest.stop + self._ahead))
        memory = memoryview(bytearray(len(block)))
        self._fetch(block, memory)
        self._kept, self._kept_at = memory, block
        out[:] = memory[: len(rest)]

    def _buffer(self, nbytes: int) -> memoryview:
        return buffer_for(self.name, max(0, nbytes))

    def _check_open(self) -> None:
        if self.closed:
            msg = f"{self.name} is closed"
            raise ValueError(msg)
