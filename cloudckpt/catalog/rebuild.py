"""A lost manifest, made anew from what plain shards say of themselves.

Law: shards are read, never written. What is proven whole is committed as any save is; what is ambiguous is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from secrets import token_hex

from cloudckpt.catalog.assembly import ambiguities, assemble, first_frames
from cloudckpt.catalog.headers import DescribedShard, describe_all
from cloudckpt.catalog.streaming import Stream, read_streams
from cloudckpt.engine import commit
from cloudckpt.engine.commit import Uploaded
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.session import Session
from cloudckpt.engine.write import WriteOptions
from cloudckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ManifestError,
    NotCommittedError,
    ObjectNotFoundError,
    UsageError,
)
from cloudckpt.layout import FRAMES, MANIFEST, SHARDS, is_own_shard_key
from cloudckpt.manifest import (
    FORMAT,
    VERSION,
    Entry,
    Manifest,
    PlannerPath,
    Shard,
    Summary,
    TensorEntry,
    encode,
    entry_problems,
    pack,
    parse_summary,
    plain_nbytes,
)
from cloudckpt.ranges import Range, split
from cloudckpt.store.protocols import ObjectInfo, Store
from cloudckpt.store.url import StoreOptions, check_url
from cloudckpt.threads import in_thread
from cloudckpt.tombstone import swept_keys

LOST = (
    "the user's metadata",
    "the step",
    "its metrics",
    "plain values kept in the manifest itself",
    "the order of the entries",
    "when and by what it was saved, and its save_id",
    "the checksums made when it was saved: those made now are of what is there now",
    "the seal, if it had one",
)
"""What only the manifest held."""

_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuiltShard:
    """A shard that the checkpoint is made of.

    Attributes:
        key: relative to the checkpoint's URL.
        rank: that wrote it.
        modified: by the server's clock.
        size: in bytes.
    """

    key: str
    rank: int
    modified: datetime
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What was rebuilt, or could be.

    Attributes:
        url: of the checkpoint.
        is_dry_run: whether nothing was written, and only headers were read.
        save_id: of the new manifest.
        shards: by rank. Whether those of different ranks are of the same save, nothing in them proves: look at
            when they were written.
        entry_count: tensors and byte strings.
        nbytes: of all of them.
        lost: what only the manifest held.
    """

    url: str
    is_dry_run: bool
    save_id: str
    shards: tuple[RebuiltShard, ...]
    entry_count: int
    nbytes: int
    lost: tuple[str, ...] = LOST


def rebuild(
    url: str, *, shards: Sequence[str] | None = None, dry_run: bool = False, store: StoreOptions | None = None
) -> Rebuilt:
    """Makes and commits a manifest for plain shards that lost theirs.

    Every tensor is proven to be there, each element once. Every byte is read, for the checksums. The save that wrote
    the shards must have ended: if it is alive and commits, one of the two loses. What a sweep condemned is never
    taken; what came after it is.

    Args:
        url: of the checkpoint.
        shards: keys of those to take, relative to the URL; all that are there if not given. Needed where several
            saves left shards.
        dry_run: read headers only, and write nothing.
        store: how to reach the store.

    Raises:
        CheckpointExistsError: a committed checkpoint is there.
        CheckpointNotFoundError: no shards are there.
        IntegrityError: a shard went, or was replaced, while the others were read.
        NotCommittedError: a sweep has begun to remove them; or they are not whole.
        UsageError: there are several of an item, or shards with extensions, so that ``shards`` must say which to
            take; or it names one that is not there.
        ManifestError: the manifest that is there is damaged, or a header is.
        CommitConflictError, CommitUnknownError: see `engine.commit.commit`.
        StoreError: the store refused.
    """
    with Session(check_url(url), store or StoreOptions()) as session:
        return session.run(lambda opened: rebuild_in(opened, shards=shards, is_dry_run=dry_run))


async def rebuild_in(store: Store, *, shards: Sequence[str] | None, is_dry_run: bool) -> Rebuilt:
    """See `rebuild`; the store is rooted at the checkpoint's URL."""
    chosen = _chosen(store.url, await _list_shards(store, await _condemned(store)), shards)
    described = await _describe(store, chosen)
    described.sort(key=lambda shard: (shard.rank, shard.modified, shard.key))
    problems = ambiguities(described)
    if problems:
        raise _ambiguous(store.url, problems, described)
    frame_size = WriteOptions().frame_size
    entries, paths = await in_thread(assemble, described, frame_size)
    made = _manifest([_unread(shard, frame_size) for shard in described], entries, paths)
    await in_thread(_refuse_incomplete, store.url, made, described)
    if not is_dry_run:
        read = await _read(store, described, frame_size)
        made = _manifest(read, entries, paths)
        await commit.check(store, [Uploaded(info.key, info.size, info.etag) for info in chosen])
        await commit.commit(
            store,
            encode(made),
            made.summary.save_id,
            replaces=None,
            shard_keys=[shard.key for shard in read],
            deadline_s=WriteOptions().commit_deadline_s,
        )
    return Rebuilt(
        url=store.url,
        is_dry_run=is_dry_run,
        save_id="" if is_dry_run else made.summary.save_id,
        shards=tuple(RebuiltShard(key=s.key, rank=s.rank, modified=s.modified, size=s.size) for s in described),
        entry_count=len(entries),
        nbytes=made.summary.nbytes,
    )


