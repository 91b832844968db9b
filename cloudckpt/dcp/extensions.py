"""Our extensions as torch's: its file-system writer and reader ask by ``isinstance``.

Law: importing this registers our classes as virtual subclasses of torch's, and does nothing else.
"""

from torch.distributed.checkpoint import _extension

from cloudckpt.extensions.base import Extension, StreamTransformExtension

_extension.Extension.register(Extension)  # type: ignore[type-abstract]
_extension.StreamTransformExtension.register(StreamTransformExtension)  # type: ignore[type-abstract]
