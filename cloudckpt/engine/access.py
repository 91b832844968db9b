"""Reading from one open checkpoint, sync and from any thread.

Law: holds what reading needs, and decides nothing but to refuse what cannot be verified as it was asked to be.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Self

from cloudckpt.engine.contents import Ask, Contents, Located
from cloudckpt.engine.read import ReadOptions, Stats, Wanted, read_regions, unverifiable
from cloudckpt.engine.session import Session
from cloudckpt.engine.traces import check_place, leave_trace
from cloudckpt.engine.tracing import FETCH, PLAN, Outcome, Recorder
from cloudckpt.store.protocols import Store
from cloudckpt.threads import in_thread


class Access:
    """A checkpoint's contents and the store they lie in.

    Attributes:
        contents: what is there.
        options: how to read.
        stats: what reading through this object did so far, finding out what is there excluded.
        recorder: of all that is read through this object.
    """

    def __init__(
        self,
        contents: Contents,
        session: Session,
        options: ReadOptions,
        stats: Stats | None = None,
        *,
        recorder: Recorder | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Reads ``contents`` over ``session``, which is closed with this.

        Args:
            contents: what is there.
            session: to where it is.
            options: how to read.
            stats: counted on, if given.
            recorder: of a load that has begun.
            rank: this one, for the trace.
            world_size: ranks of the job, likewise.

        Raises:
            UsageError: traces would lie below the checkpoint.
        """
        check_place(options.trace, session.url)
        self.contents = contents
        self.options = options
        self.stats = Stats() if stats is None else stats
        self.recorder = recorder or Recorder(keeps_events=options.trace is not None)
        self._session = session
        self._rank = rank
        self._world_size = world_size
        self._nbytes = 0
        self._error = ""
        self._was_read = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._error = "" if kind is None else kind.__name__
        self.close()

    def close(self) -> None:
        """See `Session.close`; leaves a trace, where one is wanted and something was read."""
        self._session.close()
        with self._lock:
            was_read, self._was_read = self._was_read, False
        if was_read and self.options.trace is not None:
            leave_trace(self.options.trace, self.recorder, self.outcome(), self._session.options)

    def outcome(self, error: str = "") -> Outcome:
        """What became of what was read so far."""
        summary = self.contents.summary
        return Outcome(
            kind="load",
            url=self._session.url,
            rank=self._rank,
            world_size=self._world_size,
            nbytes=self._nbytes,
            stored_nbytes=self.recorder.tally(FETCH).nbytes,
            save_id="" if summary is None else summary.save_id,
            error=error or self._error,
        )

    def read(self, asks: Callable[[], Iterable[Ask]], build: Callable[[Located], Sequence[Wanted]]) -> None:
        """Finds out where what is asked for lies, and reads it.

        Args:
            asks: gives what is to be read, each time that it has to be located.
            build: makes the reads; is called again if they were made by a wrong guess.

        Raises:
            IntegrityError, StoreError: as `engine.read.read_regions` and `Contents.locate`.
            UsageError: all is to be verified, and what is there has no checksums; nothing was fetched.
        """
        recorder = Recorder(keeps_events=self.recorder.keeps_events)
        recorder.report = self.recorder.report
        is_proven = False
        try:
            while not is_proven:
                with recorder.step(PLAN):
                    located = self.locate(asks())
                    wanted = build(located)
                is_proven = self._session.run(partial(self._read, located, wanted, recorder), recorder)
        finally:
            with self._lock:
                self._was_read = True
                self.recorder.absorb(recorder.recorded())
                self.stats.count(recorder)

    def locate(self, asks: Iterable[Ask]) -> Located:
        """See `Contents.locate`; raises UsageError as `read` does."""
        if self.options.verify != "frames" and self.contents.format != "cloudckpt":
            raise unverifiable(f"this checkpoint (of format {self.contents.format})", self.options.verify)
        return self._session.run(lambda store: self.contents.locate(store, asks, self.options, self.stats))

    async def _read(self, located: Located, wanted: Sequence[Wanted], recorder: Recorder, store: Store) -> bool:
        checks = await in_thread(located.checks)
        await read_regions(store, [*wanted, *checks], self.options, self.stats, recorder)
        self.stats.bytes_needed -= sum(check.read.nbytes for check in checks)
        self._nbytes += sum(w.read.nbytes for w in wanted)
        return await in_thread(located.is_proven) if checks else True
