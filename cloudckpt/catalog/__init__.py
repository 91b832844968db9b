"""Checkpoints as wholes: which are there, whether they are sound, what is left over; new keys for encrypted ones.

Law: sync, and safe to run while training saves. A checkpoint exists when its manifest does, and nothing else decides.
"""

from cloudckpt.catalog.policies import CommittedStep, KeepEvery, KeepLast, Policy
from cloudckpt.catalog.prune import Pruned, PrunedStep, prune
from cloudckpt.catalog.rebuild import Rebuilt, RebuiltShard, rebuild
from cloudckpt.catalog.rotation import rewrap
from cloudckpt.catalog.steps import newest_step, step_url
from cloudckpt.catalog.sweep import Kept, Leftovers, Swept, sweep
from cloudckpt.catalog.verify import Verification, verify

__all__ = [
    "CommittedStep",
    "KeepEvery",
    "KeepLast",
    "Kept",
    "Leftovers",
    "Policy",
    "Pruned",
    "PrunedStep",
    "Rebuilt",
    "RebuiltShard",
    "Swept",
    "Verification",
    "newest_step",
    "prune",
    "rebuild",
    "rewrap",
    "step_url",
    "sweep",
    "verify",
]
