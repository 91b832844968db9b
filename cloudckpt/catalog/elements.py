"""The elements of tensors of any size, read piece by piece.

Law: sync; memory is bounded by how many pieces are under way, whatever the tensors. Pieces follow the chunks, so that
whole frames are read, and verified.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, TypeVar

import numpy as np

from cloudckpt.array import ArrayTarget, chunks_of, numpy_dtype
from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.access import Access
from cloudckpt.engine.contents import Ask, Located
from cloudckpt.engine.read import Wanted
from cloudckpt.manifest import Chunk, TensorEntry
from cloudckpt.ranges import Range, Region, rectangles, split

T = TypeVar("T")
R = TypeVar("R")
Elements = np.ndarray[Any, Any]

BATCH_NBYTES = 8 << 20
"""Read together: a multiple of what a frame has by default."""

THREADS = 8
"""Batches under way at a time; each takes as much memory as it has bytes, of each checkpoint that is read."""

_MOST_PIECES = 1000
"""In a batch: what is asked for must be planned."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some elements of a tensor.

    Attributes:
        key: of the tensor.
        chunk: the index of the chunk that they are of, in the checkpoint that was cut into pieces.
        regions: that they are, counted from the tensor's first element.
        nbytes: of them.
    """

    key: str
    chunk: int
    regions: tuple[Region, ...]
    nbytes: int


Batch = Sequence[Piece]


def batches(access: Access, keys: Iterable[str]) -> Iterator[Batch]:
    """All elements of tensors, each once, in batches of at most `BATCH_NBYTES`."""
    batch: list[Piece] = []
    room = BATCH_NBYTES
    for key in keys:
        for piece in _pieces(key, tensor_entry(access, key)):
            if batch and (piece.nbytes > room or len(batch) == _MOST_PIECES):
                yield batch
                batch, room = [], BATCH_NBYTES
            batch.append(piece)
            room -= piece.nbytes
    if batch:
        yield batch


def _pieces(key: str, entry: TensorEntry) -> Iterator[Piece]:
    itemsize = DTYPES[entry.dtype].itemsize
    for i, chunk in enumerate(entry.chunks):
        for run in split(Range(0, prod(chunk.sizes)), BATCH_NBYTES // itemsize):
            inside = (region.relative_to([-o for o in chunk.offsets]) for region in rectangles(run, chunk.sizes))
            yield Piece(key, i, tuple(inside), len(run) * itemsize)


def tensor_entry(access: Access, key: str) -> TensorEntry:
    """The entry of a key that is a tensor's."""
    entry = access.contents.entry(key)
    assert isinstance(entry, TensorEntry)  # noqa: S101 - see above
    return entry


def read_batch(access: Access, batch: Batch) -> list[Elements]:
    """The elements of each piece, flat; of a dtype that numpy does not know, as void.

    Raises:
        IntegrityError, StoreError: the bytes could not be had.
    """
    found: list[tuple[Elements, str]] = []
    parts: list[tuple[TensorEntry, Ask, Region, ArrayTarget]] = []
    for piece in batch:
        entry = tensor_entry(access, piece.key)
        itemsize = DTYPES[entry.dtype].itemsize
        flat = np.empty(sum(region.numel for region in piece.regions), np.dtype((np.void, itemsize)))
        position = 0
        for region in piece.regions:
            target = ArrayTarget(flat[position : position + region.numel].reshape(region.sizes))
            position += region.numel
            for chunk, common in _holding(entry, piece, region):
                ask = Ask(piece.key, chunk, common.relative_to(chunk.offsets))
                parts.append((entry, ask, common.relative_to(region.offsets), target))
        found.append((flat, entry.dtype))

    def wanted(located: Located) -> list[Wanted]:
        return [_wanted(located, *part) for part in parts]

    access.read(lambda: [ask for _, ask, _, _ in parts], wanted)
    return [_typed(flat, dtype) for flat, dtype in found]


def _holding(entry: TensorEntry, piece: Piece, region: Region) -> Iterable[tuple[Chunk, Region]]:
    """The chunks that hold a region of a piece, and what of it; that of the piece's index is asked first."""
    for chunk in entry.chunks[piece.chunk : piece.chunk + 1]:
        if region.intersect(Region(chunk.offsets, chunk.sizes)) == region:
            return [(chunk, region)]
    return chunks_of(entry, region, piece.key)


def _wanted(located: Located, entry: TensorEntry, ask: Ask, place: Region, target: ArrayTarget) -> Wanted:
    assert isinstance(ask.at, Chunk)  # noqa: S101 - for the type checker
    sink = target.sink(place, ask.at.sizes, ask.region)
    read = located.read_chunk(ask.key, entry, ask.at, ask.region, is_direct=sink.memory is not None)
    return Wanted(repr(ask.key), read, sink)


def has_numbers(dtype: str) -> bool:
    """Whether elements of a dtype are read as numbers here."""
    return dtype == "complex32" or DTYPES[dtype].numpy is not None


def _typed(flat: Elements, dtype: str) -> Elements:
    """As numbers, where numpy knows the dtype or a wider one of its kind."""
    if dtype == "complex32":
        halves: Elements = flat.view(np.float16)
        return halves.astype(np.float32).view(np.complex64)
    return flat.view(numpy_dtype(dtype, dtype)) if has_numbers(dtype) else flat


def spread(action: Callable[[T], R], jobs: Iterable[T]) -> Iterator[tuple[T, R]]:
    """Does jobs in several threads, and yields each with its result, in order.

    None is begun before there is room for its result; after an error, or when the caller stops, none is any more.
    """
    rest = iter(jobs)
    pool = ThreadPoolExecutor(THREADS)
    under_way: list[tuple[T, Future[R]]] = [(job, pool.submit(action, job)) for job in islice(rest, THREADS)]
    try:
        while under_way:
            job, future = under_way.pop(0)
            result = future.result()
            under_way += [(job, pool.submit(action, job)) for job in islice(rest, 1)]
            yield job, result
    finally:
        pool.shutdown(cancel_futures=True)
