"""Sweeping: what never committed goes, what is committed or young or not ours stays, whatever fails on the way."""

import asyncio
import json
import math
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from awscrt.checksums import crc32c

from cloudckpt.catalog import rebuild, sweep, verify
from cloudckpt.catalog.sweep import Sweeping
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine import commit, loop
from cloudckpt.errors import CommitConflictError, NotImplementedByStoreError, StoreUnavailableError, UsageError
from cloudckpt.extensions import ZStandard
from cloudckpt.layout import shard_key
from cloudckpt.manifest import parse, parse_summary
from cloudckpt.safetensors_header import HeaderItem
from cloudckpt.safetensors_header import encode as encode_header
from cloudckpt.store.memory import MemoryStore, _Object
from cloudckpt.store.protocols import IfAbsent, IfMatch
from cloudckpt.store.url import open_store
from cloudckpt.testing import FailingStore, RecordingStore, WrappedStore
from cloudckpt.tombstone import swept_keys

LOST = StoreUnavailableError("no answer")
AGES_AGO = timedelta(days=3)
STATE = {"w": torch.arange(60.0).reshape(20, 3), "x": [1, 2]}
FOREIGN = [
    "step-1/notes.txt", "step-9/shards/readme", "shards/00/" + "a" * 32 + ".safetensors", "data/manifest.json",
    "step-9/shards/zz/" + "a" * 32 + ".safetensors", "shards.bin", "step-9/shards/00/abc.frames", "my-manifest.json",
    "other/shards/00/" + "0" * 32 + ".frames",
]  # fmt: skip


def key(token=None, ext="frames"):
    return shard_key(token or token_hex(16), ext)


def save(name, prefix, **options):
    writer = ObjectStoreWriter(f"memory://{name}/{prefix}", **options)
    dcp.save(STATE, storage_writer=writer)


def age(name, by=AGES_AGO, prefix=""):
    """Makes all that lies there as old as if the server had seen it so long ago."""
    bucket = MemoryStore(name)._bucket
    for k, found in list(bucket.objects.items()):
        if k.startswith(prefix):
            bucket.objects[k] = _Object(found.data, found.etag, found.modified - by)
    for i, (upload, parts) in list(bucket.uploads.items()):
        if upload.key.startswith(prefix):
            bucket.uploads[i] = type(upload)(key=upload.key, upload_id=i, started=upload.started - by), parts


async def put(store, k, data=b"leftover"):
    await store.put(k, [memoryview(data)])


async def keys(store, prefix=""):
    return [found.key async for found in store.list_objects(prefix)]


async def uploads(store):
    return [found.key async for found in store.list_uploads()]


async def swept(store, *, grace_s=3600.0, is_dry_run=False, include_whole=False, names=()):
    sweeping = Sweeping(store, grace_s=grace_s, is_dry_run=is_dry_run, include_whole=include_whole, names=names)
    return await sweeping.run()


@pytest.fixture
def name():
    return token_hex(6)


@pytest.fixture
def store(name):
    return MemoryStore(name)


async def leave(store, prefix="step-3/", ext="frames"):
    """Two shards and an upload of an attempt that died."""
    for _ in range(2):
        await put(store, prefix + key(ext=ext))
    await store.create_upload(prefix + key(ext=ext))


async def test_what_never_committed_is_removed_behind_a_tombstone_that_names_it(name, store):
    await leave(store)
    left = [k.removeprefix("step-3/") for k in [*await keys(store), *await uploads(store)]]
    age(name)
    result = await swept(store)
    assert await keys(store) == ["step-3/manifest.json"]
    assert await uploads(store) == []
    (removed,) = result.removed
    assert (removed.prefix, removed.why, removed.nbytes) == ("step-3", "never committed", 16)
    assert (len(removed.keys), len(removed.uploads), result.kept) == (2, 1, ())
    tombstone = (await store.get("step-3/manifest.json")).data
    assert parse_summary(tombstone, "there").is_tombstone
    assert swept_keys(tombstone, "there") == set(left)


