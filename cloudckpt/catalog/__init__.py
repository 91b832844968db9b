"""Checkpoints as wholes: which are there, whether they are sound, what is left over; new keys for encrypted ones.

Law: sync, and safe to run while training saves. A checkpoint exists when its manifest does, and nothing else decides.
"""

from cloudckpt.catalog.committed import Known
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
from cloudckpt.catalog.rotation import rewrap
from cloudckpt.catalog.steps import committed_steps, listed_steps, newest_step, step_url
from cloudckpt.catalog.sweep import Kept, Leftovers, Swept, sweep
from cloudckpt.catalog.verify import Verification, verify

__all__ = [
    "GRACE_S",
    "AllOf",
    "AnyOf",
    "Combines",
    "CommittedStep",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "Kept",
    "Known",
    "Leftovers",
    "Policy",
    "Pruned",
    "PrunedStep",
    "Rebuilt",
    "RebuiltShard",
    "Swept",
    "Verification",
    "committed_steps",
    "listed_steps",
    "newest_step",
    "pin",
    "pins",
    "prune",
    "rebuild",
    "rewrap",
    "step_url",
    "sweep",
    "unpin",
    "verify",
]
