"""An example of a stream extension, and a registry that knows it.

Law: written as a user would write one.
"""

import io
from typing import IO, Any, cast

from cloudckpt.errors import UnknownExtensionError
from cloudckpt.extensions import ExtensionRegistry, StreamTransformExtension

_ROT13 = bytes.maketrans(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", b"NOPQRSTUVWXYZABCDEFGHIJKLMnopqrstuvwxyzabcdefghijklm"
)


class Rot13(StreamTransformExtension):
    """An example of a stream extension, as one would write it for torch: turns each ASCII letter by 13 places.

    torch's own example of the name ``stream.rot13`` does something else (it swaps case), hence the domain.
    """

    @staticmethod
    def registry_name() -> str:
        """``stream.rot13@cloudckpt``."""
        return "stream.rot13@cloudckpt"

    @staticmethod
    def from_descriptor(version: str) -> "Rot13":
        """See `Extension.from_descriptor`."""
        if version != "1":
            msg = f"stream.rot13@cloudckpt/{version} is of a version that this release does not know"
            raise UnknownExtensionError(msg)
        return Rot13()

    def get_descriptor(self) -> str:
        """See `Extension.get_descriptor`."""
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """See `StreamTransformExtension.transform_to`."""
        return cast(IO[bytes], _Rot13Stream(output))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:  # noqa: A002 - DCP's name
        """See `StreamTransformExtension.transform_from`."""
        return cast(IO[bytes], _Rot13Stream(input))


class _Rot13Stream(io.RawIOBase):
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._stream.write(bytes(data).translate(_ROT13))

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data.translate(_ROT13)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def get_test_extension_registry() -> ExtensionRegistry:
    """A registry that knows `Rot13` too."""
    registry = ExtensionRegistry()
    registry.register(Rot13)
    return registry