async def test_a_dry_run_tells_the_same_and_writes_nothing(name, store):
    await leave(store)
    age(name)
    recording = RecordingStore(store)
    told = await swept(recording, is_dry_run=True)
    assert {method for method, _ in recording.requests} == {"list_objects", "list_uploads"}
    assert told.removed == (await swept(store)).removed
    assert told.is_dry_run


async def test_what_is_younger_than_the_grace_stays_and_the_newest_sign_of_life_counts(name, store):
    await leave(store)
    age(name)
    before = await keys(store)
    await store.create_upload("step-3/" + key())
    result = await swept(store)
    assert result.removed == ()
    assert "younger than the grace" in result.kept[0].why
    assert await keys(store) == before
    assert len(await uploads(store)) == 2
    age(name, timedelta(hours=2))
    assert len((await swept(store)).removed) == 1


async def test_an_upload_whose_beginning_is_not_known_is_alive(name, store):
    class Untold(WrappedStore):
        async def list_uploads(self, prefix=""):
            async for upload in super().list_uploads(prefix):
                yield type(upload)(key=upload.key, upload_id=upload.upload_id)

    await leave(store)
    age(name)
    assert (await swept(Untold(store), grace_s=0)).removed == ()


async def test_a_tombstone_whose_reply_was_lost_is_found_and_the_sweep_goes_on(name, store):
    class Deaf(WrappedStore):
        async def after(self, method, key):
            if (method, key) == ("put", "step-3/manifest.json"):
                raise LOST

    await leave(store)
    age(name)
    assert len((await swept(Deaf(store))).removed) == 1
    assert await keys(store) == ["step-3/manifest.json"]


class Clock(WrappedStore):
    """A server whose clock is ahead of, or behind, this machine's."""

    def __init__(self, store, ahead):
        super().__init__(store)
        self._ahead = ahead

    async def list_objects(self, prefix=""):
        async for found in super().list_objects(prefix):
            yield type(found)(key=found.key, size=found.size, etag=found.etag, modified=found.modified + self._ahead)


@pytest.mark.parametrize("hours", [-48, 48])
async def test_age_is_by_the_servers_clock(name, store, hours):
    await put(store, "step-3/" + key())
    clock = Clock(store, timedelta(hours=hours))
    assert (await swept(clock)).removed == ()
    age(name, timedelta(hours=2))
    assert len((await swept(clock)).removed) == 1


async def test_nothing_is_touched_that_is_not_surely_ours(name, store):
    for k in FOREIGN:
        await put(store, k, b"{}")
    await store.create_upload("step-9/shards/readme")
    await leave(store)
    age(name)
    result = await swept(store, grace_s=0)
    assert [removed.prefix for removed in result.removed] == ["step-3"]
    assert set(await keys(store)) == {*FOREIGN, "step-3/manifest.json"}
    assert await uploads(store) == ["step-9/shards/readme"]
    assert result.kept == ()


async def test_a_committed_checkpoint_keeps_what_it_names_and_loses_what_it_does_not(name, store):
    await asyncio.to_thread(save, name, "step-3")
    await asyncio.to_thread(save, name, "step-4")
    mine = await keys(store)
    await leave(store, "step-3/")
    age(name)
    result = await swept(store)
    assert await keys(store) == mine
    assert await uploads(store) == []
    (removed,) = result.removed
    assert (removed.prefix, removed.why) == ("step-3", "not named by the checkpoint that is there")
    for step in ("step-3", "step-4"):
        assert (await asyncio.to_thread(verify, f"memory://{name}/{step}", deep=True)).is_sound


async def test_leftovers_of_an_overwrite_under_way_stay(name, store):
    await asyncio.to_thread(save, name, "step-3")
    age(name)
    await leave(store)
    before = await keys(store)
    assert (await swept(store)).removed == ()
    assert await keys(store) == before


async def test_an_upload_begun_twice_is_aborted_and_its_shard_stays(name, store):
    await asyncio.to_thread(save, name, "step-3")
    (shard,) = await keys(store, "step-3/shards/")
    await store.create_upload(shard)
    age(name)
    await swept(store)
    assert await uploads(store) == []
    assert (await asyncio.to_thread(verify, f"memory://{name}/step-3")).is_sound


