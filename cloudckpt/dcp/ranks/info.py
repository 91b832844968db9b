"""Who this rank is.

Law: asks torch and the operating system, and never the environment.
"""

import os
import socket
from dataclasses import dataclass
from typing import Self

import torch.distributed as dist

from cloudckpt.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """A rank of the job, as messages name it."""

    rank: int
    """In the whole job, whatever group is spoken of."""
    world_size: int
    local_rank: int | None
    """Among the ranks of its host, where the launcher says so (torchrun does)."""
    host: str
    pid: int

    @classmethod
    def read(cls) -> Self:
        """What torch knows of this process; without torch.distributed it is rank 0 of 1.

        Raises:
            UsageError: the launcher's local rank is no number.
        """
        rank, world_size = rank_and_world_size()
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=_local_rank(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def rank_and_world_size() -> tuple[int, int]:
    """What torch knows of this process; without torch.distributed it is rank 0 of 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _local_rank() -> int | None:
    """What `torch.distributed.get_node_local_rank` says; it takes ``LOCAL_RANK`` from the launcher."""
    if not dist.is_available():
        return None
    try:
        found = dist.get_node_local_rank(fallback_rank=-1)
    except ValueError as e:
        raise UsageError(f"the launcher's LOCAL_RANK is no number: {e}") from e
    return found if found >= 0 else None
