"""Pruning: what the policy keeps is whole, what it does not is gone, whatever fails on the way."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.catalog import (
    KeepEvery,
    KeepLast,
    Known,
    committed_steps,
    listed_steps,
    newest_step,
    pin,
    prune,
    rewrap,
    unpin,
    verify,
)
from cloudckpt.catalog.pins import pin_in
from cloudckpt.catalog.prune import prune_in
from cloudckpt.catalog.sweep import Sweeping
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.engine import commit, loop
from cloudckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CommitConflictError,
    NotImplementedByStoreError,
    StoreUnavailableError,
    UsageError,
)
from cloudckpt.extensions import AesGcm
from cloudckpt.layout import shard_key
from cloudckpt.manifest import FORMAT, VERSION, Manifest, Summary, encode, parse, parse_summary
from cloudckpt.store.memory import MemoryStore, _Object
from cloudckpt.store.protocols import IfMatch
from cloudckpt.testing import FailingStore, RecordingStore, WrappedStore
from cloudckpt.tombstone import encode_tombstone, swept_keys

LOST = StoreUnavailableError("no answer")


def save(root, *steps, **options):
    for step in steps:
        state = {"w": torch.full((40,), float(step)), "x": [step]}
        dcp.save(state, storage_writer=ObjectStoreWriter(f"{root}/step-{step}", step=step, **options))


async def saved(*steps):
    name = token_hex(6)
    await asyncio.to_thread(save, f"memory://{name}", *steps)
    return MemoryStore(name)


async def keys(store, prefix=""):
    return [found.key async for found in store.list_objects(prefix)]


async def places(store):
    return {key.partition("/")[0] for key in await keys(store)}


async def pruned(store, policy, *, is_dry_run=False, grace_s=0, known=None):
    return await prune_in(store, policy, is_dry_run=is_dry_run, grace_s=grace_s, known=known)


def age(store, **by):
    """Makes all that lies there older by the server's clock."""
    objects = MemoryStore(store.url.removeprefix("memory://"))._bucket.objects
    for key, found in objects.items():
        objects[key] = _Object(found.data, found.etag, found.modified - timedelta(**by))


async def is_sound(store, step):
    return (await asyncio.to_thread(verify, f"{store.url}/step-{step}", deep=True)).is_sound


async def test_the_newest_are_kept_and_the_others_go_with_all_their_shards():
    store = await saved(1, 2, 10, 9)
    result = await pruned(store, KeepLast(2))
    assert (result.kept, [removed.step for removed in result.removed]) == ((10, 9), [2, 1])
    assert result.passed_over == {}
    assert await places(store) == {"step-9", "step-10"}
    assert await is_sound(store, 9)
    assert await is_sound(store, 10)


async def test_every_nth_step_is_kept_and_the_newest_whatever_the_policy_says():
    store = await saved(10, 15, 20, 25)
    assert (await pruned(store, KeepEvery(steps=10))).kept == (25, 20, 10)

    class Nothing:
        def keep(self, steps):
            assert [found.step for found in steps] == [25, 20, 10]
            assert all(found.summary.step == found.step for found in steps)
            return []

    assert (await pruned(store, Nothing())).kept == (25,)
    assert await places(store) == {"step-25"}


async def test_a_dry_run_tells_the_same_and_writes_nothing():
    store = await saved(1, 2, 3)
    recording = RecordingStore(store)
    told = await pruned(recording, KeepLast(1), is_dry_run=True)
    assert {method for method, _ in recording.requests} == {"list_names", "head", "get_range"}
    assert told.removed == (await pruned(store, KeepLast(1))).removed
    assert (told.is_dry_run, told.removed[0].nbytes > 0) == (True, True)


async def test_a_tombstone_goes_first_and_the_requests_are_those_promised():
    store = await saved(1, 2)
    (shard,) = await keys(store, "step-1/shards")
    recording = RecordingStore(store)
    await pruned(recording, KeepLast(1))
    at, asked = "step-1/manifest.json", recording.requests[5:-5]
    assert [method for method, _ in recording.requests[:5]].count("get_range") == 2
    assert len(asked) == 6
    assert all(not key.startswith("step-") for _, key in asked)
    assert recording.requests[-5:] == [
        ("get", at), ("list_objects", "pins/step-1"), ("put", at), ("delete", shard), ("delete_if", at),
    ]  # fmt: skip


