"""Rebuilding: a checkpoint that lost its manifest loads as it was saved; what is not surely whole is refused."""

import asyncio
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cloudckpt.catalog import rebuild, sweep, verify
from cloudckpt.catalog.rebuild import rebuild_in
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.engine.framing import Item, plan_shards
from cloudckpt.engine.sources import BytesSource
from cloudckpt.engine.write import ShardWriter, WriteOptions
from cloudckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitConflictError,
    IntegrityError,
    ManifestError,
    NotCommittedError,
    ObjectNotFoundError,
    StoreUnavailableError,
    UnsupportedVersionError,
    UsageError,
)
from cloudckpt.extensions import ZStandard
from cloudckpt.layout import item_name, shard_key
from cloudckpt.manifest import parse
from cloudckpt.safetensors_header import HeaderItem
from cloudckpt.store.memory import MemoryStore
from cloudckpt.store.protocols import IfAbsent
from cloudckpt.store.url import open_store
from cloudckpt.testing import FailingStore, RecordingStore, WrappedStore
from cloudckpt.tombstone import encode_tombstone

LOST = StoreUnavailableError("no answer")


def make_state():
    torch.manual_seed(3)
    return {
        "model": {"w": torch.randn(70, 30), "b@d": torch.randn(5).bfloat16(), "100%": torch.arange(3)},
        "optim": {"state": [{"step": torch.tensor(4.0)}, {"step": torch.tensor(5.0)}], "lr": 0.1},
        "complex": torch.randn(6, dtype=torch.complex128),
        "e8m0": torch.arange(7, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "text": "ü" * 40,
        "__metadata__": torch.ones(2),
        "step": 7,
    }


def save(url, state=None, **options):
    dcp.save(state or make_state(), storage_writer=ObjectStoreWriter(url, frame_size=4096, **options))


def zeroed(value):
    match value:
        case torch.Tensor():
            return torch.zeros_like(value)
        case dict():
            return {key: zeroed(inner) for key, inner in value.items()}
        case list():
            return [zeroed(inner) for inner in value]
        case _:
            return None


def assert_equal(a, b):
    match a:
        case torch.Tensor():
            assert a.dtype == b.dtype
            assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))
        case dict():
            assert a.keys() == b.keys()
            for key in a:
                assert_equal(a[key], b[key])
        case list():
            for x, y in zip(a, b, strict=True):
                assert_equal(x, y)
        case _:
            assert a == b


def on(url, action, options=None):
    async def run():
        async with open_store(url, options) as store:
            return await action(store)

    return loop.run(run)


def lose_manifest(url, options=None):
    """Deletes the manifest and returns what it said."""
    data = on(url, lambda store: store.get("manifest.json"), options).data
    on(url, lambda store: store.delete(["manifest.json"]), options)
    return parse(data, url)


def put(url, key, data):
    on(url, lambda store: store.put(key, [memoryview(bytes(data))]))


def get(url, key):
    return on(url, lambda store: store.get(key)).data


def list_keys(url):
    async def run(store):
        return [found.key async for found in store.list_objects()]

    return on(url, run)


@pytest.fixture
def url():
    return f"memory://{token_hex(6)}/step-1"


def check_rebuilt(url, s3, options):
    state = make_state()
    save(url, state, **s3)
    before = lose_manifest(url, options)
    result = rebuild(url, store=options)
    assert (result.entry_count, len(result.shards), result.is_dry_run) == (len(before.entries), 1, False)
    assert result.nbytes == before.summary.nbytes
    assert result.save_id
    assert verify(url, deep=True, store=options).is_sound
    loaded = zeroed(state)
    dcp.load(loaded, storage_reader=ObjectStoreReader(url, **s3))
    assert_equal(loaded, state)
    return before


def test_what_is_rebuilt_loads_as_it_was_saved(url):
    before = check_rebuilt(url, {}, None)
    after = parse(get(url, "manifest.json"), url)
    assert after.planner_paths == before.planner_paths
    assert after.entries.keys() == before.entries.keys()
    assert [(s.key, s.size, s.crc32c) for s in after.shards] == [(s.key, s.size, s.crc32c) for s in before.shards]
    assert after.summary.writer.endswith("rebuilt")


