"""What the null server remembers.

Law: of an object its size and its first bytes; what comes after them is told by repeating the last of them.
"""

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from secrets import token_hex
from xml.sax.saxutils import escape

PERIOD = 1 << 10
"""Bytes that are repeated: a state dict whose tensors repeat themselves so often comes back whole."""
_REST_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """An object.

    Attributes:
        kept: its first bytes; all of them where they are few.
    """

    size: int
    kept: bytes
    etag: str

    @property
    def rest(self) -> bytes:
        """What follows ``kept``, for a few MiB."""
        return _rest(self.kept[-PERIOD:])[0]

    @property
    def rest_file(self) -> int:
        """The same as a file to send from."""
        return _rest(self.kept[-PERIOD:])[1]

    def offset_in_rest(self, at: int) -> int:
        """Where the object's byte ``at`` stands in it, with a MiB behind it."""
        return (at - len(self.kept)) % PERIOD


@cache
def _rest(period: bytes) -> tuple[bytes, int]:
    data = period * (_REST_NBYTES // PERIOD)
    file = os.memfd_create("rest")
    os.truncate(file, len(data))
    os.pwrite(file, data, 0)
    return data, file


class NullObjects:
    """Objects and uploads by name; used from many threads."""

    most_kept = 4 << 20
    """Bytes of each object."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[str, Found] = {}
        self._uploads: dict[str, dict[int, tuple[int, bytes]]] = {}

    def find(self, path: str) -> Found | None:
        """The object at ``/bucket/key``."""
        return self._objects.get(path)

    def put(self, path: str, size: int, kept: bytes) -> str:
        """Remembers an object, and returns its ETag."""
        etag = f'"{token_hex(16)}"'
        with self._lock:
            self._objects[path] = Found(size, kept, etag)
        return etag

    def delete(self, bucket: str, keys: Iterable[bytes]) -> None:
        """Forgets objects."""
        with self._lock:
            for key in keys:
                self._objects.pop(f"{bucket.rstrip('/')}/{key.decode()}" if bucket else key.decode(), None)

    def create_upload(self) -> str:
        """Begins an upload, and returns its id."""
        upload_id = token_hex(16)
        with self._lock:
            self._uploads[upload_id] = {}
        return upload_id

    def put_part(self, upload_id: str, number: int, size: int, kept: bytes) -> str:
        """Remembers a part, and returns its ETag; of parts but the first only the size is kept."""
        with self._lock:
            self._uploads[upload_id][number] = size, kept if number == 1 else b""
        return f'"{token_hex(16)}"'

    def complete_upload(self, upload_id: str, path: str) -> str:
        """Makes an object of an upload, and returns its ETag."""
        with self._lock:
            parts = self._uploads.pop(upload_id)
        return self.put(path, sum(size for size, _ in parts.values()), parts[1][1])

    def listing(self, bucket: str, prefix: str) -> str:
        """A page of ListObjectsV2 with all of them."""
        root = f"{bucket.rstrip('/')}/"
        with self._lock:
            found = [
                (path.removeprefix(root), o) for path, o in self._objects.items() if path.startswith(root + prefix)
            ]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{o.size}</Size><ETag>{escape(o.etag)}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, o in sorted(found)
        )
        named = f"<Name>{escape(bucket.strip('/'))}</Name><KeyCount>{len(found)}</KeyCount>"
        return f"<ListBucketResult>{named}<IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
