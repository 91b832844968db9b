"""The only place that makes a checkpoint exist: one conditional PutObject of its manifest.

Law: never multipart, rename or copy; what is in doubt is read back; what cannot be learnt is said so.
"""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Protocol

from awscrt.checksums import crc32c

from cloudckpt.engine.loop import shielded
from cloudckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    ChecksumRefusedError,
    CommitConflictError,
    CommitUnknownError,
    IntegrityError,
    NotCommittedError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreError,
    StoreUnavailableError,
)
from cloudckpt.layout import FRAMES, MANIFEST, SHARDS, shard_key
from cloudckpt.manifest import parse, parse_summary
from cloudckpt.store.protocols import Blob, Condition, Delete, Get, IfAbsent, IfMatch, List, Put
from cloudckpt.tombstone import swept_keys

log = logging.getLogger(__name__)
_IN_DOUBT = (PreconditionFailedError, ObjectNotFoundError, StoreUnavailableError, ChecksumRefusedError)
_WAIT_S = 0.2
_probed: set[str] = set()
"""Identities of the stores that were asked in this process whether they honour `IfAbsent`."""


class Commits(Get, Put, List, Delete, Protocol):
    """What committing asks of a store."""

    @property
    def url(self) -> str:
        """For messages."""
        ...

    @property
    def identity(self) -> str:
        """What `honours_conditions` is remembered for."""
        ...


class Reads(Get, List, Protocol):
    """What opening a checkpoint asks of a store."""

    @property
    def url(self) -> str:
        """For messages."""
        ...


