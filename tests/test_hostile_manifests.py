"""Manifests that lie are refused, or read as they were saved; never anything else."""

import itertools
import json
import tracemalloc

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.regions import Locator
from cloudckpt.errors import CheckpointError, ManifestError
from cloudckpt.layout import shard_key
from cloudckpt.manifest import (
    BytesEntry,
    Chunk,
    TensorEntry,
    encode,
    entry_problems,
    find_problems,
    frame_problems,
    overlap_problems,
    pack,
    parse,
    shard_problems,
    tiling_problem,
)
from cloudckpt.ranges import Region
from fuzz import fuzz_manifest
from fuzz.mutations import HOSTILE, altered_bytes, altered_tree
from fuzz.reading import read
from test_manifest import shard, small

TREE = msgspec.json.decode(fuzz_manifest.seeds()[1])


# Whatever it says.


@HOSTILE
@given(altered_bytes(fuzz_manifest.seeds()))
def test_a_manifest_of_altered_bytes_is_refused_or_read(data):
    fuzz_manifest.check(data)


@pytest.mark.parametrize("part", ["shards", "entries", "all"])
def test_a_manifest_of_absurd_values_is_refused_or_read(part):
    @HOSTILE
    @given(altered_tree(TREE if part == "all" else TREE[part]))
    def run(altered):
        tree = altered if part == "all" else TREE | {part: altered}
        fuzz_manifest.check(fuzz_manifest.resealed_tree(tree))
        find_problems(tree)

    run()


def test_the_manifest_that_is_altered_is_read_as_it_was_saved():
    found = read(fuzz_manifest.objects())
    assert np.array_equal(found["a"], fuzz_manifest.STATE["a"])
    assert np.array_equal(found["z/b"], fuzz_manifest.STATE["z/b"])


def changed(path, value):
    """The bytes of the sound manifest with one value in place of another."""
    tree = json.loads(json.dumps(TREE))
    at = tree
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return fuzz_manifest.resealed_tree(tree)


LIES = {
    "a key that climbs": (["shards", 0, "key"], f"shards/../{'a' * 32}.safetensors"),
    "a key that is a path": (["shards", 0, "key"], "/etc/passwd"),
    "a shard twice": (["shards", 1], TREE["shards"][0]),
    "a size of 2^63": (["shards", 0, "size"], 1 << 63),
    "frames of 2^63 bytes": (["shards", 0, "frame_size"], 1 << 63),
    "a checksum of 33 bits": (["shards", 0, "crc32c"], 1 << 32),
    "a negative checksum": (["shards", 0, "crc32c"], -1),
    "17 extensions": (["shards", 0, "extensions"], ["stream.zstd/1"] * 17),
    "a number of 400 digits": (["shards", 0, "size"], 10**400),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lie_about_a_shard_is_refused_when_the_checkpoint_is_opened(lie):
    with pytest.raises(ManifestError, match=r"shards\[[01]\]"):
        parse(changed(*lie), "here")


def test_params_of_a_mebibyte_are_refused():
    made = shard(extensions=("stream.zstd/1",), extension_params=({"a": "x" * (1 << 20)},))
    assert "extension_params" in shard_problems(made)[0]
    assert not shard_problems(shard(extensions=("stream.zstd/1",), extension_params=({"a": "x" * 1000},)))


def test_a_second_summary_is_refused():
    whole = fuzz_manifest.seeds()[0]
    other = msgspec.json.encode(TREE["summary"] | {"save_id": "other"})
    twice = whole.replace(b',"metadata":', b',"summary":' + other + b',"metadata":', 1)
    with pytest.raises(ManifestError, match="two summaries"):
        parse(fuzz_manifest.resealed(twice), "here")


# Shapes.


def tensor(shape, *chunks, dtype="U8"):
    return TensorEntry(dtype, shape, tuple(Chunk(tuple(o), tuple(s), 0, 0, 0, 0) for o, s in chunks))


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        pytest.param((1,) * 65, "65 axes, more than 64", id="65 axes"),
        pytest.param((1 << 63,), "2^63", id="2^63 elements"),
        pytest.param((1 << 32, 1 << 31), "2^63", id="a product of 2^63"),
        pytest.param((0, 1 << 40, 1 << 40), "2^63", id="strides of 2^80"),
        pytest.param((10**400,), "2^63", id="400 digits"),
        pytest.param((-1, 4), "negative", id="negative"),
    ],
)
def test_a_shape_that_no_array_can_have_is_refused(shape, told):
    (problem,) = entry_problems(tensor(shape), (shard(),))
    assert told in problem


