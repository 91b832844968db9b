"""A gloo group as the rooms here use it: rank to rank, by ranks within the group.

Law: messages and ranks; what is sent is nobody's business here.
"""

from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from cloudckpt.dcp.ranks.group_store import connected, store_of
from cloudckpt.dcp.ranks.info import RankInfo
from cloudckpt.errors import RanksLostError, UsageError

_LONGEST_S = 10 * 365 * 86400
"""For a timeout that is endless, which torch cannot keep."""


class GlooGroup:
    """One that torch.distributed has, or one that is ours alone.

    Attributes:
        rank, size: within the group.
        ranks: in the whole job, by rank within the group.
        store: that all of its ranks share, on a connection of its own.
        timeout_s: how long a rank waits for another.
    """

    def __init__(self, backend: Any, ranks: list[int], store: Any, timeout_s: float) -> None:
        """Made by `of` and `new`."""
        self._backend = backend
        self.rank, self.size = backend.rank(), backend.size()
        self.ranks = ranks
        self.store = store
        self.timeout_s = timeout_s

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, me: RankInfo) -> Self:
        """A group of torch.distributed's, for as long as that has it; the default group, if None.

        Raises:
            UsageError: it has no gloo for CPU tensors, or this rank is not in it.
            RanksLostError: its store cannot be reached.
        """
        found = _checked(group, me)
        backend = found._get_backend(torch.device("cpu"))
        timeout_s = float(backend.options._timeout.total_seconds())
        return cls(backend, dist.get_process_group_ranks(found), _store_of(found, me), timeout_s)

    @classmethod
    def new(cls, of: dist.ProcessGroup | None, timeout_s: float, me: RankInfo) -> Self:
        """One of the same ranks, that torch.distributed knows nothing of and so never ends; collective.

        All ranks make theirs in the same order. (``dist.new_group`` has either the whole job make it, or names it by
        how many groups this rank is in, which ranks of a subgroup may differ in.)

        Args:
            of: the ranks; all of the job, if None.
            timeout_s: how long a rank waits for another, here too.
            me: who this rank is.

        Raises:
            UsageError: this rank is not in it.
            RanksLostError: a rank did not come.
        """
        group = _with_me(of, me)
        store = _store_of(group, me)
        timeout_s = min(timeout_s, _LONGEST_S)
        try:
            number = store.add(f"cloudckpt/groups/{group.rank()}", 1)
            own = PrefixStore(f"cloudckpt/group/{number}", group.get_group_store())
            backend = dist.ProcessGroupGloo(own, group.rank(), group.size(), timedelta(seconds=timeout_s))
        except RuntimeError as e:
            msg = f"not all ranks came to make a group with {me}: {e}"
            raise RanksLostError(msg) from e
        return cls(backend, dist.get_process_group_ranks(group), connected(own), timeout_s)

    def send(self, rank: int, tensor: torch.Tensor, tag: int) -> Any:
        """Begins to send to a rank."""
        return self._backend.send([tensor], rank, tag)

    def receive(self, rank: int, tensor: torch.Tensor, tag: int) -> Any:
        """Begins to receive from a rank."""
        return self._backend.recv([tensor], rank, tag)

    def broadcast(self, tensor: torch.Tensor, rank: int) -> None:
        """Sends what a rank has to all, down a tree; returns when it is there."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = rank, 0
        self._backend.broadcast([tensor], options).wait()


def _with_me(group: dist.ProcessGroup | None, me: RankInfo) -> Any:
    if dist.get_rank(group) < 0:
        raise UsageError(f"{me} is not in the process group: only its ranks can make Collectives of it")
    return group or dist.group.WORLD


def _checked(group: dist.ProcessGroup | None, me: RankInfo) -> Any:
    found = _with_me(group, me)
    config = dist.get_backend_config(found)
    backends = dict(pair.split(":", 1) for pair in config.split(",") if ":" in pair)
    if backends.get("cpu") != "gloo":
        raise UsageError(
            f"Collectives need a process group that has gloo for CPU tensors, and this one has {config}: it would "
            'send objects through device memory. Make one with torch.distributed.new_group(backend="gloo")'
        )
    return found


def _store_of(group: dist.ProcessGroup, me: RankInfo) -> Any:
    try:
        return store_of(group)
    except RuntimeError as e:
        raise RanksLostError(f"the store of the process group does not answer {me}: {e}") from e
