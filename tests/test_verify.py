"""Verifying: what is whole is called so, and no damage goes unseen."""

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
from awscrt.checksums import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from safetensors.torch import save_file

from cloudckpt.catalog import verify
from cloudckpt.catalog.placing import placing_of
from cloudckpt.catalog.streaming import Stream, read_streams
from cloudckpt.catalog.verify import _verify_in
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.engine.read import ReadOptions
from cloudckpt.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    EncryptionKeyError,
    IntegrityError,
    ManifestError,
    NotCommittedError,
    StoreUnavailableError,
    UsageError,
)
from cloudckpt.extensions import AesGcm, BytePlane, ZStandard
from cloudckpt.layout import shard_key
from cloudckpt.manifest import FORMAT, BytesEntry, Manifest, Shard, Summary, encode, overlap_problems, pack, parse
from cloudckpt.ranges import Range
from cloudckpt.store.memory import MemoryStore
from cloudckpt.store.url import open_store
from cloudckpt.testing import FailingStore, RecordingStore, WrappedStore

KEY = {"k": bytes(range(32))}


def save(url, state=None, **options):
    torch.manual_seed(7)
    state = state or {
        "w": torch.randn(300, 50),
        "nested": {"list": [1, "two"], "half": torch.randn(77).bfloat16()},
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
    }
    dcp.save(state, storage_writer=ObjectStoreWriter(url, frame_size=4096, **options))
    return url


def fresh(**options):
    return save(f"memory://{token_hex(6)}/step-1", **options)


def on(url, action):
    async def run():
        async with open_store(url) as store:
            return await action(store)

    return loop.run(run)


def get(url, key):
    return on(url, lambda store: store.get(key)).data


def put(url, key, data):
    on(url, lambda store: store.put(key, [memoryview(bytes(data))]))


def delete(url, key):
    on(url, lambda store: store.delete([key]))


def manifest_of(url):
    return parse(get(url, "manifest.json"), url)


def shard_of(url):
    (shard,) = manifest_of(url).shards
    return shard


def change_manifest(url, **changes):
    put(url, "manifest.json", encode(replace(manifest_of(url), **changes)))


CHAINS = [(), (ZStandard(),), (BytePlane(), ZStandard()), (ZStandard(), AesGcm("k", KEY))]


@pytest.mark.parametrize("chain", CHAINS, ids=["plain", "zstd", "byteplane", "aesgcm"])
def test_what_was_saved_is_sound(chain):
    url = fresh(extensions=chain)
    quick, deep = verify(url), verify(url, deep=True)
    assert (quick.problems, quick.is_sound, quick.is_deep) == ((), True, False)
    assert (deep.problems, deep.is_sound, deep.is_deep) == ((), True, True)
    shard = shard_of(url)
    assert (deep.shard_count, deep.nbytes) == (1, shard.size)


@pytest.mark.parametrize("chain", CHAINS[:2], ids=["plain", "zstd"])
@settings(max_examples=150, deadline=None)
@given(at=st.integers(0), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(damaged, chain, at, bit):
    url, data = damaged(chain)
    data = bytearray(data)
    data[at % len(data)] ^= 1 << bit
    put(url, shard_of(url).key, data)
    assert verify(url).is_sound
    found = verify(url, deep=True)
    assert not found.is_sound
    assert shard_of(url).key in found.problems[0]


@pytest.fixture(scope="module")
def damaged():
    made = {}

    def make(chain):
        if chain not in made:
            url = fresh(extensions=chain)
            made[chain] = url, get(url, shard_of(url).key)
        return made[chain]

    return make


@pytest.mark.parametrize("chain", CHAINS[:2], ids=["plain", "zstd"])
def test_every_byte_of_a_small_shard_counts(chain):
    url = save(f"memory://{token_hex(6)}/s", {"a": torch.arange(20), "b": [1]}, extensions=chain)
    shard = shard_of(url)
    whole = get(url, shard.key)
    for i in range(len(whole)):
        put(url, shard.key, whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :])
        assert not verify(url, deep=True).is_sound, i
    put(url, shard.key, whole)
    assert verify(url, deep=True).is_sound


@pytest.mark.parametrize("chain", CHAINS[:3], ids=["plain", "zstd", "byteplane"])
def test_damage_is_told_with_the_entry_the_frame_and_the_bytes(chain):
    url = fresh(extensions=chain)
    shard, entry = shard_of(url), manifest_of(url).entries["w"]
    (chunk,) = entry.chunks
    data = bytearray(get(url, shard.key))
    data[chunk.start + 3] ^= 1
    data[chunk.stop - 1] ^= 1
    put(url, shard.key, data)
    first, last, whole = verify(url, deep=True).problems
    assert first.startswith(f"'w' is damaged in bytes {chunk.start} to ")
    assert "frame 0 of 'w'" in first
    assert f"to {chunk.stop} of {shard.key} (frame 14 of 'w')" in last
    assert whole.startswith(f"{shard.key} does not match its checksum")