def test_it_works_on_a_server(s3, store_options, root):
    check_rebuilt(root, s3, store_options)


def test_it_works_on_files(tmp_path):
    check_rebuilt(f"file://{tmp_path}/s", {}, None)


def test_what_only_the_manifest_held_is_said(url):
    save(url, metadata={"run": 1}, step=9)
    lose_manifest(url)
    assert {"the user's metadata", "the step"} <= set(rebuild(url).lost)


def test_a_dry_run_reads_headers_and_writes_nothing(url):
    save(url, {"w": torch.randn(400, 400)})
    lose_manifest(url)
    store = RecordingStore(MemoryStore(url.split("/")[2], "step-1/"))
    before = list_keys(url)
    told = loop.run(lambda: rebuild_in(store, shards=None, is_dry_run=True))
    assert (told.is_dry_run, told.entry_count, told.save_id) == (True, 1, "")
    assert {method for method, _ in store.requests} == {"get", "list_objects", "get_range"}
    assert sum(method == "get_range" for method, _ in store.requests) == 1
    assert list_keys(url) == before


def test_a_flattened_state_dict_that_is_nested_comes_back_nested(url):
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    save(url, {"a": {"b": [torch.ones(2), torch.zeros(3)]}, "c": 4})
    lose_manifest(url)
    rebuild(url)
    loaded = _load_state_dict_from_keys(storage_reader=ObjectStoreReader(url))
    assert torch.equal(loaded["a"]["b"][0], torch.ones(2))
    assert loaded["c"] == 4


TWO_RANKS = """
import sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from cloudckpt.dcp import ObjectStoreWriter
warnings.simplefilter("ignore")
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
state = {
    "rows": distribute_tensor(torch.arange(35.0).reshape(7, 5), mesh, [Shard(0)]),
    "nested": {"columns": distribute_tensor(torch.arange(60).reshape(6, 10), mesh, [Shard(1)])},
    "complex": distribute_tensor(torch.arange(8).to(torch.complex128), mesh, [Shard(0)]),
    "step": 12,
}
dcp.save(state, storage_writer=ObjectStoreWriter(sys.argv[1]))
dist.destroy_process_group()
"""


def test_what_two_ranks_saved_is_put_together(tmp_path):
    script, url = tmp_path / "two.py", f"file://{tmp_path}/s"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), url]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    lose_manifest(url)
    result = rebuild(url)
    assert [shard.rank for shard in result.shards] == [0, 1]
    assert verify(url, deep=True).is_sound
    loaded = {
        "rows": torch.zeros(7, 5),
        "nested": {"columns": torch.zeros(6, 10, dtype=torch.int64)},
        "complex": torch.zeros(8, dtype=torch.complex128),
        "step": None,
    }
    dcp.load(loaded, storage_reader=ObjectStoreReader(url))
    assert torch.equal(loaded["rows"], torch.arange(35.0).reshape(7, 5))
    assert torch.equal(loaded["nested"]["columns"], torch.arange(60).reshape(6, 10))
    assert torch.equal(loaded["complex"], torch.arange(8).to(torch.complex128))
    assert loaded["step"] == 12


# Shards as one rank of several would leave them.


def rows(first, last, of=4, value=1.0, key="w"):
    """An item: some rows of a tensor of ``of`` rows."""
    data = torch.full((last - first, 2), float(value)).numpy().tobytes()
    is_whole = (first, last) == (0, of)
    name = item_name(key, None if is_whole else (first, 0))
    header = HeaderItem(name=name, dtype="F32", shape=(last - first, 2), nbytes=len(data))
    return Item(header=header, notes={} if is_whole else {"shape": [of, 2]}), BytesSource(data)