async def test_an_overwrite_that_commits_meanwhile_keeps_its_shards(name, store):
    """Everything looks old, and the other save's manifest comes after the listing."""
    await asyncio.to_thread(save, name, "step-3")
    other = token_hex(6)
    await asyncio.to_thread(save, other, "step-3")
    theirs = {found: (await MemoryStore(other).get(found)).data for found in await keys(MemoryStore(other))}
    for k, data in theirs.items():
        if "shards" in k:
            await put(store, k, data)
    age(name)

    class Overwriting(WrappedStore):
        async def after(self, method, key):
            if method == "get_range" and key == "step-3/manifest.json":
                await put(self._store, key, theirs[key])

    await swept(Overwriting(store))
    assert (await asyncio.to_thread(verify, f"memory://{name}/step-3", deep=True)).is_sound


async def test_a_whole_attempt_is_kept_for_rebuild_unless_asked(name, store):
    await asyncio.to_thread(save, name, "step-3")
    await store.delete(["step-3/manifest.json"])
    age(name)
    result = await swept(store)
    assert result.removed == ()
    assert (result.kept[0].is_rescuable, result.kept[0].prefix) == (True, "step-3")
    assert len((await swept(store, include_whole=True)).removed) == 1


async def test_a_whole_attempt_is_kept_beside_one_that_is_not(name, store):
    """The other tried again with a larger state dict, and died when one of its shards was up."""
    for state in (STATE, {**STATE, "more": torch.zeros(40)}):
        url = f"memory://{name}/step-3"
        await asyncio.to_thread(dcp.save, state, storage_writer=ObjectStoreWriter(url))
        (shard,) = parse((await store.get("step-3/manifest.json")).data, url).shards
        await store.delete(["step-3/manifest.json"])
    half = await store.get(f"step-3/{shard.key}")
    header = half.data.replace(b'"more":{"dtype":"F32","shape":[40]', b'"more@0":{"dtype":"F32","shape":[40]')
    note = b'\\"items\\":{'
    header = header.replace(note, note + b'\\"more@0\\":{\\"shape\\":[80]},')
    grown = len(header) - len(half.data)
    header = (int.from_bytes(header[:8], "little") + grown).to_bytes(8, "little") + header[8:]
    await put(store, f"step-3/{shard.key}", header)
    age(name)
    (kept,) = (await swept(store)).kept
    assert kept.is_rescuable
    first = next(k for k in kept.keys if not k.endswith(shard.key))
    await store.delete([first])
    assert len((await swept(store)).removed) == 1


async def test_a_whole_attempt_is_kept_beside_half_of_one_that_was_cut_otherwise(name, store):
    """The other had two ranks and a larger state dict; what its second rank wrote names nothing alike."""
    await asyncio.to_thread(save, name, "step-3")
    await store.delete(["step-3/manifest.json"])
    token = "7" * 32
    items = [("w@10,0", (10, 3)), ("more@8", (8,))]
    notes = {"w@10,0": {"shape": [20, 3]}, "more@8": {"shape": [16]}}
    said = json.dumps({"version": 1, "rank": 1, "attempt": token, "items": notes})
    header = encode_header(
        [HeaderItem(name=n, dtype="F32", shape=s, nbytes=4 * math.prod(s)) for n, s in items],
        {"format": "pt", "cloudckpt": said},
    )
    await put(store, "step-3/" + key(token, "safetensors"), header + bytes(4 * 38))
    age(name)
    (kept,) = (await swept(store)).kept
    assert kept.is_rescuable
    await store.delete([next(k for k in kept.keys if token not in k)])
    assert len((await swept(store)).removed) == 1


async def test_what_a_newer_release_wrote_is_kept_unless_asked(name, store):
    await asyncio.to_thread(save, name, "step-3")
    await store.delete(["step-3/manifest.json"])
    (shard,) = await keys(store)
    data = (await store.get(shard)).data
    await put(store, shard, data.replace(b'\\"version\\":1', b'\\"version\\":2'))
    age(name)
    (kept,) = (await swept(store)).kept
    assert kept.is_rescuable
    assert "another release" in kept.why
    assert len((await swept(store, include_whole=True)).removed) == 1


