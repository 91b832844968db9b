"""Checkpoints as wholes: which are there, whether they are sound, what is left over; new keys for encrypted ones.

Law: sync, and safe to run while training saves. A checkpoint exists when its manifest does, and nothing else decides.
"""

from cloudckpt.catalog.committed import Known
from cloudckpt.catalog.diff import Changed, Difference, Side, diff, diff_open
from cloudckpt.catalog.inspection import Chain, Inspection, TensorDetails, inspect
from cloudckpt.catalog.listing import Listed, Listing, list_checkpoints
from cloudckpt.catalog.numbers import Change, Histogram, Statistics
from cloudckpt.catalog.pins import pin, pins, unpin
from cloudckpt.catalog.policies import (
    AllOf,
    AnyOf,
    Combines,
    CommittedStep,
    KeepBest,
    KeepEvery,
    KeepLast,
    Policy,
)
from cloudckpt.catalog.prune import GRACE_S, Pruned, PrunedStep, prune
from cloudckpt.catalog.rebuild import Rebuilt, RebuiltShard, rebuild
from cloudckpt.catalog.removal import remove
from cloudckpt.catalog.rotation import rewrap
from cloudckpt.catalog.statistics import statistics
from cloudckpt.catalog.steps import committed_steps, listed_steps, newest_step, step_url
from cloudckpt.catalog.sweep import Kept, Leftovers, Swept, sweep
from cloudckpt.catalog.tree import Leaf, Module, joined, tree_of
from cloudckpt.catalog.verify import Verification, verify

__all__ = [
    "GRACE_S",
    "AllOf",
    "AnyOf",
    "Chain",
    "Change",
    "Changed",
    "Combines",
    "CommittedStep",
    "Difference",
    "Histogram",
    "Inspection",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "Kept",
    "Known",
    "Leaf",
    "Leftovers",
    "Listed",
    "Listing",
    "Module",
    "Policy",
    "Pruned",
    "PrunedStep",
    "Rebuilt",
    "RebuiltShard",
    "Side",
    "Statistics",
    "Swept",
    "TensorDetails",
    "Verification",
    "committed_steps",
    "diff",
    "diff_open",
    "inspect",
    "joined",
    "list_checkpoints",
    "listed_steps",
    "newest_step",
    "pin",
    "pins",
    "prune",
    "rebuild",
    "remove",
    "rewrap",
    "statistics",
    "step_url",
    "sweep",
    "tree_of",
    "unpin",
    "verify",
]
