"""Nested state dicts that DCP's flattening would lose something of."""

from collections import Counter, OrderedDict
from secrets import token_hex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict

from cloudckpt.dcp.state.nesting import KEYS, fold, unfold
from cloudckpt.errors import ReservedNameError, UnstorableError
from states import TENSOR, Feed, equal, load, save


@pytest.fixture
def url():
    return f"memory://{token_hex(6)}/run/step-1"


LOSSY = {
    "an empty dict": {},
    "numbers for keys": {0: 1, 10: 2},
    "numbers and text for keys": {0: 1, "a": 2},
    "numbers for keys over tensors": {0: {"m": TENSOR}, 1: {"m": TENSOR + 1, "step": 4}},
    "None and True for keys over tensors": {None: TENSOR, True: 1},
    "a list of empty dicts": [{}, {}],
    "an empty dict beside a tensor": [TENSOR, {}],
    "an empty dict in a list in a list": [[{}], 1],
    "numbers for keys in a list": [{1: 2}, {"a": 3}],
    "numbers for keys in a list beside a tensor": [TENSOR, [{1: 2}]],
    "what a box looks like": ("cloudckpt.box/1", 5),
    "what a box looks like, in a list": [("cloudckpt.box/1", 5)],
    "what a box looks like, in an empty box's place": {1: ("cloudckpt.box/1", {})},
    "a counter": Counter({10: 1, 20: 2}),
    "an ordered dict with numbers": OrderedDict([(2, 1), (1, 2)]),
}

KEPT = {
    "text for keys": {"a": 1, "b": {"c": [1, 2], "d": TENSOR}},
    "a list of dicts": [{"lr": 0.1, "betas": (0.9, 0.99)}, {"lr": 0.2, "betas": ()}],
    "an empty list": [],
    "a tuple": (1, "a"),
    "a tensor in a list": [TENSOR, [TENSOR, 1]],
    "a tensor": TENSOR,
    "values": [None, True, 1, 1.5, "x", 10**30, float("inf"), b"x"],
}


@pytest.mark.parametrize("value", (LOSSY | KEPT).values(), ids=LOSSY | KEPT)
def test_what_an_object_holds_comes_back_as_it_was(value, url):
    save({"feed": Feed({"x": value, "y": 1})}, url)
    fresh = Feed()
    load({"feed": fresh}, url)
    assert equal(fresh.state, {"x": value, "y": 1})


@pytest.mark.parametrize("value", KEPT.values(), ids=KEPT)
def test_what_dcp_keeps_is_handed_on_as_it_is(value):
    assert equal(fold({"x": value}), {"x": value})


@pytest.mark.parametrize("value", LOSSY.values(), ids=LOSSY)
def test_dcp_alone_would_lose_the_others_or_take_them_for_ours(value):
    flat, paths = flatten_state_dict({"x": value})
    alone = unflatten_state_dict(flat, paths)
    assert not equal(alone, {"x": value}) or not equal(unfold(alone), {"x": value})


LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.just(TENSOR) | st.text(max_size=2) | st.just(())
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        | st.dictionaries(st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(NESTED)
def test_whatever_is_folded_survives_dcps_flattening(value):
    state = {"x": value, "y": 1}
    flat, paths = flatten_state_dict(fold(state))
    assert equal(unfold(unflatten_state_dict(flat, paths)), state)


def test_keys_that_are_the_same_as_text_are_refused_over_tensors():
    with pytest.raises(UnstorableError, match=r"x\.y has keys that are the same as text"):
        fold({"x": {"y": {0: TENSOR, "0": TENSOR}}})


def test_keys_that_cannot_be_kept_are_refused_over_tensors():
    with pytest.raises(UnstorableError, match=r"x has the key \(1, 2\) of type tuple"):
        fold({"x": {(1, 2): TENSOR}})


@pytest.mark.parametrize("value", [{"x": {KEYS: 1}}, {"x": [{KEYS: 1}]}, {"x": [{KEYS: 1}, {}]}, {KEYS: TENSOR}])
def test_the_key_that_is_kept_for_keys_is_refused_wherever_it_stands(value):
    with pytest.raises(ReservedNameError, match="cloudckpt:keys"):
        fold(value)
