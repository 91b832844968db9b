"""Many ranges down: every byte in its place, or an error that names it."""

import asyncio

import numpy as np
import pytest
from awscrt.checksums import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.engine import loop
from cloudckpt.engine.budget import AHEAD
from cloudckpt.engine.fetching import RegionRead
from cloudckpt.engine.read import ReadOptions, Stats, Wanted, read_regions
from cloudckpt.errors import IntegrityError, ObjectNotFoundError, StoreError, StoreUnavailableError, UsageError
from cloudckpt.ranges import Region, strides_of
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.testing import FailingStore, RecordingStore, WrappedStore

KEY = "shards/ab/one.safetensors"
FRAME = 64


def slices(region):
    return tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))


class ArraySink:
    """A region of a chunk into an array; contiguous arrays are received into where ``is_direct``."""

    def __init__(self, read, target):
        self.read = read
        self.target = target

    @property
    def memory(self):
        return memoryview(self.target.reshape(-1).view(np.uint8)) if self.read.is_direct else None

    def place(self, region, data):
        strides = strides_of(self.read.shape, self.read.itemsize)
        rows = np.ndarray(region.sizes, self.target.dtype, data, strides=strides)
        self.target[slices(region.relative_to(self.read.region.offsets))] = rows


class Shard:
    """A shard of whole arrays as it lies in a bucket, after some bytes of a header."""

    def __init__(self, arrays, frame_size=FRAME, header=b"h" * 24):
        self.arrays = arrays
        self.frame_size = frame_size
        self.starts = []
        body = bytearray(header)
        for array in arrays:
            self.starts.append(len(body))
            body += array.tobytes()
        self.body = bytes(body)

    def want(self, n, region=None, *, is_direct=True, name="'weight'"):
        """A read of a region of array ``n``, into zeros."""
        array = self.arrays[n]
        data = array.tobytes()
        region = region or Region((0,) * array.ndim, array.shape)
        read = RegionRead(
            key=KEY,
            start=self.starts[n],
            itemsize=array.itemsize,
            shape=array.shape,
            region=region,
            frame_size=self.frame_size,
            checksums=[crc32c(data[i : i + self.frame_size]) for i in range(0, len(data), self.frame_size)],
            is_direct=is_direct,
        )
        return Wanted(name, read, ArraySink(read, np.zeros(region.sizes, array.dtype)))

    def store(self, body=None):
        """A store that holds the shard, or other bytes in its place."""
        store = MemoryStore("tests", "", Bucket())
        loop.run(lambda: store.put(KEY, [memoryview(self.body if body is None else body)]))
        return store


def read(store, wanted, stats=None, **options):
    """Reads as a load does: on the process's loop."""
    options = ReadOptions(**options)
    stats = stats or Stats()
    loop.run(lambda: read_regions(store, wanted, options, stats))
    return stats


def numbers(*shape, dtype=np.int32, seed=0):
    return np.random.default_rng(seed).integers(1, 100, shape).astype(dtype)


ONE = Shard([numbers(40, 10)])
"""1600 bytes in 25 frames."""


# What arrives.


@st.composite
def shards(draw):
    """A shard, and regions of its arrays."""
    arrays, regions = [], []
    for i in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 8), max_size=3)))
        ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
        arrays.append(numbers(*shape, dtype=draw(st.sampled_from([np.int8, np.float16, np.int32, np.int64])), seed=i))
        regions.append((i, Region(tuple(a for a, _ in ends), tuple(b - a for a, b in ends)), draw(st.booleans())))
    return Shard(arrays, draw(st.integers(1, 100))), regions


@settings(deadline=None)
@given(shards(), st.integers(1, 2000), st.integers(0, 300), st.integers(1, 4))
def test_every_region_arrives_in_its_place(sharded, max_request_size, max_gap, concurrency):
    shard, regions = sharded
    wanted = [shard.want(n, region, is_direct=is_direct) for n, region, is_direct in regions]
    stats = read(shard.store(), wanted, max_request_size=max_request_size, max_gap=max_gap, concurrency=concurrency)
    for (n, region, _), w in zip(regions, wanted, strict=True):
        np.testing.assert_array_equal(w.sink.target, shard.arrays[n][slices(region)])
    assert stats.bytes_needed == sum(w.sink.target.nbytes for w in wanted)