def leave(url, rank, *made):
    """Uploads a shard of that rank and returns its key."""
    items, sources = [item for item, _ in made], [source for _, source in made]
    plans = plan_shards(
        items,
        rank=rank,
        frame_size=64,
        new_token=lambda: token_hex(16),
        key_of=lambda token: shard_key(token, "safetensors"),
    )
    on(url, lambda store: ShardWriter(store, WriteOptions()).write(plans, items, sources))
    (plan,) = plans
    return plan.key


def load_w(url):
    loaded = {"w": torch.zeros(4, 2)}
    dcp.load(loaded, storage_reader=ObjectStoreReader(url))
    return loaded["w"][:, 0].tolist()


def test_shards_of_two_saves_are_never_mixed(url):
    old = [leave(url, 0, rows(0, 2, value=1)), leave(url, 1, rows(2, 4, value=1))]
    new = [leave(url, 0, rows(0, 2, value=2)), leave(url, 1, rows(2, 4, value=2))]
    with pytest.raises(UsageError, match="shards of more than one save") as e:
        rebuild(url)
    assert all(key in str(e.value) for key in old + new)
    assert "rank 1" in str(e.value)
    assert "manifest.json" not in list_keys(url)
    rebuild(url, shards=new)
    assert load_w(url) == [2, 2, 2, 2]


def test_one_ranks_second_shard_is_enough_to_be_ambiguous(url):
    keys = [leave(url, 0, rows(0, 2, value=1)), leave(url, 1, rows(2, 4)), leave(url, 0, rows(0, 2, value=3))]
    with pytest.raises(UsageError, match="more than one save"):
        rebuild(url)
    with pytest.raises(UsageError, match="more than one save"):
        rebuild(url, shards=keys)
    rebuild(url, shards=keys[1:])
    assert load_w(url) == [3, 3, 1, 1]


def test_bytes_that_are_there_twice_are_ambiguous(url):
    for text in ("old", "new"):
        save(url, {"text": text}, overwrite=True)
        shard = lose_manifest(url).shards[0].key
        put(url, shard_key(token := token_hex(16), "safetensors"), _renamed(get(url, shard), shard, token))
        on(url, lambda store, shard=shard: store.delete([shard]))
    with pytest.raises(UsageError, match="'text' is there more than once"):
        rebuild(url)


def _renamed(data, key, token):
    """A shard's bytes as they would be under another token."""
    return data.replace(key[-44:-12].encode(), token.encode())


@pytest.mark.parametrize(
    "others",
    [[(0, 0, 4)], [(0, 0, 3), (1, 3, 4)], [(0, 1, 3)]],
    ids=["one rank's whole", "cut elsewhere", "across the cut"],
)
def test_saves_of_other_numbers_of_ranks_are_not_mixed_either(url, others):
    leave(url, 0, rows(0, 2))
    leave(url, 1, rows(2, 4))
    for rank, first, last in others:
        leave(url, rank, rows(first, last))
    with pytest.raises(UsageError, match="more than one save"):
        rebuild(url)


def test_one_key_of_two_shapes_is_ambiguous(url):
    leave(url, 0, rows(0, 2, of=4))
    leave(url, 1, rows(2, 4, of=5))
    with pytest.raises(UsageError, match="in several ways"):
        rebuild(url)


def test_several_shards_of_one_rank_without_a_common_item_are_one_save(url):
    leave(url, 0, rows(0, 4, value=5))
    leave(url, 0, rows(0, 4, key="v"))
    assert rebuild(url).entry_count == 2
    assert load_w(url) == [5] * 4


def test_what_is_not_whole_is_refused_with_what_is_there(url):
    key = leave(url, 0, rows(0, 2))
    with pytest.raises(NotCommittedError, match="no whole checkpoint") as e:
        rebuild(url)
    assert key in str(e.value)
    assert "'w'" in str(e.value)
    assert "manifest.json" not in list_keys(url)


