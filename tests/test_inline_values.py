"""Plain values of a state dict, kept in the manifest by the writer and put back by the reader."""

import io
import json
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

import cloudckpt
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.dcp.state.values import MAX_VALUE_NBYTES
from cloudckpt.engine import loop
from cloudckpt.engine.commit import read_manifest_blob
from cloudckpt.extensions import AesGcm
from cloudckpt.manifest import BytesEntry, TensorEntry, ValueEntry, parse
from cloudckpt.store.url import open_store

STATE = {
    "weight": torch.arange(6.0),
    "step": 7,
    "optim": {"groups": [{"lr": 0.5, "betas": (0.9, 0.999)}], "names": ["a", "b"]},
    "note": "\u00e9\U0001f600",
    "nothing": None,
    "flags": [True, [1, 1.0, -0.0]],
}
FLAT = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
INLINE = {"step", "optim.groups.0.lr", "optim.names", "note", "nothing", "flags"}


@pytest.fixture
def url():
    return f"memory://{token_hex(6)}/run/step-1"


def save(state, url, planner=None, **more):
    dcp.save(state, storage_writer=ObjectStoreWriter(url, inline_values=True, **more), planner=planner)


def load(state, url, planner=None, **more):
    dcp.load(state, storage_reader=ObjectStoreReader(url, **more), planner=planner)
    return state


def entries_at(url):
    async def read():
        async with open_store(url) as store:
            return parse((await read_manifest_blob(store)).data, url).entries

    return loop.run(read)


def kinds(url, kind):
    return {key for key, entry in entries_at(url).items() if isinstance(entry, kind)}


def blank():
    return {
        "weight": torch.zeros(6),
        "step": None,
        "optim": {"groups": [{"lr": None, "betas": None}], "names": None},
        "note": None,
        "nothing": "something",
        "flags": None,
    }


def test_plain_values_go_into_the_manifest_and_the_others_into_a_shard(url):
    save(STATE, url)
    assert kinds(url, ValueEntry) == INLINE
    assert kinds(url, BytesEntry) == {"optim.groups.0.betas"}
    assert kinds(url, TensorEntry) == {"weight"}


def test_all_of_it_loads_as_it_was_saved(url):
    save(STATE, url)
    loaded = load(blank(), url)
    assert torch.equal(loaded.pop("weight"), STATE["weight"])
    assert repr(loaded) == repr({key: value for key, value in STATE.items() if key != "weight"})


def test_they_are_there_without_torch(url):
    save(STATE, url)
    with cloudckpt.open(url) as checkpoint:
        assert checkpoint["step"] == 7
        assert checkpoint["optim.names"] == ["a", "b"]


def test_without_being_asked_the_writer_keeps_them_in_the_shard(url):
    dcp.save(STATE, storage_writer=ObjectStoreWriter(url))
    assert kinds(url, ValueEntry) == set()


def test_a_state_dict_of_values_alone_needs_no_shard(url):
    save({"step": 3, "name": "x"}, url)
    with cloudckpt.open(url) as checkpoint:
        assert checkpoint.summary.shard_count == 0
        assert checkpoint.summary.entry_count == 2
    assert load({"step": 0, "name": ""}, url) == {"step": 3, "name": "x"}


def test_a_value_takes_the_place_of_whatever_the_destination_has(url):
    save({"a": 1, "b": [1, 2], "c": "text"}, url)
    loaded = load({"a": torch.zeros(3), "b": "text", "c": (1, 2)}, url)
    assert loaded == {"a": 1, "b": [1, 2], "c": "text"}


def test_a_value_too_large_for_the_manifest_goes_into_a_shard(url):
    save({"large": "x" * MAX_VALUE_NBYTES, "small": "x"}, url)
    assert kinds(url, BytesEntry) == {"large"}
    assert load({"large": "", "small": ""}, url) == {"large": "x" * MAX_VALUE_NBYTES, "small": "x"}


def test_a_value_that_outgrows_the_manifest_between_saves_needs_no_other_plan(url):
    writer = ObjectStoreWriter(inline_values=True)

    class Cached(DefaultSavePlanner):
        pass

    for i, value in enumerate((1, "x" * MAX_VALUE_NBYTES, 2)):
        planner = Cached(enable_plan_caching=True)
        dcp.save({"value": value}, storage_writer=writer, planner=planner, checkpoint_id=f"{url}{i}")
        assert load({"value": None}, f"{url}{i}") == {"value": value}


def test_values_are_encrypted_where_the_rest_is(url):
    keys = {"k": bytes(32)}
    save({"weight": torch.zeros(4), "lr": 0.1234567}, url, extensions=[AesGcm(keys=keys, key_id="k")])

    async def read():
        async with open_store(url) as store:
            return bytes((await read_manifest_blob(store)).data)

    text = loop.run(read)
    assert json.loads(text)["entries"]["lr"] == ["sealed"]
    assert b"0.1234567" not in text
    assert load({"weight": torch.ones(4), "lr": None}, url, keys=keys)["lr"] == 0.1234567


def test_a_planner_that_spells_values_in_its_own_way_is_left_alone(url):
    class Reversed(DefaultSavePlanner):
        def transform_object(self, write_item, word):
            return io.BytesIO(word[::-1].encode())

    class Restored(DefaultLoadPlanner):
        def load_bytes(self, read_item, value):
            self.state_dict[read_item.dest_index.fqn] = value.read().decode()[::-1]

    save({"word": "stressed"}, url, planner=Reversed(flatten_state_dict=False))
    assert kinds(url, BytesEntry) == {"word"}
    with cloudckpt.open(url) as checkpoint:
        assert checkpoint["word"] == b"desserts"
    assert load({"word": ""}, url, planner=Restored(**FLAT), unsafe_pickle=True)["word"] == "stressed"


def test_a_load_planner_of_its_own_is_given_a_value_as_bytes(url):
    class Noted(DefaultLoadPlanner):
        def load_bytes(self, read_item, value):
            self.state_dict[read_item.dest_index.fqn] = ("noted", torch.load(value, weights_only=True))

    save({"word": "stressed"}, url)
    assert load({"word": ""}, url, planner=Noted(**FLAT))["word"] == ("noted", "stressed")


def test_a_planner_that_does_not_flatten_gets_whole_values(url):
    save({"step": 3}, url, planner=DefaultSavePlanner(flatten_state_dict=False))
    assert kinds(url, ValueEntry) == {"step"}
    assert load({"step": 0}, url, planner=DefaultLoadPlanner(**FLAT)) == {"step": 3}