async def test_a_step_is_absent_from_its_tombstone_on_which_names_exactly_its_shards():
    class Stopping(WrappedStore):
        async def before(self, method, key):
            if method == "delete" and key.startswith("step-1/"):
                raise LOST

    store = await saved(1, 2)
    shards = await keys(store, "step-1/shards")
    await store.put(f"step-1/{shard_key('7' * 32, 'frames')}", [memoryview(b"of another attempt")])
    with pytest.raises(StoreUnavailableError):
        await pruned(Stopping(store), KeepLast(1))
    tombstone = (await store.get("step-1/manifest.json")).data
    assert {f"step-1/{key}" for key in swept_keys(tombstone, "there")} == set(shards)
    with pytest.raises(CheckpointNotFoundError):
        await asyncio.to_thread(verify, f"{store.url}/step-1")
    assert (await pruned(store, KeepLast(1))).passed_over == {}


async def test_what_is_not_a_committed_step_is_neither_judged_nor_touched():
    store = await saved(1, 2, 3)
    await store.delete(["step-3/manifest.json"])
    await store.put("step-0/manifest.json", [memoryview(b"<html>")])
    await store.put("latest/manifest.json", [memoryview(b"{}")])
    await store.put("step-1/beside.txt", [memoryview(b"stays")])
    result = await pruned(store, KeepLast(1))
    assert result.kept == (2,)
    assert "cannot be read" in result.passed_over[0]
    assert await places(store) == {"step-0", "step-1", "step-2", "step-3", "latest"}
    assert await keys(store, "step-1/") == ["step-1/beside.txt"]


async def test_nothing_there_is_nothing_to_do():
    result = await pruned(MemoryStore(token_hex(6)), KeepLast(1))
    assert (result.removed, result.kept) == ((), ())


class Replacing(WrappedStore):
    """Another save of step 1 commits before a request."""

    def __init__(self, store, other, method):
        super().__init__(store)
        self._other = other
        self._method = method

    async def before(self, method, key):
        if method == self._method and key == "step-1/manifest.json":
            for found in await keys(self._other, "step-1/"):
                await self._store.put(found, [memoryview((await self._other.get(found)).data)])


@pytest.mark.parametrize("method", ["get", "put"])
async def test_a_step_that_was_saved_again_meanwhile_stays(method):
    store, other = await saved(1, 2), await saved(1)
    result = await pruned(Replacing(store, other, method), KeepLast(1))
    assert (result.removed, result.passed_over) == ((), {1: "another save replaced it meanwhile"})
    assert await is_sound(store, 1)


class Meanwhile(RecordingStore):
    """Something happens before request ``at``."""

    def __init__(self, store, at, happens):
        super().__init__(store)
        self._at = at
        self._happens = happens

    async def before(self, method, key):
        await super().before(method, key)
        if len(self.requests) == self._at + 1:
            await self._happens()


async def test_a_save_that_overwrites_the_step_before_any_request_stands():
    counting = RecordingStore(await saved(1, 2))
    await pruned(counting, KeepLast(1))
    for k in range(len(counting.requests)):
        store = await saved(1, 2)
        (before,) = await keys(store, "step-1/shards")

        async def overwrite(store=store):
            await asyncio.to_thread(save, store.url, 1, overwrite=True)

        result = await pruned(Meanwhile(store, k, overwrite), KeepLast(1))
        assert before not in await keys(store)
        if "step-1" in await places(store):
            assert await is_sound(store, 1), k
        else:
            assert k < 5, "it was there when the steps were looked at, and is not kept"
            assert [removed.step for removed in result.removed] == [1]


@pytest.mark.parametrize("k", range(3))
async def test_a_save_commits_whose_step_is_pruned_before_a_request_of_its_commit(k):
    store, other = await saved(1, 2), await saved(1)
    mine = MemoryStore(store.url.removeprefix("memory://"), "step-1/")
    replaces = await commit.prepare(mine, overwrite=True)
    for found in await keys(other, "step-1/shards"):
        await store.put(found, [memoryview((await other.get(found)).data)])
    data = (await other.get("step-1/manifest.json")).data
    made = parse(data, "there")
    shards = [shard.key for shard in made.shards]
    happened = []

    async def happens():
        happened.extend((await pruned(store, KeepLast(1))).removed)

    await commit.commit(
        Meanwhile(mine, k, happens), data, made.summary.save_id, replaces=replaces, deadline_s=1, shard_keys=shards
    )
    if happened and happened[0].save_id == made.summary.save_id:
        return  # it was committed by then, and the policy does not keep it
    assert await is_sound(store, 1)


