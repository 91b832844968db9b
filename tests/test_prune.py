"""Pruning: what the policy keeps is whole, what it does not is gone, whatever fails on the way."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cloudckpt.catalog import KeepEvery, KeepLast, newest_step, prune, verify
from cloudckpt.catalog.prune import prune_in
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.errors import (
    NotImplementedByStoreError,
    PreconditionFailedError,
    StoreUnavailableError,
    UsageError,
)
from cloudckpt.store.memory import MemoryStore
from cloudckpt.testing import FailingStore, RecordingStore, WrappedStore

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


async def pruned(store, policy, *, is_dry_run=False):
    return await prune_in(store, policy, is_dry_run=is_dry_run)


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


async def test_the_manifest_goes_first_and_whole_manifests_are_read_only_of_what_goes():
    store = RecordingStore(await saved(1, 2))
    await pruned(store, KeepLast(1))
    (shard,) = [key for method, key in store.requests if method == "delete"]
    assert store.requests[-3:] == [
        ("get", "step-1/manifest.json"),
        ("delete_if", "step-1/manifest.json"),
        ("delete", shard),
    ]
    assert [key for method, key in store.requests if method == "get"] == ["step-1/manifest.json"]


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


@pytest.mark.parametrize("method", ["get", "delete_if"])
async def test_a_step_that_was_saved_again_meanwhile_stays(method):
    store, other = await saved(1, 2), await saved(1)
    result = await pruned(Replacing(store, other, method), KeepLast(1))
    assert (result.removed, result.passed_over) == ((), {1: "another save replaced it meanwhile"})
    assert await is_sound(store, 1)


async def test_a_store_that_deletes_without_conditions_only_is_pruned_too():
    class Simple(WrappedStore):
        async def delete_if(self, key, condition):
            raise NotImplementedByStoreError("501")

    store = await saved(1, 2)
    await pruned(Simple(store), KeepLast(1))
    assert await places(store) == {"step-2"}


async def test_another_prune_that_was_faster_is_no_error():
    class Racing(WrappedStore):
        async def before(self, method, key):
            if method in {"get", "delete_if"}:
                await prune_in(self._store, KeepLast(1), is_dry_run=False)
            if method == "delete_if":
                raise PreconditionFailedError("404")

    store = await saved(1, 2, 3)
    await pruned(Racing(store), KeepLast(1))
    assert await places(store) == {"step-3"}


async def test_a_manifest_whose_deletion_got_no_answer_is_asked_to_go_again():
    class Deaf(WrappedStore):
        async def after(self, method, key):
            if method == "delete_if":
                raise LOST

    store = await saved(1, 2)
    assert [removed.step for removed in (await pruned(Deaf(store), KeepLast(1))).removed] == [1]
    assert await places(store) == {"step-2"}


@pytest.mark.parametrize("is_reply_lost", [False, True], ids=["request lost", "reply lost"])
async def test_a_prune_that_fails_at_any_request_leaves_each_step_whole_or_gone(is_reply_lost):
    counting = RecordingStore(await saved(1, 2, 3))
    await pruned(counting, KeepLast(1))
    assert len(counting.requests) > 10
    for k in range(len(counting.requests)):
        store = await saved(1, 2, 3)
        try:
            await pruned(FailingStore(store, k, LOST, is_reply_lost=is_reply_lost), KeepLast(1))
        except* StoreUnavailableError:
            pass
        for step in (1, 2, 3):
            if f"step-{step}/manifest.json" in await keys(store):
                assert await is_sound(store, step), (k, step)
            else:
                assert step != 3
        assert (await pruned(store, KeepLast(1))).kept == (3,)
        manifests = [key for key in await keys(store) if key.endswith("manifest.json")]
        assert manifests == ["step-3/manifest.json"]


@pytest.mark.parametrize("make", [lambda: KeepLast(0), lambda: KeepEvery(steps=0)], ids=["last", "every"])
def test_a_policy_that_keeps_nothing_is_refused(make):
    with pytest.raises(UsageError):
        make()


def test_it_works_on_a_server(s3, store_options, root):
    save(root, 1, 2, 3, **s3)
    assert [removed.step for removed in prune(root, KeepLast(1), store=store_options).removed] == [2, 1]
    assert newest_step(root, store_options) == 3
    assert prune(root, KeepLast(2), dry_run=False, store=store_options).kept == (3, 2)
    assert verify(f"{root}/step-2", deep=True, store=store_options).is_sound
    assert prune(root, KeepLast(1), dry_run=False, store=store_options).kept == (3,)


def test_it_works_on_files(tmp_path):
    save(f"file://{tmp_path}", 1, 2)
    prune(f"file://{tmp_path}", KeepLast(1), dry_run=False)
    assert [path.name for path in tmp_path.rglob("manifest.json")] == ["manifest.json"]
    assert verify(f"file://{tmp_path}/step-2", deep=True).is_sound
    assert list(tmp_path.glob("step-1/shards/*/*")) == []


COMMAND = str(Path(sys.executable).parent / "cloudckpt")


def typed(*args):
    return subprocess.run([COMMAND, *args], capture_output=True, text=True, check=False)


def test_the_command_shows_a_plan_and_needs_a_yes(tmp_path):
    root = f"file://{tmp_path}"
    save(root, 1, 2, 3, 4)
    plan = typed("prune", root, "--keep-last", "1", "--keep-every", "2")
    assert plan.returncode == 0
    assert [line.split(" (")[0] for line in plan.stdout.splitlines()] == [
        "would remove step 3", "would remove step 1",
    ]  # fmt: skip
    assert "--yes" in plan.stderr
    assert newest_step(root) == 4
    assert verify(f"{root}/step-1").is_sound
    done = typed("prune", root, "--keep-last", "1", "--keep-every", "2", "--yes", "--json")
    told = json.loads(done.stdout)
    assert (told["kept"], [removed["step"] for removed in told["removed"]]) == ([4, 2], [3, 1])
    assert not (tmp_path / "step-1/manifest.json").exists()
    misused = typed("prune", root)
    assert (misused.returncode, misused.stdout) == (2, "")
    assert "--keep-last" in misused.stderr