async def test_an_attempt_that_lacks_a_shard_or_cannot_be_rebuilt_is_not_kept(name, store):
    await asyncio.to_thread(save, name, "step-3", extensions=(ZStandard(),))
    await store.delete(["step-3/manifest.json"])
    await put(store, "step-4/" + key(ext="safetensors"), b"what is no file of safetensors")
    age(name)
    assert len((await swept(store)).removed) == 2


async def test_what_an_interrupted_sweep_left_beside_its_tombstone_is_removed_at_any_age(name, store):
    class Stopping(WrappedStore):
        async def before(self, method, key):
            if method == "delete" and key.startswith("step-3/"):
                raise LOST

    await leave(store)
    age(name)
    with pytest.raises(StoreUnavailableError):
        await swept(Stopping(store))
    assert len(await keys(store, "step-3/")) == 3
    again = await swept(store)
    assert again.removed[0].why == "condemned before, and not removed to the end"
    assert await keys(store) == ["step-3/manifest.json"]


async def test_what_came_after_a_tombstone_is_swept_when_it_is_old_and_named_first(name, store):
    await leave(store)
    age(name)
    await swept(store)
    later = "step-3/" + key()
    await put(store, later)
    assert (await swept(store)).removed == ()
    assert await keys(store, "step-3/shards") == [later]
    age(name)
    recording = RecordingStore(store)
    (removed,) = (await swept(recording)).removed
    assert removed.keys == (later,)
    assert later.removeprefix("step-3/") in swept_keys((await store.get("step-3/manifest.json")).data, "there")
    order = [
        request for request in recording.requests if request in {("put", "step-3/manifest.json"), ("delete", later)}
    ]
    assert [method for method, _ in order] == ["put", "delete"]


async def test_a_tombstone_with_nothing_beside_it_goes_when_it_is_old(name, store):
    await leave(store)
    age(name)
    await swept(store)
    assert (await swept(store)).removed == ()
    age(name)
    (removed,) = (await swept(store)).removed
    assert removed.keys == ("step-3/manifest.json",)
    assert await keys(store) == []


async def test_a_whole_attempt_beside_a_tombstone_is_kept_and_can_be_rebuilt(name, store):
    await leave(store)
    await asyncio.to_thread(save, name, "step-3", overwrite=True)
    (later,) = parse((await store.get("step-3/manifest.json")).data, "there").shards
    data = (await store.get(f"step-3/{later.key}")).data
    await store.delete(["step-3/manifest.json", f"step-3/{later.key}"])
    age(name)
    await swept(store)
    await put(store, f"step-3/{later.key}", data)
    age(name)
    (kept,) = (await swept(store)).kept
    assert (kept.is_rescuable, kept.keys) == (True, (f"step-3/{later.key}",))
    await asyncio.to_thread(rebuild, f"memory://{name}/step-3")
    assert (await asyncio.to_thread(verify, f"memory://{name}/step-3", deep=True)).is_sound


async def test_a_tombstone_that_took_the_place_of_an_old_one_while_it_was_looked_at_stays(name, store):
    await leave(store)
    age(name)
    await swept(store)
    age(name)

    class Racing(WrappedStore):
        """Another sweep finds another attempt, and ends, after this one has listed."""

        async def before(self, method, key):
            if (method, key) == ("get", "step-3/manifest.json"):
                await leave(self._store)
                await swept(self._store, grace_s=0)

    assert (await swept(Racing(store))).removed == ()
    assert await keys(store) == ["step-3/manifest.json"]


async def test_an_upload_that_is_completed_between_the_listings_is_seen(name, store):
    await leave(store)
    age(name)
    upload = await store.create_upload("step-3/" + key())
    part = await store.put_part(upload, 1, 0, [memoryview(b"new")], crc32c=crc32c(b"new"))

    class Completing(WrappedStore):
        listings = 0

        async def before(self, method, key):
            self.listings += method in {"list_objects", "list_uploads"}
            if self.listings == 2 and upload.key in await uploads(self._store):
                await self._store.complete_upload(upload, [part], crc32c=crc32c(b"new"))

    before = await keys(store)
    result = await swept(Completing(store))
    assert result.removed == ()
    assert "younger than the grace" in result.kept[0].why
    assert await keys(store) == sorted([*before, upload.key])


