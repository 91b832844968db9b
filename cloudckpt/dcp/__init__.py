"""cloudckpt for `torch.distributed.checkpoint`, and the Checkpointer that drives it.

Law: the only floor with torch. It translates between DCP's words and the engine's; it holds no bytes logic.
"""

from cloudckpt.catalog import KeepBest, KeepEvery, KeepLast
from cloudckpt.dcp import extensions  # noqa: F401 - registers ours as torch's
from cloudckpt.dcp.background import Saved, SaveHandle
from cloudckpt.dcp.checkpointer import Checkpointer
from cloudckpt.dcp.hooks import CommitInfo, WriterHook
from cloudckpt.dcp.ranks import Barrier, Collectives, GroupBarrier, RankInfo, StoreBarrier, TcpBarrier
from cloudckpt.dcp.reader import ObjectStoreReader
from cloudckpt.dcp.state.rng import RngStates
from cloudckpt.dcp.stats import SaveStats
from cloudckpt.dcp.writer import ObjectStoreWriter

__all__ = [
    "Barrier",
    "Checkpointer",
    "Collectives",
    "CommitInfo",
    "GroupBarrier",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "ObjectStoreReader",
    "ObjectStoreWriter",
    "RankInfo",
    "RngStates",
    "SaveHandle",
    "SaveStats",
    "Saved",
    "StoreBarrier",
    "TcpBarrier",
    "WriterHook",
]
