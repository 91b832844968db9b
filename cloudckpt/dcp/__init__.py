"""cloudckpt for `torch.distributed.checkpoint`.

Law: the only floor with torch. It translates between DCP's words and the engine's; it holds no bytes logic.
"""

from cloudckpt.dcp import extensions  # noqa: F401 - registers ours as torch's
from cloudckpt.dcp.reader import ObjectStoreReader
from cloudckpt.dcp.writer import ObjectStoreWriter

__all__ = ["ObjectStoreReader", "ObjectStoreWriter"]
