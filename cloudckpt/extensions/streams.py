"""Stream extensions, such as those written for torch, at work on frames.

Law: an extension is used through DCP's two methods and nothing else.
"""

import io
from collections.abc import Mapping, Sequence
from typing import IO

from cloudckpt.extensions.base import Buffer, FrameCodec, FrameContext, StreamTransformExtension


class StreamCodec(FrameCodec):
    """Runs each frame through a stream of its own."""

    def __init__(self, extension: StreamTransformExtension) -> None:
        """Uses ``extension``, which may be torch's own: only its methods are asked for."""
        self.params: Mapping[str, str] = {}
        self._extension = extension

    def transform(self, sections: Sequence[memoryview], frame: FrameContext) -> Sequence[Buffer]:
        """See `FrameCodec.transform`."""
        del frame
        stored = _Kept()
        stream = self._extension.transform_to(stored)
        for section in sections:
            stream.write(section)
        stream.close()
        return [stored.data if stored.closed else stored.getvalue()]  # some close what they write to, some do not

    def restore(self, stored: memoryview, frame: FrameContext, *, limit: int) -> Buffer:
        """See `FrameCodec.restore`."""
        del frame
        source = io.BytesIO(stored)
        stream = self._extension.transform_from(source)
        restored = read_at_most(stream, limit)
        if source.read(1):
            msg = "other bytes follow it"
            raise ValueError(msg)
        return restored


def read_at_most(stream: IO[bytes], limit: int) -> bytearray:
    """Everything that a stream restores.

    Raises:
        ValueError: that is more than ``limit`` bytes.
    """
    restored = bytearray()
    while len(restored) <= limit and (piece := stream.read(limit + 1 - len(restored))):
        restored += piece
    if len(restored) > limit:
        msg = f"it restores to more than the {limit} bytes it may have"
        raise ValueError(msg)
    return restored


class _Kept(io.BytesIO):
    """Keeps what was written when it is closed, as transforming streams close what they write to."""

    data: bytes = b""

    def close(self) -> None:
        if not self.closed:
            self.data = self.getvalue()
        super().close()
