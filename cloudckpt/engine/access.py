"""Reading from one open checkpoint, sync and from any thread.

Law: holds what reading needs, and decides nothing but to refuse what cannot be verified as it was asked to be.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Self

from cloudckpt.engine.contents import Ask, Contents, Located
from cloudckpt.engine.read import ReadOptions, Stats, Wanted, read_regions, unverifiable
from cloudckpt.engine.session import Session
from cloudckpt.store.protocols import Store
from cloudckpt.threads import in_thread


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
        """See `Session.close`."""
        self._session.close()

    def read(self, asks: Callable[[], Iterable[Ask]], build: Callable[[Located], Sequence[Wanted]]) -> None:
        """Finds out where what is asked for lies, and reads it.

        Args:
            asks: gives what is to be read, each time that it has to be located.
            build: makes the reads; is called again if they were made by a wrong guess.

        Raises:
            IntegrityError, StoreError: as `engine.read.read_regions` and `Contents.locate`.
            UsageError: all is to be verified, and what is there has no checksums; nothing was fetched.
        """
        is_proven = False
        while not is_proven:
            located = self.locate(asks())
            is_proven = self._session.run(partial(self._read, located, build(located)))

    def locate(self, asks: Iterable[Ask]) -> Located:
        """See `Contents.locate`; raises UsageError as `read` does."""
        if self.options.verify != "frames" and self.contents.format != "cloudckpt":
            raise unverifiable(f"this checkpoint (of format {self.contents.format})", self.options.verify)
        return self._session.run(lambda store: self.contents.locate(store, asks, self.options, self.stats))

    async def _read(self, located: Located, wanted: Sequence[Wanted], store: Store) -> bool:
        checks = await in_thread(located.checks)
        await read_regions(store, [*wanted, *checks], self.options, self.stats)
        self.stats.bytes_needed -= sum(check.read.nbytes for check in checks)
        return await in_thread(located.is_proven) if checks else True
