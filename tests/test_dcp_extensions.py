"""DCP's save and load with extensions: everything comes back, and what is kept is what was asked for."""

import pickle
from itertools import pairwise
from pathlib import Path
from secrets import token_hex

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import _extension
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.testing._internal.distributed.checkpoint_utils import Rot13Example

import cloudckpt
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine.write import WriteOptions
from cloudckpt.errors import EncryptionKeyError, UnknownExtensionError, UsageError
from cloudckpt.extensions import AesGcm, BytePlane, ExtensionRegistry, ZStandard
from cloudckpt.testing import Rot13
from test_dcp import all_sorts, blank, equal, fails_with, load, manifest_at, save

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

KEYS = {"k": bytes(range(32))}
ALL = [BytePlane(), ZStandard(), AesGcm("k", KEYS)]


def registry():
    made = ExtensionRegistry()
    for cls in (Rot13, Rot13Example):
        made.register(cls)
    return made


@pytest.fixture
def url():
    return f"memory://{token_hex(6)}/run/step-1"


CHAINS = {
    "zstd": [ZStandard()],
    "planes, zstd": [BytePlane(), ZStandard()],
    "planes, zstd, aesgcm": ALL,
    "aesgcm alone": [AesGcm("k", KEYS)],
    "planes of 4 alone": [BytePlane(4)],
    "torch's zstd": [_extension.ZStandard()],
    "torch's rot13, ours, zstd": [Rot13Example(), Rot13(), ZStandard()],
    "by pattern": {"dtypes.*": ALL, "nested.*": [], "st*": [ZStandard()], "*": [BytePlane(), AesGcm("k", KEYS)]},
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_everything_a_state_dict_holds_comes_back_equal(url, chain):
    state, loaded = all_sorts(3), blank(all_sorts(3))
    save(state, url, extensions=chain)
    load(loaded, url, keys=KEYS, registry=registry())
    assert equal(state, loaded)


def test_it_comes_back_equal_from_a_real_server_in_many_parts_and_ranges(root, s3):
    state = all_sorts(5) | {"large": torch.randn(4_000_000), "slow": torch.randn(1500, 1100).t()}
    loaded = blank(state)
    chains = {"large": [ZStandard(), AesGcm("k", KEYS)], "dtypes.*": [], "*": [BytePlane(), ZStandard()]}
    save(state, root, extensions=chains, part_size=5 << 20, frame_size=1 << 16, max_inflight_nbytes=16 << 20, **s3)
    load(loaded, root, keys=KEYS, max_request_size=1 << 20, **s3)
    assert equal(state, loaded)
    ckpt = cloudckpt.open(root, keys=KEYS, **s3)
    np.testing.assert_array_equal(ckpt["large"][2_000_000:2_000_010], state["large"][2_000_000:2_000_010].numpy())
    np.testing.assert_array_equal(ckpt["slow"][100:200, 7], state["slow"][100:200, 7].numpy())


def test_items_lie_in_the_shard_of_their_chain(url):
    state = {"optim": {"m": torch.randn(100), "v": torch.randn(100)}, "model": torch.randn(100), "step": 7}
    save(state, url, extensions={"optim.*": [ZStandard()], "model": [BytePlane()]})
    found = manifest_at(url)
    chains = {}
    for key, entry in found.entries.items():
        at = entry.chunks[0] if hasattr(entry, "chunks") else entry
        chains[key] = found.shards[at.shard].extensions
    assert chains == {
        "optim.m": ("stream.zstd/1",),
        "optim.v": ("stream.zstd/1",),
        "model": ("stream.byteplane/1",),
        "step": (),
    }
    assert len(found.shards) == 3
    assert [s.key.rpartition(".")[2] for s in found.shards].count("frames") == 2


def test_the_summary_tells_plain_and_stored_sizes(url):
    state = {"a": torch.zeros(1000, 1000), "b": torch.ones(10)}
    save(state, url, extensions={"a": [ZStandard()]})
    summary = manifest_at(url).summary
    assert summary.nbytes == 4_000_040
    assert summary.stored_nbytes == sum(s.size for s in manifest_at(url).shards) < 10_000


@pytest.mark.parametrize("is_cached", [False, True], ids=["plan cache off", "plan cache on"])
def test_each_save_has_shards_and_keys_of_its_own(is_cached):
    class Planner(DefaultSavePlanner):  # DCP keys its cache by class name
        pass

    Planner.__name__ = token_hex(4)
    name, found = token_hex(6), []
    for step in range(3):
        save(
            {"a": torch.full((4,), float(step))},
            f"memory://{name}/{step}",
            Planner(enable_plan_caching=is_cached),
            extensions=ALL,
        )
        found += manifest_at(f"memory://{name}/{step}").shards
    for one, other in pairwise(found):
        assert one.key != other.key
        assert one.extension_params[2]["wrapped_key"] != other.extension_params[2]["wrapped_key"]
    for step in range(3):
        state = {"a": torch.zeros(4)}
        load(state, f"memory://{name}/{step}", keys=KEYS)
        assert state["a"].tolist() == [step] * 4


def test_loading_casts_and_fills_strided_destinations(url):
    source = torch.randn(60, 50)
    save({"t": source}, url, extensions=ALL, frame_size=4096)
    around = torch.zeros(60, 100, dtype=torch.bfloat16)
    load({"t": around[:, ::2]}, url, keys=KEYS)
    assert torch.equal(around[:, ::2], source.bfloat16())
    assert not around[:, 1::2].any()


def test_frames_alone_are_in_a_shard(tmp_path):
    save({"a": torch.zeros(100_000)}, f"file://{tmp_path}", extensions=[ZStandard()])
    (path,) = Path(tmp_path).glob("shards/*/*.frames")
    assert path.read_bytes()[:4] == b"\x28\xb5\x2f\xfd"


def test_what_cannot_be_restored_is_told_before_anything_is_fetched(url):
    save({"a": torch.ones(100)}, url, extensions=[Rot13(), AesGcm("k", KEYS)])
    with fails_with(UnknownExtensionError, "stream.rot13@cloudckpt"):
        load({"a": torch.zeros(100)}, url, keys=KEYS)
    with fails_with(EncryptionKeyError, "'k'"):
        load({"a": torch.zeros(100)}, url, registry=registry())
    with fails_with(EncryptionKeyError, "'k'"):
        load({"a": torch.zeros(100)}, url, registry=registry(), keys={"k": bytes(32)})


def test_what_is_plain_is_loaded_without_keys(url):
    save({"a": torch.ones(100), "b": torch.ones(5)}, url, extensions={"a": [AesGcm("k", KEYS)]})
    state = {"b": torch.zeros(5)}
    load(state, url)
    assert state["b"].tolist() == [1] * 5


def test_what_is_no_extension_is_refused_when_the_writer_is_made():
    with pytest.raises(UsageError, match="extensions="):
        ObjectStoreWriter("memory://x", extensions=["zstd"])


def test_writers_and_readers_with_extensions_pickle(url):
    writer = pickle.loads(pickle.dumps(ObjectStoreWriter(url, extensions=ALL)))
    reader = pickle.loads(pickle.dumps(ObjectStoreReader(url, keys=KEYS)))
    assert [type(e) for e in writer._options.extensions] == [BytePlane, ZStandard, AesGcm]
    assert reader._options.keys == KEYS


def test_no_repr_shows_a_key():
    shown = repr(WriteOptions(extensions=ALL))
    assert "AesGcm(key_id='k')" in shown
    assert "\\x01" not in shown
