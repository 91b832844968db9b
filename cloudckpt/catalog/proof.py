"""What the manifests of two checkpoints prove of their bytes.

Law: pure. Nothing is fetched, and what they do not prove is not guessed.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from math import prod

from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.contents import Contents
from cloudckpt.engine.regions import Locator
from cloudckpt.manifest import BytesEntry, Chunk, OpenEntry, Shard, TensorEntry, unpack

_Items = list[tuple[Chunk | BytesEntry, int]]
"""What an entry is stored in, each with its plain bytes."""


class Prover:
    """Holds the checksums of frames in two checkpoints against each other.

    Those of plain shards are of plain bytes: where an entry is cut in both into the same chunks, and these into the
    same frames, equal checksums mean equal bytes (but for one chance in 2^32 for each frame that differs), and
    different ones different bytes.
    """

    def __init__(self, left: Contents, right: Contents) -> None:
        """Knows nothing of checkpoints of others, which have no checksums."""
        self._sides = (
            (_Side(left), _Side(right)) if isinstance(left, Locator) and isinstance(right, Locator) else None
        )

    def are_equal(self, left: OpenEntry, right: OpenEntry) -> bool | None:
        """Whether two tensors of one dtype and shape, or two byte strings, have the same bytes; None: who knows."""
        if self._sides is None:
            return None
        items = _items(left), _items(right)
        places = [[(at.offsets, at.sizes) for at, _ in some if isinstance(at, Chunk)] for some in items]
        if places[0] != places[1]:
            return None
        verdicts = set(self._verdicts(*self._sides, *items))
        return False if False in verdicts else None if None in verdicts else True

    def _verdicts(self, left: "_Side", right: "_Side", its: _Items, others: _Items) -> Iterator[bool | None]:
        for (a, nbytes), (b, other_nbytes) in zip(its, others, strict=True):
            one, other = left.shards[a.shard], right.shards[b.shard]
            if nbytes != other_nbytes:
                yield False
            elif one.extensions or other.extensions or one.frame_size != other.frame_size:
                yield None
            else:
                count = -(-nbytes // one.frame_size)
                yield left.checksums(a, count) == right.checksums(b, count)


class _Side:
    def __init__(self, contents: Locator) -> None:
        self.shards: Sequence[Shard] = contents.shards
        self._unpacked = cache(lambda shard: unpack(self.shards[shard].frame_checksums))

    def checksums(self, at: Chunk | BytesEntry, count: int) -> Sequence[int]:
        found: Sequence[int] = self._unpacked(at.shard)[at.frame : at.frame + count]
        return found


def _items(entry: OpenEntry) -> _Items:
    if isinstance(entry, BytesEntry):
        return [(entry, entry.nbytes)]
    assert isinstance(entry, TensorEntry)  # noqa: S101 - values are not stored in items
    itemsize = DTYPES[entry.dtype].itemsize
    chunks = sorted((chunk for chunk in entry.chunks if prod(chunk.sizes)), key=lambda chunk: chunk.offsets)
    return [(chunk, prod(chunk.sizes) * itemsize) for chunk in chunks]
