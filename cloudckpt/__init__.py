"""Object-storage-first checkpoints for PyTorch.

`cloudckpt.dcp` saves and loads; `open` looks inside a checkpoint without torch.
"""

from cloudckpt import errors
from cloudckpt.checkpoint import Checkpoint, open  # noqa: A004 - the name is the public face

__all__ = ["Checkpoint", "errors", "open"]
