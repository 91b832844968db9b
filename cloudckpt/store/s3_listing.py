"""What a page of a listing says, taken at its word only where that can be true.

Law: pure. A listing ends, and tells of nothing but what was asked for.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from cloudckpt.errors import StoreError
from cloudckpt.store.protocols import ObjectInfo, Upload

_MOST_WITHOUT_NEW = 1000
"""Pages, one after the other. Servers send empty ones where much was deleted (SeaweedFS, and S3 with versions)."""


class Listing:
    """One listing under way: from page to page, towards an end."""

    def __init__(self, root: str, prefix: str, where: str) -> None:
        """Nothing was listed yet.

        Args:
            root: of the store; keys are told relative to it.
            prefix: below that, what is asked for.
            where: for messages.
        """
        self.full_prefix = root + prefix
        self._root = root
        self._where = where
        self._greatest: tuple[str, ...] = ()
        self._without_new = 0

    def next_asks(self, asked: dict[str, str], following: dict[str, str], found: Iterable[tuple[str, ...]]) -> None:
        """Looks whether the listing goes on by asking for the next page.

        Args:
            asked: what marked the page.
            following: what marks the next.
            found: names what was on the page; later pages name greater ones.

        Raises:
            StoreError: it goes in circles, or goes on and on without telling anything.
        """
        if asked == following:
            msg = f"{self._where}: the listing does not end: each page names itself as the next"
            raise StoreError(msg)
        greatest = max(found, default=())
        if greatest > self._greatest:
            self._greatest, self._without_new = greatest, 0
            return
        self._without_new += 1
        if self._without_new >= _MOST_WITHOUT_NEW:
            msg = f"{self._where}: the listing does not end: {self._without_new} pages in a row told nothing new"
            raise StoreError(msg)

    def info(self, found: dict[str, Any]) -> ObjectInfo:
        """An object on a page."""
        key, size, modified = self._key(found["Key"]), found["Size"], found["LastModified"]
        return ObjectInfo(key=key, size=self._at_least_0(size, key), etag=found["ETag"], modified=modified)

    def upload(self, found: dict[str, Any]) -> Upload:
        """An upload on a page."""
        started: datetime | None = found.get("Initiated")
        return Upload(key=self._key(found["Key"]), upload_id=found["UploadId"], started=started)

    def name(self, found: dict[str, Any]) -> str:
        """A common prefix on a page, as the path segment that it is."""
        self._key(found["Prefix"])
        name: str = found["Prefix"].removeprefix(self.full_prefix)
        if not name.endswith("/") or "/" in name[:-1]:
            msg = f"{self._where}: the server lists {found['Prefix']!r}, which is no directory in what was asked for"
            raise StoreError(msg)
        return name[:-1]

    def _key(self, full: str) -> str:
        key = full.removeprefix(self._root)
        if not full.startswith(self.full_prefix) or ".." in key.split("/"):
            msg = f"{self._where}: the server lists {full!r}, which is not below what was asked for"
            raise StoreError(msg)
        return key

    def _at_least_0(self, size: int, key: str) -> int:
        if size < 0:
            msg = f"{self._where}: the server lists {key!r} with a size of {size}"
            raise StoreError(msg)
        return size
