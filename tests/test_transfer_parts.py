"""Bytes to be moved, planned: runs of chunks, and the parts of an upload."""

from itertools import pairwise, product

import numpy as np
from awscrt.checksums import crc32c
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.engine.framing import MAX_PART_SIZE, MAX_PARTS, MIN_PART_SIZE
from cloudckpt.manifest import Chunk
from cloudckpt.ranges import Range, Region, strides_of
from cloudckpt.transfer.elements import _runs
from cloudckpt.transfer.parts import PART_SIZE, Copied, Sent, plan_parts
from cloudckpt.transfer.segments import Segment, crc32c_of, cut, nbytes_of, runs_of
from cloudckpt.transfer.segments import given as at_hand

MIB = 1 << 20
GIB = 1 << 30


@st.composite
def tilings(draw):
    shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=3))
    borders = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=2))}) for n in shape]
    axes = [list(pairwise(b)) for b in borders]
    chunks = [
        Chunk(tuple(a for a, _ in box), tuple(b - a for a, b in box), i, 0, 0, 0)
        for i, box in enumerate(product(*axes))
    ]
    return tuple(shape), draw(st.permutations(chunks))


@given(tilings())
def test_the_runs_of_a_tensor_are_its_elements_in_order_and_each_lies_in_its_chunk_in_one_piece(tiling):
    shape, chunks = tiling
    whole = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    region = Region((0,) * len(shape), shape)
    made = []
    for run, chunk in _runs(region, [(c, Region(c.offsets, c.sizes)) for c in chunks], 1 << 20):
        index = tuple(slice(o, o + s) for o, s in zip(run.offsets, run.sizes, strict=True))
        made.append(whole[index].reshape(-1))
        if chunk is not None:
            strides = strides_of(chunk.sizes, 1)
            inside = run.relative_to(chunk.offsets)
            assert inside.is_inside(chunk.sizes)
            last = sum((n - 1) * s for n, s in zip(run.sizes, strides, strict=True))
            assert last + 1 == run.numel
    assert np.array_equal(np.concatenate(made), whole.reshape(-1))


def test_long_rows_of_chunks_cut_along_their_second_axis_are_runs_and_short_ones_are_gathered():
    def runs(rows):
        half = rows // 2
        chunks = [Chunk((0, i * half, 0), (2, half, 1024), i, 0, 0, 0) for i in (0, 1)]
        region = Region((0, 0, 0), (2, rows, 1024))
        return [c and c.shard for _, c in _runs(region, [(c, Region(c.offsets, c.sizes)) for c in chunks], 4)]

    assert runs(4096) == [0, 1, 0, 1]
    assert runs(64) == [None]


@st.composite
def segments(draw):
    made, position = [], 0
    for i in range(draw(st.integers(1, 12))):
        if draw(st.booleans()):
            made.append(at_hand(bytes(draw(st.integers(0, 300)))))
            continue
        whole = draw(st.one_of(st.integers(0, 9 * MIB), st.integers(0, 3 * GIB)))
        key = draw(st.sampled_from([None, "a", "b"]))
        position = draw(st.sampled_from([position, position + 1]))
        grain = draw(st.sampled_from([1, 8, 4 * MIB]))
        made.append(Segment(source=i, whole=whole, at=Range(0, whole), key=key, start=position, grain=grain))
        position += whole
    return made


def unpacked(part):
    if isinstance(part, Copied):
        return [(part.key, part.at.start, part.at.stop)]
    return [
        (s.key, s.place.start, s.place.stop) if s.key else (s.source, s.at.start, s.at.stop) for s in part.segments
    ]


def joined(pieces):
    made = []
    for of, start, stop in pieces:
        if start == stop:
            continue
        if made and made[-1][0] == of and made[-1][2] == start:
            made[-1] = of, made[-1][1], stop
        else:
            made.append((of, start, stop))
    return made


@given(segments(), st.booleans())
def test_parts_are_the_segments_in_order_and_what_s3_takes(planned, copies):
    nbytes = nbytes_of(planned)
    parts = plan_parts(planned, nbytes, copies=copies)
    assert sum(part.nbytes for part in parts) == nbytes
    assert joined(p for part in parts for p in unpacked(part)) == joined(unpacked(Sent(tuple(planned))))
    assert len(parts) <= MAX_PARTS
    assert all(part.nbytes >= MIN_PART_SIZE for part in parts[:-1])
    assert all(part.nbytes <= MAX_PART_SIZE for part in parts)
    assert copies or not any(isinstance(part, Copied) for part in parts)
    assert all(part.nbytes <= 3 * PART_SIZE + nbytes // 1000 for part in parts if isinstance(part, Sent))


@given(segments())
def test_of_a_long_run_at_most_a_part_and_a_grain_pass_through_here(planned):
    passing = 2 * MIN_PART_SIZE + 4 * MIB  # what the part before lacks, and what is too little for a part of its own
    least = sum(max(0, nbytes_of(run) - passing) for run in runs_of(planned) if run[0].key)
    parts = plan_parts(planned, nbytes_of(planned), copies=True)
    assert sum(part.nbytes for part in parts if isinstance(part, Copied)) >= least


def test_a_thousand_terabytes_of_small_tensors_are_planned_within_ten_thousand_parts():
    planned = [Segment(source=i, whole=GIB, at=Range(0, GIB), key=f"{i}", grain=4 * MIB) for i in range(5 * 1024)]
    assert len(plan_parts(planned, 5 << 40, copies=False)) <= MAX_PARTS
    assert len(plan_parts(planned, 5 << 40, copies=True)) <= MAX_PARTS


@given(st.binary(min_size=1, max_size=100), st.integers(1, 9), st.lists(st.integers(0, 60), max_size=5))
def test_checksums_of_segments_follow_from_those_of_their_grains(data, grain, sizes):
    checksums = [crc32c(data[i : i + grain]) for i in range(0, len(data), grain)]
    left = [
        Segment(source="x", whole=len(data), at=Range(0, len(data)), key="k", grain=grain, checksums=checksums),
        at_hand(data),
    ]
    made = data * 2
    for size in sizes:
        front, left = cut(left, size)
        assert nbytes_of(front) >= min(size, len(made))
        assert crc32c_of(front) == crc32c(made[: nbytes_of(front)])
        made = made[nbytes_of(front) :]
    assert crc32c_of(left) == crc32c(made)
    inside = Segment(source="x", whole=len(data), at=Range(0, max(1, grain - 1)), grain=grain, checksums=checksums)
    assert grain == 1 or len(data) < grain or crc32c_of([inside]) is None
