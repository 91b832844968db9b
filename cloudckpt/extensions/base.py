"""What an extension is: DCP's words for streams, and ours for whole frames.

Law: no I/O, no await, no torch. The stream classes have the names, methods and descriptors of
``torch.distributed.checkpoint._extension``, so that an extension written for either works in both.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from cloudckpt.extensions.scratch import Scratch

Buffer = bytes | bytearray | memoryview


class Extension(ABC):
    """Changes how items are stored; told again at reading time by its descriptor."""

    @staticmethod
    @abstractmethod
    def registry_name() -> str:
        """The name under which an `ExtensionRegistry` knows the class: ``name[@local-domain]``."""

    @staticmethod
    @abstractmethod
    def from_descriptor(version: str) -> "Extension":
        """Makes the extension that a descriptor names.

        Args:
            version: what followed the ``/`` in the descriptor, or an empty text.

        Raises:
            UnknownExtensionError: a version this class does not know.
            MissingLibraryError: a library is needed that is not installed; says which.
        """

    @abstractmethod
    def get_descriptor(self) -> str:
        """The name and version that checkpoints keep: ``name[@local-domain]/version``."""


class StreamTransformExtension(Extension):
    """Transforms a byte stream: what torch's file-system writer and reader use."""

    @abstractmethod
    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """A stream to write plain bytes to, which writes transformed bytes to ``output``.

        Closing it writes what is left and closes ``output``.
        """

    @abstractmethod
    def transform_from(self, input: IO[bytes]) -> IO[bytes]:  # noqa: A002 - DCP's name
        """A stream to read plain bytes from, which reads transformed bytes from ``input``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameContext:
    """Which frame this is; the same when it is restored as when it was transformed.

    Attributes:
        shard: the shard's token.
        item: the item's name in the shard, as `layout.item_name` spells it.
        number: of the frame among the shard's.
        index: of the frame among the item's.
        is_last: whether it is the item's last.
        width: bytes of each number in the item: 2 for bfloat16, 4 for complex64 (pairs of float32), 1 for bytes.
    """

    shard: str
    item: str
    number: int
    index: int
    is_last: bool
    width: int


class FrameCodec(ABC):
    """An extension at work on the frames of one shard.

    Its methods are called from several threads at once, for different frames.

    Attributes:
        params: what `FrameTransformExtension.open_shard` needs to know again; kept in the manifest for anyone
            to read.
        is_optional: whether a frame that this would not make smaller is left as it is.
        reuses_memory: whether what `transform` returns lies in `scratch`, or in the memory of what it was given.
        scratch: to take memory from, once a call and only for what is returned; the same for all codecs of a
            save or a load.
    """

    params: Mapping[str, str] = {}
    is_optional: bool = False
    reuses_memory: bool = False
    scratch: Scratch = Scratch()

    @abstractmethod
    def transform(self, sections: Sequence[memoryview], frame: FrameContext) -> Sequence[Buffer]:
        """Transforms a frame.

        Args:
            sections: the frame's bytes, in order. Where there are several, each is of one nature (a plane of
                bytes, say) and may be worth treating alone.
            frame: which frame it is.

        Returns:
            The transformed bytes, in one section or several; views of ``sections`` only if `reuses_memory`.
        """

    @abstractmethod
    def restore(self, stored: memoryview, frame: FrameContext, *, limit: int) -> Buffer:
        """Restores a frame: the joined bytes of what `transform` was given.

        Args:
            stored: the joined bytes of what `transform` returned.
            frame: which frame it is.
            limit: the plain bytes that may come out, and that memory may be taken for.

        Returns:
            The plain bytes, which may lie in `scratch`.

        Raises:
            ValueError: ``stored`` is damaged, not authentic, followed by other bytes, or is more than ``limit``
                when restored. The caller adds where it lay.
        """

    def stored_size(self, nbytes: int) -> int | None:
        """How many bytes `transform` makes of ``nbytes``, where that does not depend on them; else None."""
        del nbytes
        return None

    def max_stored_size(self, nbytes: int) -> int:
        """How many bytes `transform` makes of ``nbytes`` at most."""
        return self.stored_size(nbytes) or 2 * nbytes + (1 << 16)


class FrameTransformExtension(StreamTransformExtension):
    """Transforms whole frames, each alone, so that a slice of what was stored can be read.

    As a stream it serves torch's writer, which says nothing of dtype, item or place.
    """

    @abstractmethod
    def start_shard(self) -> FrameCodec:
        """A codec for a new shard. May ask a key service."""

    @abstractmethod
    def open_shard(self, params: Mapping[str, str]) -> FrameCodec:
        """The codec for a shard that was written with these `FrameCodec.params`. May ask a key service.

        Raises:
            EncryptionKeyError: a key is missing or wrong; says which.
        """
