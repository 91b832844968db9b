"""Extensions: compression and encryption, frame by frame, so that what is stored can still be read by the slice.

Law: no I/O, no await, no torch. Names, methods and descriptors are those of
``torch.distributed.checkpoint._extension``.
"""

from cloudckpt.extensions.aesgcm import AesGcm
from cloudckpt.extensions.base import (
    Extension,
    FrameCodec,
    FrameContext,
    FrameTransformExtension,
    StreamTransformExtension,
)
from cloudckpt.extensions.byteplane import BytePlane
from cloudckpt.extensions.keys import KeyProvider, KeysFromEnvironment, KeysFromFile, LocalKeys
from cloudckpt.extensions.registry import ExtensionRegistry
from cloudckpt.extensions.zstd import ZStandard

__all__ = [
    "AesGcm",
    "BytePlane",
    "Extension",
    "ExtensionRegistry",
    "FrameCodec",
    "FrameContext",
    "FrameTransformExtension",
    "KeyProvider",
    "KeysFromEnvironment",
    "KeysFromFile",
    "LocalKeys",
    "StreamTransformExtension",
    "ZStandard",
]