def test_what_is_there_already_is_refused(url):
    save(url)
    with pytest.raises(CheckpointExistsError):
        rebuild(url)
    put(url, "manifest.json", b"<html>")
    with pytest.raises(ManifestError) as e:
        rebuild(url)
    assert "damaged and not lost" in e.value.__notes__[0]
    assert get(url, "manifest.json") == b"<html>"


def test_nothing_there_and_what_was_swept_are_refused(url):
    with pytest.raises(CheckpointNotFoundError, match="no shards of one"):
        rebuild(url)
    save(url)
    lose_manifest(url)
    sweep(url, grace_s=0, dry_run=False, include_whole=True)
    with pytest.raises(NotCommittedError, match="was swept"):
        rebuild(url)


def test_what_was_swept_is_not_used_beside_what_came_later(url):
    save(url)
    condemned = lose_manifest(url).shards[0].key
    data = get(url, condemned)
    sweep(url, grace_s=0, dry_run=False, include_whole=True)
    put(url, condemned, data)  # a sweep that has not deleted it yet
    with pytest.raises(NotCommittedError, match="was swept"):
        rebuild(url)
    save(url)
    later = lose_manifest(url).shards[0].key
    sweep_again = encode_tombstone([condemned], created=datetime.now(UTC), writer="a sweep")
    put(url, "manifest.json", sweep_again)
    with pytest.raises(UsageError, match="to take"):
        rebuild(url, shards=[condemned])
    assert [shard.key for shard in rebuild(url).shards] == [later]
    assert verify(url, deep=True).is_sound


async def test_a_shard_that_goes_after_it_was_read_keeps_the_manifest_from_being_put(url):
    await asyncio.to_thread(save, url)
    key = (await asyncio.to_thread(lose_manifest, url)).shards[0].key

    class Losing(RecordingStore):
        async def before(self, method, key_):
            await super().before(method, key_)
            if self.requests.count(("list_objects", "shards/")) == 2:
                await self._store.delete([key])

    store = MemoryStore(
        url.removeprefix("memory://").partition("/")[0], url.removeprefix("memory://").partition("/")[2] + "/"
    )
    with pytest.raises(IntegrityError, match="is gone"):
        await rebuild_in(Losing(store), shards=None, is_dry_run=False)
    with pytest.raises(ObjectNotFoundError):
        await store.get("manifest.json")


def test_shards_with_extensions_are_refused_and_the_plain_ones_beside_them_are_not(url):
    save(url, extensions={"optim*": [ZStandard()]})
    manifest = lose_manifest(url)
    with pytest.raises(UsageError, match="shards with extensions"):
        rebuild(url)
    plain = [shard.key for shard in manifest.shards if not shard.extensions]
    rebuild(url, shards=plain)
    assert verify(url, deep=True).is_sound


@pytest.mark.parametrize("shards", [[], ["shards/00/" + "0" * 32 + ".safetensors"]], ids=["none", "unknown"])
def test_shards_that_are_not_there_are_misuse(url, shards):
    save(url)
    lose_manifest(url)
    with pytest.raises(UsageError):
        rebuild(url, shards=shards)


HEADERS = {
    "no notes": lambda h: h.replace(b'"cloudckpt"', b'"cloudckqt"'),
    "another version": lambda h: h.replace(b'\\"version\\":1', b'\\"version\\":7'),
    "another shard's": lambda h: h.replace(b'\\"attempt\\":\\"', b'\\"attempt\\":\\"x'),
    "a note on nothing": lambda h: h.replace(b'\\"complex\\":', b'\\"komplex\\":'),
    "an unknown kind": lambda h: h.replace(b'\\"kind\\":\\"bytes\\"', b'\\"kind\\":\\"bites\\"'),
    "an unknown dtype": lambda h: h.replace(b"complex128", b"complex129"),
    "a name no key has": lambda h: h.replace(b'"scalar"', b'"scal@x"'),
    "a hole": lambda h: h.replace(b'"data_offsets":[0,', b'"data_offsets":[8,'),
    "no json": lambda h: h.replace(b"{", b"[", 1),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_header_that_cannot_be_believed_is_refused(url, change):
    save(url)
    (shard,) = lose_manifest(url).shards
    data = get(url, shard.key)
    nbytes = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + nbytes]
    changed = change(header)
    assert changed != header
    put(url, shard.key, len(changed).to_bytes(8, "little") + changed + data[8 + nbytes :])
    with pytest.raises(ManifestError) as e:
        rebuild(url)
    assert isinstance(e.value, UnsupportedVersionError) == (changed.count(b"7") > header.count(b"7"))
    assert "manifest.json" not in list_keys(url)