async def test_a_tombstone_stays_where_deletes_are_not_conditional(name, store):
    class Careless(WrappedStore):
        async def delete_if(self, key, condition):
            await self._store.delete([key])

    await leave(store)
    age(name)
    await swept(store)
    age(name)
    assert (await swept(Careless(store))).removed == ()
    assert await keys(store) == ["step-3/manifest.json"]


@pytest.mark.parametrize("data", [b"", b"<html>", b'{"summary":{"format":"cloudckpt","version":99}}'])
async def test_nothing_is_touched_beside_a_manifest_that_cannot_be_read(name, store, data):
    await leave(store)
    await put(store, "step-3/manifest.json", data)
    await put(store, "alone/manifest.json", data)
    age(name)
    before = await keys(store)
    result = await swept(store)
    assert result.removed == ()
    (kept,) = result.kept
    assert "cannot be read" in kept.why
    assert await keys(store) == before


async def test_a_manifest_damaged_behind_its_summary_counts_as_one_that_cannot_be_read(name, store):
    await asyncio.to_thread(save, name, "step-3")
    await leave(store)
    data = (await store.get("step-3/manifest.json")).data
    await put(store, "step-3/manifest.json", data[:-9] + b"x" + data[-8:])
    age(name)
    before = await keys(store)
    assert "cannot be read" in (await swept(store)).kept[0].why
    assert await keys(store) == before


async def test_a_save_that_commits_while_its_place_is_judged_stands(name, store):
    other = token_hex(6)
    await asyncio.to_thread(save, other, "step-3")
    manifest = (await MemoryStore(other).get("step-3/manifest.json")).data
    for k in await keys(MemoryStore(other), "step-3/shards"):
        await put(store, k, (await MemoryStore(other).get(k)).data)
    age(name)

    class Committing(WrappedStore):
        async def before(self, method, key):
            if method == "put" and key == "step-3/manifest.json":
                await self._store.put(key, [memoryview(manifest)], condition=IfAbsent())

    result = await swept(Committing(store), include_whole=True)
    assert (result.removed, len(result.kept)) == ((), 1)
    assert (await asyncio.to_thread(verify, f"memory://{name}/step-3", deep=True)).is_sound


async def test_a_save_whose_shards_were_condemned_loses_its_commit(name, store):
    await asyncio.to_thread(save, name, "step-3")
    manifest = (await store.get("step-3/manifest.json")).data
    await store.delete(["step-3/manifest.json"])
    age(name)
    await swept(store, include_whole=True)
    mine = MemoryStore(name, "step-3/")
    made = parse(manifest, "there")
    with pytest.raises(CommitConflictError):
        await commit.commit(
            mine, manifest, made.summary.save_id, replaces=None, deadline_s=1, shard_keys=[s.key for s in made.shards]
        )


async def test_a_new_save_to_a_swept_place_commits(name, store):
    await leave(store)
    age(name)
    await swept(store)
    await asyncio.to_thread(save, name, "step-3")
    assert (await asyncio.to_thread(verify, f"memory://{name}/step-3")).is_sound


class Unconditional(WrappedStore):
    """A store that ignores conditions."""

    async def put(self, key, body, *, condition=None, crc32c=None):
        return await super().put(key, body, crc32c=crc32c)

    async def delete_if(self, key, condition):
        await self._store.delete([key])


async def test_a_store_that_ignores_conditions_is_swept_only_where_it_is_told_by_name(name, store):
    await leave(store, "step-3/")
    await leave(store, "step-4/")
    age(name)
    before = await keys(store)
    result = await swept(Unconditional(store))
    assert result.removed == ()
    assert all("does not honour conditional writes" in kept.why for kept in result.kept)
    assert await keys(store) == before
    (removed,) = (await swept(Unconditional(store), names=["step-3"])).removed
    assert removed.prefix == "step-3"
    assert len(await keys(store, "step-4/")) == 2