def test_a_run_of_damaged_frames_is_told_once():
    url = fresh()
    shard, (chunk,) = shard_of(url), manifest_of(url).entries["w"].chunks
    data = bytearray(get(url, shard.key))
    data[chunk.start : chunk.stop] = bytes(chunk.stop - chunk.start)
    put(url, shard.key, data)
    damage, _ = verify(url, deep=True).problems
    assert f"'w' is damaged in bytes {chunk.start} to {chunk.stop}" in damage
    assert "frames 0 to 14" in damage


def test_a_header_that_says_something_else_is_told_beside_the_checksum():
    url = fresh()
    shard = shard_of(url)
    data = get(url, shard.key)
    put(url, shard.key, data.replace(b'"nested.half"', b'"nested.calf"', 1))
    problems = verify(url, deep=True).problems
    assert f"{shard.key}: its header lacks 'nested.half'" in problems
    assert f"{shard.key}: its header has 'nested.calf', which the manifest does not know" in problems
    assert len(problems) == 3


@pytest.mark.parametrize("deep", [False, True], ids=["quick", "deep"])
def test_a_missing_shard_is_found(deep):
    url = fresh()
    delete(url, shard_of(url).key)
    found = verify(url, deep=deep)
    assert found.problems == (f"{shard_of(url).key} is missing, of {shard_of(url).size} bytes",)
    assert found.nbytes == 0


@pytest.mark.parametrize("deep", [False, True], ids=["quick", "deep"])
@pytest.mark.parametrize("by", [-5000, -1, 1, 9000])
def test_a_shard_of_another_size_is_found(deep, by):
    url = fresh()
    shard = shard_of(url)
    data = get(url, shard.key)
    put(url, shard.key, data[:by] if by < 0 else data + bytes(by))
    assert f"{shard.key} has {shard.size + by} bytes, not {shard.size}" in verify(url, deep=deep).problems


def test_an_emptied_shard_is_found():
    url = fresh()
    put(url, shard_of(url).key, b"")
    assert len(verify(url, deep=True).problems) == 2


def test_a_shard_in_the_place_of_another_of_its_size_is_found():
    url, other = (save(f"memory://{token_hex(6)}/s", {"w": torch.full((64, 64), v)}) for v in (1.0, 2.0))
    assert shard_of(url).size == shard_of(other).size
    put(url, shard_of(url).key, get(other, shard_of(other).key))
    assert verify(url).is_sound
    assert not verify(url, deep=True).is_sound


def test_all_problems_are_told():
    url = fresh()
    other = fresh(extensions=(ZStandard(),))
    both = manifest_of(url).shards + manifest_of(other).shards
    change_manifest(url, shards=both)
    shard = shard_of(other)
    put(url, both[0].key, bytes(both[0].size))
    problems = verify(url, deep=True).problems
    assert f"{shard.key} is missing, of {shard.size} bytes" in problems
    assert sum("is damaged" in p for p in problems) == 4  # scalar, w, half and the list: all that have bytes
    assert any("no safetensors file" in p for p in problems)


def test_what_the_manifest_claims_of_an_entry_is_checked():
    url = fresh()
    entries = dict(manifest_of(url).entries)
    (chunk,) = entries["w"].chunks
    entries["w"] = replace(entries["w"], chunks=(replace(chunk, sizes=(299, 50)),))
    entries["none"] = replace(entries["none"], dtype="F999")
    change_manifest(url, entries=entries)
    problems = verify(url).problems
    assert any(p.startswith("entry 'w': ") for p in problems)
    assert any(p.startswith("entry 'none': unknown dtype") for p in problems)


def test_chunks_that_leave_a_hole_are_found():
    url = fresh()
    entries = dict(manifest_of(url).entries)
    entries["w"] = replace(entries["w"], shape=(301, 50))
    change_manifest(url, entries=entries)
    assert any(p.startswith("entry 'w': ") for p in verify(url).problems)


def test_items_that_share_some_of_their_bytes_are_found():
    url = fresh()
    entries = dict(manifest_of(url).entries)
    (half,), (w,) = entries["nested.half"].chunks, entries["w"].chunks
    at = w.start + 8
    entries["nested.half"] = replace(
        entries["nested.half"], chunks=(replace(half, start=at, stop=at + half.stop - half.start),)
    )
    change_manifest(url, entries=entries)
    assert any("overlaps" in p for p in verify(url).problems)


PLACES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 12), st.integers(0, 5), st.integers(0, 3)), max_size=5)