def test_nothing_wanted_is_nothing_asked():
    recording = RecordingStore(ONE.store())
    stats = read(recording, [])
    assert recording.requests == []
    assert (stats.requests, stats.bytes_fetched, stats.bytes_needed) == (0, 0, 0)


def test_memory_that_is_contiguous_is_received_into():
    class Looking(WrappedStore):
        async def get_range(self, key, at, into):
            received.extend(into)
            await super().get_range(key, at, into)

    received, wanted = [], ONE.want(0)
    read(Looking(ONE.store()), [wanted])
    (view,) = received
    assert np.shares_memory(np.frombuffer(view, np.uint8), wanted.sink.target)


# What it costs.


def test_near_regions_are_one_request_and_what_was_done_is_counted():
    shard = Shard([numbers(10), numbers(5), numbers(20)])
    recording, stats = RecordingStore(shard.store()), Stats()
    read(recording, [shard.want(0), shard.want(2)], stats, max_gap=100)
    assert recording.requests == [("get_range", KEY)]
    assert (stats.requests, stats.bytes_fetched, stats.bytes_needed) == (1, 140, 120)
    assert stats.seconds > 0


def test_regions_too_far_apart_are_several_requests():
    shard = Shard([numbers(10), numbers(5), numbers(20)])
    recording = RecordingStore(shard.store())
    stats = read(recording, [shard.want(0), shard.want(2)], max_gap=19)
    assert len(recording.requests) == stats.requests == 2
    assert stats.bytes_fetched == stats.bytes_needed == 120


def test_a_long_region_is_several_requests():
    recording = RecordingStore(ONE.store())
    stats = read(recording, [ONE.want(0)], max_request_size=640)
    assert len(recording.requests) == stats.requests == 3
    assert stats.bytes_fetched == 1600


def test_rows_of_an_array_fetch_only_their_bytes():
    recording = RecordingStore(ONE.store())
    stats = read(recording, [ONE.want(0, Region((7, 0), (3, 10)))])
    assert len(recording.requests) == 1
    assert stats.bytes_fetched == 120


def test_what_was_done_adds_up():
    stats = Stats()
    read(ONE.store(), [ONE.want(0)], stats)
    seconds = stats.seconds
    read(ONE.store(), [ONE.want(0)], stats)
    assert (stats.requests, stats.bytes_fetched, stats.bytes_needed) == (2, 3200, 3200)
    assert stats.seconds > seconds


@pytest.mark.parametrize(
    ("limit", "concurrency", "is_direct", "most"),
    [(640, 16, False, 1), (1280, 16, False, 2), (6400, 3, False, 3), (640, 16, True, 10), (640, 3, True, 3)],
)
def test_requests_in_flight_keep_to_their_number_and_to_the_memory_that_they_take(
    limit, concurrency, is_direct, most
):
    class Gauged(WrappedStore):
        now = most = requests = most_requests = 0

        async def get_range(self, key, at, into):
            self.now += len(at)
            self.requests += 1
            self.most = max(self.most, self.now)
            self.most_requests = max(self.most_requests, self.requests)
            for _ in range(20):
                await asyncio.sleep(0)
            await super().get_range(key, at, into)
            self.now -= len(at)
            self.requests -= 1

    shard = Shard([numbers(160, 10)])
    gauged, wanted = Gauged(shard.store()), shard.want(0, is_direct=is_direct)
    read(gauged, [wanted], max_request_size=640, max_inflight_nbytes=limit, concurrency=concurrency)
    np.testing.assert_array_equal(wanted.sink.target, shard.arrays[0])
    assert gauged.most <= limit or is_direct
    assert gauged.most_requests == most


# Damage.


@settings(deadline=None)
@given(st.integers(0, 1599), st.integers(0, 7), st.integers(64, 3000))
def test_a_bit_flipped_anywhere_is_told_with_the_item_and_the_frame(at, bit, max_request_size):
    body = bytearray(ONE.body)
    body[24 + at] ^= 1 << bit
    start = 24 + at // FRAME * FRAME
    with pytest.raises(IntegrityError, match=rf"'weight': bytes {start} to {start + FRAME} of {KEY} do not match"):
        read(ONE.store(body), [ONE.want(0)], max_request_size=max_request_size)


