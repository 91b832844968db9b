"""Items into shards, parts and segments, and shards that any safetensors reader opens."""

from itertools import count

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cloudckpt import safetensors_header
from cloudckpt.dcp.dtypes import dtype_of
from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.framing import (
    HEADER,
    MAX_PARTS,
    MAX_SHARD_SIZE,
    MIN_PART_SIZE,
    Item,
    Segment,
    part_size_for,
    plan_shards,
    segments,
)
from cloudckpt.layout import item_name
from cloudckpt.ranges import Range, split
from cloudckpt.safetensors_header import HeaderItem

MIB = 1 << 20
SAFE = [d for d in DTYPES.values() if d.is_safetensors]


def item(name, dtype="F32", shape=(), notes=None):
    nbytes = int(np.prod(shape, dtype=object)) * DTYPES[dtype].itemsize
    return Item(header=HeaderItem(name=name, dtype=dtype, shape=tuple(shape), nbytes=nbytes), notes=notes or {})


def planned(items, frame_size=64, **limits):
    tokens = count()
    return plan_shards(
        items,
        rank=3,
        frame_size=frame_size,
        new_token=lambda: f"{next(tokens):032x}",
        key_of=lambda token: f"shards/{token}",
        **limits,
    )


SHORT = st.text(max_size=8)


@st.composite
def some_items(draw, least=0, keys=SHORT):
    names = draw(st.lists(keys, unique=True, min_size=least, max_size=8))
    shapes = st.lists(st.integers(0, 6), max_size=3)
    notes = st.none() | st.dictionaries(st.text(max_size=5), st.integers(0, 9) | st.text(max_size=5), max_size=3)
    return [
        item(item_name(name, None), draw(st.sampled_from(SAFE)).name, draw(shapes), draw(notes)) for name in names
    ]


def header_of(plan):
    text = plan.header[8:]
    assert int.from_bytes(plan.header[:8], "little") == len(text)
    return msgspec.json.decode(text)


# Shards.


