"""A training job's loads.

Law: which step is loaded is agreed on by all ranks before anything is read.
"""

import logging
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions

from cloudckpt import catalog
from cloudckpt.dcp.agreement import Wanted, agree_to_load
from cloudckpt.dcp.choosing import load_first
from cloudckpt.dcp.driving import load
from cloudckpt.dcp.ranks import Collectives
from cloudckpt.dcp.reader import ObjectStoreReader
from cloudckpt.engine.read import ReadOptions, Stats
from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.progress import Progress
from cloudckpt.store.url import StoreOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPolicy:
    """How all loads of a job are done; see `Checkpointer`."""

    root: str
    progress: Progress
    state_options: StateDictOptions | None
    options: ReadOptions
    store: StoreOptions


class Loader:
    """Loads for one rank.

    Attributes:
        stats: what the last load did on this rank; None before.
    """

    def __init__(self, policy: LoadPolicy, collectives: Collectives) -> None:
        """Speaks to the other ranks over ``collectives``."""
        self._policy = policy
        self._collectives = collectives
        self.stats: Stats | None = None

    def agree(self, say: Callable[[], Wanted]) -> list[int]:
        """The steps that the ranks are about to try, the first first.

        Args:
            say: what this rank wants; refuses what can be refused on it already.

        Raises:
            CheckpointError: as `agree_to_load`.
        """
        root, store = self._policy.root, self._policy.store

        def choose(wanted: Wanted) -> list[int]:
            return catalog.listed_steps(root, store) if wanted.step is None else [wanted.step]

        return agree_to_load(self._collectives, say, choose)

    def load(
        self,
        steps: list[int],
        wanted: Wanted,
        state_dict: MutableMapping[str, Any],
        per_rank: MutableMapping[str, Any] | None,
    ) -> int | None:
        """Loads what was agreed on; see `Checkpointer.load`."""
        root = self._policy.root
        found = load_first(
            root,
            steps,
            lambda url: self._load(url, wanted, state_dict, per_rank),
            fallback=wanted.fallback and wanted.step is None,
        )
        if found is None and wanted.step is not None:
            msg = f"step {steps[0]} is not committed below {root}; steps() tells which are"
            raise CheckpointNotFoundError(msg)
        if found is None and wanted.missing == "error":
            msg = f"no step is committed below {root}; check the URL, or begin with missing='none'"
            raise CheckpointNotFoundError(msg)
        return found

    def _load(
        self,
        url: str,
        wanted: Wanted,
        state_dict: MutableMapping[str, Any],
        per_rank: MutableMapping[str, Any] | None,
    ) -> None:
        policy = self._policy
        reader = ObjectStoreReader(url, progress=policy.progress, options=policy.options, store=policy.store)
        self.stats = reader.stats
        left_out = load(
            state_dict,
            reader,
            self._collectives,
            per_rank=per_rank,
            missing=wanted.missing_per_rank,
            options=policy.state_options,
        )
        if left_out and self._collectives.is_coordinator:
            log.warning("%s holds what ranks %s kept for themselves; this job has no such ranks", url, left_out)