class Simple(WrappedStore):
    """A store that deletes without conditions only."""

    async def delete_if(self, key, condition):
        raise NotImplementedByStoreError("501")


class Careless(WrappedStore):
    """A store that ignores the conditions of deletions."""

    async def delete_if(self, key, condition):
        await self.before("delete_if", key)
        await self._store.delete([key])


class Older(WrappedStore):
    """A store that knows ``If-None-Match`` and no ``If-Match``, except of deletions."""

    async def put(self, key, body, *, condition=None, crc32c=None):
        if isinstance(condition, IfMatch):
            raise NotImplementedByStoreError("501")
        return await super().put(key, body, condition=condition, crc32c=crc32c)


class Ignoring(WrappedStore):
    """A store that ignores the conditions of puts."""

    async def put(self, key, body, *, condition=None, crc32c=None):
        return await super().put(key, body, crc32c=crc32c)


class Unconditional(Ignoring, Careless):
    """A store that ignores all conditions."""


@pytest.mark.parametrize("kind", [Simple, Careless, Older, Ignoring, Unconditional])
async def test_a_store_that_lacks_conditions_is_pruned_too(kind):
    store = await saved(1, 2)
    assert [removed.step for removed in (await pruned(kind(store), KeepLast(1))).removed] == [1]
    assert await places(store) == {"step-2"}
    assert await is_sound(store, 2)


@pytest.mark.parametrize("kind", [Older, Ignoring])
async def test_no_tombstone_is_put_where_it_could_take_the_place_of_another_save(kind):
    store, other = await saved(1, 2), await saved(1)
    recording = RecordingStore(Replacing(store, other, "delete_if"))
    result = await pruned(kind(recording), KeepLast(1))
    assert ("put", "step-1/manifest.json") not in recording.requests
    assert result.passed_over == {1: "another save replaced it meanwhile"}
    assert await is_sound(store, 1)


@pytest.mark.parametrize("kind", [Simple, Careless, WrappedStore])
async def test_a_save_that_replaced_the_tombstone_is_not_taken_away_with_it(kind):
    class Late(WrappedStore):
        async def after(self, method, key):
            if method == "delete" and key.startswith("step-1/shards"):
                await asyncio.to_thread(save, store.url, 1)

    store = await saved(1, 2)
    assert [removed.step for removed in (await pruned(kind(Late(store)), KeepLast(1))).removed] == [1]
    assert await is_sound(store, 1)


@pytest.mark.parametrize("method", ["get", "put", "delete_if"])
async def test_another_prune_that_was_faster_is_no_error(method):
    class Racing(WrappedStore):
        async def before(self, called, key):
            if called == method and key.startswith("step-1/"):
                await pruned(self._store, KeepLast(1))

    store = await saved(1, 2, 3)
    result = await pruned(Racing(store), KeepLast(1))
    assert set(result.passed_over.values()) <= {"it was removed meanwhile"}
    assert await places(store) == {"step-3"}


@pytest.mark.parametrize("method", ["put", "delete_if"])
async def test_a_request_that_got_no_answer_is_looked_into(method):
    class Deaf(WrappedStore):
        async def after(self, called, key):
            if called == method and key == "step-1/manifest.json":
                raise LOST

    store = await saved(1, 2)
    assert [removed.step for removed in (await pruned(Deaf(store), KeepLast(1))).removed] == [1]
    assert await places(store) == {"step-2"}


def test_new_keys_for_a_step_that_is_being_pruned_do_not_bring_it_back():
    keys, url = {"old": bytes(range(32)), "new": bytes(32)}, f"memory://{token_hex(6)}/step-1"
    dcp.save({"w": torch.ones(4)}, storage_writer=ObjectStoreWriter(url, extensions=[AesGcm("old", keys)]))
    store = MemoryStore(url.removeprefix("memory://").partition("/")[0], "step-1/")

    async def condemn():
        shards = [found.key async for found in store.list_objects("shards/")]
        data = encode_tombstone(shards, created=datetime.now(UTC), writer="a prune")
        await store.put("manifest.json", [memoryview(data)])

    def find(key_id):
        if key_id == "new":
            loop.run(condemn)
        return keys[key_id]

    with pytest.raises(CommitConflictError):
        rewrap(url, "new", find)
    with pytest.raises(CheckpointNotFoundError):
        verify(url)