@given(some_items(), st.integers(1, 100))
def test_each_item_lies_in_one_shard_and_its_frames_follow_those_before_it(items, frame_size):
    plans = planned(items, frame_size)
    assert sorted(i for p in plans for i in p.items) == list(range(len(items)))
    for plan in plans:
        sizes = [items[i].header.nbytes for i in plan.items]
        assert plan.starts[0] == len(plan.header)
        assert np.diff(plan.starts).tolist() == sizes
        assert plan.frames[0] == 0
        assert np.diff(plan.frames).tolist() == [-(-n // frame_size) for n in sizes]
        assert plan.size == len(plan.header) + sum(sizes)


@given(some_items(least=1))
def test_each_item_begins_at_a_multiple_of_its_elements_width(items):
    (plan,) = planned(items)
    for i, start in zip(plan.items, plan.starts, strict=False):
        if items[i].header.nbytes:
            assert start % DTYPES[items[i].header.dtype].itemsize == 0


@given(some_items(least=1))
def test_the_header_says_where_each_item_lies(items):
    (plan,) = planned(items)
    header = header_of(plan)
    about = header.pop("__metadata__")
    base = len(plan.header)
    assert header == {
        items[i].header.name: {
            "dtype": items[i].header.dtype,
            "shape": list(items[i].header.shape),
            "data_offsets": [plan.starts[n] - base, plan.starts[n + 1] - base],
        }
        for n, i in enumerate(plan.items)
    }
    told = msgspec.json.decode(about["cloudckpt"])
    assert told["rank"] == 3
    assert told["attempt"] in plan.key
    assert told["items"] == {i.header.name: i.notes for i in items if i.notes}


def test_nothing_makes_no_shard():
    assert planned([]) == []


def test_items_of_equal_width_keep_their_order():
    (plan,) = planned([item("b"), item("a"), item("wide", "F64"), item("c")])
    assert plan.items == (2, 0, 1, 3)


def test_an_item_whose_chunk_is_the_whole_object_is_a_single_shard_of_its_size():
    (plan,) = planned([item("x", "U8", (100,))], frame_size=64)
    assert plan.frames == (0, 2)
    assert plan.size == len(plan.header) + 100


def test_a_header_that_would_grow_too_long_begins_a_new_shard():
    items = [item(f"layer.{i}", shape=(4,), notes={"shape": [4]}) for i in range(100)]
    assert len(planned(items)) == 1
    plans = planned(items, max_header_nbytes=4096)
    assert len(plans) > 1
    assert all(len(p.header) <= 4096 for p in plans)
    assert len({p.key for p in plans}) == len(plans)


@settings(deadline=None)
@given(
    some_items(keys=st.text(max_size=8) | st.text(st.sampled_from('\0"\\é😀'), max_size=300)),
    st.integers(1500, 6000),
)
def test_no_header_of_several_items_is_longer_than_its_limit(items, limit):
    for plan in planned(items, max_header_nbytes=limit):
        assert len(plan.items) == 1 or len(plan.header) <= limit


@given(some_items(), st.integers(1, 3000))
def test_no_shard_of_several_items_is_larger_than_its_limit(items, limit):
    plans = planned(items, max_size=limit)
    assert sorted(i for p in plans for i in p.items) == list(range(len(items)))
    for plan in plans:
        assert len(plan.items) == 1 or plan.size <= limit


@given(some_items(least=1))
def test_the_data_begin_at_a_multiple_of_eight(items):
    (plan,) = planned(items)
    assert plan.starts[0] % safetensors_header.ALIGNMENT == 0


@settings(deadline=None, max_examples=50)
@given(some_items(least=1), st.integers(0, 2**32))
def test_a_safetensors_reader_finds_every_tensor_under_its_name(tmp_path_factory, items, seed):
    (plan,) = planned(items)
    path = tmp_path_factory.mktemp("shard") / "one.safetensors"
    random = np.random.default_rng(seed)
    data = [random.integers(0, 2, i.header.nbytes, np.uint8).tobytes() for i in items]
    path.write_bytes(plan.header + b"".join(data[i] for i in plan.items))
    with safe_open(path, "pt") as opened:
        assert set(opened.keys()) == {i.header.name for i in items}
        assert opened.metadata()["format"] == "pt"
        for i, raw in zip(items, data, strict=True):
            found = opened.get_tensor(i.header.name)
            assert found.dtype == dtype_of(i.header.dtype)
            assert found.shape == i.header.shape
            assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == raw


# Parts.


@given(st.integers(1, MAX_SHARD_SIZE), st.integers(1, 4 << 30), st.integers(1, 1000))
def test_parts_keep_to_the_limits_of_s3(size, most, ways):
    part = part_size_for(size, most=most, ways=ways)
    assert MIN_PART_SIZE <= part <= 5 << 30
    assert -(-size // part) <= MAX_PARTS


@pytest.mark.parametrize(
    ("size", "most", "ways", "part"),
    [
        pytest.param(1, 64 * MIB, 16, 8 * MIB, id="an object smaller than a part"),
        pytest.param(1024 * MIB, 64 * MIB, 64, 16 * MIB, id="a part for each request that may be under way"),
        pytest.param(1024 * MIB, 64 * MIB, 16, 64 * MIB, id="the same where fewer may"),
        pytest.param(1024 * MIB + 9999, 64 * MIB, 16, 64 * MIB + (64 << 10), id="a header more makes no round more"),
        pytest.param(1000 * MIB, 64 * MIB, 10, 50 * MIB, id="even rounds"),
        pytest.param(100 * MIB, 64 * MIB, 64, 8 * MIB, id="no smaller than is worth a request"),
        pytest.param(64 * MIB * MAX_PARTS, 64 * MIB, 1, 64 * MIB, id="just ten thousand parts"),
        pytest.param(1, 1, 1, MIN_PART_SIZE, id="a part that would be too small"),
        pytest.param(MAX_SHARD_SIZE, 64 * MIB, 64, 525 * MIB, id="the largest object"),
    ],
)
def test_parts_are_even_where_the_limits_allow(size, most, ways, part):
    assert part_size_for(size, most=most, ways=ways) == part


# Segments.


@settings(deadline=None)
@given(some_items(least=1), st.integers(1, 80), st.integers(1, 700))
def test_segments_cover_the_shard_once_and_in_order_and_cross_no_border(items, frame_size, part_size):
    (plan,) = planned(items, frame_size)
    position = 0
    for part in split(Range(0, plan.size), part_size):
        for segment in segments(plan, part):
            assert len(segment.at) > 0
            if segment.item == HEADER:
                assert segment.frame == HEADER
                start = segment.at.start
                assert segment.at.stop <= len(plan.header)
            else:
                n = plan.items.index(segment.item)
                start = plan.starts[n] + segment.at.start
                assert segment.at.stop <= items[segment.item].header.nbytes
                frame = segment.frame - plan.frames[n]
                assert 0 <= frame < plan.frames[n + 1] - plan.frames[n]
                assert frame * frame_size <= segment.at.start
                assert segment.at.stop <= (frame + 1) * frame_size
            assert start == position
            position += len(segment.at)
        assert position == part.stop
    assert position == plan.size


def test_a_part_is_cut_where_a_frame_or_an_item_ends():
    (plan,) = planned([item("a", "U8", (100,)), item("empty", "U8", (0,)), item("b", "U8", (30,))], frame_size=64)
    head = len(plan.header)
    assert list(segments(plan, Range(head - 8, head + 110))) == [
        Segment(HEADER, Range(head - 8, head), HEADER),
        Segment(0, Range(0, 64), 0),
        Segment(0, Range(64, 100), 1),
        Segment(2, Range(0, 10), 2),
    ]
    assert list(segments(plan, Range(head + 110, plan.size))) == [Segment(2, Range(10, 30), 2)]


@pytest.mark.parametrize("length", [50, 300, 1000])
def test_a_header_of_names_that_json_spells_long_keeps_to_its_limit(length):
    items = [item("\0" * length + str(i), notes={"kind": "bytes"}) for i in range(8)]
    limit = 4 * (length + 1) * 12 + 1800
    for plan in planned(items, max_header_nbytes=limit):
        assert len(plan.items) == 1 or len(plan.header) <= limit
