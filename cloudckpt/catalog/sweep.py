"""Leftovers of saves that never committed: found, condemned, removed.

Law: nothing is touched that is not surely ours, nothing that is younger than the grace, and nothing that a commit
could still name: a tombstone comes first, and names every shard that is deleted where no checkpoint is.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypedDict

from cloudckpt.catalog.asking import Server, ask_server
from cloudckpt.catalog.assembly import could_be_whole
from cloudckpt.catalog.condemning import condemn, take_away
from cloudckpt.catalog.found import Found, look
from cloudckpt.catalog.headers import DescribedShard, describe_all
from cloudckpt.catalog.summaries import read_summary
from cloudckpt.engine.session import Session
from cloudckpt.errors import ManifestError, ObjectNotFoundError, UnsupportedVersionError, UsageError
from cloudckpt.layout import SAFETENSORS, SHARDS
from cloudckpt.manifest import Summary, parse, parse_summary
from cloudckpt.store.protocols import Blob, Condition, IfAbsent, IfMatch, Store
from cloudckpt.store.url import StoreOptions, check_url
from cloudckpt.threads import in_thread
from cloudckpt.tombstone import swept_keys

_CHANGED = "it changed while it was looked at: sweep again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """What was removed at one place, or would be.

    Attributes:
        prefix: of the place, relative to the root.
        why: it was left over.
        keys: of objects, relative to the root.
        uploads: keys of multipart uploads, relative to the root.
        nbytes: of the objects; what uploads hold is not known.
    """

    prefix: str
    why: str
    keys: tuple[str, ...]
    uploads: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What belongs to no checkpoint at one place, and was kept.

    Attributes:
        prefix: of the place, relative to the root.
        why: it was kept.
        is_rescuable: whether `rebuild` may make a checkpoint of it.
        keys: as of `Leftovers`.
        uploads: the same.
        nbytes: the same.
    """

    prefix: str
    why: str
    is_rescuable: bool
    keys: tuple[str, ...]
    uploads: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a sweep did, or would do.

    Attributes:
        root: the URL that was swept.
        is_dry_run: whether nothing was touched.
        removed: by place.
        kept: by place.
    """

    root: str
    is_dry_run: bool
    removed: tuple[Leftovers, ...]
    kept: tuple[Kept, ...]


def sweep(
    root: str,
    *,
    grace_s: float = 86_400,
    dry_run: bool = True,
    include_whole: bool = False,
    names: Sequence[str] = (),
    store: StoreOptions | None = None,
) -> Swept:
    """Removes what saves that never committed left below a URL: shards, and multipart uploads.

    Whatever else lies there is neither touched nor told of. Safe beside saves, loads and other sweeps: a save whose
    shards are swept cannot commit any more, and a checkpoint that is committed keeps all that it names. May be
    interrupted at any moment, and run again.

    A place is swept when its newest sign of life is older than the grace by the server's clock (a dry run, which
    writes nothing, goes by this machine's). A save that takes longer than that from its last upload to its commit, or
    for one upload (S3 tells when a multipart upload began, and not when it ended), loses what it wrote, and fails.

    All keys below the root are listed and held: a million take 350 MiB. ``names`` makes it less.

    Args:
        root: of a run, or of one checkpoint.
        grace_s: seconds.
        dry_run: only tell what would be removed.
        include_whole: remove also attempts whose plain shards are all there, or are of a newer format. Perhaps only
            their manifest is lost, and `rebuild` would rescue them.
        names: of places below the root, such as ``step-30``, to sweep and no others. On a store that does not honour
            conditional writes nothing else is swept, and no save to these places may be under way.
        store: how to reach the store.

    Raises:
        StoreError: the store refused; what was removed by then is gone, all else is there.
    """
    if not grace_s >= 0:
        msg = f"grace_s={grace_s} must not be negative"
        raise UsageError(msg)
    _refuse_elsewhere(names)
    with Session(check_url(root), store or StoreOptions()) as session:

        async def run(opened: Store) -> Swept:
            sweeping = Sweeping(opened, grace_s=grace_s, is_dry_run=dry_run, include_whole=include_whole, names=names)
            return await sweeping.run()

        return session.run(run)


class Sweeping:
    """One sweep at work."""

    def __init__(
        self, store: Store, *, grace_s: float, is_dry_run: bool, include_whole: bool, names: Sequence[str]
    ) -> None:
        """See `sweep`; the store is rooted at its root."""
        self._store = store
        self._grace = timedelta(seconds=grace_s)
        self._is_dry_run = is_dry_run
        self._include_whole = include_whole
        self._names = names
        self._asked: Server | None = None
        self._removed: list[Leftovers] = []
        self._kept: list[Kept] = []

    async def run(self) -> Swept:
        """Sweeps, place by place."""
        for found in await look(self._store, self._names):
            try:
                await self._sweep(found)
            except ObjectNotFoundError:
                self._keep(found, _CHANGED)
        return Swept(
            root=self._store.url,
            is_dry_run=self._is_dry_run,
            removed=tuple(self._removed),
            kept=tuple(self._kept),
        )

    async def _sweep(self, found: Found) -> None:
        if found.manifest is None:
            await self._sweep_uncommitted(found)
            return
        try:
            summary = await self._summary(found)
            if summary.is_tombstone:
                await self._sweep_swept(found)
            elif found.uploads or _differs(found, summary):
                await self._sweep_committed(found)
        except ManifestError as e:
            self._keep(found, f"nothing is touched beside a manifest that cannot be read: {e}")

    async def _sweep_uncommitted(self, found: Found) -> None:
        """No manifest: all of it is left over, unless it is young or may be whole."""
        await self._condemn_and_remove(found, found.keys, IfAbsent())

    async def _sweep_swept(self, found: Found) -> None:
        """A tombstone: what it names goes; beside it may lie what came later; at last it goes itself."""
        blob = await self._store.get(found.manifest_key)
        if not parse_summary(blob.data, self._where(found)).is_tombstone:
            self._keep(found, _CHANGED)
            return
        if not found.keys:
            await self._remove_tombstone(found, blob)
            return
        swept = swept_keys(blob.data, self._where(found))
        named, later = found.only(swept), found.only(found.keys - swept)
        if named.keys and await self._is_allowed(named, IfAbsent()):
            await self._remove(named, "condemned before, and not removed to the end")
        if later.keys:
            await self._condemn_and_remove(later, swept | later.keys, IfMatch(blob.etag))

    async def _condemn_and_remove(self, found: Found, keys: Collection[str], condition: Condition) -> None:
        if not await self._is_old(found) or not await self._is_allowed(found, condition):
            return
        hope = None if self._include_whole else await self._hope(found)
        if hope is not None:
            self._keep(found, hope, is_rescuable=True)
        elif await self._condemn(found, keys, condition):
            await self._remove(found, "never committed")
        else:
            self._keep(found, _CHANGED)

    async def _sweep_committed(self, found: Found) -> None:
        """A checkpoint: what its manifest does not name is of an attempt that lost, or that was overwritten."""
        await self._server()
        blob = await self._store.get(found.manifest_key)  # after the listing: an overwrite may have come since
        if parse_summary(blob.data, self._where(found)).is_tombstone:
            self._keep(found, _CHANGED)
            return
        named = {shard.key for shard in (await in_thread(parse, blob.data, self._where(found))).shards}
        left = Found(
            found.prefix,
            found.manifest,
            [shard for shard in found.shards if found.own_key(shard) not in named],
            found.uploads,  # one to a key that the manifest names was begun twice: its object stays
        )
        if left.keys and await self._is_old(left) and await self._is_allowed(left, IfAbsent()):
            await self._remove(left, "not named by the checkpoint that is there", spared=named)

    async def _remove_tombstone(self, found: Found, blob: Blob) -> None:
        server, there = await self._server(), found.manifest
        is_listed = there is not None and there.etag == blob.etag  # not a younger one that took its place since
        if there is None or not is_listed or server.now - there.modified < self._grace or not server.honours_deletes:
            return
        if not self._is_dry_run:
            is_gone = await take_away(self._store, found.manifest_key, blob.etag, honours_deletes=True)
            if not is_gone:
                return  # a save replaced it
        self._removed.append(
            Leftovers(
                prefix=found.prefix.rstrip("/"),
                why="a tombstone with nothing beside it",
                keys=(found.manifest_key,),
                uploads=(),
                nbytes=there.size,
            )
        )

    async def _condemn(self, found: Found, keys: Collection[str], condition: Condition) -> bool:
        """Puts a tombstone that names the shards, and says whether it is there."""
        if self._is_dry_run:
            return True
        server = await self._server()
        asked = condition if server.honours(condition) else None  # see `_is_allowed`
        return await condemn(self._store, found.manifest_key, keys, asked, now=server.now, by="sweep") is not None

    async def _remove(self, found: Found, why: str, *, spared: Collection[str] = ()) -> None:
        if not self._is_dry_run:
            async for upload in self._store.list_uploads(found.prefix + SHARDS):
                if found.own_key(upload) in found.keys:
                    await self._store.abort_upload(upload)
            # Also those of uploads: one may have been completed since it was listed.
            await self._store.delete(sorted(found.prefix + key for key in found.keys.difference(spared)))
        self._removed.append(Leftovers(why=why, **_told(found)))

    def _keep(self, found: Found, why: str, *, is_rescuable: bool = False) -> None:
        if found.keys:
            self._kept.append(Kept(why=why, is_rescuable=is_rescuable, **_told(found)))

    async def _is_old(self, found: Found) -> bool:
        """Whether the newest sign of life is older than the grace."""
        now = (await self._server()).now
        newest = max((sign or now for sign in found.signs_of_life()), default=now)
        if now - newest >= self._grace and None not in set(found.signs_of_life()):
            return True
        self._keep(found, f"its newest sign of life is of {newest.isoformat()}, younger than the grace")
        return False

    async def _is_allowed(self, found: Found, condition: Condition) -> bool:
        """Whether a commit that comes in between would be seen, or is not to be expected."""
        if self._names or (await self._server()).honours(condition):
            return True
        self._keep(found, "this store does not honour conditional writes: give the name of what is to be swept")
        return False

    async def _hope(self, found: Found) -> str | None:
        """Why a checkpoint may yet be made of it."""
        plain = [shard for shard in found.shards if shard.key.endswith(f".{SAFETENSORS}")]
        described = await describe_all(self._store, plain, self._store.url)
        for one in described:
            if isinstance(one, UnsupportedVersionError):
                return f"another release of cloudckpt wrote it, which may rebuild it: {one}"
        if could_be_whole([one for one in described if isinstance(one, DescribedShard)]):
            return "its plain shards are all there: perhaps only its manifest is lost, and rebuild would rescue it"
        return None

    async def _summary(self, found: Found) -> Summary:
        size = found.manifest.size if found.manifest is not None else 0
        return await read_summary(self._store, found.manifest_key, size, self._where(found))

    async def _server(self) -> Server:
        if self._asked is None:
            if self._is_dry_run:
                self._asked = Server(
                    now=datetime.now(UTC), honours_puts=True, honours_replacements=True, honours_deletes=True
                )
            else:
                self._asked = await ask_server(self._store)
        return self._asked

    def _where(self, found: Found) -> str:
        return f"{self._store.url}/{found.manifest_key}"


def _refuse_elsewhere(names: Sequence[str]) -> None:
    for name in names:
        if name.strip("/") and not {"", ".", ".."}.isdisjoint(name.strip("/").split("/")):
            msg = f"names= has {name!r}, which is no place below the root; give one such as 'step-30', or '' for it"
            raise UsageError(msg)


def _differs(found: Found, summary: Summary) -> bool:
    """Whether there is something else than a checkpoint's shards."""
    nbytes = sum(shard.size for shard in found.shards)
    return (len(found.shards), nbytes) != (summary.shard_count, summary.stored_nbytes)


class _Told(TypedDict):
    prefix: str
    keys: tuple[str, ...]
    uploads: tuple[str, ...]
    nbytes: int


def _told(found: Found) -> _Told:
    return {
        "prefix": found.prefix.rstrip("/"),
        "keys": tuple(shard.key for shard in found.shards),
        "uploads": tuple(upload.key for upload in found.uploads),
        "nbytes": sum(shard.size for shard in found.shards),
    }