@pytest.mark.parametrize("is_reply_lost", [False, True], ids=["request lost", "reply lost"])
def test_a_rebuild_that_fails_at_any_request_commits_or_does_not(is_reply_lost):
    name = token_hex(6)
    save(f"memory://{name}/s")
    lose_manifest(f"memory://{name}/s")
    counting = RecordingStore(MemoryStore(name, "s/"))
    loop.run(lambda: rebuild_in(counting, shards=None, is_dry_run=False))
    assert len(counting.requests) > 4
    for k in range(len(counting.requests)):
        url = f"memory://{name}/{k}"
        save(url)
        lose_manifest(url)
        failing = FailingStore(MemoryStore(name, f"{k}/"), k, LOST, is_reply_lost=is_reply_lost)
        try:
            loop.run(lambda failing=failing: rebuild_in(failing, shards=None, is_dry_run=False))
        except StoreUnavailableError:
            assert "manifest.json" not in list_keys(url)
            rebuild(url)
        assert verify(url, deep=True).is_sound


async def test_a_save_that_commits_meanwhile_stands():
    name = token_hex(6)
    await asyncio.to_thread(save, f"memory://{name}/s")
    theirs = (await MemoryStore(name, "s/").get("manifest.json")).data
    await MemoryStore(name, "s/").delete(["manifest.json"])

    class Committing(WrappedStore):
        async def before(self, method, key):
            if method == "put":
                await self._store.put(key, [memoryview(theirs)], condition=IfAbsent())

    with pytest.raises(CommitConflictError):
        await rebuild_in(Committing(MemoryStore(name, "s/")), shards=None, is_dry_run=False)
    assert (await MemoryStore(name, "s/").get("manifest.json")).data == theirs


def test_a_shard_that_vanishes_while_it_is_read_is_told(url):
    save(url)
    lose_manifest(url)

    class Vanishing(WrappedStore):
        seen = 0

        async def before(self, method, key):
            Vanishing.seen += method == "get_range"
            if method == "get_range" and Vanishing.seen == 2:
                await self._store.delete([key])

    store = Vanishing(MemoryStore(url.split("/")[2], "step-1/"))
    with pytest.raises(ObjectNotFoundError):
        loop.run(lambda: rebuild_in(store, shards=None, is_dry_run=False))


COMMAND = str(Path(sys.executable).parent / "cloudckpt")


def typed(*args):
    return subprocess.run([COMMAND, *args], capture_output=True, text=True, check=False)


def test_the_command_shows_a_plan_and_needs_a_yes(tmp_path):
    url = f"file://{tmp_path}/s"
    save(url, {"w": torch.ones(3), "x": 1})
    (shard,) = lose_manifest(url).shards
    plan = typed("rebuild", url)
    assert plan.returncode == 0
    assert shard.key in plan.stdout
    assert "would make a checkpoint of 2 entries" in plan.stdout
    assert "--yes" in plan.stderr
    assert not (tmp_path / "s/manifest.json").exists()
    done = typed("rebuild", url, "--shard", shard.key, "--yes", "--json")
    told = json.loads(done.stdout)
    assert (told["entry_count"], told["shards"][0]["rank"], told["is_dry_run"]) == (2, 0, False)
    assert verify(url, deep=True).is_sound
    again = typed("rebuild", url, "--yes")
    assert (again.returncode, again.stdout) == (1, "")
    assert "nothing to rebuild" in again.stderr
    assert typed("rebuild", url, "--shard").returncode == 2
