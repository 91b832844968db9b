"""Checkpoints as wholes: which are there, whether they are sound, what is left over; new keys for encrypted ones.

Law: sync, and safe to run while training saves. A checkpoint exists when its manifest does, and nothing else decides.
"""

from cloudckpt.catalog.rotation import rewrap
from cloudckpt.catalog.steps import newest_step, step_url

__all__ = ["newest_step", "rewrap", "step_url"]