@settings(max_examples=500, deadline=None)
@given(PLACES)
def test_overlaps_are_told_as_the_manifest_tells_them(places):
    """The catalog asks a faster question first."""
    shards = tuple(
        Shard(
            key=shard_key(f"{i:032x}", "safetensors"),
            size=20,
            crc32c=0,
            frame_size=2,
            frame_checksums=pack([0] * 9),
        )
        for i in range(2)
    )
    entries = {
        f"{i}": BytesEntry(nbytes, shard, start, start + nbytes, frame)
        for i, (shard, start, nbytes, frame) in enumerate(places)
    }
    summary = Summary(format=FORMAT, version=1, save_id="a", created=datetime.now(UTC), writer="b")
    manifest = Manifest(summary=summary, metadata={}, planner_paths=None, shards=shards, entries=entries)
    assert placing_of(manifest).problems == overlap_problems(manifest)


def test_two_entries_in_the_very_same_bytes_are_sound():
    url = fresh()
    entries = dict(manifest_of(url).entries)
    change_manifest(url, entries={**entries, "tied": entries["w"]})
    assert verify(url, deep=True).is_sound


def test_frames_that_are_not_the_bytes_of_their_item_are_found():
    url = fresh(extensions=(ZStandard(),))
    entries = dict(manifest_of(url).entries)
    (chunk,) = entries["w"].chunks
    entries["w"] = replace(entries["w"], chunks=(replace(chunk, start=chunk.start + 1),))
    change_manifest(url, entries=entries)
    assert any("the frames of 'w' are not its bytes" in p for p in verify(url).problems)


def test_nothing_there_what_never_committed_and_a_damaged_manifest_are_the_usual_errors():
    root = f"memory://{token_hex(6)}"
    with pytest.raises(CheckpointNotFoundError):
        verify(f"{root}/none")
    url = fresh()
    manifest = get(url, "manifest.json")
    put(url, "manifest.json", manifest.replace(b'"w"', b'"v"', 1))
    with pytest.raises(ManifestError):
        verify(url)
    delete(url, "manifest.json")
    with pytest.raises(NotCommittedError):
        verify(url)


