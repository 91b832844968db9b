"""The items of other people's formats, and the contents that are made of them.

Law: a format's own file says where its items lie; here is what all of them have in common. Async only in `locate`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

import numpy as np

from cloudckpt.convert.pickles import StoredTensor
from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.contents import Ask
from cloudckpt.engine.fetching import RegionRead, StoredFrames
from cloudckpt.engine.read import ReadOptions, Stats, Wanted, read_regions
from cloudckpt.engine.sinks import MemorySink
from cloudckpt.errors import CheckpointError, IntegrityError, ManifestError
from cloudckpt.extensions.base import FrameContext
from cloudckpt.manifest import BytesEntry, Chunk, Entry, OpenEntry, PlannerPath, TensorEntry, ValueEntry
from cloudckpt.ranges import Range, Region, strides_of
from cloudckpt.store.protocols import Get
from cloudckpt.threads import in_thread

_WHOLE_NBYTES = 16 << 20
"""An item of at most that many bytes, wanted whole, is fetched and taken apart in memory: the copy costs less than
the request that would find out where its elements lie."""

_PROBE_GAP = 64 << 10
"""Between two probes; larger ones would fetch the elements that lie between them."""


@dataclass(frozen=True, slots=True)
class Plain:
    """An item whose elements lie in its object as they do in memory, row-major."""

    at: Range


@dataclass(frozen=True, slots=True)
class Coded:
    """An item that must be fetched whole and decoded.

    Attributes:
        at: the bytes to fetch.
        decode: makes the row-major elements of them; raises IntegrityError.
        nbytes: of the elements; None for what is a tensor, whose size is known.
    """

    at: Range
    decode: Callable[[memoryview], memoryview]
    nbytes: int | None = None


class Item(Protocol):
    """A tensor's chunk, or a byte string, in an object."""

    @property
    def key(self) -> str:
        """Of the object."""
        ...

    @property
    def extent(self) -> Range:
        """Bytes of the object that hold it, and may hold more."""
        ...

    def probes(self) -> Sequence[Range]:
        """What has to be fetched to learn where its elements lie; nothing where that is known."""
        ...

    def locate(self, probed: Sequence[memoryview]) -> Plain | Coded:
        """Where its elements lie, given the bytes of `probes`.

        Raises:
            IntegrityError, ManifestError, UnsafePickleError: it is not what it should be.
        """
        ...

    def decode(self, extent: memoryview) -> memoryview:
        """Its row-major elements, given the bytes of `extent`; raises as `locate`."""
        ...


@dataclass(frozen=True, slots=True)
class PlainItem:
    """An item of which it is known that its bytes are its elements."""

    key: str
    extent: Range

    def probes(self) -> Sequence[Range]:
        """See `Item.probes`."""
        return ()

    def locate(self, probed: Sequence[memoryview]) -> Plain:
        """See `Item.locate`."""
        del probed
        return Plain(self.extent)

    def decode(self, extent: memoryview) -> memoryview:
        """See `Item.decode`."""
        return extent


