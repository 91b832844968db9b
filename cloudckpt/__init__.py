"""Object-storage-first checkpoints for PyTorch.

`cloudckpt.dcp` saves and loads; `open` looks inside a checkpoint without torch.

Law: names only. Rooms are imported when a name of theirs is first used, so that the command line starts fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloudckpt.array import Array
    from cloudckpt.checkpoint import Checkpoint, Loaded, open  # noqa: A004 - the name is the public face

__all__ = ["Array", "Checkpoint", "Loaded", "open"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        msg = f"module 'cloudckpt' has no attribute {name!r}"
        raise AttributeError(msg)
    from cloudckpt import checkpoint

    return getattr(checkpoint, name)
