"""What stands at a URL, whoever wrote it: entries by key, and where their bytes lie.

Law: contracts only. Everything above reads through these and does not ask for the format.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct

from cloudckpt.engine.fetching import RegionRead
from cloudckpt.engine.read import ReadOptions, Stats, Wanted
from cloudckpt.manifest import BytesEntry, Chunk, Entry, OpenEntry, PlannerPath, Summary, TensorEntry
from cloudckpt.ranges import Region
from cloudckpt.store.protocols import Get


class Ask(Struct, frozen=True, gc=False):
    """A rectangle that is about to be read.

    Attributes:
        key: of the entry.
        at: its chunk, or the entry itself where it is a byte string.
        region: counted from the chunk's first element.
    """

    key: str
    at: Chunk | BytesEntry
    region: Region


class Located(Protocol):
    """Where what was asked for lies; good for one load."""

    def read_chunk(
        self, key: str, entry: TensorEntry, chunk: Chunk, region: Region, *, is_direct: bool
    ) -> RegionRead:
        """A read of a rectangle of a chunk, counted from the chunk's first element.

        Raises:
            UnknownExtensionError, MissingLibraryError, EncryptionKeyError: it cannot be restored here.
            ManifestError: what is claimed of its object cannot be.
        """
        ...

    def read_bytes(self, key: str, entry: BytesEntry, region: Region) -> RegionRead:
        """A read of some of a byte string into memory; raises as `read_chunk`."""
        ...

    def checks(self) -> Sequence[Wanted]:
        """What has to be read with the rest, to prove what was only guessed."""
        ...

    def is_proven(self) -> bool:
        """Whether all guesses were right, once `checks` were read; what was read by a wrong one is worth nothing.

        Raises:
            IntegrityError: what lies there cannot be what was saved.
        """
        ...


class Contents(Protocol):
    """The entries of one checkpoint.

    Attributes:
        format: what wrote it: ``cloudckpt``, ``dcp``, ``safetensors`` or ``torch.save``.
        entries: by key, not checked yet.
        metadata: the user's own.
        planner_paths: see `manifest.Manifest.planner_paths`.
        summary: when and by whom it was saved; None where the format does not say.
    """

    @property
    def format(self) -> str:
        """See the class."""
        ...

    @property
    def entries(self) -> Mapping[str, Entry]:
        """See the class."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """See the class. Raises EncryptionKeyError where it is encrypted and no keys were given."""
        ...

    @property
    def planner_paths(self) -> Mapping[str, PlannerPath] | None:
        """See the class."""
        ...

    @property
    def summary(self) -> Summary | None:
        """See the class."""
        ...

    async def locate(self, store: Get, asks: Iterable[Ask], options: ReadOptions, stats: Stats) -> Located:
        """Learns where what is asked for lies.

        Raises:
            IntegrityError: what lies there cannot be what was saved.
            StoreError: it is missing, shorter than it should be, or could not be read.
        """
        ...

    def entry(self, key: str) -> OpenEntry:
        """The entry of that key, which must be there.

        Raises:
            EncryptionKeyError: it is a value that is encrypted, and no keys were given.
            ManifestError: what is claimed of it cannot be.
        """
        ...
