"""One checkpoint removed, wherever it lies.

Law: as `prune` removes a step: a tombstone takes the manifest's place, on the condition that it is still the one that
was read; then exactly the shards it named go; last the tombstone.
"""

import os

from cloudckpt.catalog.asking import ask_server
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
    server = await ask_server(store)
    if not server.honours_replacements:
        if not await take_away(store, MANIFEST, blob.etag, honours_deletes=server.honours_deletes):
            return await _what_came(store)
        await store.delete(shards)
        return True
    tombstone = await condemn(store, MANIFEST, shards, IfMatch(blob.etag), now=server.now, by="remove")
    if tombstone is None:
        return await _what_came(store)
    await store.delete(shards)
    await take_away(store, MANIFEST, tombstone, honours_deletes=server.honours_deletes)
    return True


async def _what_came(store: Store) -> bool:
    """What is to be said of a manifest that is not there any more."""
    if await find_manifest_blob(store) is None:
        return False
    msg = f"{store.url} was saved again while it was being removed; what was saved stands"
    raise CheckpointChangedError(msg)
