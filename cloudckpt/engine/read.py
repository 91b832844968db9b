"""Many ranges down: fetch, verify, place.

Law: async; no torch, no S3, no environment. Memory that is received into has one writer at a time.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal, get_args

from awscrt.checksums import combine_crc32c, crc32c
from msgspec import Struct

from cloudckpt.engine.budget import AHEAD, Budget, BufferPool, share_of
from cloudckpt.engine.fetching import Fetch, RegionRead, frame_range, is_of_whole_frames, plan_fetches
from cloudckpt.engine.frame_fetching import FramedRead, by_frames, plan_frame_fetches
from cloudckpt.engine.read_frames import WantedFrames, fetch_again, fetch_frames, fetch_nbytes, read_again
from cloudckpt.engine.sinks import Sink
from cloudckpt.engine.tracing import FETCH, PLACE, PLAN, RESTORE, Recorder
from cloudckpt.errors import UsageError
from cloudckpt.extensions.keys import Keys
from cloudckpt.extensions.registry import ExtensionRegistry
from cloudckpt.ranges import Range, Region, balanced_size
from cloudckpt.store.protocols import Get
from cloudckpt.store.url import check_url
from cloudckpt.threads import in_thread

_LEAST_REQUEST_SIZE = 8 << 20
_FRAMES_REQUEST_SIZE = 32 << 20
"""Of frames that are taken whole, at most: they lie in memory until they are restored."""

Verify = Literal["frames", "strict", "before"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How checkpoints are read.

    Attributes:
        max_request_size: bytes of a ranged GET, at most, but for a sixteenth. Requests are made even and as few as
            keep ``concurrency`` of them under way, so that they end together, and of 8 MiB at least where so much is
            to be read. Figures in docs/tuning.md.
        max_gap: bytes that cost as much as a request. A gap between two wanted ranges is fetched if it is not
            longer, unless both are: then it is fetched if it adds little to them (`ranges.is_bridged`). Columns of
            rows of up to that length, such as tensor parallelism keeps, are read in few large requests then, and
            rows of tensors, such as FSDP keeps, to the byte (figures in docs/benchmarks.md).
        max_inflight_nbytes: the byte budget of a load on this rank: memory that it takes beside the state dict.
            Bytes that are received into the state dict's own memory take none.
        concurrency: requests under way at a time, at most; how many really are, `TrafficOptions` says.
        cast: convert to the destination's dtype where it differs, as ``torch.Tensor.copy_`` does; False
            refuses.
        unsafe_pickle: let bytes items load any class, which runs code of the checkpoint's author.
        registry: knows the extensions that checkpoints may name, if others than cloudckpt's own.
        keys: for what is encrypted: a `KeyProvider`, or 32-byte keys by id as a mapping or a function.
        require_seal: refuse a checkpoint that was not saved with encryption on, and so could be anybody's.
        verify: what is proven by checksums, and when. ``"frames"``: every frame that arrives whole; a read of a part
            of one fetches only what it needs, which nothing proves. ``"strict"``: everything that is handed out,
            because frames are always fetched whole. ``"before"``: as ``"strict"``, and nothing reaches its
            destination before it was verified, so that after a failed load each frame of it holds what it held or
            what was saved; everything goes through memory of the budget and is copied once. Frames with extensions
            are always read so. What others wrote has no checksums, and cannot be read by the latter two.
        trace: URL below which each rank leaves a trace of the load, outside the checkpoint; of what is opened with
            `cloudckpt.open`, when it is closed (docs/observing.md).
    """

    max_request_size: int = 64 << 20
    max_gap: int = 256 << 10
    max_inflight_nbytes: int = 256 << 20
    concurrency: int = 32
    cast: bool = True
    unsafe_pickle: bool = False
    registry: ExtensionRegistry | None = None
    keys: Keys | None = field(default=None, repr=False)
    require_seal: bool = False
    verify: Verify = "frames"
    trace: str | None = None

    def __post_init__(self) -> None:
        if self.trace is not None:
            check_url(self.trace)
        if self.max_request_size < 1 or self.max_inflight_nbytes < 1 or self.max_gap < 0:
            msg = (
                f"max_request_size={self.max_request_size} and max_inflight_nbytes={self.max_inflight_nbytes} must "
                f"be positive, max_gap={self.max_gap} at least 0"
            )
            raise UsageError(msg)
        if self.concurrency < 1:
            msg = f"concurrency={self.concurrency} must be at least 1"
            raise UsageError(msg)
        if self.verify not in get_args(Verify):
            msg = f"verify={self.verify!r} must be one of {', '.join(map(repr, get_args(Verify)))}"
            raise UsageError(msg)