class Unknowing(WrappedStore):
    """A store that refuses conditions it does not know."""

    def __init__(self, store, *unknown):
        super().__init__(store)
        self._unknown = unknown

    async def put(self, key, body, *, condition=None, crc32c=None):
        if isinstance(condition, self._unknown):
            raise NotImplementedByStoreError("501")
        return await super().put(key, body, condition=condition, crc32c=crc32c)


async def test_a_store_that_refuses_conditions_is_swept_only_where_it_is_told_by_name(name, store):
    await leave(store)
    age(name)
    unknowing = Unknowing(store, IfAbsent, IfMatch)
    assert "does not honour conditional writes" in (await swept(unknowing)).kept[0].why
    assert len((await swept(unknowing, names=["step-3"])).removed) == 1
    assert await keys(store) == ["step-3/manifest.json"]


class Replacing(WrappedStore):
    """A store that ignores ``If-Match``, on which a save replaces the tombstone before a sweep does."""

    def __init__(self, store, manifest):
        super().__init__(store)
        self._manifest = manifest

    async def put(self, key, body, *, condition=None, crc32c=None):
        if isinstance(condition, IfMatch):
            if key == "step-3/manifest.json":
                await self._store.put(key, [memoryview(self._manifest)])
            condition = None
        return await super().put(key, body, condition=condition, crc32c=crc32c)


async def test_no_tombstone_is_replaced_on_a_store_that_knows_if_none_match_alone(name, store):
    other = token_hex(6)
    await asyncio.to_thread(save, other, "step-3")
    manifest = (await MemoryStore(other).get("step-3/manifest.json")).data
    await leave(store)
    age(name)
    await swept(store)
    await leave(store)
    age(name)
    before = await keys(store)
    result = await swept(Replacing(store, manifest))
    assert result.removed == ()
    assert "does not honour conditional writes" in result.kept[0].why
    assert await keys(store) == before


@pytest.mark.parametrize("place", ["..", "../step-3", "a/../../step-3", "a//b", "./step-3"])
def test_a_name_that_is_no_place_below_the_root_is_misuse(name, place):
    with pytest.raises(UsageError, match="no place below the root"):
        sweep(f"memory://{name}/run", names=[place])


async def test_only_the_named_places_are_swept(name, store):
    for prefix in ("step-3/", "step-33/", "step-3/deeper/", ""):
        await leave(store, prefix)
    age(name)
    assert [removed.prefix for removed in (await swept(store, names=["step-3"])).removed] == ["step-3"]
    assert [removed.prefix for removed in (await swept(store, names=[""])).removed] == [""]
    assert [removed.prefix for removed in (await swept(store)).removed] == ["step-3/deeper", "step-33"]


async def test_a_checkpoints_own_url_is_a_root_too(name):
    own = MemoryStore(name, "run/step-3/")
    await leave(own, "")
    age(name)
    (removed,) = (await swept(own)).removed
    assert removed.prefix == ""
    assert await keys(own) == ["manifest.json"]


async def _scene(name):
    """A checkpoint with leftovers, leftovers alone, a tombstone with a leftover, an old tombstone, strangers."""
    store = MemoryStore(name)
    await asyncio.to_thread(save, name, "step-1")
    await leave(store, "step-1/")
    await leave(store, "step-2/")
    await leave(store, "step-5/")
    age(name)
    await swept(store, names=["step-2", "step-5"])
    await put(store, "step-2/" + key())
    await leave(store, "step-3/")
    await asyncio.to_thread(save, name, "step-4")
    await store.delete(["step-4/manifest.json"])
    for k in FOREIGN:
        await put(store, k, b"{}")
    age(name)
    await leave(store, "step-6/")
    return store


def kept_by_all(name):
    """What every sweep of the scene must leave."""
    objects = MemoryStore(name)._bucket.objects
    named = {k for k in objects if k.startswith(("step-4/", "step-6/"))} | set(FOREIGN)
    manifest = parse(objects["step-1/manifest.json"].data, "there")
    return named | {"step-1/manifest.json"} | {f"step-1/{shard.key}" for shard in manifest.shards}