def test_a_checkpoint_of_others_carries_no_checksums(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    for url in (f"file://{tmp_path}", f"file://{tmp_path}/model.safetensors"):
        with pytest.raises(UsageError, match="no checksums of ours"):
            verify(url)
    dcp.save({"a": torch.ones(3)}, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(UsageError, match="checkpoint of dcp"):
        verify(f"file://{tmp_path}/dcp")


def test_a_sealed_manifest_is_proven_authentic_with_keys():
    url = fresh(extensions=(AesGcm("k", KEY),))
    assert verify(url, deep=True).is_sound
    assert verify(url, deep=True, options=ReadOptions(keys=KEY, require_seal=True)).is_sound
    with pytest.raises(EncryptionKeyError):
        verify(url, options=ReadOptions(keys={"k": bytes(32)}))
    with pytest.raises(IntegrityError, match="require_seal"):
        verify(fresh(), options=ReadOptions(keys=KEY, require_seal=True))


class Replacing(WrappedStore):
    """Removes the checkpoint, or saves another in its place, while its shards are listed."""

    def __init__(self, store, manifest):
        super().__init__(store)
        self._manifest = manifest

    async def before(self, method, key):
        if method == "list_objects":
            await self._store.delete([found.key async for found in self._store.list_objects()])
            if self._manifest is not None:
                await self._store.put("manifest.json", [memoryview(self._manifest)])


async def looked_at(store, deep):
    manifest = parse((await store.get("manifest.json")).data, "there")
    return await _verify_in(store, manifest, deep=deep, options=ReadOptions())


@pytest.mark.parametrize("deep", [False, True], ids=["quick", "deep"])
async def test_what_is_removed_or_replaced_meanwhile_is_not_called_damaged(deep):
    name = token_hex(6)
    await asyncio.to_thread(save, f"memory://{name}/s")
    await asyncio.to_thread(save, f"memory://{name}/other")
    other = (await MemoryStore(name, "other/").get("manifest.json")).data
    store = MemoryStore(name, "s/")
    with pytest.raises(CheckpointChangedError, match="replaced by another save"):
        await looked_at(Replacing(store, other), deep)
    await asyncio.to_thread(save, f"memory://{name}/s2")
    with pytest.raises(CheckpointNotFoundError, match="removed while it was verified"):
        await looked_at(Replacing(MemoryStore(name, "s2/"), None), deep)


async def test_an_outage_is_no_damage():
    name = token_hex(6)
    await asyncio.to_thread(save, f"memory://{name}/s")
    counting = RecordingStore(MemoryStore(name, "s/"))
    assert (await looked_at(counting, True))[1] == []
    for k in range(1, len(counting.requests)):
        failing = FailingStore(MemoryStore(name, "s/"), k, StoreUnavailableError("no answer"))
        with pytest.raises((StoreUnavailableError, ExceptionGroup)):
            await looked_at(failing, True)


async def test_a_shard_that_vanishes_while_it_is_read_is_told():
    name = token_hex(6)
    await asyncio.to_thread(save, f"memory://{name}/s")

    class Vanishing(WrappedStore):
        async def before(self, method, key):
            if method == "get_range":
                await self._store.delete([key])

    _, problems = await looked_at(Vanishing(MemoryStore(name, "s/")), True)
    assert "cannot be read" in problems[0]


async def test_large_objects_are_read_in_bounded_requests_within_the_budget():
    class Watching(WrappedStore):
        held = most = 0

        async def get_range(self, key, at, into):
            Watching.held += len(at)
            Watching.most = max(Watching.most, Watching.held)
            assert len(at) <= 16 << 20
            await super().get_range(key, at, into)
            Watching.held -= len(at)

    store = MemoryStore(token_hex(6))
    data = bytes(range(256)) * (40 << 12)
    await store.put("a", [memoryview(data)])
    cuts = [0, 5, 1 << 20, (16 << 20) + 3, 30 << 20]
    stream = Stream("a", len(data), cuts)
    await read_streams(Watching(store), [stream], ReadOptions(max_inflight_nbytes=32 << 20, concurrency=2))
    assert Watching.most <= 32 << 20
    for start, stop in [(0, len(data)), (5, 1 << 20), (1 << 20, 30 << 20), (30 << 20, len(data))]:
        assert stream.crc32c(Range(start, stop)) == crc32c(data[start:stop])


def test_it_works_on_a_server(server, s3, store_options, root, client):
    save(root, **s3)
    assert verify(root, deep=True, store=store_options).is_sound
    bucket, prefix = root.removeprefix("s3://").split("/")
    (found,) = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/shards/")["Contents"]
    data = bytearray(client.get_object(Bucket=bucket, Key=found["Key"])["Body"].read())
    data[-1] ^= 1
    client.put_object(Bucket=bucket, Key=found["Key"], Body=bytes(data))
    assert verify(root, store=store_options).is_sound
    assert not verify(root, deep=True, store=store_options).is_sound
    client.put_object(Bucket=bucket, Key=found["Key"], Body=bytes(data[:-1]))
    assert not verify(root, store=store_options).is_sound
    client.delete_object(Bucket=bucket, Key=found["Key"])
    assert "is missing" in verify(root, store=store_options).problems[0]


def test_it_works_on_files(tmp_path):
    url = save(f"file://{tmp_path}/s")
    assert verify(url, deep=True).is_sound
    (path,) = tmp_path.glob("s/shards/*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert not verify(url, deep=True).is_sound


COMMAND = str(Path(sys.executable).parent / "cloudckpt")


def typed(*args):
    return subprocess.run([COMMAND, *args], capture_output=True, text=True, check=False)


def test_the_command_tells_what_is_sound_and_what_is_not(tmp_path):
    url = save(f"file://{tmp_path}/s")
    sound = typed("verify", url, "--deep")
    assert (sound.returncode, sound.stderr) == (0, "")
    assert f"{url}: sound (1 shards" in sound.stdout
    (path,) = tmp_path.glob("s/shards/*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damaged = typed("verify", url, "--deep")
    assert damaged.returncode == 1
    assert "is damaged in bytes" in damaged.stdout
    assert "2 problem(s)" in damaged.stderr
    as_json = typed("verify", url, "--deep", "--json")
    assert as_json.returncode == 1
    told = json.loads(as_json.stdout)
    assert (told["is_sound"], told["is_deep"], len(told["problems"])) == (False, True, 2)
    nothing = typed("verify", f"file://{tmp_path}/none")
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "there is no checkpoint" in nothing.stderr
    assert typed("verify", "nonsense").returncode == 2


@pytest.mark.parametrize("name", ["verify", "sweep", "prune", "rebuild"])
def test_the_commands_help_imports_neither_torch_nor_a_client(name):
    script = (
        f"import sys\nimport cloudckpt.cli.main as m\ntry:\n    m.cli([{name!r}, '--help'])\n"
        "except SystemExit:\n    pass\nassert not {'torch', 'numpy', 'aiobotocore', 'botocore'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_verifying_imports_no_torch(tmp_path):
    url = save(f"file://{tmp_path}/s")
    script = (
        f"import sys\nfrom cloudckpt.catalog import *\nassert verify({url!r}, deep=True).is_sound\n"
        f"sweep({url!r})\nprune({url!r}, KeepLast(1))\nassert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
