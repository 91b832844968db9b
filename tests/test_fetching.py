"""Requests that bring exactly what is wanted."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.engine.fetching import Fetch, Piece, RegionRead, frame_range, plan_fetches
from cloudckpt.ranges import Range, Region, strides_of

KEYS = ("shards/a", "shards/b")
OBJECT_NBYTES = 8000


def slices(region):
    return tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))


def read_of(shape, region, *, itemsize=1, start=0, key="shards/a", frame_size=64, is_direct=True):
    return RegionRead(
        key=key,
        start=start,
        itemsize=itemsize,
        shape=tuple(shape),
        region=region,
        frame_size=frame_size,
        checksums=(),
        is_direct=is_direct,
    )


@st.composite
def reads(draw):
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    is_whole = draw(st.booleans())
    region = Region(
        tuple(0 if is_whole else a for a, _ in ends),
        tuple(n if is_whole else b - a for n, (a, b) in zip(shape, ends, strict=True)),
    )
    itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
    return read_of(
        shape,
        region,
        itemsize=itemsize if np.prod(shape) * itemsize <= 6000 else 1,
        start=draw(st.integers(0, 500)),
        key=draw(st.sampled_from(KEYS)),
        frame_size=draw(st.integers(1, 100)),
        is_direct=draw(st.booleans()),
    )


def carried_out(fetches, some, objects):
    """What each read gets, and how often each of its bytes was written."""
    outs = [np.zeros((*r.region.sizes, r.itemsize), np.uint8) for r in some]
    times = [np.zeros((*r.region.sizes, r.itemsize), int) for r in some]
    for fetch in fetches:
        received = objects[fetch.key][fetch.at.start : fetch.at.stop]
        assert len(received) == len(fetch.at)
        for piece in fetch.pieces:
            data = received[piece.at.start - fetch.at.start : piece.at.stop - fetch.at.start]
            read, out, count = some[piece.read], outs[piece.read], times[piece.read]
            assert read.key == fetch.key
            if piece.into is not None:
                assert read.is_direct
                assert piece.region is None
                out.reshape(-1)[piece.into.start : piece.into.stop] = np.frombuffer(data, np.uint8)
                count.reshape(-1)[piece.into.start : piece.into.stop] += 1
            else:
                strides = (*strides_of(read.shape, read.itemsize), 1)
                rows = np.ndarray((*piece.region.sizes, read.itemsize), np.uint8, data, strides=strides)
                target = slices(piece.region.relative_to(read.region.offsets))
                out[target] = rows
                count[target] += 1
    return outs, times


def stored(read, objects):
    nbytes = int(np.prod(read.shape)) * read.itemsize
    data = np.frombuffer(objects[read.key], np.uint8)[read.start : read.start + nbytes]
    return data.reshape(*read.shape, read.itemsize)[slices(read.region)]


OBJECTS = {
    k: np.random.default_rng(i).integers(0, 256, OBJECT_NBYTES, np.uint8).tobytes() for i, k in enumerate(KEYS)
}
SIZES = st.integers(1, 3000)
GAPS = st.integers(0, 200)


@settings(deadline=None, max_examples=300)
@given(st.lists(reads(), max_size=4), SIZES, GAPS)
def test_each_read_gets_its_bytes_exactly_once(some, max_request_size, max_gap):
    fetches = plan_fetches(some, max_request_size=max_request_size, max_gap=max_gap)
    outs, times = carried_out(fetches, some, OBJECTS)
    for read, out, count in zip(some, outs, times, strict=True):
        assert (out == stored(read, OBJECTS)).all()
        assert (count == 1).all()


@settings(deadline=None, max_examples=300)
@given(st.lists(reads(), max_size=4), SIZES, GAPS)
def test_the_pieces_of_a_request_lie_in_it_in_order_with_narrow_gaps(some, max_request_size, max_gap):
    for fetch in plan_fetches(some, max_request_size=max_request_size, max_gap=max_gap):
        assert fetch.pieces[0].at.start == fetch.at.start
        assert fetch.pieces[-1].at.stop == fetch.at.stop
        for a, b in pairwise(fetch.pieces):
            assert 0 <= b.at.start - a.at.stop <= max_gap


@settings(deadline=None, max_examples=300)
@given(st.lists(reads(), max_size=4), SIZES, GAPS)
def test_no_request_is_larger_than_its_limit_unless_a_frame_or_an_element_is(some, max_request_size, max_gap):
    for fetch in plan_fetches(some, max_request_size=max_request_size, max_gap=max_gap):
        widest = max(max(some[p.read].itemsize, some[p.read].frame_size) for p in fetch.pieces)
        assert len(fetch.at) <= max(max_request_size, widest)


@settings(deadline=None, max_examples=300)
@given(st.lists(reads(), max_size=4), SIZES, GAPS)
def test_no_request_is_larger_than_its_limit_unless_a_single_element_is(some, max_request_size, max_gap):
    for fetch in plan_fetches(some, max_request_size=max_request_size, max_gap=max_gap):
        widest = max(some[p.read].itemsize for p in fetch.pieces)
        assert len(fetch.at) <= max(max_request_size, widest)


@settings(deadline=None, max_examples=300)
@given(reads(), SIZES)
def test_without_gaps_only_wanted_bytes_are_fetched(read, max_request_size):
    fetches = plan_fetches([read], max_request_size=max_request_size, max_gap=0)
    assert sum(len(f.at) for f in fetches) == read.nbytes


@settings(deadline=None)
@given(st.data(), SIZES, GAPS)
def test_whole_rows_fetch_exactly_their_bytes(data, max_request_size, max_gap):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    first = data.draw(st.integers(0, shape[0] - 1))
    rows = data.draw(st.integers(1, shape[0] - first))
    region = Region((first, *[0] * (len(shape) - 1)), (rows, *shape[1:]))
    read = read_of(shape, region, itemsize=4, start=24, is_direct=data.draw(st.booleans()))
    fetches = plan_fetches([read], max_request_size=max_request_size, max_gap=max_gap)
    row_nbytes = int(np.prod(shape[1:])) * 4
    wanted = range(24 + first * row_nbytes, 24 + (first + rows) * row_nbytes)
    assert sorted(i for f in fetches for i in range(f.at.start, f.at.stop)) == list(wanted)


def test_a_run_into_memory_is_cut_at_borders_of_frames():
    read = read_of((1000,), Region((100,), (800,)), frame_size=64, start=7)
    fetches = plan_fetches([read], max_request_size=200, max_gap=0)
    assert [f.at.stop - 7 for f in fetches[:-1]] == [192, 384, 576, 768]
    assert fetches[0].pieces == (Piece(0, Range(107, 199), Range(0, 92), None),)


def test_rows_near_each_other_are_one_request_and_rows_far_apart_are_several():
    read = read_of((10, 100), Region((2, 0), (3, 20)), is_direct=True)
    (near,) = plan_fetches([read], max_request_size=1000, max_gap=80)
    assert near == Fetch("shards/a", Range(200, 420), (Piece(0, Range(200, 420), None, read.region),))
    far = plan_fetches([read], max_request_size=1000, max_gap=79)
    assert [(f.at.start, f.at.stop) for f in far] == [(200, 220), (300, 320), (400, 420)]


def test_near_reads_of_one_shard_are_one_request():
    some = [
        read_of((10,), Region((0,), (10,)), start=100),
        read_of((10,), Region((0,), (10,)), start=60),
        read_of((10,), Region((0,), (10,)), start=100, key="shards/b"),
    ]
    fetches = plan_fetches(some, max_request_size=1000, max_gap=30)
    assert [(f.key, f.at, [p.read for p in f.pieces]) for f in fetches] == [
        ("shards/a", Range(60, 110), [1, 0]),
        ("shards/b", Range(100, 110), [2]),
    ]


def test_the_same_bytes_wanted_twice_are_fetched_for_each():
    read = read_of((10,), Region((0,), (10,)))
    fetches = plan_fetches([read, read], max_request_size=1000, max_gap=30)
    assert sorted(p.read for f in fetches for p in f.pieces) == [0, 1]
    assert all(len(f.pieces) == 1 for f in fetches)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)], ids=str)
def test_an_empty_region_asks_for_nothing(shape):
    read = read_of(shape, Region((0,) * len(shape), shape))
    assert plan_fetches([read], max_request_size=10, max_gap=0) == []


@pytest.mark.parametrize("is_direct", [True, False])
def test_a_scalar_is_one_small_request(is_direct):
    read = read_of((), Region((), ()), itemsize=4, start=12, is_direct=is_direct)
    (fetch,) = plan_fetches([read], max_request_size=1000, max_gap=100)
    assert fetch.at == Range(12, 16)


# Frames.


@given(st.data())
def test_frames_cut_a_chunk_from_its_first_byte_to_its_last(data):
    itemsize = data.draw(st.sampled_from([1, 2, 4]))
    shape = tuple(data.draw(st.lists(st.integers(1, 8), max_size=3)))
    nbytes = int(np.prod(shape)) * itemsize
    frame_size = data.draw(st.integers(1, 60))
    chunk_start = data.draw(st.integers(0, 100))
    checksums = tuple(range(-(-nbytes // frame_size)))
    read = RegionRead(
        key="k",
        start=chunk_start,
        itemsize=itemsize,
        shape=shape,
        region=Region((0,) * len(shape), shape),
        frame_size=frame_size,
        checksums=checksums,
        is_direct=True,
    )
    expected = [Range(k, min(k + frame_size, nbytes)) for k in range(0, nbytes, frame_size)]
    assert [frame_range(read, i) for i in range(len(checksums))] == expected


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 60), st.integers(60, 300), st.data())
def test_a_run_into_memory_brings_every_frame_that_lies_in_it_whole(nbytes, frame_size, max_request_size, data):
    first = data.draw(st.integers(0, nbytes - 1))
    last = data.draw(st.integers(first + 1, nbytes))
    count = -(-nbytes // frame_size)
    read = RegionRead(
        key="k",
        start=16,
        itemsize=1,
        shape=(nbytes,),
        region=Region((first,), (last - first,)),
        frame_size=frame_size,
        checksums=tuple(range(count)),
        is_direct=True,
    )
    fetches = plan_fetches([read], max_request_size=max_request_size, max_gap=0)
    frames = [frame_range(read, i).shift(read.start) for i in range(count)]
    brought = [p.at for f in fetches for p in f.pieces]
    told = [i for i, f in enumerate(frames) for at in brought if at.start <= f.start and f.stop <= at.stop]
    assert sorted(told) == [
        i for i in range(count) if first <= i * frame_size and min((i + 1) * frame_size, nbytes) <= last
    ]


COLUMNS = {
    "never": (0, 8, 2000),
    "gaps cost more than requests": (749, 8, 2000),
    "a gap costs as much as a request": (750, 1, 7250),
    "always": (1 << 40, 1, 7250),
}


@pytest.mark.parametrize(("max_gap", "requests", "nbytes"), COLUMNS.values(), ids=COLUMNS)
def test_the_gaps_between_columns_are_fetched_where_a_request_more_would_cost_more(max_gap, requests, nbytes):
    columns = read_of((8, 1000), Region((0, 500), (8, 250)))
    fetches = plan_fetches([columns], max_request_size=1 << 20, max_gap=max_gap)
    assert (len(fetches), sum(len(f.at) for f in fetches)) == (requests, nbytes)


LONG_RUNS = {"a wide gap": (0, 900, 8), "a narrow gap": (0, 960, 1), "a gap at a request's cost": (0, 200, 1)}


@pytest.mark.parametrize(("first", "width", "requests"), LONG_RUNS.values(), ids=LONG_RUNS)
def test_long_runs_are_joined_over_gaps_that_add_little_to_them(first, width, requests):
    columns = read_of((8, 1000), Region((0, first), (8, width)))
    max_gap = 800 if width < 800 else 500
    assert len(plan_fetches([columns], max_request_size=1 << 20, max_gap=max_gap)) == requests


def test_rows_of_neighbouring_tensors_are_fetched_to_the_byte():
    """As when eight ranks' shards are loaded by three: two thirds of each chunk, one after the other."""
    some = [read_of((300, 10), Region((0, 0), (200, 10)), start=3000 * i) for i in range(4)]
    assert sum(len(f.at) for f in plan_fetches(some, max_request_size=1 << 20, max_gap=1500)) == 4 * 2000


def test_each_gap_is_decided_by_itself():
    """Rows that are kept apart hold runs that are joined."""
    block = read_of((4, 10, 1000), Region((0, 2, 100), (4, 3, 300)))
    fetches = plan_fetches([block], max_request_size=1 << 20, max_gap=700)
    assert (len(fetches), {len(f.at) for f in fetches}) == (4, {2 * 1000 + 300})