async def assert_each_is_whole_or_gone(store, k):
    """A sweep of what is a day old leaves committed steps, and tombstones with nothing beside them."""
    await Sweeping(store, grace_s=86_400, is_dry_run=False, include_whole=False, names=()).run()
    for step in (1, 2, 3):
        left = await keys(store, f"step-{step}/")
        is_committed = bool(left) and not parse_summary((await store.get(left[0])).data, "there").is_tombstone
        assert is_committed or step != 3, k
        if is_committed:
            assert await is_sound(store, step), (k, step)
        else:
            assert left in ([], [f"step-{step}/manifest.json"]), (k, step)


@pytest.mark.parametrize("is_reply_lost", [False, True], ids=["request lost", "reply lost"])
async def test_a_prune_that_fails_at_any_request_leaves_each_step_whole_or_gone(is_reply_lost):
    counting = RecordingStore(await saved(1, 2, 3))
    await pruned(counting, KeepLast(1))
    assert len(counting.requests) > 20
    for k in range(len(counting.requests)):
        store = await saved(1, 2, 3)
        try:
            await pruned(FailingStore(store, k, LOST, is_reply_lost=is_reply_lost), KeepLast(1))
        except* StoreUnavailableError:
            pass
        await assert_each_is_whole_or_gone(store, k)
        assert (await pruned(store, KeepLast(1))).kept == (3,)
        assert [key for key in await keys(store) if key.startswith(("step-1/s", "step-2/s"))] == []


async def test_a_prune_that_is_cancelled_at_any_request_leaves_each_step_whole_or_gone():
    counting = RecordingStore(await saved(1, 2, 3))
    await pruned(counting, KeepLast(1))
    for k in range(len(counting.requests)):
        store = await saved(1, 2, 3)
        running = []

        async def cancel(running=running):
            running[0].cancel()
            await asyncio.sleep(0)

        running.append(asyncio.ensure_future(pruned(Meanwhile(store, k, cancel), KeepLast(1))))
        with pytest.raises(asyncio.CancelledError):
            await running[0]
        assert [key for key in await keys(store) if key.startswith("shards/")] == []
        await assert_each_is_whole_or_gone(store, k)


# The grace.


async def test_a_step_stays_until_a_newer_one_has_been_there_for_the_grace():
    store = await saved(1, 2)
    age(store, minutes=9)
    result = await pruned(store, KeepLast(1), grace_s=600)
    assert (result.removed, result.kept, result.in_grace) == ((), (2, 1), (1,))
    age(store, minutes=2)
    await asyncio.to_thread(save, store.url, 3)
    result = await pruned(store, KeepLast(1), grace_s=600)
    assert ([found.step for found in result.removed], result.kept, result.in_grace) == ([1], (3, 2), (2,))
    assert await is_sound(store, 2)


async def test_it_is_the_first_of_the_newer_ones_that_counts_and_not_the_newest():
    store = await saved(1, 2)
    age(store, minutes=11)
    await asyncio.to_thread(save, store.url, 3)
    await asyncio.to_thread(save, store.url, 4)
    result = await pruned(store, KeepLast(1), grace_s=600)
    assert ([found.step for found in result.removed], result.in_grace) == ([1], (3, 2))


async def test_the_grace_goes_by_the_servers_clock():
    class Ahead(WrappedStore):
        """Its clock is an hour ahead of this machine's."""

        async def list_objects(self, prefix=""):
            async for found in super().list_objects(prefix):
                yield replace(found, modified=found.modified + timedelta(hours=1))

        async def head(self, key):
            found = await super().head(key)
            return replace(found, modified=found.modified + timedelta(hours=1))

    store = await saved(1, 2)
    age(store, minutes=11)
    assert [found.step for found in (await pruned(Ahead(store), KeepLast(1), grace_s=600)).removed] == [1]


async def test_without_a_grace_no_clock_matters():
    store = await saved(1, 2)
    age(store, hours=-1)  # as if the server's clock had been set back since
    assert [found.step for found in (await pruned(store, KeepLast(1))).removed] == [1]


async def test_a_negative_grace_is_refused():
    for grace_s in (-1, float("nan")):
        with pytest.raises(UsageError, match="negative"):
            await pruned(MemoryStore(token_hex(6)), KeepLast(1), grace_s=grace_s)


