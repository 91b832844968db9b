"""A tensor in a checkpoint, read when it is indexed, by the rectangles that hold what is asked for.

Law: sync; no torch. What an index means is worked out before anything is asked of the store.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product
from math import prod
from types import EllipsisType
from typing import Any, Protocol

import numpy as np

from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.access import Access
from cloudckpt.engine.contents import Ask, Located
from cloudckpt.engine.memory import buffer_for, made_for
from cloudckpt.engine.read import Wanted
from cloudckpt.engine.sinks import Sink
from cloudckpt.errors import DtypeMismatchError, ManifestError, ShapeMismatchError
from cloudckpt.manifest import Chunk, TensorEntry
from cloudckpt.ranges import Range, Region, is_bridged, rectangles, strides_of

Index = int | slice | EllipsisType


class Target(Protocol):
    """Memory of the shape of what is read."""

    def sink(self, place: Region, chunk_shape: tuple[int, ...], inside: Region) -> Sink:
        """Where a part of it is received.

        Args:
            place: the part, counted from the target's first element.
            chunk_shape: elements per axis of the chunk that it comes from.
            inside: the same elements, counted from the chunk's first.
        """
        ...


class Array:
    """A tensor that is not read until it is indexed.

    Attributes:
        key: of its entry.
        shape: elements per axis.
    """

    def __init__(self, access: Access, key: str, entry: TensorEntry) -> None:
        """Call ``checkpoint[key]``."""
        self._access = access
        self.key = key
        self._entry = entry
        self.shape = entry.shape

    @property
    def dtype(self) -> "np.dtype[Any]":
        """numpy's, with `ml_dtypes` for bfloat16 and float8.

        Raises:
            DtypeMismatchError: numpy has none for it.
        """
        return numpy_dtype(self._entry.dtype, self.key)

    @property
    def dtype_name(self) -> str:
        """As `cloudckpt.dtypes.DTYPES` spells it; every array has one."""
        return self._entry.dtype

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many elements it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes its elements take."""
        return self.size * DTYPES[self._entry.dtype].itemsize

    def __len__(self) -> int:
        if not self.shape:
            msg = f"{self.key!r} is a scalar and has no length"
            raise TypeError(msg)
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Array {self.key!r} {self._entry.dtype} {self.shape}>"

    def __iter__(self) -> Iterator["np.ndarray[Any, Any]"]:
        """One request for each row: read a slice where several are wanted."""
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: Any = None) -> "np.ndarray[Any, Any]":
        """Reads all of it."""
        if copy is False:
            msg = f"{self.key!r} is in object storage: reading it makes a copy"
            raise ValueError(msg)
        return np.asarray(self[...], dtype=dtype)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> "np.ndarray[Any, Any]":
        """Reads a slice, from all chunks that hold some of it.

        Args:
            index: integers, slices and an ellipsis, as numpy takes them. What lies between the elements that a
                slice with a step takes is read too where it is cheaper read than asked around
                (`ReadOptions.max_gap`).

        Raises:
            ShapeMismatchError: too many indices, or one out of range.
            TooLargeError: what is read does not fit into memory; nothing was fetched.
            IntegrityError, StoreError: the bytes could not be had.
        """
        axes = _parse_index(index, self, self._access.options.max_gap)
        out = self._memory(axis.count for axis in axes)
        self._read((region, ArrayTarget(out[_slices(place)])) for region, place in _regions(axes))
        return out[tuple(axis.take for axis in axes)]

    def empty(self) -> "np.ndarray[Any, Any]":
        """Memory for all of it; nothing is read.

        Raises:
            TooLargeError: it does not fit.
            DtypeMismatchError: see `dtype`.
        """
        return self._memory(self.shape)

    def read_bytes(self, at: Range, into: memoryview) -> None:
        """Reads some of its bytes, row-major as they would lie in memory.

        Args:
            at: of `nbytes`.
            into: as many bytes.
        """
        itemsize = DTYPES[self._entry.dtype].itemsize
        elements = Range(at.start // itemsize, -(-at.stop // itemsize))
        is_exact = elements.start * itemsize == at.start and elements.stop * itemsize == at.stop
        memory = into if is_exact else buffer_for(repr(self.key), len(elements) * itemsize)
        flat = np.frombuffer(memory, np.dtype((np.void, itemsize)))
        wanted, position = [], 0
        for region in rectangles(elements, self.shape):
            wanted.append((region, ArrayTarget(flat[position : position + region.numel].reshape(region.sizes))))
            position += region.numel
        self._read(wanted)
        if not is_exact:
            start = at.start - elements.start * itemsize
            into[:] = memory[start : start + len(at)]

    def asks(self) -> list[Ask]:
        """For all of it."""
        whole = Region((0,) * self.ndim, self.shape)
        return [ask for ask, _ in self._parts(whole)]

    def wanted(self, target: Target, located: Located) -> list[Wanted]:
        """Reads of all of it into ``target``."""
        whole = Region((0,) * self.ndim, self.shape)
        return [self._wanted(ask, place, target, located) for ask, place in self._parts(whole)]

    def _memory(self, shape: Iterable[int]) -> "np.ndarray[Any, Any]":
        dtype, sizes = self.dtype, tuple(shape)
        with made_for(repr(self.key), prod(sizes) * dtype.itemsize):
            return np.empty(sizes, dtype)

    def _read(self, into: Iterable[tuple[Region, Target]]) -> None:
        found = [(ask, place, target) for region, target in into for ask, place in self._parts(region)]
        asks = [ask for ask, _, _ in found]
        self._access.read(lambda: asks, lambda located: [self._wanted(*part, located) for part in found])

    def _parts(self, region: Region) -> Iterator[tuple[Ask, Region]]:
        """What each chunk holds of a rectangle, and where it stands in that."""
        for chunk, common in chunks_of(self._entry, region, self.key):
            yield Ask(self.key, chunk, common.relative_to(chunk.offsets)), common.relative_to(region.offsets)

    def _wanted(self, ask: Ask, place: Region, target: Target, located: Located) -> Wanted:
        assert isinstance(ask.at, Chunk)  # noqa: S101 - for the type checker
        sink = target.sink(place, ask.at.sizes, ask.region)
        read = located.read_chunk(self.key, self._entry, ask.at, ask.region, is_direct=sink.memory is not None)
        return Wanted(repr(self.key), read, sink)


def chunks_of(entry: TensorEntry, region: Region, key: str) -> Iterator[tuple[Chunk, Region]]:
    """Each chunk that holds some of a rectangle, and what it holds, both counted from the tensor's first element.

    Raises:
        ManifestError: they do not hold all of it, or some of it twice.
    """
    covered = 0
    for chunk in entry.chunks if region.numel else ():
        common = region.intersect(Region(chunk.offsets, chunk.sizes))
        if common is not None:
            covered += common.numel
            yield chunk, common
    if covered != region.numel:
        msg = f"the chunks of {key!r} do not cover what was asked for exactly once"
        raise ManifestError(msg)


@dataclass(frozen=True, slots=True)
class ArrayTarget:
    """A numpy array, or a view of one, as a `Target`.

    Attributes:
        array: is written to.
        stored: dtype of the elements that arrive, cast where the array's differs; None where it does not.
    """

    array: "np.ndarray[Any, Any]"
    stored: "np.dtype[Any] | None" = None

    def sink(self, place: Region, chunk_shape: tuple[int, ...], inside: Region) -> Sink:
        """See `Target.sink`."""
        return _ArraySink(self.array[_slices(place)], self.stored or self.array.dtype, chunk_shape, inside)


@dataclass(frozen=True, slots=True)
class _ArraySink:
    array: "np.ndarray[Any, Any]"
    stored: "np.dtype[Any]"
    chunk_shape: tuple[int, ...]
    region: Region

    @property
    def memory(self) -> memoryview | None:
        if self.array.dtype != self.stored or not self.array.flags.c_contiguous:
            return None
        return self.array.reshape(-1).view(np.uint8).data

    def place(self, region: Region, data: memoryview) -> None:
        strides = strides_of(self.chunk_shape, self.stored.itemsize)
        rows = np.ndarray(region.sizes, self.stored, data, strides=strides)
        self.array[_slices(region.relative_to(self.region.offsets))] = rows


@dataclass(frozen=True, slots=True)
class _Axis:
    """What an index takes of one axis, in runs of indices that are read.

    Attributes:
        starts: of the runs, ascending; not one by one, for a hostile axis has more than can be counted.
        width: of each.
        take: the index into what was read that gives what was asked for.
    """

    starts: range
    width: int
    take: int | slice

    @property
    def count(self) -> int:
        """How many indices are read."""
        s = self.starts  # of which len() knows too small numbers only
        return max(0, -((s.start - s.stop) // s.step)) * self.width

    def placed(self) -> Iterator[tuple[Range, Range]]:
        """Each run, and where it stands among what is read."""
        for position, start in zip(count(0, self.width), self.starts, strict=False):
            yield Range(start, start + self.width), Range(position, position + self.width)


def _regions(axes: Sequence[_Axis]) -> Iterator[tuple[Region, Region]]:
    """The rectangles to read, and where each stands in what is read."""
    for some in product(*(axis.placed() for axis in axes)):
        yield _region_of([run for run, _ in some]), _region_of([place for _, place in some])


def _region_of(runs: Sequence[Range]) -> Region:
    return Region(tuple(run.start for run in runs), tuple(map(len, runs)))


def _parse_index(index: Index | tuple[Index, ...], array: Array, max_gap: int) -> list[_Axis]:
    parts = list(index) if isinstance(index, tuple) else [index]
    spread = [i for i, part in enumerate(parts) if part is Ellipsis]
    given = len(parts) - len(spread)
    if given > array.ndim or len(spread) > 1:
        msg = f"{array.key!r} of shape {array.shape} cannot be indexed with {index!r}: too many indices"
        raise ShapeMismatchError(msg)
    at = spread[0] if spread else len(parts)
    whole: list[Index] = [slice(None)] * (array.ndim - given)
    parts[at : at + len(spread)] = whole
    strides = strides_of(array.shape, DTYPES[array.dtype_name].itemsize)
    return [
        _parse_axis(part, n, stride, array, max_gap)
        for part, n, stride in zip(parts, array.shape, strides, strict=True)
    ]


def _parse_axis(part: Index, n: int, stride: int, array: Array, max_gap: int) -> _Axis:
    if not isinstance(part, slice):
        try:
            i = range(n)[part]  # type: ignore[index]
        except (IndexError, TypeError) as e:
            msg = f"{array.key!r} of shape {array.shape}: {part!r} is not an index into an axis of {n}"
            raise ShapeMismatchError(msg) from e
        return _Axis(range(i, i + 1), 1, 0)
    try:
        wanted = range(*part.indices(n))
    except (TypeError, ValueError) as e:  # a step of 0, a bound that is no integer
        msg = f"{array.key!r} of shape {array.shape}: {part!r} is not a slice of an axis of {n}: {e}"
        raise ShapeMismatchError(msg) from e
    if not wanted:
        return _Axis(range(0), 1, slice(None))
    direction = 1 if wanted.step > 0 else -1
    ascending = wanted[::direction]
    if not is_bridged((ascending.step - 1) * stride, stride, max_gap):
        return _Axis(ascending, 1, slice(None, None, direction))
    first, last = ascending[0], ascending[-1]
    return _Axis(range(first, first + 1), last + 1 - first, slice(None, None, wanted.step))


def _slices(region: Region) -> tuple[slice | EllipsisType, ...]:
    """An index that gives a view, of a scalar too."""
    return (*(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True)), Ellipsis)


def numpy_dtype(name: str, key: str) -> "np.dtype[Any]":
    """Numpy's dtype for a manifest's.

    Raises:
        DtypeMismatchError: numpy has none.
    """
    known = DTYPES[name].numpy
    if known is None:
        msg = f"{key!r} has dtype {name}, which numpy does not know; load it with torch"
        raise DtypeMismatchError(msg)
    if known.startswith("ml:"):
        import ml_dtypes

        extended: np.dtype[Any] = np.dtype(getattr(ml_dtypes, known.removeprefix("ml:")))
        return extended
    return np.dtype(known)