@pytest.mark.parametrize("is_reply_lost", [False, True], ids=["request lost", "reply lost"])
async def test_a_sweep_that_fails_at_any_request_loses_nothing_and_can_be_run_again(name, is_reply_lost):
    counting = RecordingStore(await _scene(token_hex(6)))
    await swept(counting)
    assert len(counting.requests) > 25
    for k in range(len(counting.requests)):
        mine = f"{name}-{k}"
        store = await _scene(mine)
        stay = kept_by_all(mine)
        try:
            await swept(FailingStore(store, k, LOST, is_reply_lost=is_reply_lost))
        except* StoreUnavailableError:
            pass
        assert stay <= set(await keys(store)), k
        await swept(store)
        clock = {k for k in await keys(store) if k.startswith("shards/") and k not in FOREIGN}
        left = set(await keys(store)) - clock - stay
        assert {k.partition("/")[0] for k in left} <= {"step-2", "step-3", "step-5"}, k
        assert all(k.endswith("/manifest.json") for k in left), k
        assert {k.partition("/")[0] for k in await uploads(store)} == {"step-6"}
        assert (await asyncio.to_thread(verify, f"memory://{mine}/step-1", deep=True)).is_sound
        for found in clock:  # what an interruption left of the question of what time it is: a leftover like others
            age(mine, prefix=found)
        await swept(store)
        assert {k for k in await keys(store) if k.startswith("shards/")} <= set(FOREIGN)


async def test_a_sweep_that_is_cancelled_at_any_request_loses_nothing_and_can_be_run_again(name):
    class Cancelling(RecordingStore):
        def __init__(self, store, at):
            super().__init__(store)
            self.at = at
            self.task = None

        async def before(self, method, key):
            await super().before(method, key)
            if len(self.requests) == self.at + 1:
                self.task.cancel()
                await asyncio.sleep(0)

    counting = RecordingStore(await _scene(token_hex(6)))
    await swept(counting)
    for k in range(len(counting.requests)):
        mine = f"{name}-{k}"
        store = Cancelling(await _scene(mine), k)
        store.task = asyncio.ensure_future(swept(store))
        with pytest.raises(asyncio.CancelledError):
            await store.task
        left = set(await keys(MemoryStore(mine)))
        assert kept_by_all(mine) <= left
        assert {k for k in left if k.startswith("shards/")} <= set(FOREIGN)
        await swept(MemoryStore(mine))
        assert all(k.endswith("/manifest.json") for k in set(await keys(MemoryStore(mine))) - kept_by_all(mine)), k


async def test_two_sweeps_at_once_are_harmless(name):
    class Taking(WrappedStore):
        """Lets the other sweep have its turn with each request."""

        async def before(self, method, key):
            await asyncio.sleep(0)

    store = await _scene(name)
    stay = kept_by_all(name)
    await asyncio.gather(*(swept(Taking(store)) for _ in range(2)))
    left = set(await keys(store))
    assert stay <= left
    assert all(k.endswith("/manifest.json") for k in left - stay)


def test_the_door_is_dry_by_default_and_refuses_a_grace_of_less_than_nothing(name):
    url = f"memory://{name}/run"
    loop.run(lambda: leave(MemoryStore(name, "run/")))
    told = sweep(url, grace_s=0)
    assert (told.root, told.is_dry_run, len(told.removed)) == (url, True, 1)
    assert sweep(url, grace_s=0).removed == told.removed
    assert sweep(url).removed == ()
    with pytest.raises(UsageError):
        sweep(url, grace_s=-1)


def test_it_works_on_a_server(s3, store_options, root):
    run_sweep(root, store_options, s3)


def test_it_works_on_files(tmp_path):
    run_sweep(f"file://{tmp_path}/run", None, {})