async def _condemned(store: Store) -> frozenset[str] | None:
    """The shards that a tombstone names; None where no manifest is at all. A checkpoint's is refused."""
    where = f"{store.url}/{MANIFEST}"
    try:
        blob = await store.get(MANIFEST)
    except ObjectNotFoundError:
        return None
    try:
        if parse_summary(blob.data, where).is_tombstone:
            return swept_keys(blob.data, where)
    except ManifestError as e:
        e.add_note("it is damaged and not lost; delete it before you rebuild it, if it cannot be had from elsewhere")
        raise
    msg = f"{store.url} holds a committed checkpoint; there is nothing to rebuild; verify tells whether it is sound"
    raise CheckpointExistsError(msg)


async def _list_shards(store: Store, condemned: frozenset[str] | None) -> dict[str, ObjectInfo]:
    found = {info.key: info async for info in store.list_objects(SHARDS) if is_own_shard_key(info.key)}
    left = {key: info for key, info in found.items() if key not in (condemned or ())}
    if not left and condemned is not None:
        msg = f"{store.url} was swept: a tombstone is there, and what is left of its shards is not to be used"
        raise NotCommittedError(msg)
    if not left:
        msg = f"there is no checkpoint at {store.url}, and no shards of one; check the URL"
        raise CheckpointNotFoundError(msg)
    return left


def _chosen(url: str, found: dict[str, ObjectInfo], shards: Sequence[str] | None) -> list[ObjectInfo]:
    missing = sorted(set(shards or ()) - set(found))
    if missing or (shards is not None and not shards):
        msg = (
            f"{url} has no shard {missing[0]!r} to take"
            if missing
            else "shards= names none; leave it out to take all"
        )
        raise UsageError(msg)
    chosen = [info for key, info in found.items() if shards is None or key in shards]
    opaque = [info.key for info in chosen if info.key.endswith(f".{FRAMES}")]
    if opaque:
        msg = (
            f"{url} has {len(opaque)} shards with extensions, such as {opaque[0]}: where their frames lie only the "
            "manifest knew, so they cannot be rebuilt. Name the plain ones with shards= to rebuild what they hold"
        )
        raise UsageError(msg)
    return chosen


async def _describe(store: Store, chosen: Sequence[ObjectInfo]) -> list[DescribedShard]:
    described = await describe_all(store, chosen, store.url)
    damaged = [error for error in described if isinstance(error, ManifestError)]
    if damaged:
        damaged[0].add_note(f"{len(damaged)} of {len(described)} shards have no sound header")
        raise damaged[0]
    return [shard for shard in described if isinstance(shard, DescribedShard)]


def _ambiguous(url: str, problems: Sequence[str], described: Sequence[DescribedShard]) -> CheckpointError:
    return UsageError(
        f"{url} has shards of more than one save, and nothing in them tells which belong together: "
        f"{'; '.join(problems[:3])}. Say which to take, one save's of each rank, with shards=[...]:"
        + _listing(described)
    )


def _refuse_incomplete(url: str, made: Manifest, described: Sequence[DescribedShard]) -> None:
    problems = [
        f"{key!r}: {problem}" for key, entry in made.entries.items() for problem in entry_problems(entry, made.shards)
    ]
    if problems:
        msg = (
            f"the shards of {url} are no whole checkpoint, {len(problems)} problem(s): {'; '.join(problems[:3])}. "
            "There are:" + _listing(described)
        )
        raise NotCommittedError(msg)


def _listing(described: Sequence[DescribedShard]) -> str:
    lines = [
        f"\n  rank {shard.rank}, {shard.modified.isoformat()}, {shard.size} bytes: {shard.key}" for shard in described
    ]
    more = f"\n  ... and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "".join(lines[:_SHOWN]) + more


async def _read(store: Store, described: Sequence[DescribedShard], frame_size: int) -> list[Shard]:
    """Reads every byte, and fills in the checksums."""
    frames = [[at for item in shard.items for at in split(item.at, frame_size)] for shard in described]
    streams = [
        Stream(shard.key, shard.size, sorted({bound for at in of for bound in (at.start, at.stop)} - {shard.size}))
        for shard, of in zip(described, frames, strict=True)
    ]
    await read_streams(store, streams, ReadOptions())
    for stream in streams:
        if stream.failure is not None:
            raise stream.failure
    return [
        Shard(
            key=shard.key,
            size=shard.size,
            crc32c=stream.crc32c(Range(0, shard.size)),
            frame_size=frame_size,
            frame_checksums=pack(map(stream.crc32c, of)),
        )
        for shard, stream, of in zip(described, streams, frames, strict=True)
    ]


def _unread(shard: DescribedShard, frame_size: int) -> Shard:
    """A shard as it will be, but for its checksums."""
    count = sum(-(-len(item.at) // frame_size) for item, _ in first_frames(shard, frame_size))
    return Shard(key=shard.key, size=shard.size, crc32c=0, frame_size=frame_size, frame_checksums=pack([0] * count))


def _manifest(shards: Sequence[Shard], entries: dict[str, Entry], paths: dict[str, PlannerPath]) -> Manifest:
    return Manifest(
        summary=Summary(
            format=FORMAT,
            version=VERSION,
            save_id=token_hex(16),
            created=datetime.now(UTC),
            writer=f"cloudckpt {version('cloudckpt')}, rebuilt",
            nbytes=plain_nbytes(entries),
            stored_nbytes=sum(shard.size for shard in shards),
            shard_count=len(shards),
            entry_count=len(entries),
            chunk_count=sum(len(entry.chunks) for entry in entries.values() if isinstance(entry, TensorEntry)),
        ),
        metadata={},
        planner_paths=paths,
        shards=tuple(shards),
        entries=entries,
    )
