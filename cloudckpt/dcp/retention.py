"""Old steps removed behind training.

Law: off the way of every save; a failure costs nothing but space, is told in the log, and is made good after the next
commit.
"""

import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor

from cloudckpt import catalog
from cloudckpt.errors import CheckpointError
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
        """
        self._root = root
        self._keep = keep
        self._grace_s = grace_s
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cloudckpt-prune")
        self._lock = threading.Lock()
        self._waiting: Future[None] | None = None

    def after_commit(self) -> None:
        """Has old steps removed soon. Does not wait."""
        if self._keep is None:
            return
        with self._lock:
            if self._waiting is None:
                self._waiting = self._pool.submit(self._prune, self._keep)

    def close(self) -> None:
        """Waits until what was begun is done."""
        self._pool.shutdown(wait=True)

    def _prune(self, keep: catalog.Policy) -> None:
        with self._lock:
            self._waiting = None  # what commits from now on is not seen by this one
        try:
            pruned = catalog.prune(self._root, keep, dry_run=False, grace_s=self._grace_s, store=self._store)
        except CheckpointError as e:
            log.warning("old steps below %s could not be removed, they stay until the next commit: %s", self._root, e)
            return
        if pruned.removed:
            log.info("removed steps %s below %s", [found.step for found in pruned.removed], self._root)
        for step, why in pruned.passed_over.items():
            log.warning("step %d below %s was not judged: %s", step, self._root, why)
