"""New keys for encrypted checkpoints.

Law: no shard is read or written.
"""

from collections.abc import Mapping
from secrets import token_hex

from msgspec import UNSET
from msgspec.structs import replace

from cloudckpt.engine import commit, loop
from cloudckpt.engine.commit import Replaced, read_manifest_blob
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.sealing import open_manifest, seal
from cloudckpt.errors import UsageError
from cloudckpt.extensions.aesgcm import DataKey
from cloudckpt.extensions.keys import Keys, provider_of
from cloudckpt.manifest import Manifest
from cloudckpt.store.protocols import Blob
from cloudckpt.store.url import StoreOptions, check_url, open_store


def rewrap(
    url: str, key_id: str, keys: Keys, *, store: StoreOptions | None = None, commit_deadline_s: float = 120
) -> None:
    """Encrypts the data keys of a checkpoint under another key: key rotation. No shard is read or written.

    The manifest is replaced, on the condition that it is still the one that was read. Copies of the old one (a
    bucket with versions keeps them) still open with the old key.

    Args:
        url: of a checkpoint that was saved with encryption on.
        key_id: of the key to use from now on.
        keys: that know this key and the old one.
        store: how to reach the store.
        commit_deadline_s: how long a commit in doubt is looked into.

    Raises:
        UsageError: the checkpoint is not encrypted.
        EncryptionKeyError: a key is missing or wrong; nothing was changed.
        IntegrityError: the manifest is not authentic; nothing was changed.
        CommitConflictError: it was replaced or pruned meanwhile; ours was not committed.
    """
    url, provider = check_url(url), provider_of(keys)

    async def get() -> Blob:
        async with open_store(url, store) as opened:
            return await read_manifest_blob(opened)

    old = loop.run(get)
    found = open_manifest(old.data, url, ReadOptions(keys=keys))
    if found.seal is UNSET:
        msg = f"{url} was not saved with encryption on: it has no keys to encrypt under another"
        raise UsageError(msg)
    shards = tuple(
        replace(s, extension_params=tuple(_rewrapped(p, key_id, keys) for p in s.extension_params))
        for s in found.shards
    )
    made: Manifest = replace(found, summary=replace(found.summary, save_id=token_hex(16)), shards=shards, seal=UNSET)
    data = seal(made, DataKey.new(key_id, provider))

    async def put() -> None:
        async with open_store(url, store) as opened:
            await commit.commit(
                opened,
                data,
                made.summary.save_id,
                replaces=Replaced(old.etag, ()),  # its shards stay
                shard_keys=[shard.key for shard in shards],
                deadline_s=commit_deadline_s,
            )

    loop.run(put)


def _rewrapped(params: Mapping[str, str], key_id: str, keys: Keys) -> dict[str, str]:
    provider = provider_of(keys)
    return (
        DataKey.open(params, provider).rewrapped(key_id, provider).params if "wrapped_key" in params else dict(params)
    )
