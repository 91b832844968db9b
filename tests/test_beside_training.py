"""Verifying, sweeping and pruning beside a training that saves: what is kept loads, and nothing is lost."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.catalog import KeepLast, newest_step, prune, step_url, sweep, verify
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.errors import CheckpointChangedError, CheckpointNotFoundError, CommitConflictError, IntegrityError
from cloudckpt.layout import shard_key
from cloudckpt.store.url import open_store

SECONDS = 10
GRACE_S = 3
KEPT = 2


def state_of(step, edition):
    generator = torch.Generator().manual_seed(1000 * step + edition)
    return {
        "w": torch.randn(300, 40, generator=generator),
        "optim": {"m": torch.randn(77, generator=generator), "step": step, "edition": edition},
    }


class Training:
    """Saves step after step, and overwrites every third, until it is told to end."""

    def __init__(self, root, s3):
        self._root = root
        self._s3 = s3
        self._saved = {}
        self.lost = []

    def run(self, is_over):
        step = 0
        while not is_over():
            step += 1
            self._save(step, 0)
            if step % 3 == 0:
                self._save(step, 1, overwrite=True)

    def _save(self, step, edition, **options):
        self._saved.setdefault(step, set())
        writer = ObjectStoreWriter(step_url(self._root, step), step=step, **self._s3, **options)
        try:
            dcp.save(state_of(step, edition), storage_writer=writer)
        except CheckpointException as e:
            (failure,) = e.failures.values()
            self.lost.append(failure[0])
        else:
            self._saved[step] = {edition}

    def assert_loads(self, step):
        loaded = state_of(0, 0)
        dcp.load(loaded, storage_reader=ObjectStoreReader(step_url(self._root, step), **self._s3))
        assert loaded["optim"]["step"] == step
        edition = loaded["optim"]["edition"]
        assert edition in self._saved[step]
        expected = state_of(step, edition)
        assert torch.equal(loaded["w"], expected["w"])
        assert torch.equal(loaded["optim"]["m"], expected["optim"]["m"])


@contextmanager
def beside(main):
    """Runs ``main`` in a thread, which is joined at the end and whose failure is raised."""
    failures = []

    def run():
        try:
            main()
        except BaseException as e:
            failures.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()
    if failures:
        raise failures[0]


def leave(root, options, count):
    """Shards of attempts that died, in places of their own and in those of steps to come."""

    async def put():
        async with open_store(root, options) as store:
            for i in range(count):
                for place in (f"died-{i}", f"step-{3 * i + 3}"):
                    await store.put(f"{place}/{shard_key(f'{i:032x}', 'frames')}", [memoryview(b"leftover")])

    loop.run(put)


def orphans(root, options):
    async def find():
        async with open_store(root, options) as store:
            return [found.key async for found in store.list_objects() if found.size == len(b"leftover")]

    return loop.run(find)


@pytest.mark.timeout(120)
def test_the_steps_that_are_kept_load_equal_while_everything_runs_at_once(s3, store_options, root):
    leave(root, store_options, 3)
    training = Training(root, s3)
    end = time.monotonic() + SECONDS
    rounds = swept = pruned = verified = 0
    with beside(lambda: training.run(lambda: time.monotonic() > end)):
        while time.monotonic() < end:
            rounds += 1
            swept += len(sweep(root, grace_s=GRACE_S, dry_run=False, store=store_options).removed)
            pruned += len(prune(root, KeepLast(KEPT), dry_run=False, grace_s=0, store=store_options).removed)
            verified += is_newest_sound(root, store_options)
    assert min(rounds, swept, pruned, verified) > 0
    assert all(isinstance(lost, CommitConflictError | IntegrityError) for lost in training.lost), training.lost
    sweep(root, grace_s=GRACE_S, dry_run=False, store=store_options)
    assert orphans(root, store_options) == []
    left = prune(root, KeepLast(KEPT), dry_run=False, grace_s=0, store=store_options)
    assert len(left.kept) == KEPT
    assert left.passed_over == {}
    for step in left.kept:
        assert verify(step_url(root, step), deep=True, store=store_options).is_sound
        training.assert_loads(step)


def is_newest_sound(root, store_options):
    """Whether the newest step is; it may be replaced, or become an old one and go, while it is looked at."""
    step = newest_step(root, store_options)
    if step is None:
        return False
    try:
        found = verify(step_url(root, step), deep=True, store=store_options)
    except (CheckpointChangedError, CheckpointNotFoundError):
        return False
    assert found.is_sound, found.problems
    return True