def test_a_shape_of_64_axes_is_read():
    made = TensorEntry("U8", (1,) * 64, (Chunk((0,) * 64, (1,) * 64, 0, 0, 1, 0),))
    assert entry_problems(made, (shard(),)) == []


def test_the_bytes_of_an_element_count_for_the_size_of_a_shape():
    empty = tensor((1 << 62, 0), ((0, 0), (1 << 62, 0)))
    assert entry_problems(empty, (shard(),)) == []
    assert entry_problems(msgspec.structs.replace(empty, dtype="U16"), (shard(),)) != []


# Tilings, against counting.


def boxes_of(chunks):
    return [Chunk(tuple(o), tuple(s), 0, 0, 0, 0) for o, s in chunks]


def brute_force(shape, chunks):
    counts = np.zeros(shape, int)
    for chunk in chunks:
        counts[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
    return bool((counts == 1).all())


@st.composite
def tilings(draw):
    """A shape, and rectangles that are cut out of it, some of which were then moved, dropped or doubled."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    chunks = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6)) if shape else 0):
        offsets, sizes = chunks.pop(draw(st.integers(0, len(chunks) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, sizes[axis]))
        before, after = list(sizes), list(sizes)
        before[axis], after[axis] = at, sizes[axis] - at
        second = list(offsets)
        second[axis] += at
        chunks += [(offsets, tuple(before)), (tuple(second), tuple(after))]
    edit = draw(st.sampled_from(["none", "none", "drop", "double", "move", "swap sizes"]))
    i = draw(st.integers(0, len(chunks) - 1))
    offsets, sizes = chunks[i]
    if edit == "drop":
        chunks.pop(i)
    elif edit == "double":
        chunks.append(chunks[i])
    elif edit == "move":
        moved = tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, sizes, strict=True))
        chunks[i] = (moved, sizes)
    elif edit == "swap sizes":
        other = tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
        chunks[i] = (offsets, other)
    return shape, boxes_of(draw(st.permutations(chunks)))


@HOSTILE
@given(tilings())
def test_a_tiling_is_told_from_anything_else(made):
    shape, chunks = made
    assert (tiling_problem(shape, chunks) is None) == brute_force(shape, chunks)


@HOSTILE
@given(tilings())
def test_the_element_that_is_told_is_in_no_chunk_or_in_two(made):
    shape, chunks = made
    told = tiling_problem(shape, chunks)
    if told is not None:
        assert tiling_problem(shape, list(reversed(chunks))) is not None
        named = [i for i in range(len(chunks)) if f"chunks[{i}]" in told]
        assert len(named) == (0 if "no chunk" in told else 2)


ROWS = [((i, 0), (1, 6)) for i in range(4)]


@pytest.mark.parametrize(
    ("shape", "chunks", "told"),
    [
        pytest.param((4, 6), ROWS, None, id="rows"),
        pytest.param((4, 6), [*ROWS[:2], *ROWS[3:]], "no chunk holds its element at (2, 0)", id="a gap"),
        pytest.param((4, 6), ROWS[:-1], "no chunk holds its element at (3, 0)", id="a gap at the end"),
        pytest.param((4, 6), [*ROWS, ROWS[1]], "chunks[1] and chunks[4] are the same rectangle", id="a duplicate"),
        pytest.param(
            (4, 6),
            [*ROWS[:2], ((1, 2), (3, 4)), ((2, 0), (2, 2))],
            "chunks[1] and chunks[2] overlap: both hold its element at (1, 2)",
            id="an overlap",
        ),
        pytest.param((4, 6), [], "no chunk holds its element at (0, 0)", id="no chunks"),
        pytest.param((), [((), ())], None, id="a scalar"),
        pytest.param((), [], "no chunk holds its element at ()", id="a scalar without a chunk"),
        pytest.param((), [((), ()), ((), ())], "the same rectangle", id="a scalar twice"),
        pytest.param((0, 3), [], None, id="empty, without chunks"),
        pytest.param((0, 3), [((0, 0), (0, 3)), ((0, 0), (0, 3))], None, id="empty, twice"),
        pytest.param((4, 6), [*ROWS, ((4, 0), (0, 6))], None, id="a chunk without elements"),
        pytest.param((4, 6), [((1, 0), (0, 6))], "no chunk holds", id="only one without elements"),
        pytest.param(
            (3, 3),
            [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))],
            None,
            id="a pinwheel",
        ),
        pytest.param(
            (3, 3),
            [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1))],
            "no chunk holds its element at (1, 1)",
            id="a pinwheel without its middle",
        ),
    ],
)
def test_a_tiling_is_named_by_what_is_wrong_with_it(shape, chunks, told):
    problem = tiling_problem(shape, boxes_of(chunks))
    assert problem == told if told is None else told in problem


def test_as_many_elements_as_there_should_be_do_not_make_a_tiling():
    assert tiling_problem((4,), boxes_of([((0,), (2,)), ((1,), (2,))])) is not None


@pytest.mark.parametrize("axes", [8, 9])
def test_a_tensor_is_cut_along_eight_axes_at_most(axes):
    halves = [(corner, (1,) * axes) for corner in itertools.product(range(2), repeat=axes)]
    problem = tiling_problem((2,) * axes, boxes_of(halves))
    assert (problem is None) == (axes == 8)
    assert problem is None or "along 9 axes" in problem


def test_chunks_that_meet_in_too_many_corners_are_not_followed_to_the_end():
    numbers = np.random.default_rng(0).integers(1, 1000, (1200, 16))
    chunks = boxes_of([(tuple(map(int, row[:8])), tuple(map(int, row[8:]))) for row in numbers])
    assert "too many corners" in tiling_problem((2000,) * 8, chunks)


def test_chunks_without_elements_cut_nothing():
    assert tiling_problem((2,) * 9, boxes_of([((0,) * 9, (2,) * 9), ((1,) * 9, (0,) * 9)])) is None


def test_an_entry_with_a_gap_is_refused_before_a_request():
    entries = {"w": TensorEntry("F32", (8, 4), (Chunk((0, 0), (4, 4), 0, 100, 164, 0),))}
    locator = Locator(parse(encode(small(entries=entries)), "here"), ReadOptions())
    with pytest.raises(ManifestError, match=r"entry 'w' is not sound: no chunk holds its element at \(4, 0\)"):
        locator.entry("w")


# Places.


def strings(*places):
    """A manifest of byte strings, each of which has 64 bytes to a frame."""
    entries = {
        f"b{i}": BytesEntry(stop - start, 0, start, stop, frame) for i, (start, stop, frame) in enumerate(places)
    }
    return small(entries=entries, shards=(shard(frame_checksums=pack(range(16))),))


PLACES = {
    "apart": ([(0, 64, 0), (64, 128, 1)], None),
    "apart, in another order": ([(64, 128, 1), (0, 64, 0)], None),
    "the same": ([(0, 64, 0), (0, 64, 0)], None),
    "the same in other frames": ([(0, 64, 0), (0, 64, 1)], "overlaps"),
    "by a byte": ([(0, 64, 0), (63, 127, 1)], "overlaps"),
    "one in the other": ([(0, 128, 0), (32, 64, 2)], "overlaps"),
    "one behind one that is in another": ([(0, 128, 0), (0, 64, 2), (120, 130, 3)], "overlaps"),
    "empty ones": ([(0, 64, 0), (32, 32, 5), (32, 32, 7)], None),
    "in one frame": ([(0, 64, 0), (64, 128, 0)], "begins with frame 0"),
    "in frames of another's": ([(0, 128, 0), (128, 192, 1)], "begins with frame 1"),
}


@pytest.mark.parametrize(("places", "told"), PLACES.values(), ids=PLACES)
def test_items_that_share_bytes_or_frames_are_told(places, told):
    problems = overlap_problems(strings(*places))
    assert bool(problems) == (told is not None)
    assert all(told in problem and shard().key in problem for problem in problems[:1])


def test_each_item_that_overlaps_one_before_it_is_told():
    first, second = overlap_problems(strings((0, 128, 0), (10, 64, 2), (120, 130, 3)))
    assert first.startswith("'b1'")
    assert second.startswith("'b2'")


@HOSTILE
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=6))
def test_items_overlap_exactly_where_a_byte_is_in_two_of_them(places):
    made = strings(*((start, start + nbytes, i) for i, (start, nbytes) in enumerate(places)))
    sets = [set(range(start, start + nbytes)) for start, nbytes in places]
    overlaps = any(a & b for a, b in itertools.combinations(sets, 2))
    assert any("overlaps" in problem for problem in overlap_problems(made)) == overlaps


def test_what_two_shards_hold_does_not_overlap():
    shards = tuple(shard(key=shard_key(f"{i:032x}", "safetensors")) for i in range(2))
    entries = {f"b{i}": BytesEntry(64, i, 0, 64, 0) for i in range(2)}
    assert overlap_problems(small(entries=entries, shards=shards)) == []


def test_a_load_of_items_that_overlap_is_refused_before_a_request():
    state = TREE["entries"]
    shard_of, start, stop, frame = state["rng"][2:]
    nbytes = stop - start
    assert state["n"][2] == shard_of
    inside = changed(["entries", "n"], ["bytes", nbytes - 1, shard_of, start, stop - 1, frame])
    located = Locator(parse(inside, "here"), ReadOptions())

    async def places():
        found = await located.locate(None, (), ReadOptions(), None)
        for key in ("n", "rng"):
            entry = located.entry(key)
            found.read_bytes(key, entry, Region((0,), (entry.nbytes,)))
        return found.checks()

    with pytest.raises(ManifestError, match="overlaps"):
        next(iter(_run(places())))


def _run(coroutine):
    try:
        coroutine.send(None)
    except StopIteration as e:
        yield e.value


def test_find_problems_tells_of_items_that_overlap():
    tree = msgspec.json.decode(msgspec.json.encode(strings((0, 64, 0), (63, 127, 1))))
    assert [p for p in find_problems(tree) if "'b1' at bytes 63 to 127" in p]


# Frames.


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param({"frame_sizes": pack([500, 499])}, "make up 999 bytes", id="another sum"),
        pytest.param({"frame_sizes": pack([1000])}, "1 frame_sizes are not those of its 2 frames", id="too few"),
        pytest.param({"frame_sizes": pack([500, 500, 0])}, "3 frame_sizes", id="too many"),
        pytest.param({"frame_sizes": ""}, "0 frame_sizes", id="none"),
        pytest.param({"extensions": ()}, "no extensions", id="of a plain shard"),
        pytest.param({"extension_params": ({}, {})}, "extension_params has 2 for 1", id="params of no extension"),
        pytest.param({}, None, id="sound"),
    ],
)
def test_frame_sizes_are_those_of_the_shard(change, told):
    made = shard(extensions=("stream.zstd/1",), frame_checksums=pack(range(2)), frame_sizes=pack([500, 500]))
    problems = frame_problems(msgspec.structs.replace(made, **change))
    assert bool(problems) == (told is not None)
    assert all(told in problem for problem in problems)


def test_a_negative_number_of_bytes_is_refused():
    made = shard(extensions=("stream.zstd/1",))
    assert entry_problems(BytesEntry(-5, 0, 0, 10, 0), (made,)) != []


def test_a_size_that_is_only_claimed_takes_no_memory():
    """A tensor of 2^61 bytes in a frame of 2^62, and one of 2^40 frames."""
    frames = shard(size=1 << 62, frame_size=1 << 62, frame_checksums=pack([7]))
    entries = {"w": TensorEntry("U8", (1 << 61,), (Chunk((0,), (1 << 61,), 0, 0, 1 << 61, 0),))}
    data = encode(small(shards=(frames,), entries=entries))
    tracemalloc.start()
    try:
        locator = Locator(parse(data, "here"), ReadOptions())
        entry = locator.entry("w")
        made = locator.read_chunk("w", entry, entry.chunks[0], Region((0,), (10,)), is_direct=True)
        assert made.nbytes == 10
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("nesting", [b"[", b'{"a":', b'["tensor",'])
def test_nesting_without_end_is_refused(nesting):
    data = fuzz_manifest.seeds()[0].replace(b'"metadata":{', b'"metadata":{"x":' + nesting * 100_000, 1)
    with pytest.raises(CheckpointError):
        parse(fuzz_manifest.resealed(data), "here")
