"""A state dict copied to host memory, so that training may go on while it is saved.

Law: torch and memory; nothing of stores, plans or other ranks.
"""

from cloudckpt.dcp.staging.stager import Staged, Stager

__all__ = ["Staged", "Stager"]
