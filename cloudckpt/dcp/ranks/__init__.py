"""What the ranks of a job do together, and how they learn of each other's failures.

Law: knows nothing of checkpoints.
"""

from cloudckpt.dcp.ranks.barriers import Barrier, GroupBarrier, StoreBarrier, TcpBarrier
from cloudckpt.dcp.ranks.collectives import Collectives
from cloudckpt.dcp.ranks.gloo_group import GlooGroup
from cloudckpt.dcp.ranks.info import RankInfo

__all__ = ["Barrier", "Collectives", "GlooGroup", "GroupBarrier", "RankInfo", "StoreBarrier", "TcpBarrier"]