async def test_a_load_of_the_newest_step_is_not_broken_by_a_commit_and_a_prune_within_the_grace():
    def read(opened):
        return float(opened["w"][:].sum())

    async def opened_and_superseded():
        store = await saved(1, 2)
        age(store, hours=1)
        opened = await asyncio.to_thread(cloudckpt.open, f"{store.url}/step-{newest}")
        await asyncio.to_thread(save, store.url, 3)
        return store, opened

    newest = 2
    counting = RecordingStore((await opened_and_superseded())[0])
    await pruned(counting, KeepLast(1), grace_s=600)
    assert "put" in dict(counting.requests), "it removed step 1"
    for k in range(len(counting.requests)):
        store, opened = await opened_and_superseded()
        sums = []

        async def load(opened=opened, sums=sums):
            sums.append(await asyncio.to_thread(read, opened))

        result = await pruned(Meanwhile(store, k, load), KeepLast(1), grace_s=600)
        await load()
        assert (sums, result.in_grace) == ([80.0, 80.0], (2,)), k
    await pruned(store, KeepLast(1))
    with pytest.raises(CheckpointError):
        await load()


# Pins.


async def test_a_pinned_step_stays_whatever_the_policy_says_until_it_is_unpinned():
    store = await saved(1, 2, 3)
    await pin_in(store, 1)
    await store.put("pins/step-20", [memoryview(b"of another step")])
    result = await pruned(store, KeepLast(1))
    assert ([found.step for found in result.removed], result.kept, result.pinned) == ([2], (3, 1), (1,))
    assert await is_sound(store, 1)
    await asyncio.to_thread(unpin, store.url, 1)
    assert (await pruned(store, KeepLast(1))).kept == (3,)
    assert await places(store) == {"step-3", "pins"}


async def test_a_pin_of_a_step_that_the_policy_keeps_is_not_told_of():
    store = await saved(1, 2, 3)
    await pin_in(store, 2)
    assert (await pruned(store, KeepLast(2))).pinned == ()


async def test_a_pin_that_comes_before_the_tombstone_is_asked_for_is_honoured():
    counting = RecordingStore(await saved(1, 2))
    await pruned(counting, KeepLast(1))
    looks_at = counting.requests.index(("list_objects", "pins/step-1"))
    for k in range(looks_at + 1):
        store = await saved(1, 2)

        async def pin_it(store=store):
            await pin_in(store, 1)

        result = await pruned(Meanwhile(store, k, pin_it), KeepLast(1))
        assert (result.removed, result.kept, result.pinned) == ((), (2, 1), (1,)), k
        assert result.passed_over == {}
        assert await is_sound(store, 1)


# What is known from before.


async def test_from_the_second_prune_on_a_summary_that_did_not_change_and_the_clock_are_not_asked_for_again():
    store = await saved(1, 2, 3, 4)
    recording, known = RecordingStore(store), Known()
    await pruned(recording, KeepLast(3), known=known)
    await asyncio.to_thread(save, store.url, 5)
    recording.requests.clear()
    result = await pruned(recording, KeepLast(3), known=known)
    assert [found.step for found in result.removed] == [2]
    methods = Counter(method for method, _ in recording.requests)
    assert methods == {
        "list_names": 1, "head": 4, "get_range": 1,
        "get": 1, "list_objects": 1, "put": 1, "delete": 1, "delete_if": 1,
    }  # fmt: skip
    assert methods.total() == 11
    assert [key for method, key in recording.requests if method == "get_range"] == ["step-5/manifest.json"]
    recording.requests.clear()
    assert (await pruned(recording, KeepLast(3), known=known)).kept == (5, 4, 3)
    assert sorted(recording.requests) == [("head", f"step-{n}/manifest.json") for n in (3, 4, 5)] + [
        ("list_names", "")
    ]


async def test_a_step_that_was_saved_again_is_read_again():
    store, known = await saved(1, 2), Known()
    await pruned(store, KeepLast(2), known=known)
    await asyncio.to_thread(save, store.url, 1, overwrite=True)
    again = (await pruned(store, KeepLast(1), known=known)).removed
    assert [found.step for found in again] == [1]
    assert await places(store) == {"step-2"}


async def test_the_clock_that_is_known_goes_on():
    store, known = await saved(1, 2), Known()
    first = (await known.server(store)).now
    second = (await known.server(store)).now
    assert second > first
    assert [key for key in await keys(store) if key.startswith("shards/")] == []