@dataclass(slots=True, kw_only=True)
class ForeignContents:
    """Implements `Contents` for a checkpoint of others.

    The ``frame`` of its chunks and byte strings is the index of their item.
    """

    format: str
    items: Sequence[Item]
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    planner_paths: Mapping[str, PlannerPath] | None = None
    summary: None = None
    _found: dict[int, Plain | Coded] = field(default_factory=dict)

    def entry(self, key: str) -> OpenEntry:
        """See `Contents.entry`."""
        entry = self.entries[key]
        if isinstance(entry, TensorEntry) and entry.dtype not in DTYPES:
            msg = f"{key!r} has dtype {entry.dtype}, which this release does not read"
            raise ManifestError(msg)
        if isinstance(entry, BytesEntry):
            found = self._found.get(entry.frame)
            if isinstance(found, Coded) and found.nbytes is not None:
                return BytesEntry(found.nbytes, entry.shard, entry.start, entry.stop, entry.frame)
        assert isinstance(entry, TensorEntry | BytesEntry | ValueEntry)  # noqa: S101 - for the type checker
        return entry

    async def locate(self, store: Get, asks: Sequence[Ask], options: ReadOptions, stats: Stats) -> None:
        """See `Contents.locate`."""
        names = {ask.at.frame: ask.key for ask in asks if not self._is_decoded(ask.at, ask.region)}
        names = {i: key for i, key in names.items() if i not in self._found}
        probed: dict[int, list[memoryview]] = {}
        wanted = []
        for i, key in names.items():
            item = self.items[i]
            with noting(key):
                probes = item.probes()
            probed[i] = [memoryview(bytearray(len(at))) for at in probes]
            wanted += [
                Wanted(repr(key), _raw(item.key, at), MemorySink(memory))
                for at, memory in zip(probes, probed[i], strict=True)
            ]
        if wanted:
            probing = Stats()
            await read_regions(store, wanted, replace(options, max_gap=_PROBE_GAP), probing)
            stats.requests += probing.requests
            stats.bytes_fetched += probing.bytes_fetched
            stats.seconds += probing.seconds
        self._found |= await in_thread(self._locate_all, names, probed)

    def read_chunk(
        self, key: str, entry: TensorEntry, chunk: Chunk, region: Region, *, is_direct: bool
    ) -> RegionRead:
        """See `Contents.read_chunk`."""
        dtype = DTYPES[entry.dtype]
        return self._read(key, chunk, dtype.itemsize, chunk.sizes, region, is_direct=is_direct)

    def read_bytes(self, key: str, entry: BytesEntry, region: Region) -> RegionRead:
        """See `Contents.read_bytes`."""
        return self._read(key, entry, 1, (entry.nbytes,), region, is_direct=True)

    def _locate_all(
        self, names: Mapping[int, str], probed: Mapping[int, Sequence[memoryview]]
    ) -> dict[int, Plain | Coded]:
        found = {}
        for i, key in names.items():
            with noting(key):
                found[i] = self.items[i].locate(probed[i])
        return found

    def _is_decoded(self, at: Chunk | BytesEntry, region: Region) -> bool:
        """Whether an item that is not located yet is fetched whole, and taken apart in memory."""
        return isinstance(at, Chunk) and region.sizes == at.sizes and at.stop - at.start <= _WHOLE_NBYTES

    def _read(
        self,
        key: str,
        at: Chunk | BytesEntry,
        itemsize: int,
        shape: tuple[int, ...],
        region: Region,
        *,
        is_direct: bool,
    ) -> RegionRead:
        item = self.items[at.frame]
        found = self._found.get(at.frame)
        if found is None:
            found = Coded(item.extent, item.decode) if item.probes() else item.locate(())
        stored = None
        if isinstance(found, Coded):
            stored = StoredFrames(
                chain=_Decoder(found.decode),
                token="",
                item=key,
                number_size=1,
                first=found.at.start * len(self.items) + at.frame,  # in order of place, and no two alike
                starts=(found.at.start, found.at.stop),
            )
        return RegionRead(
            key=item.key,
            start=found.at.start,
            itemsize=itemsize,
            shape=shape,
            region=region,
            frame_size=max(1, prod(shape) * itemsize) if stored else 1,
            checksums=(),
            is_direct=is_direct,
            stored=stored,
        )


@dataclass(frozen=True, slots=True)
class _Decoder:
    """Implements `engine.fetching.Restorer`: an item is one frame."""

    decode: Callable[[memoryview], memoryview]

    def restore(self, stored: memoryview, frame: FrameContext, nbytes: int) -> memoryview:
        del frame
        plain = self.decode(stored)
        if len(plain) != nbytes:
            msg = f"it was restored to {len(plain)} bytes where there should be {nbytes}"
            raise IntegrityError(msg)
        return plain


class noting:  # noqa: N801 - reads as the statement it is
    """Adds to an error which entry it is about."""

    def __init__(self, key: str) -> None:
        """Of the entry."""
        self._key = key

    def __enter__(self) -> None:
        return

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, CheckpointError):
            error.add_note(f"found in the item of {self._key!r}")


def strided(tensor: StoredTensor, storage: Range, where: str) -> Plain | Coded:
    """Where the elements of a tensor lie that is a view of a storage.

    Args:
        tensor: the view.
        storage: its bytes, in their object.
        where: it lies, for errors.

    Raises:
        IntegrityError: it reaches beyond its storage.
    """
    itemsize = DTYPES[tensor.dtype].itemsize
    nbytes = prod(tensor.shape) * itemsize
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)) if nbytes else -1
    start = storage.start + tensor.offset * itemsize
    at = Range(start, start + (last + 1) * itemsize)
    if at.stop > storage.stop:
        msg = f"{where}: a tensor of shape {tensor.shape} reaches beyond its storage of {len(storage)} bytes"
        raise IntegrityError(msg)
    byte_strides = tuple(stride * itemsize for stride in tensor.strides)
    if not nbytes or all(
        n == 1 or a == b
        for n, a, b in zip(tensor.shape, byte_strides, strides_of(tensor.shape, itemsize), strict=True)
    ):
        return Plain(at)

    def gather(data: memoryview) -> memoryview:
        view = np.ndarray(tensor.shape, np.dtype((np.void, itemsize)), data, strides=byte_strides)
        return np.ascontiguousarray(view).reshape(-1).view(np.uint8).data

    return Coded(at, gather)


def elements_of(found: Plain | Coded, extent: memoryview) -> memoryview:
    """The elements of an item whose bytes are at hand, ``found`` being counted from their first."""
    data = extent[found.at.start : found.at.stop]
    return found.decode(data) if isinstance(found, Coded) else data


def shifted(found: Plain | Coded, by: int) -> Plain | Coded:
    """The same, counted from ``-by``."""
    return replace(found, at=found.at.shift(by))


def _raw(key: str, at: Range) -> RegionRead:
    """A read of bytes as they lie."""
    shape = (len(at),)
    return RegionRead(
        key=key, start=at.start, itemsize=1, shape=shape, region=Region((0,), shape), frame_size=1, checksums=(),
        is_direct=True,
    )  # fmt: skip
