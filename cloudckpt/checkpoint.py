"""One open checkpoint, without torch: look inside, read a slice.

Law: sync, and safe to use from several threads and after a fork: each call opens its own connections.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import EllipsisType
from typing import Any

import numpy as np
from msgspec import UNSET

from cloudckpt.dtypes import DTYPES
from cloudckpt.engine import loop
from cloudckpt.engine.commit import read_manifest_blob
from cloudckpt.engine.read import ReadOptions, Stats, Wanted, read_regions
from cloudckpt.engine.regions import Locator, MemorySink
from cloudckpt.engine.sealing import missing_key, open_manifest
from cloudckpt.errors import DtypeMismatchError, ManifestError, MissingKeyError, ShapeMismatchError
from cloudckpt.manifest import BytesEntry, Summary, TensorEntry, ValueEntry
from cloudckpt.ranges import Region, strides_of
from cloudckpt.store.url import StoreOptions, check_url, open_store, with_overrides

Index = int | slice | EllipsisType


def open(  # noqa: A001 - as `zarr.open`, `xarray.open_dataset`
    url: str | os.PathLike[str],
    *,
    options: ReadOptions | None = None,
    store: StoreOptions | None = None,
    **overrides: Any,
) -> "Checkpoint":
    """Opens a committed checkpoint: one GET, of its manifest.

    Args:
        url: of the checkpoint.
        options: how to read.
        store: how to reach the store.
        **overrides: any field of `ReadOptions`, `S3Options` or `RetryOptions`, by name.

    Raises:
        CheckpointNotFoundError, NotCommittedError: no checkpoint is there.
        ManifestError: its manifest is not sound.
        EncryptionKeyError, IntegrityError: see `engine.sealing.open_manifest`.
        StoreError: the store refused.
    """
    reading, reaching = with_overrides(options or ReadOptions(), store, overrides)
    return Checkpoint(check_url(os.fspath(url)), reading, reaching)


class Checkpoint(Mapping[str, "Array | bytes | Any"]):
    """A committed checkpoint: a mapping from keys to lazy arrays, byte strings and plain values.

    Attributes:
        url: where it is.
        stats: what reading through this object did so far.
    """

    def __init__(self, url: str, options: ReadOptions, store: StoreOptions) -> None:
        """Reads the manifest; call `cloudckpt.open`."""
        self.url = url
        self.stats = Stats()
        self._options = options
        self._store = store
        data = loop.run(self._get_manifest)
        self._manifest = open_manifest(data, url, options)
        self._locator = Locator(self._manifest, options)

    @property
    def summary(self) -> Summary:
        """When and by whom it was saved, and its sizes."""
        return self._manifest.summary

    @property
    def metadata(self) -> dict[str, Any]:
        """The user's own metadata.

        Raises:
            EncryptionKeyError: it is encrypted, and the checkpoint was opened without keys.
        """
        if self._manifest.seal is not UNSET and self._options.keys is None:
            raise missing_key(self._manifest, f"the metadata of {self.url}")
        return dict(self._manifest.metadata)

    def __len__(self) -> int:
        return len(self._manifest.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._manifest.entries)

    def __contains__(self, key: object) -> bool:
        return key in self._manifest.entries

    def __getitem__(self, key: str) -> "Array | bytes | Any":
        """The entry of that key: a lazy `Array`, or the value itself.

        Raises:
            MissingKeyError: there is none.
            EncryptionKeyError: it is a value that is encrypted, and the checkpoint was opened without keys.
        """
        if key not in self._manifest.entries:
            msg = f"{self.url} has no entry {key!r}; it has {len(self)} others, see keys()"
            raise MissingKeyError(msg)
        match self._locator.entry(key):
            case TensorEntry() as entry:
                return Array(self, key, entry)
            case BytesEntry() as entry:
                return self._read_bytes(key, entry)
            case ValueEntry(value):
                return value

    def __repr__(self) -> str:
        return f"<Checkpoint {self.url}: {len(self)} entries, {self.summary.nbytes} bytes>"

    def _read_bytes(self, key: str, entry: BytesEntry) -> bytes:
        sink = MemorySink(entry.nbytes)
        self._read([Wanted(repr(key), self._locator.read_bytes(key, entry), sink)])
        return bytes(sink.memory)

    def _read(self, wanted: list[Wanted]) -> None:
        async def read() -> None:
            async with open_store(self.url, self._store) as store:
                await read_regions(store, wanted, self._options, self.stats)

        loop.run(read)

    async def _get_manifest(self) -> bytes:
        async with open_store(self.url, self._store) as store:
            return (await read_manifest_blob(store)).data


class Array:
    """A tensor that is not read until it is indexed.

    Attributes:
        shape: elements per axis.
        dtype: numpy's, with `ml_dtypes` for bfloat16 and float8.
    """

    def __init__(self, checkpoint: Checkpoint, key: str, entry: TensorEntry) -> None:
        """Call ``checkpoint[key]``."""
        self._checkpoint = checkpoint
        self._key = key
        self._entry = entry
        self.shape = entry.shape
        self.dtype = _numpy_dtype(entry.dtype, key)

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
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        if not self.shape:
            msg = f"{self._key!r} is a scalar and has no length"
            raise TypeError(msg)
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<Array {self._key!r} {self.dtype} {self.shape}>"

    def __array__(self, dtype: Any = None, copy: Any = None) -> "np.ndarray[Any, Any]":
        """Reads all of it."""
        if copy is False:
            msg = f"{self._key!r} is in object storage: reading it makes a copy"
            raise ValueError(msg)
        return np.asarray(self[...], dtype=dtype)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> "np.ndarray[Any, Any]":
        """Reads a slice: the rows of it, from all chunks that hold some.

        Args:
            index: integers, slices and an ellipsis, as numpy takes them. A slice with a step reads what lies
                between its first and last element.

        Raises:
            ShapeMismatchError: too many indices, or one out of range.
            IntegrityError, StoreError: the bytes could not be had.
        """
        steps, region = _parse_index(index, self.shape, self._key)
        out = np.empty(region.sizes, self.dtype)
        wanted = []
        for chunk in self._entry.chunks:
            common = region.intersect(Region(chunk.offsets, chunk.sizes))
            if common is not None:
                target = out[_slices(common.relative_to(region.offsets))]
                inside = common.relative_to(chunk.offsets)
                sink = _ArraySink(target, chunk.sizes, inside)
                is_direct = sink.memory is not None
                locator = self._checkpoint._locator
                read = locator.read_chunk(self._key, self._entry, chunk, inside, is_direct=is_direct)
                wanted.append(Wanted(repr(self._key), read, sink))
        if sum(w.read.region.numel for w in wanted) != region.numel:
            msg = f"the chunks of {self._key!r} do not cover what was asked for exactly once"
            raise ManifestError(msg)
        self._checkpoint._read(wanted)
        return out[steps]


@dataclass(frozen=True, slots=True)
class _ArraySink:
    target: "np.ndarray[Any, Any]"
    chunk_shape: tuple[int, ...]
    region: Region

    @property
    def memory(self) -> memoryview | None:
        if not self.target.flags.c_contiguous:
            return None
        return self.target.reshape(-1).view(np.uint8).data

    def place(self, region: Region, data: memoryview) -> None:
        strides = strides_of(self.chunk_shape, self.target.itemsize)
        rows = np.ndarray(region.sizes, self.target.dtype, data, strides=strides)
        self.target[_slices(region.relative_to(self.region.offsets))] = rows


def _slices(region: Region) -> tuple[slice | EllipsisType, ...]:
    """An index that gives a view, of a scalar too."""
    return (*(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True)), Ellipsis)


def _parse_index(
    index: Index | tuple[Index, ...], shape: tuple[int, ...], key: str
) -> tuple[tuple[int | slice, ...], Region]:
    """The rectangle to read, and what to take of it then."""
    parts = list(index) if isinstance(index, tuple) else [index]
    spread = [i for i, part in enumerate(parts) if part is Ellipsis]
    given = len(parts) - len(spread)
    if given > len(shape) or len(spread) > 1:
        msg = f"{key!r} of shape {shape} cannot be indexed with {index!r}: too many indices"
        raise ShapeMismatchError(msg)
    at = spread[0] if spread else len(parts)
    whole: list[Index] = [slice(None)] * (len(shape) - given)
    parts[at : at + len(spread)] = whole
    steps: list[int | slice] = []
    offsets, sizes = [], []
    for part, n in zip(parts, shape, strict=True):
        first, count, step = _parse_axis(part, n, shape, key)
        offsets.append(first)
        sizes.append(count)
        steps.append(step)
    return tuple(steps), Region(tuple(offsets), tuple(sizes))


def _parse_axis(part: Index, n: int, shape: tuple[int, ...], key: str) -> tuple[int, int, int | slice]:
    if isinstance(part, slice):
        wanted = range(*part.indices(n))
        if not wanted:
            return 0, 0, slice(None)
        first, last = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])
        return first, last - first + 1, slice(None, None, wanted.step)
    try:
        i = range(n)[part]  # type: ignore[index]
    except (IndexError, TypeError) as e:
        msg = f"{key!r} of shape {shape}: {part!r} is not an index into an axis of {n}"
        raise ShapeMismatchError(msg) from e
    return i, 1, 0


def _numpy_dtype(name: str, key: str) -> "np.dtype[Any]":
    known = DTYPES[name].numpy
    if known is None:
        msg = f"{key!r} has dtype {name}, which numpy does not know; load it with torch"
        raise DtypeMismatchError(msg)
    if known.startswith("ml:"):
        import ml_dtypes

        extended: np.dtype[Any] = np.dtype(getattr(ml_dtypes, known.removeprefix("ml:")))
        return extended
    return np.dtype(known)
