"""Reading from one open checkpoint, sync and from any thread.

Law: holds what reading needs, and decides nothing.
"""

from collections.abc import Sequence
from typing import Self

from cloudckpt.engine.contents import Ask, Contents
from cloudckpt.engine.read import ReadOptions, Stats, Wanted, read_regions
from cloudckpt.engine.session import Session


class Access:
    """A checkpoint's contents and the store they lie in.

    Attributes:
        contents: what is there.
        options: how to read.
        stats: what reading through this object did so far, finding out what is there excluded.
    """

    def __init__(
        self, contents: Contents, session: Session, options: ReadOptions, stats: Stats | None = None
    ) -> None:
        """Reads ``contents`` over ``session``, which is closed with this; counts on ``stats``, if given."""
        self.contents = contents
        self.options = options
        self.stats = Stats() if stats is None else stats
        self._session = session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the session. What is read later raises UsageError."""
        self._session.close()

    def locate(self, asks: Sequence[Ask]) -> None:
        """See `Contents.locate`."""
        self._session.run(lambda store: self.contents.locate(store, asks, self.options, self.stats))

    def read(self, wanted: Sequence[Wanted]) -> None:
        """See `engine.read.read_regions`."""
        self._session.run(lambda store: read_regions(store, wanted, self.options, self.stats))