@dataclass(frozen=True, slots=True)
class Replaced:
    """The manifest object that a commit replaces: a checkpoint's, or a tombstone."""

    etag: str
    shard_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A shard as its rank left it in the store."""

    key: str
    size: int
    etag: str


async def read_manifest_blob(store: Reads) -> Blob:
    """The manifest object of the committed checkpoint at the store's root, not parsed but for its summary.

    Raises:
        NotCommittedError: shards are there but no manifest.
        CheckpointNotFoundError: nothing is there.
        ManifestError: see `manifest.parse_summary`.
    """
    blob = await find_manifest_blob(store)
    if blob is not None:
        return blob
    async for _ in store.list_objects(SHARDS):
        msg = (
            f"{store.url} was never committed: there are shards but no {MANIFEST}. The save that wrote them "
            "is still under way, or it failed; load an earlier checkpoint"
        )
        raise NotCommittedError(msg)
    msg = f"there is no checkpoint at {store.url} (no {MANIFEST}); check the URL"
    raise CheckpointNotFoundError(msg)


async def find_manifest_blob(store: Reads) -> Blob | None:
    """As `read_manifest_blob`, but None where no checkpoint is committed."""
    try:
        blob = await store.get(MANIFEST)
    except ObjectNotFoundError:
        return None
    return None if parse_summary(blob.data, f"{store.url}/{MANIFEST}").is_tombstone else blob


async def prepare(store: Commits, *, overwrite: bool) -> Replaced | None:
    """Looks at what a save would replace, before anything is written.

    Returns:
        What to give to `commit`: None where no manifest is.

    Raises:
        CheckpointExistsError: a committed checkpoint is there, and ``overwrite`` is False.
        StoreError: the bucket cannot be read: the save would fail too.
    """
    try:
        blob = await store.get(MANIFEST)
    except ObjectNotFoundError:
        return None
    where = f"{store.url}/{MANIFEST}"
    if parse_summary(blob.data, where).is_tombstone:
        return Replaced(blob.etag, ())
    if not overwrite:
        msg = (
            f"{store.url} holds a committed checkpoint already; pass overwrite=True, or a Checkpointer "
            "on_exists='replace', to replace it"
        )
        raise CheckpointExistsError(msg)
    old = parse(blob.data, where)
    return Replaced(blob.etag, tuple(shard.key for shard in old.shards))


async def check(store: Reads, uploaded: Sequence[Uploaded]) -> None:
    """Looks, in one listing, whether all shards are there as they were uploaded: the last thing before a commit.

    Raises:
        IntegrityError: one is gone or another object; nothing was committed.
        StoreError: the store refused.
    """
    if not uploaded:
        return
    there = {found.key: found async for found in store.list_objects(SHARDS)}
    for shard in uploaded:
        found = there.get(shard.key)
        if found is None:
            problem = "is gone"
        elif found.size != shard.size:
            problem = f"has {found.size} bytes and not the {shard.size} that were uploaded"
        elif found.etag != shard.etag:
            problem = f"is another object (ETag {found.etag}, not {shard.etag})"
        else:
            continue
        msg = (
            f"not committed: {store.url}/{shard.key} was uploaded and {problem}. Did something else delete or write "
            "below this URL (a sweep with too short a grace, a lifecycle rule)? Save again"
        )
        raise IntegrityError(msg)


async def commit(
    store: Commits,
    data: bytes,
    save_id: str,
    *,
    replaces: Replaced | None,
    deadline_s: float,
    shard_keys: Sequence[str] = (),
) -> None:
    """Puts the manifest: when this returns, the checkpoint exists.

    Args:
        store: rooted at the checkpoint's URL; all shards are in it.
        data: the encoded manifest.
        save_id: as in the manifest; tells our own commit from another's.
        replaces: from `prepare`.
        shard_keys: of the shards in the manifest, or of those of this attempt: a tombstone that names none of them
            is replaced, for it was put to sweep another attempt.
        deadline_s: how long a commit in doubt is put again and read back.

    Raises:
        CommitConflictError: another save's manifest is there now. Nothing was overwritten.
        CommitUnknownError: the store gave no answer that tells. The shards are kept.
        StoreError: the store refused; nothing was committed.
    """
    condition: Condition = IfMatch(replaces.etag) if replaces else IfAbsent()
    end = time.monotonic() + deadline_s
    is_in_doubt = False
    while True:
        try:
            await store.put(MANIFEST, [memoryview(data)], condition=condition, crc32c=crc32c(data))
            break
        except _IN_DOUBT as e:
            is_in_doubt = is_in_doubt or isinstance(e, StoreUnavailableError)
            there = await _read_back(store, end, e)
            found = None if there is None else parse_summary(there.data, store.url)
            if there is None or found is None:
                if is_in_doubt or replaces is not None:  # it may have landed, and have been removed since
                    await _refuse_gone(store, shard_keys, e)
                condition = IfAbsent()  # what was to be replaced is gone
            elif found.save_id == save_id:
                if there.data == data:
                    break
                condition = IfMatch(there.etag)  # it landed, and not as it was sent
            elif found.is_tombstone:
                _refuse_swept(there.data, shard_keys, store.url, e)
                condition = IfMatch(there.etag)
            elif replaces is None or there.etag != replaces.etag:
                msg = (
                    f"another save committed to {store.url} first; its checkpoint stands, ours was not "
                    "committed. Let one job write to a URL, or save under another"
                )
                raise CommitConflictError(msg) from e
            if time.monotonic() >= end:
                if is_in_doubt:  # a request without an answer may still be carried out
                    msg = (
                        f"{store.url} is not committed now, but a manifest that was sent may still land: the store "
                        f"gave no answer for {deadline_s:g} s ({e}). Its shards were kept; look again before you "
                        "save to it"
                    )
                    raise CommitUnknownError(msg) from e
                e.add_note(f"not committed: the store refused the manifest for {deadline_s:g} s")
                raise
            await asyncio.sleep(random.uniform(0, _WAIT_S))  # noqa: S311 - no secret
    await _after_commit(store, replaces)


def _refuse_swept(tombstone: bytes, shard_keys: Sequence[str], url: str, refusal: StoreError) -> None:
    swept = set(shard_keys) & swept_keys(tombstone, url)
    if swept:
        msg = (
            f"{len(swept)} shards of this save to {url} were swept as leftovers before it committed, because nothing "
            "was heard of it for longer than the sweep's grace. Save again"
        )
        raise CommitConflictError(msg) from refusal


async def _refuse_gone(store: Commits, shard_keys: Sequence[str], doubt: StoreError) -> None:
    gone = set(shard_keys) - {found.key async for found in store.list_objects(SHARDS)}
    if gone:
        msg = (
            f"{len(gone)} shards of this save to {store.url} are gone, and so is its manifest: it was committed and "
            "removed again (a prune?), or its shards were. Save again"
        )
        raise CommitConflictError(msg) from doubt


async def _read_back(store: Commits, end: float, doubt: StoreError) -> Blob | None:
    try:
        async with asyncio.timeout(max(1.0, end - time.monotonic())):
            return await store.get(MANIFEST)
    except ObjectNotFoundError:
        return None
    except (StoreError, TimeoutError) as e:
        msg = (
            f"whether {store.url} was committed could not be learnt: the manifest was sent ({doubt}) and then "
            f"not readable ({e}). Its shards were kept; look again before you save to it"
        )
        raise CommitUnknownError(msg) from e


async def _after_commit(store: Commits, replaces: Replaced | None) -> None:
    """What may fail without harm: the checkpoint is there."""
    try:
        await _probe(store)
    except StoreError as e:
        log.warning("%s is committed; whether conditional writes work could not be asked: %s", store.url, e)
    try:
        if replaces and replaces.shard_keys:
            await store.delete(replaces.shard_keys)
    except StoreError as e:
        log.warning("%s is committed; the shards it replaced could not be deleted: %s", store.url, e)


async def _probe(store: Commits) -> None:
    """Asks once per bucket and process whether the store honours conditions: only trying tells.

    On an object of no attempt, that is removed again: the manifest may be gone by now, and must not come back.
    """
    if store.identity in _probed:
        return
    key = shard_key(token_hex(16), FRAMES)
    try:
        await store.put(key, [memoryview(b"?")])
        await store.put(key, [memoryview(b"?")], condition=IfAbsent())
    except PreconditionFailedError:
        _probed.add(store.identity)
        return
    finally:
        await shielded(lambda: store.delete([key]))
    _probed.add(store.identity)
    log.warning(
        "%s does not honour conditional writes: two saves that commit to one URL at the same time are not kept "
        "apart, the later one replaces the earlier",
        store.identity,
    )
