"""Ranges and regions against brute force."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.ranges import Range, Region, balanced_size, coalesce, is_bridged, span_of, split, strides_of

SMALL = st.integers(0, 40)


@st.composite
def ranges(draw):
    start = draw(SMALL)
    return Range(start, start + draw(SMALL))


@st.composite
def regions(draw, axes=3, size=5):
    """A shape and a region inside an array of it."""
    shape = draw(st.lists(st.integers(0, size), max_size=axes))
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return tuple(shape), Region(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def mask(region, shape):
    """Where in an array of ``shape`` the region lies."""
    found = np.zeros(shape, bool)
    found[tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))] = True
    return found


@given(ranges(), ranges())
def test_an_intersection_holds_the_bytes_in_both(a, b):
    common = a.intersect(b)
    assert set(range(common.start, common.stop)) == set(range(a.start, a.stop)) & set(range(b.start, b.stop))
    assert len(common) >= 0


@given(ranges(), st.integers(-50, 50))
def test_a_shifted_range_holds_as_many_bytes_elsewhere(r, by):
    moved = r.shift(by)
    assert [i - by for i in range(moved.start, moved.stop)] == list(range(r.start, r.stop))
    assert len(moved) == len(r)


@given(ranges(), st.integers(1, 50))
def test_split_covers_the_whole_in_order_with_a_shorter_range_only_at_the_end(whole, size):
    cuts = list(split(whole, size))
    assert [i for r in cuts for i in range(r.start, r.stop)] == list(range(whole.start, whole.stop))
    assert all(len(r) == size for r in cuts[:-1])
    assert all(0 < len(r) <= size for r in cuts)


@pytest.mark.parametrize(
    ("gap", "run", "max_gap", "expected"),
    [
        (0, 0, 0, True), (0, 50, 0, True), (1, 50, 0, False), (10, 1, 10, True), (11, 1, 10, False),
        (10, 9, 10, True), (10, 10, 10, False), (10, 199, 10, False), (10, 200, 10, True), (11, 10000, 10, False),
    ],
)  # fmt: skip
def test_a_gap_is_bridged_that_costs_less_than_a_request_or_next_to_nothing(gap, run, max_gap, expected):
    assert is_bridged(gap, run, max_gap) is expected


@given(st.lists(ranges(), max_size=12), st.integers(0, 20), st.integers(1, 60))
def test_groups_hold_all_ranges_in_order_and_are_as_long_as_they_may_be(some, max_gap, max_size):
    some.sort()
    groups = list(coalesce(some, max_gap=max_gap, max_size=max_size))
    assert [i for g in groups for i in g] == list(range(len(some)))
    for group in groups:
        for i, j in pairwise(group):
            assert 0 <= some[j].start - some[i].stop <= max_gap
        assert len(group) == 1 or some[group[-1]].stop - some[group[0]].start <= max_size
    for before, after in pairwise(groups):
        first, last, here = some[before[0]], some[before[-1]], some[after[0]]
        gap = here.start - last.stop
        is_near = gap >= 0 and is_bridged(gap, min(len(last), len(here)), max_gap)
        assert not (is_near and here.stop - first.start <= max_size)


@pytest.mark.parametrize(
    ("some", "expected"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([(0, 4), (4, 8)], [[0, 1]], id="touching ranges are one group"),
        pytest.param([(0, 4), (14, 18)], [[0, 1]], id="a gap of the greatest width is bridged"),
        pytest.param([(0, 4), (15, 18)], [[0], [1]], id="a gap that is too wide begins a new group"),
        pytest.param([(0, 60), (60, 100)], [[0, 1]], id="a group may span the greatest size"),
        pytest.param([(0, 60), (60, 101)], [[0], [1]], id="a range that makes the group too long begins a new one"),
        pytest.param([(0, 500), (500, 510)], [[0], [1]], id="a range longer than the greatest size stands alone"),
        pytest.param([(0, 10), (5, 12)], [[0], [1]], id="a range that overlaps begins a new group"),
        pytest.param([(0, 10), (0, 10)], [[0], [1]], id="a range that is there twice begins a new group"),
    ],
)
def test_ranges_worth_one_request_are_grouped(some, expected):
    assert list(coalesce([Range(*r) for r in some], max_gap=10, max_size=100)) == expected


@given(st.data())
def test_a_common_region_holds_the_elements_in_both(data):
    shape, a = data.draw(regions())
    ends = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    b = Region(tuple(x for x, _ in ends), tuple(y - x for x, y in ends))
    both = mask(a, shape) & mask(b, shape)
    common = a.intersect(b)
    if common is None:
        assert not both.any()
    else:
        assert common.numel == both.sum() > 0
        assert (mask(common, shape) == both).all()


@given(regions(size=4), st.integers(1, 9))
def test_a_span_reaches_from_the_first_to_the_last_byte_of_a_region(shaped, itemsize):
    shape, region = shaped
    places = np.arange(int(np.prod(shape)) * itemsize).reshape(*shape, itemsize)[mask(region, shape)]
    span = span_of(region, shape, itemsize)
    if places.size:
        assert (span.start, span.stop) == (places.min(), places.max() + 1)
    else:
        assert len(span) == 0


@given(st.lists(st.integers(1, 5), max_size=4), st.sampled_from([1, 2, 4, 8]))
def test_strides_are_those_of_numpy(shape, itemsize):
    assert strides_of(shape, itemsize) == np.empty(shape, f"V{itemsize}").strides


@given(regions())
def test_numel_counts_a_regions_elements(shaped):
    shape, region = shaped
    assert region.numel == mask(region, shape).sum()


@given(st.data())
def test_a_region_relative_to_an_origin_is_the_same_elements_seen_from_there(data):
    shape, region = data.draw(regions())
    origin = [data.draw(st.integers(0, o)) for o in region.offsets]
    inner = np.arange(int(np.prod(shape))).reshape(shape)[tuple(slice(b, None) for b in origin)]
    seen = inner[mask(region.relative_to(origin), inner.shape)]
    assert (seen == np.arange(int(np.prod(shape))).reshape(shape)[mask(region, shape)]).all()


@pytest.mark.parametrize(
    ("region", "shape", "is_inside"),
    [
        pytest.param(Region((), ()), (), True, id="a scalar is inside a scalar"),
        pytest.param(Region((0, 0), (2, 3)), (2, 3), True, id="the whole"),
        pytest.param(Region((2, 0), (0, 3)), (2, 3), True, id="nothing at the end"),
        pytest.param(Region((1, 0), (2, 3)), (2, 3), False, id="one row too many"),
        pytest.param(Region((-1, 0), (2, 3)), (2, 3), False, id="before the first row"),
        pytest.param(Region((1, 0), (-1, 3)), (2, 3), False, id="a negative size"),
        pytest.param(Region((0,), (2,)), (2, 3), False, id="an axis too few"),
    ],
)
def test_whether_a_region_is_inside_a_shape(region, shape, is_inside):
    assert region.is_inside(shape) is is_inside


def test_regions_of_different_axes_cannot_be_intersected():
    with pytest.raises(ValueError):
        Region((0,), (1,)).intersect(Region((0, 0), (1, 1)))


@given(
    st.integers(0, 1 << 44),
    st.integers(1, 1 << 28),
    st.integers(1, 200),
    st.integers(1, 1 << 24),
    st.integers(1, 1 << 22),
)
def test_balanced_pieces_keep_to_their_limits(nbytes, most, ways, least, unit):
    size = balanced_size(nbytes, most=most, ways=ways, least=least, unit=unit)
    assert min(least, most) <= size <= most * 17 / 16


@given(st.integers(1, 1 << 40), st.integers(1 << 20, 1 << 28), st.integers(1, 200))
def test_balanced_pieces_fill_whole_rounds(nbytes, most, ways):
    size = balanced_size(nbytes, most=most, ways=ways, least=1, unit=1)
    pieces = -(-nbytes // size)
    rounds = -(-pieces // ways)
    assert rounds <= nbytes / (most * ways) + 1
    assert rounds * ways * (size - 1) < nbytes  # none could be smaller without another round
