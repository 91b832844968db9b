"""One checkpoint removed by its URL."""

import pytest

from cloudckpt.catalog.removal import remove_in
from cloudckpt.catalog.sweep import Sweeping
from cloudckpt.engine.commit import find_manifest_blob
from cloudckpt.errors import CheckpointChangedError, StoreUnavailableError
from cloudckpt.store.memory import MemoryStore
from cloudckpt.testing import FailingStore, RecordingStore, WrappedStore
from test_prune import Careless, Ignoring, Older, Simple, Unconditional, is_sound, keys, places, saved

STEP = "step-1"
LOST = StoreUnavailableError("no answer")


def rooted_at_step(store):
    return MemoryStore(store.url.removeprefix("memory://"), f"{STEP}/")


@pytest.mark.parametrize("kind", [WrappedStore, Simple, Careless, Older, Ignoring, Unconditional])
async def test_it_goes_with_all_its_shards_and_nothing_else_on_any_store(kind):
    store = await saved(1, 2)
    assert await remove_in(kind(rooted_at_step(store)))
    assert await places(store) == {"step-2"}
    assert not await remove_in(kind(rooted_at_step(store)))


class SavedAgain(WrappedStore):
    """Another save commits before a request."""

    def __init__(self, store, other, method):
        super().__init__(store)
        self._other = other
        self._method = method

    async def before(self, method, key):
        if (method, key) == (self._method, "manifest.json"):
            for found in await keys(self._other):
                await self._store.put(found, [memoryview((await self._other.get(found)).data)])


@pytest.mark.parametrize(("kind", "method"), [(WrappedStore, "put"), (Older, "delete_if")])
async def test_what_was_saved_meanwhile_stands(kind, method):
    store, other = await saved(1), await saved(1)
    with pytest.raises(CheckpointChangedError, match="saved again"):
        await remove_in(kind(SavedAgain(rooted_at_step(store), rooted_at_step(other), method)))
    assert await is_sound(store, 1)


@pytest.mark.parametrize("is_reply_lost", [False, True], ids=["request lost", "reply lost"])
async def test_one_that_fails_at_any_request_leaves_it_whole_or_gone(is_reply_lost):
    counting = RecordingStore(rooted_at_step(await saved(1)))
    await remove_in(counting)
    assert len(counting.requests) > 8
    for k in range(len(counting.requests)):
        store = await saved(1)
        try:
            await remove_in(FailingStore(rooted_at_step(store), k, LOST, is_reply_lost=is_reply_lost))
        except* StoreUnavailableError:
            pass
        if await find_manifest_blob(rooted_at_step(store)) is not None:
            assert await is_sound(store, 1), k
        else:
            await Sweeping(store, grace_s=0, is_dry_run=False, include_whole=False, names=()).run()
            assert [key for key in await keys(store) if "shards" in key] == [], k
