"""One checkpoint removed, wherever it lies.

Law: a tombstone takes the manifest's place, on the condition that it is still the one that was read; then exactly the
shards it named go; last the tombstone.
"""

import os
from collections.abc import Sequence

from cloudckpt.catalog.asking import Server, ask_server
from cloudckpt.catalog.condemning import condemn, take_away
from cloudckpt.engine.commit import find_manifest_blob
from cloudckpt.engine.session import Session
from cloudckpt.errors import CheckpointChangedError
from cloudckpt.layout import MANIFEST
from cloudckpt.manifest import parse
from cloudckpt.store.protocols import IfMatch, Store
from cloudckpt.store.url import StoreOptions, check_url
from cloudckpt.threads import in_thread


def remove(url: str | os.PathLike[str], *, store: StoreOptions | None = None) -> bool:
    """Removes the checkpoint at a URL, for who keeps account of checkpoints himself.

    Pins and who may be reading it are not asked after: steps below a root are removed by `prune`. What was never
    committed is left to `sweep`, and so is what an interruption leaves.

    Args:
        url: of the checkpoint.
        store: how to reach the store.

    Returns:
        Whether one was there.

    Raises:
        CheckpointChangedError: it was saved again meanwhile; that one stands.
        StoreError: the store refused.
    """
    with Session(check_url(os.fspath(url)), store or StoreOptions()) as session:
        return session.run(remove_in)


async def remove_in(store: Store) -> bool:
    """See `remove`; the store is rooted at the checkpoint."""
    blob = await find_manifest_blob(store)
    if blob is None:
        return False
    manifest = await in_thread(parse, blob.data, f"{store.url}/{MANIFEST}")
    shards = [shard.key for shard in manifest.shards]
    if await remove_as_read(store, await ask_server(store), "", blob.etag, shards, by="remove"):
        return True
    if await find_manifest_blob(store) is None:
        return False
    msg = f"{store.url} was saved again while it was being removed; what was saved stands"
    raise CheckpointChangedError(msg)


async def remove_as_read(
    store: Store, server: Server, place: str, etag: str, shards: Sequence[str], *, by: str
) -> bool:
    """Removes a checkpoint, or nothing.

    Args:
        store: that holds it.
        server: what conditions it honours, and its clock.
        place: of the checkpoint below the store's root; empty, or ending in ``/``.
        etag: of its manifest, as it was read.
        shards: that it names; keys relative to the place.
        by: the command at work.

    Returns:
        False where its manifest is not there any more: nothing was changed.
    """
    key, keys = f"{place}{MANIFEST}", [f"{place}{shard}" for shard in shards]
    if not server.honours_replacements:
        is_gone = await take_away(store, key, etag, honours_deletes=server.honours_deletes)
        if is_gone:
            await store.delete(keys)
        return is_gone
    tombstone = await condemn(store, key, shards, IfMatch(etag), now=server.now, by=by)
    if tombstone is None:
        return False
    await store.delete(keys)
    await take_away(store, key, tombstone, honours_deletes=server.honours_deletes)
    return True
