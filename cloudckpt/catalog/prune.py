"""Old steps removed by policy.

Law: each goes as `removal` says, and only if it is still the one that was judged. What is pinned, or may be being
read as the newest, stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cloudckpt.catalog.asking import Server
from cloudckpt.catalog.committed import Known, Seen, committed_in, manifest_key, steps_among
from cloudckpt.catalog.condemning import find_blob
from cloudckpt.catalog.pins import is_pinned, pinned_in
from cloudckpt.catalog.policies import CommittedStep, Policy
from cloudckpt.catalog.removal import remove_as_read
from cloudckpt.engine.session import Session
from cloudckpt.errors import ManifestError, ObjectNotFoundError, UsageError
from cloudckpt.layout import PINS, step_name
from cloudckpt.manifest import parse, parse_summary
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, check_url
from cloudckpt.threads import in_thread

GRACE_S = 600.0
"""Long enough for a load that began when the step was the newest (1 TiB at 2 GB/s), and short enough that a training
that saves every ten minutes keeps one step more than its policy says."""

_REMOVED = "it was removed meanwhile"
_REPLACED = "another save replaced it meanwhile"
_PINNED = "it was pinned meanwhile"


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
        pinned: those of ``kept`` that the policy does not keep, and a pin does.
        in_grace: those of ``kept`` that the next prune will remove, or a later one: somebody may be reading them.
        passed_over: why steps were neither judged nor touched, by their numbers: their manifest cannot be read, or
            was replaced or removed meanwhile.
    """

    root: str
    is_dry_run: bool
    removed: tuple[PrunedStep, ...]
    kept: tuple[int, ...]
    pinned: tuple[int, ...]
    in_grace: tuple[int, ...]
    passed_over: dict[int, str]


def prune(
    root: str,
    policy: Policy,
    *,
    dry_run: bool = True,
    grace_s: float = GRACE_S,
    known: Known | None = None,
    store: StoreOptions | None = None,
) -> Pruned:
    """Removes the committed steps below ``root`` that a policy does not keep.

    Never the newest, never one that is pinned (see `pin`), and none that somebody may be loading because it was the
    newest: one goes only after a newer one has been there for the grace, by the server's clock (a dry run, which
    writes nothing, goes by this machine's). A load that takes longer, or of a step chosen by its number, needs a pin.

    A step is gone as soon as a tombstone stands in its manifest's place. What is not committed is left to `sweep`,
    and so is what an interruption leaves, at any age. Safe beside saves, loads, sweeps and other prunes: a save of a
    step that is being removed commits all the same, and one that committed meanwhile stays.

    One listing and two requests for each step show what is there, and one listing more which are pinned, if any is.
    If anything should go, six requests tell the server's clock and what conditions the store honours. Then each step
    that goes takes five: its manifest is read, a pin is looked for, the manifest is replaced, its shards are deleted
    (one request for each 1,000), and the tombstone is. With ``known`` of earlier prunes it is one request for each
    step that is there and two for a new one, and none for the clock: a prune after each commit that finds 4 steps and
    removes one takes 11.

    On a store that does not honour ``If-Match`` no tombstone is put: the manifest is deleted first and then the
    shards. A save of that very step at that very moment may lose its manifest to it, and a sweep keeps what an
    interruption leaves, as it looks like a whole attempt.

    Args:
        root: of the run: its steps are ``step-N`` below it.
        policy: says what to keep.
        dry_run: only tell what would be removed.
        grace_s: seconds; 0 where nobody reads.
        known: what earlier prunes of this root learnt.
        store: how to reach the store.

    Raises:
        UsageError: a negative grace.
        StoreError: the store refused; steps that were removed by then are gone, all others are there.
    """
    with Session(check_url(root), store or StoreOptions()) as session:
        return session.run(lambda opened: prune_in(opened, policy, is_dry_run=dry_run, grace_s=grace_s, known=known))


async def prune_in(
    store: Store, policy: Policy, *, is_dry_run: bool, grace_s: float = GRACE_S, known: Known | None = None
) -> Pruned:
    """See `prune`; the store is rooted at its root."""
    if not grace_s >= 0:
        msg = f"grace_s={grace_s} must not be negative"
        raise UsageError(msg)
    known = known or Known()
    passed_over: dict[int, str] = {}
    names = [name async for name in store.list_names()]
    seen = await committed_in(store, store.url, steps_among(names), known, passed_over)
    unwanted = _unwanted(policy, [one.found for one in seen])
    pinned = (await pinned_in(store) if unwanted and PINS.rstrip("/") in names else frozenset()) & unwanted
    server = await known.server(store) if unwanted - pinned and not is_dry_run else None
    now = datetime.now(UTC) if server is None else server.now
    in_grace = _in_grace(seen, now, grace_s) & unwanted - pinned
    goes = [one.found for one in seen if one.found.step in unwanted - pinned - in_grace]
    if server is not None:
        for found in goes:
            refusal = await _remove(store, server, found)
            if refusal == _PINNED:
                pinned |= {found.step}
            elif refusal is not None:
                passed_over[found.step] = refusal
    went = [found for found in goes if found.step not in pinned]
    gone = {found.step for found in went}
    kept = tuple(one.found.step for one in seen if one.found.step not in gone)
    return Pruned(
        root=store.url,
        is_dry_run=is_dry_run,
        removed=tuple(_removed(found) for found in went if found.step not in passed_over),
        kept=kept,
        pinned=tuple(step for step in kept if step in pinned),
        in_grace=tuple(step for step in kept if step in in_grace),
        passed_over=passed_over,
    )


def _unwanted(policy: Policy, steps: Sequence[CommittedStep]) -> frozenset[int]:
    keeps = {found.step for found in (*steps[:1], *(policy.keep(steps) if steps else ()))}
    return frozenset(found.step for found in steps if found.step not in keeps)


def _in_grace(seen: Sequence[Seen], now: datetime, grace_s: float) -> frozenset[int]:
    """Those of which no newer one has been there for so long, of steps newest first."""
    young, oldest = set(), now
    for one in seen:
        if (now - oldest).total_seconds() < grace_s:
            young.add(one.found.step)
        oldest = min(oldest, one.modified)
    return frozenset(young)


def _removed(found: CommittedStep) -> PrunedStep:
    return PrunedStep(step=found.step, save_id=found.summary.save_id, nbytes=found.summary.stored_nbytes)


async def _remove(store: Store, server: Server, found: CommittedStep) -> str | None:
    """Removes a step, or says why not."""
    key = manifest_key(found.step)
    try:
        blob = await store.get(key)
        manifest = await in_thread(parse, blob.data, f"{store.url}/{key}")
    except ObjectNotFoundError:
        return _REMOVED
    except ManifestError as e:
        return f"its manifest cannot be read: {e}"
    if manifest.summary.save_id != found.summary.save_id:
        return _REMOVED if manifest.summary.is_tombstone else _REPLACED
    if await is_pinned(store, found.step):
        return _PINNED
    shards, place = [shard.key for shard in manifest.shards], f"{step_name(found.step)}/"
    if await remove_as_read(store, server, place, blob.etag, shards, by="prune"):
        return None
    return await _what_came(store, key)


async def _what_came(store: Store, key: str) -> str:
    """What happened to a manifest that is not there any more."""
    blob = await find_blob(store, key)
    if blob is None:
        return _REMOVED
    try:
        return _REMOVED if parse_summary(blob.data, f"{store.url}/{key}").is_tombstone else _REPLACED
    except ManifestError:
        return _REPLACED
