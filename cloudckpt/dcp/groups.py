"""Process groups of our own, so that what we say never meets what training says.

Law: making them is collective, ending them is not; training's own groups may end before.
"""

import torch.distributed as dist

from cloudckpt.dcp.ranks import Collectives, GlooGroup, RankInfo


def own_collectives(of: dist.ProcessGroup | None, timeout_s: float) -> tuple[Collectives, Collectives]:
    """Two of the ranks of a group, one for each thread that talks; of one process alone, where there is no group.

    Args:
        of: the ranks; all of the job, if None.
        timeout_s: how long a rank waits for another.

    Raises:
        UsageError: this rank is not in the group.
        RanksLostError: a rank did not come.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Collectives(use_dist=False), Collectives(use_dist=False)
    me = RankInfo.read()
    front = Collectives(GlooGroup.new(of, timeout_s, me))
    return front, Collectives(GlooGroup.new(of, timeout_s, me))
