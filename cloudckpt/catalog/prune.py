"""Old steps removed by policy.

Law: a tombstone takes the manifest's place, on the condition that it is still the one that was read, and names what
it named; then exactly these shards go; last the tombstone.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from cloudckpt.catalog.asking import Server, ask_server
from cloudckpt.catalog.condemning import condemn, find_blob, take_away
from cloudckpt.catalog.policies import CommittedStep, Policy
from cloudckpt.catalog.summaries import read_summary
from cloudckpt.engine.session import Session
from cloudckpt.errors import ManifestError, ObjectNotFoundError
from cloudckpt.layout import MANIFEST, step_name, step_of
from cloudckpt.manifest import Manifest, parse, parse_summary
from cloudckpt.store.protocols import IfMatch, Store
from cloudckpt.store.url import StoreOptions, check_url
from cloudckpt.threads import in_thread

_CONCURRENCY = 16
"""Summaries that are read at a time."""

_REMOVED = "it was removed meanwhile"
_REPLACED = "another save replaced it meanwhile"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedStep:
    """A step that was removed, or would be.

    Attributes:
        step: its number.
        save_id: of the save that is gone with it.
        nbytes: of its shards.
    """

    step: int
    save_id: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What pruning did, or would do.

    Attributes:
        root: the URL that the steps lie below.
        is_dry_run: whether nothing was touched.
        removed: steps, newest first.
        kept: numbers of the committed steps that are still there, newest first.
        passed_over: why steps were neither judged nor touched, by their numbers: their manifest cannot be read, or
            was replaced or removed meanwhile.
    """

    root: str
    is_dry_run: bool
    removed: tuple[PrunedStep, ...]
    kept: tuple[int, ...]
    passed_over: dict[int, str]


def prune(root: str, policy: Policy, *, dry_run: bool = True, store: StoreOptions | None = None) -> Pruned:
    """Removes the committed steps below ``root`` that a policy does not keep, and never the newest.

    A step is gone as soon as a tombstone stands in its manifest's place. What is not committed is left to `sweep`,
    and so is what an interruption leaves, at any age. Safe beside saves, loads, sweeps and other prunes: a save of a
    step that is being removed commits all the same, and one that committed meanwhile stays.

    One listing and two requests for each step show what is there. If anything goes, six requests tell, once, what
    conditions the store honours. Then each step that goes takes four: its manifest is read and replaced, its shards
    are deleted (one request for each 1,000), and the tombstone is.

    On a store that does not honour ``If-Match`` no tombstone is put: the manifest is deleted first and then the
    shards. A save of that very step at that very moment may lose its manifest to it, and a sweep keeps what an
    interruption leaves, as it looks like a whole attempt.

    Args:
        root: of the run: its steps are ``step-N`` below it.
        policy: says what to keep.
        dry_run: only tell what would be removed.
        store: how to reach the store.

    Raises:
        StoreError: the store refused; steps that were removed by then are gone, all others are there.
    """
    with Session(check_url(root), store or StoreOptions()) as session:
        return session.run(lambda opened: prune_in(opened, policy, is_dry_run=dry_run))


async def prune_in(store: Store, policy: Policy, *, is_dry_run: bool) -> Pruned:
    """See `prune`; the store is rooted at its root."""
    passed_over: dict[int, str] = {}
    steps = await _committed(store, passed_over)
    keeps = {found.step for found in (*steps[:1], *(policy.keep(steps) if steps else ()))}
    goes = [found for found in steps if found.step not in keeps]
    if goes and not is_dry_run:
        server = await ask_server(store)
        for found in goes:
            refusal = await _remove(store, server, found)
            if refusal is not None:
                passed_over[found.step] = refusal
    return Pruned(
        root=store.url,
        is_dry_run=is_dry_run,
        removed=tuple(
            PrunedStep(step=found.step, save_id=found.summary.save_id, nbytes=found.summary.stored_nbytes)
            for found in goes
            if found.step not in passed_over
        ),
        kept=tuple(found.step for found in steps if found.step in keeps),
        passed_over=passed_over,
    )


async def _committed(store: Store, passed_over: dict[int, str]) -> Sequence[CommittedStep]:
    """The committed steps, newest first, by the first 4 KiB of their manifests."""
    names = [name async for name in store.list_names()]
    slots = asyncio.Semaphore(_CONCURRENCY)
    found: list[CommittedStep] = []

    async def look(step: int) -> None:
        key = _manifest_key(step)
        async with slots:
            try:
                size = (await store.head(key)).size
                summary = await read_summary(store, key, size, f"{store.url}/{key}")
            except ObjectNotFoundError:
                return
            except ManifestError as e:
                passed_over[step] = f"its manifest cannot be read: {e}"
                return
        if not summary.is_tombstone:
            found.append(CommittedStep(step=step, summary=summary))

    async with asyncio.TaskGroup() as group:
        for step in {step for name in names if (step := step_of(name)) is not None}:
            group.create_task(look(step))
    return sorted(found, key=lambda one: -one.step)


async def _remove(store: Store, server: Server, found: CommittedStep) -> str | None:
    """Removes a step, or says why not."""
    key = _manifest_key(found.step)
    try:
        blob = await store.get(key)
        manifest = await in_thread(parse, blob.data, f"{store.url}/{key}")
    except ObjectNotFoundError:
        return _REMOVED
    except ManifestError as e:
        return f"its manifest cannot be read: {e}"
    if manifest.summary.save_id != found.summary.save_id:
        return _REMOVED if manifest.summary.is_tombstone else _REPLACED
    shards = [f"{step_name(found.step)}/{shard.key}" for shard in manifest.shards]
    if not server.honours_replacements:
        if not await take_away(store, key, blob.etag, honours_deletes=server.honours_deletes):
            return _REPLACED
        await store.delete(shards)
        return None
    tombstone = await _replace(store, server, key, blob.etag, manifest)
    if tombstone is None:
        return await _what_came(store, key)
    await store.delete(shards)
    await take_away(store, key, tombstone, honours_deletes=server.honours_deletes)
    return None


async def _replace(store: Store, server: Server, key: str, etag: str, manifest: Manifest) -> str | None:
    """Puts a tombstone in the manifest's place, and returns its ETag; None where another object is there."""
    named = [shard.key for shard in manifest.shards]
    return await condemn(store, key, named, IfMatch(etag), now=server.now, by="prune")


async def _what_came(store: Store, key: str) -> str:
    """What happened to a manifest that is not there any more."""
    blob = await find_blob(store, key)
    if blob is None:
        return _REMOVED
    try:
        return _REMOVED if parse_summary(blob.data, f"{store.url}/{key}").is_tombstone else _REPLACED
    except ManifestError:
        return _REPLACED


def _manifest_key(step: int) -> str:
    return f"{step_name(step)}/{MANIFEST}"