@dataclass(slots=True)
class Stats:
    """What reading did, counting up.

    Attributes:
        requests: ranged GETs that brought data, those of frames that had to be fetched again included.
        bytes_fetched: their bytes.
        bytes_needed: bytes that were asked for.
        seconds: of wall time, of fetching and all that goes on beside it.
        retries: requests that were made again.
        plan_s: seconds of finding out where what was asked for lies; reading a manifest is not counted.
        fetch_s: seconds of the requests, added up: divided by ``seconds``, how many went on at a time.
        restore_s: seconds of threads that verified, restored and placed whole frames, added up.
        place_s: seconds of threads that verified and placed what came to the byte, added up.
    """

    requests: int = 0
    bytes_fetched: int = 0
    bytes_needed: int = 0
    seconds: float = 0.0
    retries: int = 0
    plan_s: float = 0.0
    fetch_s: float = 0.0
    restore_s: float = 0.0
    place_s: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes fetched in a second."""
        return self.bytes_fetched / self.seconds if self.seconds else 0.0

    def count(self, recorder: Recorder) -> None:
        """Adds what a recorder took down of a read."""
        self.retries += recorder.retries
        self.plan_s += recorder.tally(PLAN).seconds
        self.fetch_s += recorder.tally(FETCH).seconds
        self.restore_s += recorder.tally(RESTORE).seconds
        self.place_s += recorder.tally(PLACE).seconds


class Wanted(Struct, frozen=True, gc=False):
    """A read and where it goes; ``name`` is for messages."""

    name: str
    read: RegionRead
    sink: Sink


@dataclass(frozen=True, slots=True)
class _Fragment:
    """Bytes of a frame that arrived without the rest of it; ``at`` is counted from the chunk's first byte."""

    wanted: Wanted
    frame: int
    at: Range
    crc32c: int


_Placing = tuple[Wanted, Range, Region | None, memoryview]
"""What holds bytes that arrived: for whom, which of the shard's, and the rectangle to place where there is one."""


