"""Process groups of our own, so that what we say never meets what training says.

Law: making them is collective, ending them is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist


@contextmanager
def own_groups(
    of: dist.ProcessGroup | None, timeout_s: float
) -> Iterator[tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]]:
    """Two gloo groups of the ranks of a group: one for each thread that talks; (None, None) for one process alone.

    Args:
        of: the ranks; all of the job, if None.
        timeout_s: how long a rank waits for another.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield None, None
        return
    ranks = None if of is None else dist.get_process_group_ranks(of)
    timeout = timedelta(seconds=min(timeout_s, 365 * 86400.0))
    made = [
        dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=ranks is not None)
        for _ in range(2)
    ]
    try:
        yield made[0], made[1]
    finally:
        if dist.is_initialized():  # or it has ended all groups already
            for group in made:
                dist.destroy_process_group(group)
