"""Which values the manifest keeps as JSON, and that JSON gives them back the same."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.dcp.state.nesting import fold
from cloudckpt.dcp.state.values import (
    MAX_DEPTH,
    MAX_VALUE_NBYTES,
    MAX_VALUES_NBYTES,
    MIN_SHARE_NBYTES,
    choose,
    json_nbytes,
    room_of_rank,
)


class Text(str):
    __slots__ = ()


class Number(int):
    pass


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def deep_dict(depth):
    value = 1
    for _ in range(depth):
        value = {"a": value}
    return value


PLAIN = {
    "none": None,
    "true": True,
    "false": False,
    "zero": 0,
    "the largest of 64 bits": 2**63 - 1,
    "the smallest of 64 bits": -(2**63),
    "beyond what a float holds exactly": 2**53 + 1,
    "a float that is whole": 1.0,
    "minus zero": -0.0,
    "the smallest float": 5e-324,
    "the largest float": 1.7976931348623157e308,
    "no text": "",
    "text": 'é😀\x00\n"\\\u2028',
    "an empty list": [],
    "an empty dict": {},
    "nested": {"a": [1, 1.0, True, None, {"b": []}], "": {}},
    "as deep as allowed": nested(MAX_DEPTH),
}

NOT_PLAIN = {
    "an int of 65 bits": 2**63,
    "a negative int of 65 bits": -(2**63) - 1,
    "a huge int": 10**100,
    "not a number": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "a lone surrogate": "\ud800",
    "a lone surrogate in a key": {"\ud800": 1},
    "a tuple": (1, 2),
    "a tuple in a list": [(1, 2)],
    "a set": {1},
    "bytes": b"x",
    "a bytearray": bytearray(b"x"),
    "a complex number": 1j,
    "numpy's float": np.float64(1.5),
    "numpy's int": np.int64(1),
    "numpy's bool": np.bool_(True),
    "text of another class": Text("x"),
    "an int of another class": Number(1),
    "keys that are no text": {1: 2},
    "keys of another class": {Text("x"): 2},
    "infinity deep inside": {"a": [{"b": math.inf}]},
    "lists too deep": nested(MAX_DEPTH + 1),
    "dicts too deep": deep_dict(MAX_DEPTH + 1),
    "an object": object,
}


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_json_gives_back_the_same(value):
    assert choose([("k", value)]) == {"k": value}
    text = msgspec.json.encode(value)
    assert json_nbytes(value) == len(text)
    assert repr(msgspec.json.decode(text)) == repr(value)


@pytest.mark.parametrize("value", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_json_would_change_goes_as_bytes(value):
    assert json_nbytes(value) is None
    assert choose([("k", value)]) == {}


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


@given(ANYTHING)
def test_whatever_is_chosen_comes_back_to_the_type_and_the_bit(value):
    for plain in choose([("k", value)]).values():
        assert repr(msgspec.json.decode(msgspec.json.encode(plain))) == repr(value)
        assert repr(msgspec.msgpack.decode(msgspec.msgpack.encode(plain))) == repr(value)


def test_an_empty_dict_comes_out_of_its_box():
    folded = fold({"a": {}})
    assert choose(folded.items()) == {"a": {}}


def test_one_value_may_be_as_large_as_the_limit_and_no_larger():
    fits, too_large = "x" * (MAX_VALUE_NBYTES - 2), "x" * (MAX_VALUE_NBYTES - 1)
    assert set(choose([("fits", fits), ("large", too_large)])) == {"fits"}


def test_all_of_them_stay_within_the_room_and_later_ones_that_still_fit_are_taken():
    found = [("a", "x" * 48), ("b", "x" * 48), ("c", 1)]
    assert set(choose(found, room=51)) == {"a"}
    assert set(choose(found, room=53)) == {"a", "c"}
    assert set(choose(found, room=102)) == {"a", "b"}
    assert set(choose(found, room=0)) == set()


def test_without_being_told_the_room_is_the_manifests():
    count = MAX_VALUES_NBYTES // MAX_VALUE_NBYTES
    found = [(f"{i:02}", "x" * (MAX_VALUE_NBYTES - 4)) for i in range(count + 1)]
    assert len(choose(found)) == count


def test_a_key_that_cannot_be_spelled_stays_out_of_the_manifest():
    assert choose([("\ud800", 1)]) == {}


def test_ranks_share_the_room_and_each_has_some():
    assert room_of_rank(1) == MAX_VALUES_NBYTES
    assert room_of_rank(2) == MAX_VALUES_NBYTES // 2
    assert room_of_rank(100_000) == MIN_SHARE_NBYTES


def test_a_value_that_contains_itself_is_no_value_for_the_manifest():
    value = []
    value.append(value)
    assert choose([("k", value)]) == {}
