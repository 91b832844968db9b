"""Pins: a step that is pinned stays, and no pin is promised of a step that is not there."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cloudckpt.catalog import KeepLast, committed_steps, newest_step, pin, pins, prune, sweep, unpin, verify
from cloudckpt.catalog.pins import pin_in
from cloudckpt.catalog.prune import prune_in
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.errors import CheckpointNotFoundError, ManifestError, StoreUnavailableError, UsageError
from cloudckpt.layout import pin_key, shard_key, step_of_pin
from cloudckpt.store.memory import MemoryStore
from cloudckpt.testing import RecordingStore, WrappedStore

LOST = StoreUnavailableError("no answer")


@pytest.fixture
def root():
    return f"memory://{token_hex(6)}"


def save(root, *steps, **options):
    for step in steps:
        dcp.save({"w": torch.ones(40)}, storage_writer=ObjectStoreWriter(f"{root}/step-{step}", step=step, **options))


def store_of(root):
    return MemoryStore(root.removeprefix("memory://"))


def keys(root):
    async def find():
        return [found.key async for found in store_of(root).list_objects()]

    return loop.run(find)


def put(root, key, data=b"x"):
    loop.run(lambda: store_of(root).put(key, [memoryview(data)]))


def test_steps_are_pinned_until_they_are_unpinned(root):
    save(root, 1, 2, 10)
    assert pins(root) == []
    for step in (10, 1, 1):
        pin(root, step)
    assert pins(root) == [1, 10]
    assert [key for key in keys(root) if "step-1/" not in key and "pin" in key] == ["pins/step-1", "pins/step-10"]
    for _ in range(2):
        unpin(root, 1)
    assert pins(root) == [10]


def test_a_pin_names_its_step_to_people(root):
    save(root, 7)
    pin(root, 7)
    said = json.loads(loop.run(lambda: store_of(root).get("pins/step-7")).data)
    assert said["step"] == 7
    assert {"created", "writer"} < set(said)


def test_a_step_that_is_not_committed_is_not_pinned(root):
    save(root, 1)
    put(root, f"step-2/{shard_key('7' * 32, 'frames')}")
    for step in (2, 3):
        with pytest.raises(CheckpointNotFoundError, match=f"step {step} is not committed"):
            pin(root, step)
    put(root, "step-4/manifest.json", b"<html>")
    with pytest.raises(ManifestError):
        pin(root, 4)
    assert pins(root) == []


async def test_a_step_of_which_a_tombstone_is_left_is_not_pinned():
    class Stopping(WrappedStore):
        async def before(self, method, key):
            if method == "delete_if" and key.startswith("step-1/"):
                raise LOST

    name = token_hex(6)
    await asyncio.to_thread(save, f"memory://{name}", 1, 2)
    store = MemoryStore(name)
    with pytest.raises(StoreUnavailableError):
        await prune_in(Stopping(store), KeepLast(1), is_dry_run=False, grace_s=0)
    assert (await store.get("step-1/manifest.json")).data
    with pytest.raises(CheckpointNotFoundError):
        await pin_in(store, 1)
    assert await asyncio.to_thread(pins, store.url) == []
    assert await asyncio.to_thread(committed_steps, store.url) == [2]


async def test_a_step_that_is_pruned_before_any_request_of_its_pin_is_not_pinned_or_stays():
    class Meanwhile(RecordingStore):
        def __init__(self, store, at):
            super().__init__(store)
            self._at = at

        async def before(self, method, key):
            await super().before(method, key)
            if len(self.requests) == self._at + 1:
                await prune_in(self._store, KeepLast(1), is_dry_run=False, grace_s=0)

    name = token_hex(6)
    await asyncio.to_thread(save, f"memory://{name}", 1)
    counting = RecordingStore(MemoryStore(name))
    await pin_in(counting, 1)
    assert [method for method, _ in counting.requests] == ["put", "head", "get_range"]
    pinned = []
    for k in range(len(counting.requests)):
        store = MemoryStore(token_hex(6))
        await asyncio.to_thread(save, store.url, 1, 2)
        try:
            await pin_in(Meanwhile(store, k), 1)
        except CheckpointNotFoundError:
            assert await asyncio.to_thread(pins, store.url) == []
            assert await asyncio.to_thread(committed_steps, store.url) == [2]
        else:
            pinned.append(k)
            assert await asyncio.to_thread(pins, store.url) == [1]
            assert (await asyncio.to_thread(verify, f"{store.url}/step-1", deep=True)).is_sound
    assert pinned == [1, 2], "from its first request on it holds"


def test_a_pin_holds_for_the_save_that_replaces_the_step(root):
    save(root, 1, 2)
    pin(root, 1)
    save(root, 1, overwrite=True)
    assert prune(root, KeepLast(1), dry_run=False, grace_s=0).kept == (2, 1)


@pytest.mark.parametrize("step", [-1, 10**18, True, 1.0, "1", None])
def test_what_is_no_step_is_refused(root, step):
    for change in (pin, unpin):
        with pytest.raises(UsageError, match="no step"):
            change(root, step)
    assert keys(root) == []


def test_only_pins_are_taken_for_pins(root):
    save(root, 1)
    for key in ("pins/step-01", "pins/step-1/manifest.txt", "pins/notes.txt", "pins/step-x", "step-1/pins/step-5"):
        put(root, key)
    assert pins(root) == []
    assert step_of_pin(pin_key(12)) == 12
    assert step_of_pin("step-12") is None


def test_nothing_else_stumbles_over_pins(root):
    save(root, 1, 2)
    pin(root, 1)
    pin(root, 2)
    before = keys(root)
    assert newest_step(root) == 2
    assert committed_steps(root) == [1, 2]
    swept = sweep(root, grace_s=0, dry_run=False)
    assert (swept.removed, swept.kept) == ((), ())
    assert keys(root) == before


def test_it_works_on_a_server(s3, store_options):
    root = f"s3://checkpoints/{token_hex(6)}"
    save(root, 1, 2, 3, **s3)
    pin(root, 1, store=store_options)
    with pytest.raises(CheckpointNotFoundError):
        pin(root, 9, store=store_options)
    assert pins(root, store=store_options) == [1]
    assert prune(root, KeepLast(1), dry_run=False, grace_s=0, store=store_options).kept == (3, 1)
    unpin(root, 1, store=store_options)
    assert prune(root, KeepLast(1), dry_run=False, grace_s=0, store=store_options).kept == (3,)


def test_it_works_on_files(tmp_path):
    root = f"file://{tmp_path}"
    save(root, 1, 2)
    pin(root, 1)
    assert pins(root) == [1]
    assert prune(root, KeepLast(1), dry_run=False, grace_s=0).pinned == (1,)
    unpin(root, 1)
    assert pins(root) == []
    assert prune(root, KeepLast(1), dry_run=False, grace_s=0).kept == (2,)


COMMAND = str(Path(sys.executable).parent / "cloudckpt")


def typed(*args):
    return subprocess.run([COMMAND, *args], capture_output=True, text=True, check=False)


def test_the_commands_pin_and_show_and_unpin(tmp_path):
    root = f"file://{tmp_path}"
    save(root, 1, 2, 3)
    done = typed("pin", root, "1", "2")
    assert (done.returncode, done.stdout) == (0, "pinned step 1\npinned step 2\n")
    plan = typed("prune", root, "--keep-last", "1", "--grace", "0")
    assert plan.stdout == "would keep step 2: it is pinned\nwould keep step 1: it is pinned\n"
    assert json.loads(typed("unpin", root, "2", "--json").stdout) == {"root": root, "pinned": [1]}
    assert typed("pin", root).stdout == "pinned step 1\n"
    missing = typed("pin", root, "8")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "step 8 is not committed" in missing.stderr
    assert typed("unpin", root).returncode == 2
    assert typed("unpin", root, "1").stderr == "no step is pinned\n"