def run_sweep(root, options, s3):
    def on(action):
        async def run():
            async with open_store(root, options) as opened:
                return await action(opened)

        return loop.run(run)

    dcp.save(STATE, storage_writer=ObjectStoreWriter(f"{root}/step-1", **s3))
    dcp.save(STATE, storage_writer=ObjectStoreWriter(f"{root}/step-2", **s3))
    on(lambda opened: opened.delete(["step-2/manifest.json"]))
    on(lambda opened: leave(opened, "step-1/"))
    on(lambda opened: leave(opened, "step-3/"))
    on(lambda opened: put(opened, "step-3/stranger", b"stays"))
    young = sweep(root, grace_s=3600, dry_run=False, store=options)
    assert young.removed == ()
    assert len(young.kept) == 3
    done = sweep(root, grace_s=0, dry_run=False, store=options)
    assert {removed.prefix: len(removed.keys) for removed in done.removed} == {"step-1": 2, "step-3": 2}
    assert [(kept.prefix, kept.is_rescuable) for kept in done.kept] == [("step-2", True)]
    assert on(uploads) == []
    assert [k for k in on(keys) if k.startswith("step-3")] == ["step-3/manifest.json", "step-3/stranger"]
    assert verify(f"{root}/step-1", deep=True, store=options).is_sound
    dcp.save(STATE, storage_writer=ObjectStoreWriter(f"{root}/step-3", **s3))
    loaded = {"w": torch.zeros(20, 3), "x": None}
    dcp.load(loaded, storage_reader=ObjectStoreReader(f"{root}/step-3", **s3))
    assert torch.equal(loaded["w"], STATE["w"])


ODD = ["a b", "a+b&c=d", "100%25", "step-3%2F", "größe/ü", "<a>'\"", "~!*()"]


def test_places_of_odd_names_are_swept_on_a_server(store_options, root):
    async def act():
        async with open_store(root, store_options) as opened:
            for place in ODD:
                await leave(opened, f"{place}/")
            sweeping = Sweeping(opened, grace_s=-1, is_dry_run=False, include_whole=False, names=())
            result = await sweeping.run()
            return {removed.prefix for removed in result.removed}, await keys(opened), await uploads(opened)

    assert loop.run(act) == (set(ODD), sorted(f"{place}/manifest.json" for place in ODD), [])


def test_a_bucket_itself_is_a_root(client, store_options, s3):
    bucket = f"b-{token_hex(6)}"
    client.create_bucket(Bucket=bucket)
    run_sweep(f"s3://{bucket}", store_options, s3)


COMMAND = str(Path(sys.executable).parent / "cloudckpt")


def typed(*args):
    return subprocess.run([COMMAND, *args], capture_output=True, text=True, check=False)


def test_the_command_shows_a_plan_and_needs_a_yes(tmp_path):
    root = f"file://{tmp_path}/run"
    for place in ("step-1", "step-2"):
        dcp.save(STATE, storage_writer=ObjectStoreWriter(f"{root}/{place}"))
        (tmp_path / f"run/{place}/manifest.json").unlink()
    (shard,) = tmp_path.glob("run/step-1/shards/*/*")
    shard.write_bytes(b"broken")
    plan = typed("sweep", root, "--grace", "0s")
    assert plan.returncode == 0
    assert "would remove step-1: 1 objects (6 B), 0 uploads: never committed" in plan.stdout
    assert "would keep step-2" in plan.stdout
    assert "--yes" in plan.stderr
    assert shard.exists()
    assert "removed" not in typed("sweep", root, "--yes").stdout  # the grace is a day
    done = typed("sweep", root, "--grace", "0", "--yes", "--json")
    told = json.loads(done.stdout)
    assert [removed["prefix"] for removed in told["removed"]] == ["step-1"]
    assert (told["is_dry_run"], told["kept"][0]["is_rescuable"]) == (False, True)
    assert not shard.exists()
    named = typed("sweep", root, "--grace", "0", "--include-whole", "--name", "step-3", "--yes")
    assert (named.returncode, named.stdout) == (0, "")
    assert "removed step-2" in typed("sweep", root, "--grace", "0", "--include-whole", "--yes").stdout


@pytest.mark.parametrize("grace", ["tomorrow", "-3", "5 weeks", ""])
def test_a_grace_that_is_no_time_is_misuse(grace, tmp_path):
    assert typed("sweep", f"file://{tmp_path}", "--grace", grace).returncode == 2
