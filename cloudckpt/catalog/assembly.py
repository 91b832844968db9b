"""Shards that lost their manifest, put together by what their headers say.

Law: pure. What is put together is proven to be whole; what cannot be told apart is not mixed.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from cloudckpt.catalog.headers import DescribedItem, DescribedShard
from cloudckpt.manifest import BytesEntry, Chunk, Entry, PlannerPath, TensorEntry

_Identity = tuple[str, str, tuple[int, ...]]
"""An entry as an item describes it: two that differ are not of one save."""


def could_be_whole(shards: Sequence[DescribedShard]) -> bool:
    """Whether a save may have left all of its shards among these.

    Where shards contradict each other, or a rank wrote several, those of several saves may lie together, and those
    that cannot be part of a whole one are left out. It errs on the side of yes.
    """
    are_several = len({shard.rank for shard in shards}) < len(shards) or bool(ambiguities(shards))
    left = list(shards)
    while left:
        lacking = set(_incomplete(left))
        if not lacking:
            return True
        if not are_several:
            return False
        left = [shard for shard in left if lacking.isdisjoint(map(_identity, shard.items))]
    return False


def ambiguities(shards: Sequence[DescribedShard]) -> list[str]:
    """What shows that the shards are not of one save: items that are there more than once, or contradict others."""
    problems = []
    by_key: dict[str, list[DescribedItem]] = defaultdict(list)
    for shard in shards:
        for item in shard.items:
            by_key[item.key].append(item)
    for key, items in by_key.items():
        twice = [name for name, count in Counter(item.name for item in items).items() if count > 1]
        if twice:
            problems.append(f"{twice[0]!r} is there more than once")
        elif len(set(map(_identity, items))) > 1:
            problems.append(f"{key!r} is described in several ways: {sorted(set(map(_identity, items)))}")
        elif items[0].dtype and sum(prod(item.sizes) for item in items) > prod(items[0].shape):
            problems.append(f"{key!r} has more elements than its shape {items[0].shape}")
    return problems


def assemble(shards: Sequence[DescribedShard], frame_size: int) -> tuple[dict[str, Entry], dict[str, PlannerPath]]:
    """The entries of a manifest that has these shards, in this order, and the planner's paths.

    Args:
        shards: without `ambiguities`. Whether they are whole, `manifest.entry_problems` tells of each entry.
        frame_size: plain bytes per frame.
    """
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    entries: dict[str, Entry] = {}
    paths: dict[str, PlannerPath] = {}
    for index, shard in enumerate(shards):
        for item, frame in first_frames(shard, frame_size):
            if item.dtype:
                chunk = Chunk(item.offsets, item.sizes, index, item.at.start, item.at.stop, frame)
                chunks[item.key].append(chunk)
                entries[item.key] = TensorEntry(item.dtype, item.shape, ())
            else:
                entries[item.key] = BytesEntry(len(item.at), index, item.at.start, item.at.stop, frame)
            if item.path is not None:
                paths[item.key] = item.path
    return {key: _with_chunks(entry, key, chunks) for key, entry in entries.items()}, paths


def first_frames(shard: DescribedShard, frame_size: int) -> Iterator[tuple[DescribedItem, int]]:
    """The items of a shard, with the number of their first frames."""
    frame = 0
    for item in shard.items:
        yield item, frame
        frame += -(-len(item.at) // frame_size)


def _with_chunks(entry: Entry, key: str, chunks: Mapping[str, Sequence[Chunk]]) -> Entry:
    if not isinstance(entry, TensorEntry):
        return entry
    return TensorEntry(entry.dtype, entry.shape, tuple(sorted(chunks[key], key=lambda chunk: chunk.offsets)))


def _incomplete(shards: Sequence[DescribedShard]) -> Iterator[_Identity]:
    """Entries some of whose elements are surely missing."""
    rectangles: dict[_Identity, set[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(set)
    for shard in shards:
        for item in shard.items:
            rectangles[_identity(item)].add((item.offsets, item.sizes))
    for identity, found in rectangles.items():
        if identity[1] and sum(prod(sizes) for _, sizes in found) < prod(identity[2]):
            yield identity


def _identity(item: DescribedItem) -> _Identity:
    return item.key, item.dtype, item.shape
