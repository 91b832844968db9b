"""Old steps removed behind training.

Law: off the way of every save; a failure costs nothing but space, is told in the log, and is made good after the next
commit.
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from cloudckpt import catalog
from cloudckpt.errors import UsageError
from cloudckpt.store.url import StoreOptions

log = logging.getLogger(__name__)


class Retention:
    """Prunes after commits, one time at most for all that come while it is at work."""

    def __init__(self, root: str, keep: catalog.Policy | None, grace_s: float, store: StoreOptions) -> None:
        """Starts no thread yet.

        Args:
            root: URL that the steps lie below.
            keep: which of them stay; None for all.
            grace_s: see `catalog.prune`.
            store: how to reach the store.

        Raises:
            UsageError: ``keep`` is no policy, or the grace negative.
        """
        if keep is not None and not callable(getattr(keep, "keep", None)):
            msg = f"keep={keep!r} is no policy; pass one such as KeepLast(3)"
            raise UsageError(msg)
        if not grace_s >= 0:
            msg = f"keep_grace_s={grace_s} must not be negative"
            raise UsageError(msg)
        self._root = root
        self._keep = keep
        self._grace_s = grace_s
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cloudckpt-prune")
        self._known = catalog.Known()
        self._lock = threading.Lock()
        self._waiting: Future[None] | None = None
        self._last = _Last()

    def after_commit(self, step: int) -> None:
        """Has old steps removed soon, and this one in no case. Does not wait."""
        if self._keep is None:
            return
        with self._lock:
            self._last.step = step
            if self._waiting is None:
                try:
                    self._waiting = self._pool.submit(self._prune, self._keep)
                except RuntimeError as e:  # the interpreter is ending
                    log.warning("old steps below %s stay until the next commit: %s", self._root, e)

    def close(self) -> None:
        """Waits until what was begun is done."""
        self._pool.shutdown(wait=True)

    def _prune(self, keep: catalog.Policy) -> None:
        with self._lock:
            self._waiting = None  # what commits from now on is not seen by this one
        try:
            pruned = catalog.prune(
                self._root,
                catalog.AnyOf((keep, self._last)),
                dry_run=False,
                grace_s=self._grace_s,
                known=self._known,
                store=self._store,
            )
        except Exception as e:  # a user's policy may raise anything
            log.warning("old steps below %s could not be removed, they stay until the next commit: %s", self._root, e)
            return
        if pruned.removed:
            log.info("removed steps %s below %s", [found.step for found in pruned.removed], self._root)
        for step, why in pruned.passed_over.items():
            log.warning("step %d below %s was not judged: %s", step, self._root, why)


class _Last:
    """Keeps the step that this job committed last: after a roll back, steps with higher numbers are there."""

    def __init__(self) -> None:
        self.step = -1

    def keep(self, steps: Sequence[catalog.CommittedStep]) -> Iterable[catalog.CommittedStep]:
        return [found for found in steps if found.step == self.step]