def test_the_steps_that_are_committed_and_those_that_are_listed():
    root = f"memory://{token_hex(6)}"
    assert (committed_steps(root), listed_steps(root)) == ([], [])
    save(root, 1, 2, 10)
    store = MemoryStore(root.removeprefix("memory://"))
    loop.run(lambda: store.delete(["step-2/manifest.json"]))
    pin(root, 1)
    assert committed_steps(root) == [1, 10]
    assert listed_steps(root) == [10, 2, 1]


def test_it_works_on_a_server(s3, store_options, root):
    save(root, 1, 2, 3, **s3)
    told = prune(root, KeepLast(1), grace_s=0, store=store_options)
    assert [removed.step for removed in told.removed] == [2, 1]
    assert newest_step(root, store_options) == 3
    assert prune(root, KeepLast(2), dry_run=False, grace_s=0, store=store_options).kept == (3, 2)
    assert verify(f"{root}/step-2", deep=True, store=store_options).is_sound
    pin(root, 2, store=store_options)
    assert prune(root, KeepLast(1), dry_run=False, grace_s=0, store=store_options).pinned == (2,)
    unpin(root, 2, store=store_options)
    assert prune(root, KeepLast(1), dry_run=False, store=store_options).in_grace == (2,)
    assert prune(root, KeepLast(1), dry_run=False, grace_s=0, store=store_options).kept == (3,)


def test_it_works_on_files(tmp_path):
    save(f"file://{tmp_path}", 1, 2)
    prune(f"file://{tmp_path}", KeepLast(1), dry_run=False, grace_s=0)
    assert [path.name for path in tmp_path.rglob("manifest.json")] == ["manifest.json"]
    assert verify(f"file://{tmp_path}/step-2", deep=True).is_sound
    assert list(tmp_path.glob("step-1/shards/*/*")) == []


COMMAND = str(Path(sys.executable).parent / "cloudckpt")


def typed(*args):
    return subprocess.run([COMMAND, *args], capture_output=True, text=True, check=False)


def test_the_command_shows_a_plan_and_needs_a_yes(tmp_path):
    root = f"file://{tmp_path}"
    save(root, 1, 2, 3, 4)
    assert "step 2: it was the newest within the grace" in typed("prune", root, "--keep-last", "1").stdout
    options = ("--keep-last", "1", "--keep-every", "2", "--grace", "0")
    plan = typed("prune", root, *options)
    assert plan.returncode == 0
    assert [line.split(" (")[0] for line in plan.stdout.splitlines()] == [
        "would remove step 3", "would remove step 1",
    ]  # fmt: skip
    assert "--yes" in plan.stderr
    assert newest_step(root) == 4
    assert verify(f"{root}/step-1").is_sound
    done = typed("prune", root, *options, "--yes", "--json")
    told = json.loads(done.stdout)
    assert (told["kept"], [removed["step"] for removed in told["removed"]]) == ([4, 2], [3, 1])
    assert not (tmp_path / "step-1/manifest.json").exists()
    misused = typed("prune", root)
    assert (misused.returncode, misused.stdout) == (2, "")
    assert "--keep-last" in misused.stderr


def test_the_command_keeps_by_metrics_and_by_time(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.6}
    start = datetime(2026, 11, 25, 12, tzinfo=UTC)
    for step, loss in losses.items():
        summary = Summary(
            format=FORMAT, version=VERSION, save_id=f"{step:032x}", created=start + timedelta(minutes=20 * step),
            writer="a test", step=step, metrics={"loss": loss},
        )  # fmt: skip
        (tmp_path / f"step-{step}").mkdir()
        data = encode(Manifest(summary=summary, metadata={}, planner_paths=None, shards=(), entries={}))
        (tmp_path / f"step-{step}/manifest.json").write_bytes(data)

    def kept_by(*options):
        return json.loads(typed("prune", f"file://{tmp_path}", *options, "--grace", "0", "--json").stdout)["kept"]

    assert kept_by("--keep-lowest", "loss", "1") == [5, 2]
    assert kept_by("--keep-highest", "loss", "1") == [5, 1]
    assert kept_by("--keep-lowest", "loss", "1", "--keep-highest", "loss", "1", "--keep-last", "2") == [5, 4, 2, 1]
    assert kept_by("--keep-each", "1h") == [5, 3, 1]
