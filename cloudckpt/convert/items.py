"""The items of other people's formats, and the contents that are made of them.

Law: a format's own file says where its items lie; here is what all of them have in common. Async only in `locate`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from cloudckpt.manifest import (
    BytesEntry,
    Chunk,
    Entry,
    OpenEntry,
    PlannerPath,
    TensorEntry,
    ValueEntry,
    shape_problem,
    tiling_problem,
)
from cloudckpt.ranges import Range, Region, strides_of
from cloudckpt.store.protocols import Get
from cloudckpt.threads import in_thread

_WHOLE_NBYTES = 1 << 20
"""An item of at most that many bytes, wanted whole, is fetched and taken apart in memory: the copy costs less than
the requests that would find out where its elements lie."""

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

    @property
    def likeness(self) -> object | None:
        """Items of equal likeness have as much before their elements and behind them, for all one can tell.

        None for those of which one cannot tell. Where one of them is guessed to be, `locate` proves when it is given
        what lies around the elements.
        """
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
    likeness: None = None

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
    _guesses: bool = True
    _sound: set[str] = field(default_factory=set)

    def entry(self, key: str) -> OpenEntry:
        """See `Contents.entry`."""
        entry = self.entries[key]
        if isinstance(entry, TensorEntry) and key not in self._sound:
            _refuse_unsound(key, entry)
            self._sound.add(key)
        if isinstance(entry, BytesEntry):
            found = self._found.get(entry.frame)
            if isinstance(found, Coded) and found.nbytes is not None:
                return BytesEntry(found.nbytes, entry.shard, entry.start, entry.stop, entry.frame)
        assert isinstance(entry, TensorEntry | BytesEntry | ValueEntry)  # noqa: S101 - for the type checker
        return entry

    async def locate(self, store: Get, asks: Iterable[Ask], options: ReadOptions, stats: Stats) -> "_Located":
        """See `Contents.locate`.

        Of items that are alike, all of which are wanted whole, one is looked at. Where the others lie is guessed from
        it, and proven by what comes with them: else each would cost a request more.
        """
        unknown = {ask.at.frame: ask for ask in asks if ask.at.frame not in self._found and not _is_decoded(ask)}
        like: dict[object, int] = {}
        guessed: dict[int, int] = {}
        for i, ask in unknown.items():
            likeness = self.items[i].likeness if self._guesses and _is_whole(ask) else None
            if likeness is not None and like.setdefault(likeness, i) != i:
                guessed[i] = like[likeness]
        await self._probe(store, {i: ask.key for i, ask in unknown.items() if i not in guessed}, options, stats)
        guesses = {}
        for i, model in guessed.items():
            found = self._found[model]
            if isinstance(found, Plain):
                guesses[i] = _guess(self.items[i].extent, self.items[model].extent, found)
        await self._probe(store, {i: unknown[i].key for i in guessed if i not in guesses}, options, stats)
        return _Located(self, guesses, {i: unknown[i].key for i in guesses})

    def learn(self, found: Mapping[int, Plain | Coded], *, is_as_guessed: bool) -> None:
        """Takes note of where items lie."""
        self._found |= found
        self._guesses = self._guesses and is_as_guessed

    def place_of(self, i: int) -> Plain | Coded:
        """Where the elements of an item lie, which was asked for, and not guessed."""
        item, found = self.items[i], self._found.get(i)
        if found is not None:
            return found
        return Coded(item.extent, item.decode) if item.probes() else item.locate(())

    async def _probe(self, store: Get, names: Mapping[int, str], options: ReadOptions, stats: Stats) -> None:
        probed: dict[int, list[memoryview]] = {}
        wanted = []
        for i, key in names.items():
            with noting(key):
                probes = self.items[i].probes()
            probed[i] = [memoryview(bytearray(len(at))) for at in probes]
            wanted += [_raw(key, self.items[i], *probe) for probe in zip(probes, probed[i], strict=True)]
        if wanted:
            probing = Stats()
            await read_regions(store, wanted, replace(options, max_gap=_PROBE_GAP), probing)
            stats.requests += probing.requests
            stats.bytes_fetched += probing.bytes_fetched
            stats.seconds += probing.seconds
        if names:
            self._found |= await in_thread(self.locate_all, names, probed)

    def locate_all(
        self, names: Mapping[int, str], probed: Mapping[int, Sequence[memoryview]]
    ) -> dict[int, Plain | Coded]:
        """Where items lie, given what lies around their elements."""
        found = {}
        for i, key in names.items():
            with noting(key):
                found[i] = self.items[i].locate(probed[i])
        return found


def _refuse_unsound(key: str, entry: TensorEntry) -> None:
    if entry.dtype not in DTYPES:
        msg = f"{key!r} has dtype {entry.dtype}, which this release does not read"
        raise ManifestError(msg)
    problem = shape_problem(entry.shape, DTYPES[entry.dtype].itemsize)
    if problem is None and any(not Region(c.offsets, c.sizes).is_inside(entry.shape) for c in entry.chunks):
        problem = f"a chunk of it lies outside its shape {entry.shape}"
    problem = problem or tiling_problem(entry.shape, entry.chunks)
    if problem is not None:
        msg = f"what is said of {key!r} cannot be: {problem}"
        raise ManifestError(msg)


class _Located:
    """Implements `Located`: what is known of where items lie, and what was guessed for one load."""

    def __init__(self, contents: ForeignContents, guesses: Mapping[int, Plain], names: Mapping[int, str]) -> None:
        self._contents = contents
        self._guesses = guesses
        self._names = names
        self._around: dict[int, list[memoryview]] = {}

    def read_chunk(
        self, key: str, entry: TensorEntry, chunk: Chunk, region: Region, *, is_direct: bool
    ) -> RegionRead:
        dtype = DTYPES[entry.dtype]
        return self._read(key, chunk, dtype.itemsize, chunk.sizes, region, is_direct=is_direct)

    def read_bytes(self, key: str, entry: BytesEntry, region: Region) -> RegionRead:
        return self._read(key, entry, 1, (entry.nbytes,), region, is_direct=True)

    def checks(self) -> Sequence[Wanted]:
        wanted = []
        for i, guess in self._guesses.items():
            item = self._contents.items[i]
            ends = Range(item.extent.start, guess.at.start), Range(guess.at.stop, item.extent.stop)
            self._around[i] = [memoryview(bytearray(len(at))) for at in ends]
            wanted += [_raw(self._names[i], item, *end) for end in zip(ends, self._around[i], strict=True)]
        return wanted

    def is_proven(self) -> bool:
        try:
            found = self._contents.locate_all(self._names, self._around)
        except CheckpointError:  # what was guessed to lie around the elements need not be what does
            found = {}
        self._contents.learn(found, is_as_guessed=found == self._guesses)
        return found == self._guesses

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
        items = self._contents.items
        with noting(key):
            found = self._guesses.get(at.frame) or self._contents.place_of(at.frame)
        stored = None
        if isinstance(found, Coded):
            stored = StoredFrames(
                chain=_Decoder(found.decode),
                token="",
                item=key,
                number_size=1,
                first=found.at.start * len(items) + at.frame,  # in order of place, and no two alike
                starts=(found.at.start, found.at.stop),
            )
        return RegionRead(
            key=items[at.frame].key,
            start=found.at.start,
            itemsize=itemsize,
            shape=shape,
            region=region,
            frame_size=max(1, prod(shape) * itemsize) if stored else 1,
            checksums=(),
            is_direct=is_direct,
            stored=stored,
        )


def _guess(extent: Range, other: Range, found: Plain) -> Plain:
    """Where elements lie in ``extent``, if as much lies before and behind them as in the ``other``."""
    return Plain(Range(extent.start + found.at.start - other.start, extent.stop - (other.stop - found.at.stop)))


def _is_whole(ask: Ask) -> bool:
    return isinstance(ask.at, Chunk) and ask.region.sizes == ask.at.sizes


def _is_decoded(ask: Ask) -> bool:
    """Whether an item that is not located yet is fetched whole, and taken apart in memory."""
    return _is_whole(ask) and ask.at.stop - ask.at.start <= _WHOLE_NBYTES


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


def _raw(name: str, item: Item, at: Range, into: memoryview) -> Wanted:
    """A read of bytes as they lie."""
    shape = (len(at),)
    read = RegionRead(
        key=item.key, start=at.start, itemsize=1, shape=shape, region=Region((0,), shape), frame_size=1, checksums=(),
        is_direct=True,
    )  # fmt: skip
    return Wanted(repr(name), read, MemorySink(into))
