"""Old steps removed by policy.

Law: the manifest first, on the condition that it is still the one that was read; then exactly the shards it named.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from cloudckpt.catalog.policies import CommittedStep, Policy
from cloudckpt.catalog.summaries import read_summary
from cloudckpt.engine.session import Session
from cloudckpt.errors import (
    ManifestError,
    NotImplementedByStoreError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreUnavailableError,
)
from cloudckpt.layout import MANIFEST, step_name, step_of
from cloudckpt.manifest import parse
from cloudckpt.store.protocols import Blob, IfMatch, Store
from cloudckpt.store.url import StoreOptions, check_url
from cloudckpt.threads import in_thread

_CONCURRENCY = 16
"""Summaries that are read at a time."""

_TIMES = 3
"""A manifest is asked to go, where no answer comes."""


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
            another save replaced it meanwhile.
    """

    root: str
    is_dry_run: bool
    removed: tuple[PrunedStep, ...]
    kept: tuple[int, ...]
    passed_over: dict[int, str]


def prune(root: str, policy: Policy, *, dry_run: bool = True, store: StoreOptions | None = None) -> Pruned:
    """Removes the committed steps below ``root`` that a policy does not keep, and never the newest.

    What is not committed is left to `sweep`, and so is what an interruption leaves: a step is gone as soon as its
    manifest is.

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
    removed = []
    for found in steps:
        if found.step in keeps:
            continue
        if not is_dry_run:
            refusal = await _remove(store, found)
            if refusal is not None:
                passed_over[found.step] = refusal
                continue
        removed.append(PrunedStep(step=found.step, save_id=found.summary.save_id, nbytes=found.summary.stored_nbytes))
    return Pruned(
        root=store.url,
        is_dry_run=is_dry_run,
        removed=tuple(removed),
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


async def _remove(store: Store, found: CommittedStep) -> str | None:
    """Removes a step, or says why not."""
    key = _manifest_key(found.step)
    try:
        blob = await store.get(key)
        manifest = await in_thread(parse, blob.data, f"{store.url}/{key}")
    except ObjectNotFoundError:
        return "it was removed meanwhile"
    except ManifestError as e:
        return f"its manifest cannot be read: {e}"
    if manifest.summary.save_id != found.summary.save_id or not await _is_gone(store, key, blob):
        return "another save replaced it meanwhile"
    await store.delete([f"{step_name(found.step)}/{shard.key}" for shard in manifest.shards])
    return None


async def _is_gone(store: Store, key: str, blob: Blob) -> bool:
    """Deletes the manifest that was read, and says whether there is none now."""
    for remaining in reversed(range(_TIMES)):
        try:
            await store.delete_if(key, IfMatch(blob.etag))
        except NotImplementedByStoreError:
            await store.delete([key])
        except (PreconditionFailedError, ObjectNotFoundError):
            return not await _is_there(store, key)
        except StoreUnavailableError:  # it may be gone nevertheless: asking again tells
            if not remaining:
                raise
            continue
        return True
    raise AssertionError(key)


async def _is_there(store: Store, key: str) -> bool:
    try:
        await store.head(key)
    except ObjectNotFoundError:
        return False
    return True


def _manifest_key(step: int) -> str:
    return f"{step_name(step)}/{MANIFEST}"
