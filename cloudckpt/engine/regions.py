"""From the manifest's chunks to the reads the planner understands.

Law: pure. What a manifest claims of an entry is checked here, before a request is planned from it.
"""

from collections.abc import Sequence
from functools import cache

from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.fetching import RegionRead
from cloudckpt.errors import ManifestError
from cloudckpt.manifest import BytesEntry, Chunk, Entry, Manifest, TensorEntry, entry_problems, unpack
from cloudckpt.ranges import Region


class Locator:
    """Finds the bytes of a manifest's entries."""

    def __init__(self, manifest: Manifest) -> None:
        """Looks into ``manifest``; checks each entry when it is first asked for."""
        self._manifest = manifest
        self._checksums = cache(lambda shard: unpack(manifest.shards[shard].frame_checksums))
        self._sound: set[str] = set()

    def entry(self, key: str) -> Entry:
        """The entry of that key, which must be there.

        Raises:
            ManifestError: what it claims cannot be.
        """
        entry = self._manifest.entries[key]
        if key not in self._sound:
            problems = entry_problems(entry, self._manifest.shards)
            if problems:
                msg = f"the manifest's entry {key!r} is not sound: {'; '.join(problems)}"
                raise ManifestError(msg)
            self._sound.add(key)
        return entry

    def read_chunk(self, entry: TensorEntry, chunk: Chunk, region: Region, *, is_direct: bool) -> RegionRead:
        """A read of a rectangle of a chunk, counted from the chunk's first element."""
        return self._read(chunk, DTYPES[entry.dtype].itemsize, chunk.sizes, region, is_direct=is_direct)

    def read_bytes(self, entry: BytesEntry) -> RegionRead:
        """A read of a whole byte string into memory."""
        shape = (entry.nbytes,)
        return self._read(entry, 1, shape, Region((0,), shape), is_direct=True)

    def _read(
        self, at: Chunk | BytesEntry, itemsize: int, shape: tuple[int, ...], region: Region, *, is_direct: bool
    ) -> RegionRead:
        shard = self._manifest.shards[at.shard]
        if shard.extensions:
            msg = f"{shard.key} was written with extensions {shard.extensions}, which this release cannot restore"
            raise ManifestError(msg)
        checksums: Sequence[int] = self._checksums(at.shard)
        count = -(-(at.stop - at.start) // shard.frame_size)
        return RegionRead(
            key=shard.key,
            start=at.start,
            itemsize=itemsize,
            shape=shape,
            region=region,
            frame_size=shard.frame_size,
            checksums=checksums[at.frame : at.frame + count],
            is_direct=is_direct,
        )


class MemorySink:
    """A byte string received into memory of its own."""

    def __init__(self, nbytes: int) -> None:
        """Makes the memory."""
        self.memory = memoryview(bytearray(nbytes))

    def place(self, region: Region, data: memoryview) -> None:
        """Never asked: a byte string is one run."""
        del data
        msg = f"a byte string cannot be placed by region {region}"
        raise AssertionError(msg)