async def read_regions(
    store: Get, wanted: Sequence[Wanted], options: ReadOptions, stats: Stats, recorder: Recorder | None = None
) -> None:
    """Reads all regions into their sinks, verified as `ReadOptions.verify` says.

    A frame that does not match its checksum is fetched once more, with a warning: what was damaged on its way heals.
    On failure the contents of all sinks are undefined, unless ``verify="before"``.

    Args:
        store: has the shards.
        wanted: the regions.
        options: how to read.
        stats: is added to, but for what is taken from the recorder (see `Stats.count`).
        recorder: of the read.

    Raises:
        IntegrityError: a frame does not match its checksum, twice, or cannot be restored.
        StoreError: a shard is missing, shorter than the manifest says, or could not be read.
        UsageError: all is to be verified, and there are no checksums; nothing was fetched.
    """
    began, recorder = perf_counter(), recorder or Recorder()
    plain, framed = _by_way(wanted, options.verify)
    reads = [w.read for w in plain]
    is_placed = any(not read.is_direct for read in reads)
    fetches = plan_fetches(
        reads, max_request_size=_request_size(options, reads, is_placed=is_placed), max_gap=options.max_gap
    )
    frame_fetches = plan_frame_fetches(
        [w.framed for w in framed], max_request_size=_frames_request_size(options, framed), max_gap=options.max_gap
    )
    budget = Budget(options.max_inflight_nbytes, concurrency=options.concurrency + AHEAD)
    recorder.expect(sum(len(fetch.at) for fetch in fetches) + sum(len(fetch.at) for fetch in frame_fetches))
    limited = _Limited(store, options.concurrency, recorder)
    pool = BufferPool(options.max_inflight_nbytes)
    fragments: list[_Fragment] = []
    async with asyncio.TaskGroup() as group:  # what takes longest first, so that the end is short
        for frames in frame_fetches:
            granted = await budget.take(fetch_nbytes(frames, framed))
            task = group.create_task(fetch_frames(limited, frames, framed, pool, recorder))
            budget.give_when_done(task, granted)
        for fetch in sorted(fetches, key=lambda f: -len(f.at)):
            granted = await budget.take(_scratch_nbytes(fetch))
            task = group.create_task(_fetch(limited, fetch, plain, pool, fragments))
            budget.give_when_done(task, granted)
    for of, frame in _unsound(fragments):
        again = by_frames(of.read)
        await read_again(limited, WantedFrames(of.name, again, of.sink), frame // again.joined, pool)
    stats.requests += limited.requests
    stats.bytes_fetched += limited.nbytes
    stats.bytes_needed += sum(w.read.nbytes for w in wanted)
    stats.seconds += perf_counter() - began


def _by_way(wanted: Sequence[Wanted], verify: Verify) -> tuple[list[Wanted], list[WantedFrames]]:
    """Those that are read to the byte, and those that are read by whole frames, through memory of the budget."""
    plain, framed = [], []
    for w in wanted:
        if verify != "frames" and not w.read.checksums and w.read.nbytes:
            raise unverifiable(w.name, verify)
        if w.read.stored is not None:
            framed.append(WantedFrames(w.name, FramedRead(w.read, w.read.stored), w.sink))
        elif verify == "before" or (verify == "strict" and not is_of_whole_frames(w.read)):
            framed.append(WantedFrames(w.name, by_frames(w.read), w.sink))
        else:
            plain.append(w)
    return plain, framed


def unverifiable(name: str, verify: Verify) -> UsageError:
    """The error for what has no checksums and is to be verified."""
    return UsageError(
        f"{name} was not written by cloudckpt and has no checksums, so verify={verify!r} cannot be kept: "
        "read it with verify='frames', or save it with cloudckpt first"
    )


def _frames_request_size(options: ReadOptions, wanted: Sequence[WantedFrames]) -> int:
    most = min(options.max_request_size, options.max_inflight_nbytes, _FRAMES_REQUEST_SIZE)
    as_stored = [w.framed.read for w in wanted if w.framed.read.stored is None]
    return min(most, _request_size(options, as_stored, is_placed=True)) if as_stored else most


def _request_size(options: ReadOptions, reads: Sequence[RegionRead], *, is_placed: bool) -> int:
    """Bytes of a ranged GET: less where they take memory, so that the budget has room for all that are under way."""
    share = share_of(options.max_inflight_nbytes, options.concurrency)
    return balanced_size(
        sum(read.nbytes for read in reads),
        most=min(options.max_request_size, share) if is_placed else options.max_request_size,
        ways=options.concurrency,
        least=_LEAST_REQUEST_SIZE,
        unit=1 << 20,
    )


class _Limited:
    """A store that is asked for so many ranges at a time."""

    def __init__(self, store: Get, concurrency: int, recorder: Recorder) -> None:
        self._store = store
        self.recorder = recorder
        self._slots = asyncio.Semaphore(concurrency)
        self.requests = self.nbytes = 0

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        async with self._slots:
            with self.recorder.step(FETCH, len(at), key):
                await self._store.get_range(key, at, into)
        self.requests += 1
        self.nbytes += len(at)


async def _fetch(
    store: _Limited, fetch: Fetch, wanted: Sequence[Wanted], pool: BufferPool, fragments: list[_Fragment]
) -> None:
    scratch = pool.take(_scratch_nbytes(fetch))
    views, placing, used, position = [], [], 0, fetch.at.start
    for piece in fetch.pieces:
        gap = piece.at.start - position
        views.append(scratch[used : used + gap])
        used += gap
        memory = wanted[piece.read].sink.memory
        if piece.into is not None and memory is not None:
            view = memory[piece.into.start : piece.into.stop]
        else:
            view = scratch[used : used + len(piece.at)]
            used += len(piece.at)
        views.append(view)
        placing.append((wanted[piece.read], piece.at, piece.region, view))
        position = piece.at.stop
    await store.get_range(fetch.key, fetch.at, [v for v in views if len(v)])
    timed = store.recorder.timed
    some, unsound = await in_thread(timed, PLACE, len(fetch.at), fetch.key, _verify_and_place, placing)
    if unsound:
        for of, frame, view in unsound:
            at, checksum = frame_range(of.read, frame).shift(of.read.start), of.read.checksums[frame]
            await fetch_again(store, view, name=of.name, key=of.read.key, frame=frame, at=at, checksum=checksum)
        await in_thread(_place, placing)
    fragments += some
    store.recorder.advance(len(fetch.at))
    pool.give(scratch)


def _scratch_nbytes(fetch: Fetch) -> int:
    """Bytes that go nowhere else: gaps, and pieces that are placed."""
    direct = sum(len(p.at) for p in fetch.pieces if p.into is not None)
    return len(fetch.at) - direct


def _verify_and_place(placing: Sequence[_Placing]) -> tuple[list[_Fragment], list[tuple[Wanted, int, memoryview]]]:
    """Places all if it is sound, as far as frames came whole; returns those that did not, and unsound ones."""
    fragments, unsound = [], []
    for wanted, at, _, view in placing:
        read = wanted.read
        if not read.checksums:
            continue
        here = at.shift(-read.start)
        for frame in range(here.start // read.frame_size, -(-here.stop // read.frame_size)):
            whole = frame_range(read, frame)
            part = whole.intersect(here)
            inside = part.shift(-here.start)
            data = view[inside.start : inside.stop]
            crc = crc32c(data)
            if part != whole:
                fragments.append(_Fragment(wanted, frame, part, crc))
            elif crc != read.checksums[frame]:
                unsound.append((wanted, frame, data))
    if not unsound:
        _place(placing)
    return fragments, unsound


def _place(placing: Sequence[_Placing]) -> None:
    for wanted, _, region, view in placing:
        if region is not None:
            wanted.sink.place(region, view)


def _unsound(fragments: Sequence[_Fragment]) -> list[tuple[Wanted, int]]:
    """The frames that came in pieces, for one read or for several together, and are not sound, by who wants them."""
    frames: dict[tuple[object, ...], list[_Fragment]] = defaultdict(list)
    for f in fragments:
        frames[id(f.wanted), f.frame].append(f)
        frames[f.wanted.read.key, f.wanted.read.start, f.frame].append(f)
    unsound = {(id(f.wanted), f.frame): f for parts in frames.values() if not _is_sound(parts) for f in parts}
    return [(f.wanted, f.frame) for f in unsound.values()]


def _is_sound(parts: Sequence[_Fragment]) -> bool:
    """Whether a frame's fragments match its checksum; they do if they are not all of it."""
    read, frame = parts[0].wanted.read, parts[0].frame
    whole = frame_range(read, frame)
    crc, position = 0, whole.start
    for f in sorted(parts, key=lambda f: f.at):
        if f.at.start == position:
            crc, position = combine_crc32c(crc, f.crc32c, len(f.at)), f.at.stop
    return position != whole.stop or crc == read.checksums[frame]
