"""Saves one after the other behind training, and what became of each.

Law: one thread, first come first saved; no failure is dropped before somebody was told of it.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Self

from cloudckpt.dcp.agreement import Failure
from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What became of a save; the same on all ranks but for the seconds.

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


class SaveHandle:
    """An async save under way."""

    def __init__(self, step: int, future: "Future[Saved]", cancellation: Cancellation | None = None) -> None:
        """Made by `Checkpointer.async_save`."""
        self.step = step
        self._future = future
        self._cancellation = cancellation
        self._was_told = False

    def done(self) -> bool:
        """Whether it has committed, failed, or was skipped."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> Saved:
        """Waits until the checkpoint is committed.

        Args:
            timeout_s: seconds to wait at most; None for as long as it takes.

        Raises:
            CheckpointError: the save failed; nothing was committed, but for a CommitUnknownError.
            TimeoutError: it is still under way.
        """
        try:
            return self._future.result(timeout_s)
        except FutureTimeoutError:
            if self._future.done():
                self._was_told = True
                raise  # a DeadlineError is one too
            msg = f"step {self.step} is still being saved after {timeout_s:g} s"
            raise TimeoutError(msg) from None
        except BaseException:
            self._was_told = self._future.done()
            raise

    @classmethod
    def of_skipped(cls, step: int, url: str) -> Self:
        """One of a save that was not begun."""
        future: Future[Saved] = Future()
        future.set_result(Saved(step=step, url=url, was_skipped=True))
        return cls(step, future)

    def _failure(self) -> BaseException | None:
        """What it failed of, if nobody was told yet."""
        is_over = self._future.done() and not self._was_told
        return self._future.exception() if is_over else None


class Background:
    """The thread that saves, and the saves that it was given."""

    def __init__(self) -> None:
        """Starts no thread yet. One that has work keeps the interpreter from ending before it is done."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cloudckpt-save")
        self._lock = threading.Lock()
        self._handles: list[SaveHandle] = []

    @property
    def under_way(self) -> list[SaveHandle]:
        """Saves that are not over, oldest first."""
        with self._lock:
            return [handle for handle in self._handles if not handle.done()]

    def submit(self, step: int, cancellation: Cancellation, save: Callable[[], Saved]) -> SaveHandle:
        """Has ``save`` run after those before it.

        Raises:
            UsageError: `close` was called.
        """
        try:
            future = self._pool.submit(save)
        except RuntimeError as e:
            msg = "the checkpointer is closed"
            raise UsageError(msg) from e
        handle = SaveHandle(step, future, cancellation)
        with self._lock:
            self._handles = [one for one in self._handles if not one.done() or one._failure() is not None]
            self._handles.append(handle)
        return handle

    def failure(self) -> Failure | None:
        """The first failure that nobody was told of, with its step."""
        with self._lock:
            found = [
                Failure(handle.step, error) for handle in self._handles if (error := handle._failure()) is not None
            ]
        return found[0] if found else None

    def forget_failures(self) -> None:
        """They have been told."""
        with self._lock:
            self._handles = [handle for handle in self._handles if not handle.done()]

    def wait(self, most: int = 0) -> None:
        """Waits until at most so many saves are under way, whatever becomes of them."""
        under_way = self.under_way
        for handle in under_way[: len(under_way) - most]:
            handle._future.exception()

    def cancel(self) -> None:
        """Tells all that are under way to stop; those whose commit has begun do not."""
        for handle in self.under_way:
            if handle._cancellation is not None:
                handle._cancellation.cancel()

    def close(self) -> None:
        """Waits for all; takes no more."""
        self._pool.shutdown(wait=True)
