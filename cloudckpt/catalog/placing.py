"""Where a manifest says that its items lie, and what is wrong with that.

Law: pure. Every problem is told, not only the first.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from cloudckpt.convert.safetensors import Header
from cloudckpt.dtypes import DTYPES, RAW
from cloudckpt.layout import item_name
from cloudckpt.manifest import (
    BytesEntry,
    Chunk,
    Entry,
    Manifest,
    Shard,
    TensorEntry,
    entry_problems,
    frame_problems,
    overlap_problems,
    unpack,
)
from cloudckpt.ranges import Range


class Placed(Struct, frozen=True, gc=False):
    """An item in its shard.

    Attributes:
        key: of its entry.
        name: in a header.
        dtype, shape: the same.
        at: its bytes in the object.
        frame: its first among the shard's.
        frame_count: how many it has.
    """

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    at: Range
    frame: int
    frame_count: int


class Placing(Struct, frozen=True):
    """All items of a manifest whose entries are sound, by shard, and what is wrong with it."""

    items: Sequence[Sequence[Placed]]
    problems: Sequence[str]


def placing_of(manifest: Manifest) -> Placing:
    """Looks at all that a manifest claims, without a look at the shards."""
    problems: list[str] = []
    unsound: set[str] = set()
    items: list[list[Placed]] = [[] for _ in manifest.shards]
    for key, entry in manifest.entries.items():
        found = entry_problems(entry, manifest.shards)
        if found:
            problems += (f"entry {key!r}: {problem}" for problem in found)
            unsound.add(key)
            continue
        for index, item in _placed(key, entry, manifest.shards):
            items[index].append(item)
    if any(map(_may_overlap, items)):
        sound = {key: entry for key, entry in manifest.entries.items() if key not in unsound}
        problems += overlap_problems(replace(manifest, entries=sound))
    for shard, placed in zip(manifest.shards, items, strict=True):
        problems += (f"{shard.key}: {problem}" for problem in _frame_problems(shard, placed))
    return Placing(items, problems)


def _may_overlap(items: Sequence[Placed]) -> bool:
    """Whether `overlap_problems` may have anything to tell of a shard: the faster question, of a million items."""
    filled = [item for item in items if item.at]
    places = np.empty((len(filled), 4), np.int64)
    places[:, 0] = [item.at.start for item in filled]
    places[:, 1] = [item.at.stop for item in filled]
    places[:, 2] = [item.frame for item in filled]
    places[:, 3] = [item.frame + item.frame_count for item in filled]
    places = places[np.lexsort(places.T[::-1])]
    is_same = (places[1:] == places[:-1]).all(axis=1)
    is_behind = (places[1:, 0] >= places[:-1, 1]) & (places[1:, 2] >= places[:-1, 3])
    return not (is_same | is_behind).all()


def frames_of(shard: Shard, sizes: Sequence[int], item: Placed) -> Iterator[Range]:
    """The stored bytes of each frame of an item of a sound shard, whose frame sizes are ``sizes``."""
    if not shard.extensions:
        for i in range(item.frame_count):
            start = item.at.start + i * shard.frame_size
            yield Range(start, min(start + shard.frame_size, item.at.stop))
        return
    start = item.at.start
    for nbytes in sizes[item.frame : item.frame + item.frame_count]:
        yield Range(start, start + nbytes)
        start += nbytes


def header_problems(items: Iterable[Placed], header: Header) -> list[str]:
    """Where the header of a plain shard contradicts the manifest."""
    expected = {item.name: item for item in items}
    aliases = {item.at for name, item in expected.items() if name in header.tensors and len(item.at)}
    problems = [f"its header lacks {name!r}" for name in _lacking(expected, header, aliases)]
    for name, (dtype, shape, at) in header.tensors.items():
        item = expected.get(name)
        if item is None:
            problems.append(f"its header has {name!r}, which the manifest does not know")
        elif (dtype, shape, at) != (item.dtype, item.shape, item.at):
            problems.append(
                f"its header has {name!r} as {dtype} {list(shape)} in bytes {at.start} to {at.stop}, the manifest "
                f"as {item.dtype} {list(item.shape)} in bytes {item.at.start} to {item.at.stop}"
            )
    return problems


def _lacking(expected: Mapping[str, Placed], header: Header, aliases: set[Range]) -> Iterator[str]:
    """Items that the header should have: of several in one place it can have only one."""
    for name, item in expected.items():
        if name not in header.tensors and item.at not in aliases:
            yield name


def _placed(key: str, entry: Entry, shards: Sequence[Shard]) -> Iterator[tuple[int, Placed]]:
    match entry:
        case BytesEntry():
            yield entry.shard, _item(key, item_name(key, None), RAW, (entry.nbytes,), at=entry, shards=shards)
        case TensorEntry():
            dtype = DTYPES[entry.dtype]
            for chunk in entry.chunks:
                name = item_name(key, None if chunk.sizes == entry.shape else chunk.offsets)
                if dtype.is_safetensors:
                    yield chunk.shard, _item(key, name, dtype.name, chunk.sizes, at=chunk, shards=shards)
                else:
                    nbytes = prod(chunk.sizes) * dtype.itemsize
                    yield chunk.shard, _item(key, name, RAW, (nbytes,), at=chunk, shards=shards)


def _item(
    key: str, name: str, dtype: str, shape: tuple[int, ...], *, at: Chunk | BytesEntry, shards: Sequence[Shard]
) -> Placed:
    count = -(-prod(shape) * DTYPES[dtype].itemsize // shards[at.shard].frame_size)
    return Placed(key, name, dtype, shape, Range(at.start, at.stop), at.frame, count)


def _frame_problems(shard: Shard, items: Iterable[Placed]) -> Iterator[str]:
    """Where the frames of a shard are not the bytes of its items."""
    problems = frame_problems(shard)
    yield from problems
    if problems or not shard.extensions:
        return
    starts = [0, *accumulate(unpack(shard.frame_sizes))]
    for item in items:
        if (starts[item.frame], starts[item.frame + item.frame_count]) != (item.at.start, item.at.stop):
            yield f"the frames of {item.name!r} are not its bytes {item.at.start} to {item.at.stop}"
