"""Saves one after the other behind training, and what became of each.

Law: one thread, first come first saved; no failure is dropped before somebody was told of it.
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Self

from cloudckpt.dcp.agreement import Failure
from cloudckpt.dcp.stats import SaveStats
from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.errors import CheckpointError, UsageError

_LOOK_S = 1
"""How often who waits looks for signals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What became of a save; the same on all ranks but for the seconds and the `SaveStats`.

    Attributes:
        step: the training step.
        url: of its checkpoint.
        save_id: of this commit; empty if it was skipped.
        nbytes: of all items as the user knows them.
        stored_nbytes: of all shards.
        was_skipped: whether nothing was saved, because the step was there (``on_exists="skip"``) or a save was under
            way (``on_busy="skip"``).
        is_replanned: whether the structure was planned, and not that of the save before.
        staging_s: seconds in which the state dict was copied: what training waited for an async save.
        upload_s: seconds in which this rank uploaded.
        coordination_s: seconds of everything but these two and slower ranks: planning, talking, the commit.
        hook_failures: of hooks after the commit, in words.
        stats: what this rank did for it.
    """

    step: int
    url: str
    save_id: str = ""
    nbytes: int = 0
    stored_nbytes: int = 0
    was_skipped: bool = False
    is_replanned: bool = False
    staging_s: float = 0.0
    upload_s: float = 0.0
    coordination_s: float = 0.0
    hook_failures: tuple[str, ...] = ()
    stats: SaveStats = field(default_factory=SaveStats)


class SaveHandle:
    """An async save under way."""

    def __init__(
        self, step: int, future: "Future[Saved]", *, number: int = 0, cancellation: Cancellation | None = None
    ) -> None:
        """Made by `Checkpointer.async_save`."""
        self.step = step
        self._future = future
        self._number = number
        self._cancellation = cancellation
        self._was_told = False

    @classmethod
    def of_skipped(cls, step: int, url: str) -> Self:
        """One of a save that was not begun."""
        future: Future[Saved] = Future()
        future.set_result(Saved(step=step, url=url, was_skipped=True))
        return cls(step, future)

    def done(self) -> bool:
        """Whether it has committed, failed, or was skipped."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> Saved:
        """Waits until the checkpoint is committed.

        Args:
            timeout_s: seconds to wait at most; None for as long as it takes.

        Raises:
            CheckpointError: the save failed. Nothing was committed, but for a CommitUnknownError or a RanksLostError,
                after which it may have been.
            TimeoutError: it is still under way.
        """
        if not _are_over([self._future], timeout_s):
            msg = f"step {self.step} is still being saved after {timeout_s:g} s"
            raise TimeoutError(msg)
        self._was_told = True
        return self._future.result()

    def result_or_nothing(self) -> Saved:
        """As `result`; but whoever is interrupted meanwhile gets his interrupt when the save has stopped, or is done.

        For a save that reads memory that its caller will change.
        """
        try:
            return self.result()
        except BaseException:
            if not self.done():
                self.cancel()
                _are_over([self._future])
                self.tell()
            raise

    def tell(self) -> None:
        """Whoever has to know of its failure does, or will at once."""
        self._was_told = True

    def cancel(self) -> None:
        """Has it stop, unless its commit has begun. Does not wait."""
        if self._cancellation is not None:
            self._cancellation.cancel()

    @property
    def _failure(self) -> Failure | None:
        """What it failed of, if nobody was told yet."""
        if not self._future.done() or self._was_told:
            return None
        error = self._future.exception()
        return None if error is None else Failure.of(self._number, self.step, error)


class Background:
    """The thread that saves, and the saves that it was given."""

    def __init__(self) -> None:
        """Starts no thread yet. One that has work keeps the interpreter from ending before it is done."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cloudckpt-save")
        self._lock = threading.Lock()
        self._handles: list[SaveHandle] = []
        self._worker: int | None = None

    @property
    def under_way(self) -> list[SaveHandle]:
        """Saves that are not over, oldest first."""
        return [handle for handle in self._kept() if not handle.done()]

    @property
    def failure(self) -> Failure | None:
        """The first failure that nobody was told of."""
        return next((failure for handle in self._kept() if (failure := handle._failure)), None)

    def submit(self, number: int, step: int, cancellation: Cancellation, save: Callable[[], Saved]) -> SaveHandle:
        """Has ``save`` run after those before it.

        Args:
            number: of the save, the same on all ranks.
            step: that it saves.
            cancellation: stops it.
            save: what it does.

        Raises:
            UsageError: `close` was called.
        """

        def run() -> Saved:
            self._worker = threading.get_ident()
            return save()

        try:
            future = self._pool.submit(run)
        except RuntimeError as e:
            msg = "the checkpointer is closed"
            raise UsageError(msg) from e
        handle = SaveHandle(step, future, number=number, cancellation=cancellation)
        with self._lock:
            self._handles.append(handle)
        return handle

    def tell(self, failure: Failure) -> CheckpointError:
        """The failure of some rank as an error to raise here; this rank's own save of that number is told with it."""
        cause = None
        for handle in self._kept():
            if handle._number == failure.number:
                handle.tell()
                cause = handle._future.exception() if handle.done() else None
        return failure.error(cause)

    def wait(self, most: int = 0) -> None:
        """Waits until at most so many saves are under way, whatever becomes of them.

        Raises:
            UsageError: called by one of them: a hook cannot wait for its own save.
        """
        if threading.get_ident() == self._worker:
            msg = "a hook cannot save, load or close through the checkpointer that runs it: it would wait for itself"
            raise UsageError(msg)
        under_way = self.under_way
        _are_over([handle._future for handle in under_way[: len(under_way) - most]])

    def close(self, *, cancel: bool) -> None:
        """Waits for all, or has those stop whose commit has not begun; takes no more. May be called again.

        Raises:
            UsageError: see `wait`.
        """
        if cancel:
            for handle in self.under_way:
                handle.cancel()
        self.wait()
        self._pool.shutdown(wait=True)

    def _kept(self) -> list[SaveHandle]:
        """All that are under way, or have failed and nobody was told: what is over holds its state dict no longer."""
        with self._lock:
            self._handles = [handle for handle in self._handles if not handle.done() or handle._failure is not None]
            return list(self._handles)


def _are_over(futures: Sequence["Future[Saved]"], timeout_s: float | None = None) -> bool:
    """Waits for them, and looks for signals meanwhile: a lock alone lets those wait that another thread was sent."""
    until = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while (left := until - time.monotonic()) > 0 and wait(futures, min(left, _LOOK_S)).not_done:
        pass
    return all(future.done() for future in futures)
