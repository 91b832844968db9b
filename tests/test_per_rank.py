"""What a rank keeps for itself in a checkpoint, and the states of its random number generators."""

# ruff: noqa: NPY002 - the legacy global generator is what training loops use

import random
from secrets import token_hex

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.dcp.state import per_rank
from cloudckpt.dcp.state.rng import RngStates, load_rng_states, rng_states
from cloudckpt.dcp.state.stateful import to_save
from cloudckpt.errors import LoadFailedError, MissingKeyError, ReservedNameError, UsageError
from states import TENSOR, Feed, equal, load, metadata_at, save


@pytest.fixture
def url():
    return f"memory://{token_hex(6)}/run/step-1"


def save_as(rank, held, state, url):
    save(per_rank.attach(state, held, rank), url)


def save_as_many(count, held_of, url):
    """What ``count`` ranks save together: each its own, under keys that no other has."""
    together = {per_rank.KEY: {}}
    for rank in range(count):
        together[per_rank.KEY] |= to_save(per_rank.attach({}, held_of(rank), rank))[per_rank.KEY]
    dcp.save({"step": 1, **together}, storage_writer=ObjectStoreWriter(url))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_rank_gets_its_own(rank, url):
    save_as_many(3, lambda rank: {"seed": rank * 10, "feed": Feed({"at": rank}), "t": TENSOR + rank}, url)
    held, state = {"seed": None, "feed": Feed(), "t": torch.zeros(3)}, {"step": 0}
    into = held["t"]
    assert per_rank.look(metadata_at(url), rank=rank, world_size=3) == per_rank.Share(is_there=True, left_out=())
    load(per_rank.attach(state, held, rank), url)
    assert (held["seed"], held["feed"].state) == (rank * 10, {"at": rank})
    assert torch.equal(into, TENSOR + rank)
    assert state == {"step": 1}


def test_fewer_ranks_are_told_whose_is_left_out(url):
    save_as_many(3, lambda rank: {"seed": rank}, url)
    assert per_rank.look(metadata_at(url), rank=0, world_size=1) == per_rank.Share(is_there=True, left_out=(1, 2))


def test_a_rank_that_nothing_was_saved_for_gets_an_error_or_nothing(url):
    save_as_many(2, lambda rank: {"seed": rank}, url)
    found = metadata_at(url)
    with pytest.raises(MissingKeyError, match=r"rank 2 of 3: the checkpoint has it for 2 ranks, 0 to 1"):
        per_rank.look(found, rank=2, world_size=3)
    assert per_rank.look(found, rank=2, world_size=3, missing="none") == per_rank.Share(is_there=False, left_out=())


def test_a_checkpoint_without_any_says_so(url):
    save({"step": 1}, url)
    with pytest.raises(MissingKeyError, match="saved without it"):
        per_rank.look(metadata_at(url), rank=0, world_size=1)


def test_a_rank_that_kept_an_empty_dict_has_something(url):
    save_as(0, {}, {"step": 1}, url)
    assert per_rank.look(metadata_at(url), rank=0, world_size=1).is_there
    held = {}
    load(per_rank.attach({"step": 0}, held, 0), url)
    assert held == {}


def test_names_that_a_rank_does_not_hold_yet_are_given_to_it(url):
    save_as(0, {"a": 1, "b": {"c": TENSOR}}, {"step": 1}, url)
    held = {}
    load(per_rank.attach({"step": 0}, held, 0), url)
    assert equal(held, {"a": 1, "b": {"c": TENSOR}})


def test_an_object_that_nothing_was_kept_for_is_named(url):
    save_as(0, {"a": 1}, {"step": 1}, url)
    with pytest.raises(MissingKeyError, match="nothing was saved per rank under 'feed'"):
        load(per_rank.attach({"step": 0}, {"feed": Feed()}, 0), url)


@pytest.mark.parametrize("key", [per_rank.KEY, f"{per_rank.KEY}.0.seed", "cloudckpt:x"])
def test_a_users_key_cannot_look_like_ours(key):
    with pytest.raises(ReservedNameError, match="cloudckpt:"):
        per_rank.attach({key: 1}, None, 0)


# Random numbers.


def draw():
    return (
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        np.random.randn(),
        torch.rand(3).tolist(),
    )


@pytest.fixture
def generators_are_as_they_were():
    before = rng_states()
    yield
    load_rng_states(before)


@pytest.mark.usefixtures("generators_are_as_they_were")
def test_random_numbers_go_on_where_they_were(url):
    random.gauss(0, 1)  # each keeps a second number for the next call
    np.random.randn()
    held = {"rng": RngStates()}
    save_as(0, held, {"step": 1}, url)
    expected = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert draw() != expected
    load(per_rank.attach({"step": 0}, held, 0), url)
    assert draw() == expected


def test_states_are_tensors_and_plain_values():
    def leaves(value):
        return [leaf for one in value.values() for leaf in leaves(one)] if isinstance(value, dict) else [value]

    assert {type(leaf) for leaf in leaves(rng_states())} <= {torch.Tensor, int, float, str, type(None)}


def test_states_of_devices_that_are_not_there_are_refused_or_left_out():
    states = {**rng_states(), "cuda": {"100": torch.zeros(16, dtype=torch.uint8)}}
    with pytest.raises(UsageError, match=r"CUDA devices \[100\]"):
        load_rng_states(states)
    load_rng_states(states, strict=False)


def test_what_are_no_states_changes_nothing():
    before = rng_states()
    words = before["python"]["words"]
    other = {**before, "python": {**before["python"], "words": torch.cat([words[:-1].flip(0), words[-1:]])}}
    with pytest.raises(LoadFailedError, match="no states of random number generators"):
        load_rng_states({**other, "torch": torch.zeros(3, dtype=torch.uint8)})
    assert equal(rng_states(), before)