@settings(deadline=None)
@given(st.integers(0, 1599), st.integers(0, 7))
def test_a_bit_flipped_in_a_region_that_is_placed_is_told_too(at, bit):
    body = bytearray(ONE.body)
    body[24 + at] ^= 1 << bit
    wanted = ONE.want(0, is_direct=False)
    with pytest.raises(IntegrityError, match="'weight'"):
        read(ONE.store(body), [wanted])
    assert not wanted.sink.target.any()


@pytest.mark.parametrize("frame", range(25))
def test_a_damaged_frame_is_told_although_the_requests_of_a_placed_region_divide_it(frame):
    # 17 rows of 40 bytes fit into a request: its border is none of a frame
    body = bytearray(ONE.body)
    body[24 + frame * FRAME + 10] ^= 1
    with pytest.raises(IntegrityError, match="'weight'"):
        read(ONE.store(body), [ONE.want(0, is_direct=False)], max_request_size=704)


def test_damage_in_the_last_short_frame_is_told():
    shard = Shard([numbers(17)])
    body = bytearray(shard.body)
    body[-1] ^= 1
    with pytest.raises(IntegrityError, match="bytes 88 to 92"):
        read(shard.store(body), [shard.want(0)])


def test_the_item_that_is_damaged_is_named_among_others():
    shard = Shard([numbers(20), numbers(20), numbers(20)])
    body = bytearray(shard.body)
    body[shard.starts[1] + 3] ^= 1
    wanted = [shard.want(n, name=f"'x{n}'") for n in range(3)]
    with pytest.raises(IntegrityError, match=r"^'x1': ") as caught:
        read(shard.store(body), wanted)
    assert not hasattr(caught.value, "__notes__")


def test_damage_in_bytes_that_nobody_wants_does_no_harm():
    shard = Shard([numbers(10), numbers(5), numbers(20)])
    body = bytearray(shard.body)
    body[0] ^= 1
    body[shard.starts[1]] ^= 1
    wanted = [shard.want(0), shard.want(2)]
    stats = read(shard.store(body), wanted)
    assert stats.requests == 1
    for n, w in zip((0, 2), wanted, strict=True):
        np.testing.assert_array_equal(w.sink.target, shard.arrays[n])


def test_frames_that_arrive_whole_within_a_slice_are_verified():
    wanted = Region((10, 0), (10, 10))  # bytes 400 to 800, of which the frames from 448 to 768 are whole
    for at, is_told in ((448, True), (767, True), (400, False), (799, False)):
        body = bytearray(ONE.body)
        body[24 + at] ^= 1
        if is_told:
            with pytest.raises(IntegrityError):
                read(ONE.store(body), [ONE.want(0, wanted)])
        else:
            read(ONE.store(body), [ONE.want(0, wanted)])


def test_a_missing_shard_is_told_as_one():
    with pytest.raises(ObjectNotFoundError, match=KEY):
        read(MemoryStore("tests", "", Bucket()), [ONE.want(0)])


@pytest.mark.parametrize("nbytes", [0, 24, 1000, 1623])
def test_a_truncated_shard_is_told_as_one(nbytes):
    with pytest.raises(StoreError, match=KEY) as caught:
        read(ONE.store(ONE.body[:nbytes]), [ONE.want(0)])
    assert not isinstance(caught.value, ObjectNotFoundError)


@pytest.mark.parametrize("k", range(3))
def test_a_request_that_fails_fails_the_read_with_its_error(k):
    error = StoreUnavailableError(f"request {k}")
    with pytest.raises(StoreUnavailableError) as caught:
        read(FailingStore(ONE.store(), k, error), [ONE.want(0)], max_request_size=640)
    assert caught.value is error


def test_a_read_that_failed_counts_nothing():
    stats = Stats()
    with pytest.raises(StoreError):
        read(FailingStore(ONE.store(), 1, StoreError("no")), [ONE.want(0)], stats, max_request_size=640)
    assert stats == Stats()


def test_when_one_request_fails_those_that_wait_are_not_made():
    shard = Shard([numbers(1600)])
    failing = FailingStore(shard.store(), 0, StoreError("no"))
    with pytest.raises(StoreError):
        read(failing, [shard.want(0)], max_request_size=64, max_inflight_nbytes=128, concurrency=2)
    assert len(failing.requests) <= 2 + AHEAD


@pytest.mark.parametrize(
    "options",
    [
        {"max_request_size": 0},
        {"max_gap": -1},
        {"max_inflight_nbytes": 0},
        {"concurrency": 0},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_by_name(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        ReadOptions(**options)
