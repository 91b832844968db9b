"""Where items lie in their shards: two share a place, or have nothing in common.

Law: pure. Judges entries that are sound by themselves.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

from cloudckpt.dtypes import DTYPES
from cloudckpt.manifest.structs import BytesEntry, Chunk, Entry, Manifest, Shard, TensorEntry


class Place(NamedTuple):
    """What an item takes of its shard.

    Attributes:
        shard: index into the manifest's shards.
        start: first byte.
        stop: one past the last.
        frame: its first.
        frame_stop: one past its last.
        key: of its entry.
    """

    shard: int
    start: int
    stop: int
    frame: int
    frame_stop: int
    key: str


def overlap_problems(manifest: Manifest) -> list[str]:
    """Items of a manifest that share bytes or frames of a shard with another item, and not all of them.

    What was written once may be named twice. An item that lies in some of another's bytes is none that a writer made.

    Args:
        manifest: whose entries are sound (`problems.entry_problems`); others are passed over.
    """
    return place_problems(all_places(manifest.entries, manifest.shards), manifest.shards)


def place_of(key: str, at: Chunk | BytesEntry, nbytes: int, shard: Shard) -> Place:
    """What an item of ``nbytes`` plain bytes takes."""
    frames = -(-nbytes // shard.frame_size)
    return Place(at.shard, at.start, at.stop, at.frame, at.frame + frames, key)


def all_places(entries: Mapping[str, Entry], shards: Sequence[Shard | None]) -> Iterator[Place]:
    """What the items of entries take."""
    for key, entry in entries.items():
        if isinstance(entry, BytesEntry):
            shard = _shard(entry.shard, shards)
            if shard is not None:
                yield place_of(key, entry, entry.nbytes, shard)
        elif isinstance(entry, TensorEntry) and entry.dtype in DTYPES:
            itemsize = DTYPES[entry.dtype].itemsize
            for chunk in entry.chunks:
                shard = _shard(chunk.shard, shards)
                if shard is not None:
                    yield place_of(key, chunk, prod(chunk.sizes) * itemsize, shard)


def place_problems(places: Iterable[Place], shards: Sequence[Shard | None]) -> list[str]:
    """Which of the places have something in common with another, and not everything; empty ones have nothing."""
    problems = []
    before: Place | None = None
    for place in sorted({place for place in places if place.start < place.stop}):
        if before is not None and before.shard == place.shard and not _is_shared(before, place):
            shard = shards[place.shard]
            of = f"of {shard.key if shard else f'shard {place.shard}'}"
            if place.start < before.stop:
                problems.append(
                    f"{place.key!r} at bytes {place.start} to {place.stop} {of} overlaps {before.key!r} at bytes "
                    f"{before.start} to {before.stop}"
                )
            elif place.frame < before.frame_stop:
                problems.append(
                    f"{place.key!r} begins with frame {place.frame} {of}, but {before.key!r} before it ends with "
                    f"frame {before.frame_stop - 1}"
                )
        before = place if before is None or place.shard != before.shard or place.stop > before.stop else before
    return problems


def _is_shared(a: Place, b: Place) -> bool:
    return a[1:5] == b[1:5]  # but for the key


def _shard(index: int, shards: Sequence[Shard | None]) -> Shard | None:
    return shards[index] if 0 <= index < len(shards) else None
