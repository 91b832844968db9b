"""From the manifest's chunks to the reads the planner understands.

Law: no I/O but a key service's. What a manifest claims of an entry is checked here, before a request is planned
from it.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any

from msgspec import UNSET

from cloudckpt import layout
from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.contents import Ask, Located
from cloudckpt.engine.fetching import RegionRead, StoredFrames
from cloudckpt.engine.framing import FRAME_ALIGNMENT, MAX_FRAME_SIZE
from cloudckpt.engine.read import ReadOptions, Stats, Wanted
from cloudckpt.engine.sealing import missing_key
from cloudckpt.errors import CheckpointError, ManifestError
from cloudckpt.extensions.chain import ShardChain, open_shard
from cloudckpt.extensions.registry import ExtensionRegistry
from cloudckpt.extensions.scratch import Scratch
from cloudckpt.manifest import (
    BytesEntry,
    Chunk,
    Entry,
    Manifest,
    OpenEntry,
    PlannerPath,
    SealedEntry,
    Shard,
    Summary,
    TensorEntry,
    entry_problems,
    frame_problems,
    unpack,
)
from cloudckpt.manifest.places import Place, place_problems
from cloudckpt.ranges import Region
from cloudckpt.store.protocols import Get

_MAX_PROBLEMS = 20


class Locator:
    """Implements `Contents` over a manifest: finds the bytes of its entries."""

    format = "cloudckpt"

    def __init__(self, manifest: Manifest, options: ReadOptions) -> None:
        """Looks into ``manifest``; checks each entry and each shard when it is first asked for."""
        self._manifest = manifest
        self._is_hidden = manifest.seal is not UNSET and options.keys is None
        registry = options.registry or ExtensionRegistry()
        self._registry = registry if options.keys is None else registry.with_keys(options.keys)
        self._checksums = cache(lambda shard: unpack(manifest.shards[shard].frame_checksums))
        self._starts = cache(self._find_starts)
        self._chains = cache(self._open_chain)
        self._sound: set[str] = set()
        self._scratch = Scratch()

    @property
    def entries(self) -> Mapping[str, Entry]:
        """See `Contents.entries`."""
        return self._manifest.entries

    @property
    def shards(self) -> Sequence[Shard]:
        """The manifest's."""
        return self._manifest.shards

    @property
    def metadata(self) -> Mapping[str, Any]:
        """See `Contents.metadata`."""
        if self._is_hidden:
            raise missing_key(self._manifest, "the metadata of this checkpoint")
        return self._manifest.metadata

    @property
    def planner_paths(self) -> Mapping[str, PlannerPath] | None:
        """See `Contents.planner_paths`."""
        return self._manifest.planner_paths

    @property
    def summary(self) -> Summary:
        """See `Contents.summary`."""
        return self._manifest.summary

    async def locate(self, store: Get, asks: Iterable[Ask], options: ReadOptions, stats: Stats) -> Located:
        """See `Contents.locate`: the manifest says where everything lies."""
        del store, asks, options, stats
        return _Located(self, self._manifest.shards)

    def entry(self, key: str) -> OpenEntry:
        """See `Contents.entry`."""
        entry = self._manifest.entries[key]
        if isinstance(entry, SealedEntry):
            raise missing_key(self._manifest, f"the value {key!r}")
        if key not in self._sound:
            problems = entry_problems(entry, self._manifest.shards)
            if problems:
                msg = f"the manifest's entry {key!r} is not sound: {'; '.join(problems)}"
                raise ManifestError(msg)
            self._sound.add(key)
        return entry

    def read_chunk(
        self, key: str, entry: TensorEntry, chunk: Chunk, region: Region, *, is_direct: bool
    ) -> RegionRead:
        """See `Located.read_chunk`."""
        name = layout.item_name(key, None if chunk.sizes == entry.shape else chunk.offsets)
        dtype = DTYPES[entry.dtype]
        return self._read(
            chunk, name, dtype.itemsize, dtype.number_size, chunk.sizes, region=region, is_direct=is_direct
        )

    def read_bytes(self, key: str, entry: BytesEntry, region: Region) -> RegionRead:
        """See `Located.read_bytes`."""
        return self._read(entry, layout.item_name(key, None), 1, 1, (entry.nbytes,), region=region, is_direct=True)

    def _read(
        self,
        at: Chunk | BytesEntry,
        name: str,
        itemsize: int,
        number_size: int,
        shape: tuple[int, ...],
        *,
        region: Region,
        is_direct: bool,
    ) -> RegionRead:
        shard = self._manifest.shards[at.shard]
        nbytes = prod(shape) * itemsize
        count = -(-nbytes // shard.frame_size)
        checksums: Sequence[int] = self._checksums(at.shard)
        return RegionRead(
            key=shard.key,
            start=at.start,
            itemsize=itemsize,
            shape=shape,
            region=region,
            frame_size=shard.frame_size,
            checksums=checksums[at.frame : at.frame + count],
            is_direct=is_direct,
            stored=self._stored(at, name, number_size, count) if shard.extensions else None,
        )

    def _stored(self, at: Chunk | BytesEntry, name: str, number_size: int, count: int) -> StoredFrames:
        key = self._manifest.shards[at.shard].key
        try:
            starts: Sequence[int] = self._starts(at.shard)[at.frame : at.frame + count + 1]
        except ManifestError as e:
            e.add_note(f"asked for {name!r}, which should lie at bytes {at.start} to {at.stop}")
            raise
        if len(starts) != count + 1 or (starts[0], starts[-1]) != (at.start, at.stop):
            msg = f"{name!r}: bytes {at.start} to {at.stop} of {key} are not its {count} frames from {at.frame} on"
            raise ManifestError(msg)
        return StoredFrames(
            chain=self._chains(at.shard),
            token=layout.token_of(key),
            item=name,
            number_size=number_size,
            first=at.frame,
            starts=starts,
        )

    def _find_starts(self, index: int) -> list[int]:
        shard = self._manifest.shards[index]
        problems = frame_problems(shard)
        if problems:
            msg = f"the frames of {shard.key} cannot be: {'; '.join(problems)}"
            raise ManifestError(msg)
        if shard.frame_size % FRAME_ALIGNMENT or shard.frame_size > MAX_FRAME_SIZE:
            msg = (
                f"{shard.key} has frames of {shard.frame_size} bytes: too large, or no multiple of {FRAME_ALIGNMENT}"
            )
            raise ManifestError(msg)
        return [0, *accumulate(unpack(shard.frame_sizes))]

    def _open_chain(self, index: int) -> ShardChain:
        shard = self._manifest.shards[index]
        try:
            extensions = self._registry.from_descriptor_list(shard.extensions)
            return open_shard(extensions, shard.extensions, shard.extension_params, self._scratch)
        except CheckpointError as e:
            e.add_note(f"needed for {shard.key}; nothing was fetched")
            raise


class _Located:
    """Implements `Located`: reads of one load, which are known to share no bytes that two items may not share."""

    def __init__(self, locator: Locator, shards: Sequence[Shard]) -> None:
        self._locator = locator
        self._shards = shards
        self._places: list[Place] = []

    def read_chunk(
        self, key: str, entry: TensorEntry, chunk: Chunk, region: Region, *, is_direct: bool
    ) -> RegionRead:
        self._note(key, chunk)
        return self._locator.read_chunk(key, entry, chunk, region, is_direct=is_direct)

    def read_bytes(self, key: str, entry: BytesEntry, region: Region) -> RegionRead:
        self._note(key, entry)
        return self._locator.read_bytes(key, entry, region)

    def checks(self) -> Sequence[Wanted]:
        problems = place_problems(self._places, self._shards)
        if problems:
            msg = f"the manifest is not sound: {'; '.join(problems[:_MAX_PROBLEMS])}"
            raise ManifestError(msg)
        return ()

    def is_proven(self) -> bool:
        return True

    def _note(self, key: str, at: Chunk | BytesEntry) -> None:
        shard = self._shards[at.shard]
        # Frames with extensions are proven to be those bytes; those of others follow from them.
        count = 0 if shard.extensions else -(-(at.stop - at.start) // shard.frame_size)
        self._places.append(Place(at.shard, at.start, at.stop, at.frame, at.frame + count, key))
