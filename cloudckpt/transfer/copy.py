"""A checkpoint to another place, as it is: byte for byte the same objects, committed there as here.

Law: sync. The target is a checkpoint when all of it is there, and only if the source is still what it was. What was
broken off goes on where it was: shards' names are never used again, so what is there is right.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from cloudckpt.convert import stock_dcp
from cloudckpt.convert.find import find
from cloudckpt.convert.safetensors import INDEX_SUFFIX
from cloudckpt.engine import commit, loop
from cloudckpt.engine.commit import Replaced, Uploaded, find_manifest_blob, read_manifest_blob
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.sealing import open_manifest
from cloudckpt.engine.session import Session
from cloudckpt.errors import (
    CheckpointChangedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ObjectNotFoundError,
)
from cloudckpt.layout import MANIFEST, SHARDS
from cloudckpt.manifest import Manifest
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import Blob, Get, Store
from cloudckpt.store.url import StoreOptions, check_url
from cloudckpt.transfer.assembly import Advance, Assembler
from cloudckpt.transfer.places import etags, open_both, refuse_inside
from cloudckpt.transfer.segments import Segment

_OBJECTS = 8
"""Objects that are made at a time."""

_COMMIT_DEADLINE_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """What was copied.

    Attributes:
        url: of the copy.
        object_count: objects that it consists of.
        nbytes: of all of them.
        there_nbytes: of those that had been copied before.
        sent_nbytes: bytes that were fetched and sent from here.
        copied_nbytes: bytes that the server copied by itself.
    """

    url: str
    object_count: int
    nbytes: int
    there_nbytes: int
    sent_nbytes: int
    copied_nbytes: int


@dataclass(frozen=True, slots=True)
class _RawReads:
    """Implements `assembly.Reads` over objects as they are."""

    store: Get

    async def read(self, wanted: Sequence[tuple[Segment, memoryview]]) -> None:
        for segment, into in wanted:
            await self.store.get_range(str(segment.key), segment.place, [into])


class CopyPlan:
    """What a copy would consist of, before anything is written; a context manager.

    Attributes:
        url: of the copy.
        sizes: bytes of each object, by key, in the order of writing; what makes a checkpoint of them is the last.
    """

    def __init__(
        self, url: str, to_url: str, *, store: StoreOptions | None = None, to_store: StoreOptions | None = None
    ) -> None:
        """Opens the checkpoint; see `copy`."""
        self._store, self._to_store = store or StoreOptions(), to_store or store or StoreOptions()
        source, self.url = check_url(url), check_url(to_url)
        refuse_inside(source, self.url)
        self._ours: tuple[Blob, Manifest] | None = None
        with Session(source, self._store) as session:
            blob = session.run(find_manifest_blob)
        if blob is None:
            self._source, self._target, self._names, self.sizes = _files(source, self.url, self._store)
            return
        manifest = open_manifest(blob.data, f"{source}/{MANIFEST}", ReadOptions())
        self._source, self._target, self._ours = source, self.url, (blob, manifest)
        self.sizes = {shard.key: shard.size for shard in manifest.shards} | {MANIFEST: len(blob.data)}

    @property
    def nbytes(self) -> int:
        """Of all objects."""
        return sum(self.sizes.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def run(self, *, overwrite: bool = False, server_side: bool = True, advance: Advance = lambda _: None) -> Copy:
        """Copies; see `copy`."""

        async def main() -> Copy:
            async with open_both(self._source, self._store, self._target, self._to_store) as (source, target):
                assembler = Assembler(target, source, _RawReads(source), server_side=server_side, advance=advance)
                if self._ours is None:
                    there = await self._copy_files(source, target, assembler, overwrite=overwrite)
                else:
                    there = await _copy_ours(source, target, assembler, *self._ours, overwrite=overwrite)
            return Copy(
                url=self.url,
                object_count=len(self.sizes),
                nbytes=self.nbytes,
                there_nbytes=there,
                sent_nbytes=assembler.moved.sent_nbytes,
                copied_nbytes=assembler.moved.copied_nbytes,
            )

        return loop.run(main)

    async def _copy_files(self, source: Store, target: Store, assembler: Assembler, *, overwrite: bool) -> int:
        *some, last = self.sizes
        there = await etags(target, [MANIFEST, last])
        if there[MANIFEST] or (there[last] and not overwrite):
            msg = f"{self.url} holds a checkpoint already; give another URL, or overwrite it"
            raise CheckpointExistsError(msg)
        witnesses = await etags(source, self._names.values())
        if there[last] and some:
            await target.delete([last])
        objects = {name: _object(self._names[name], size) for name, size in self.sizes.items()}
        await _make(assembler, {name: objects[name] for name in some}, {})

        async def refuse_changed() -> None:
            if await etags(source, self._names.values()) != witnesses:
                msg = f"{source.url} was changed while it was copied; the copy was not finished. Copy it again"
                raise CheckpointChangedError(msg)

        await assembler.make(last, [objects[last]], before_end=refuse_changed)
        return 0


def copy(
    url: str,
    to_url: str,
    *,
    overwrite: bool = False,
    server_side: bool = True,
    store: StoreOptions | None = None,
    to_store: StoreOptions | None = None,
    advance: Advance = lambda _: None,
) -> Copy:
    """Copies a checkpoint, of any format that `cloudckpt.open` opens, to another place or store.

    The copy is the same checkpoint, with the same ``save_id``; an encrypted one needs no key. Where both places are
    of one server that knows UploadPartCopy, large objects do not pass through here. Every shard's CRC32C is held
    against the manifest's before the copy is committed: here of what passes through, by the server of what it copies.
    A copy that was broken off goes on when it is made again; until then its shards are leftovers, which `sweep`
    removes.

    Args:
        url: of the checkpoint.
        to_url: where to; nothing is committed there, or ``overwrite`` is given.
        overwrite: replace the checkpoint that is there.
        server_side: let the server copy what it can.
        store: how to reach the source.
        to_store: how to reach the target; as the source if not given.
        advance: is told of bytes that are where they belong.

    Raises:
        CheckpointExistsError: another checkpoint is there. Nothing was written.
        CheckpointChangedError, CheckpointNotFoundError: the source was replaced or removed meanwhile.
        IntegrityError: a shard is not what the manifest says; nothing was committed.
        UsageError: one place lies in the other.
        StoreError: a store refused.
        CheckpointError: as from `cloudckpt.open`, of the source.
    """
    with CopyPlan(url, to_url, store=store, to_store=to_store) as plan:
        return plan.run(overwrite=overwrite, server_side=server_side, advance=advance)


async def _copy_ours(
    source: Store, target: Store, assembler: Assembler, blob: Blob, manifest: Manifest, *, overwrite: bool
) -> int:
    """Returns the bytes that had been copied before."""
    found = await find_manifest_blob(target)
    is_committed = found is not None and found.data == blob.data
    replaces = None if is_committed else await commit.prepare(target, overwrite=overwrite)
    there = {info.key: info.size async for info in target.list_objects(SHARDS)}
    lacking = [shard for shard in manifest.shards if there.get(shard.key) != shard.size]
    checksums = {shard.key: shard.crc32c for shard in lacking}
    try:
        await _make(assembler, {shard.key: _object(shard.key, shard.size) for shard in lacking}, checksums)
    except* ObjectNotFoundError:
        await _refuse_changed(source, blob)
        raise
    await _refuse_changed(source, blob)
    if not is_committed:
        await _commit(target, blob, manifest, replaces)
    done = sum(shard.size for shard in manifest.shards) - sum(shard.size for shard in lacking)
    return done + (len(blob.data) if is_committed else 0)


async def _commit(target: Store, blob: Blob, manifest: Manifest, replaces: Replaced | None) -> None:
    own = {shard.key for shard in manifest.shards}
    there = {info.key: info async for info in target.list_objects(SHARDS)}
    uploaded = [Uploaded(s.key, s.size, there[s.key].etag if s.key in there else "") for s in manifest.shards]
    await commit.check(target, uploaded)
    if replaces is not None:  # what both have stays
        replaces = Replaced(replaces.etag, tuple(key for key in replaces.shard_keys if key not in own))
    await commit.commit(
        target,
        blob.data,
        manifest.summary.save_id,
        replaces=replaces,
        shard_keys=sorted(own),
        deadline_s=_COMMIT_DEADLINE_S,
    )


async def _make(assembler: Assembler, objects: Mapping[str, Segment], checksums: Mapping[str, int]) -> None:
    slots = asyncio.Semaphore(_OBJECTS)

    async def make(key: str, whole: Segment) -> None:
        async with slots:
            await assembler.make(key, [whole], expected=checksums.get(key))

    async with asyncio.TaskGroup() as group:
        for key, whole in objects.items():
            group.create_task(make(key, whole))


async def _refuse_changed(source: Store, blob: Blob) -> None:
    try:
        now = await read_manifest_blob(source)
    except CheckpointNotFoundError as e:
        msg = f"{source.url} was removed while it was copied; nothing was committed"
        raise CheckpointNotFoundError(msg) from e
    if now.data != blob.data:
        msg = f"{source.url} was replaced while it was copied; nothing was committed. Copy it again"
        raise CheckpointChangedError(msg)


def _object(key: str, size: int) -> Segment:
    return Segment(source=key, whole=size, at=Range(0, size), key=key)


def _files(source: str, target: str, store: StoreOptions) -> tuple[str, str, dict[str, str], dict[str, int]]:
    """Of a checkpoint of others: the two places, its files there by their names here, and their sizes.

    What tells readers of the others is the last of them.
    """
    _, session = find(source, ReadOptions(), store)
    with session:
        place = session.url
        if place != source:  # it is one file
            name = source.removeprefix(f"{place}/")
            new = target.rpartition("/")[2] if target.endswith(name[name.rindex(".") :]) else name
            info = session.run(lambda opened: opened.head(name))
            return place, target.removesuffix(f"/{new}"), {new: name}, {new: info.size}

        async def look(opened: Store) -> dict[str, int]:
            return {found.key: found.size async for found in opened.list_objects() if "/" not in found.key}

        found = session.run(look)
    order = sorted(found, key=lambda name: (name == stock_dcp.METADATA or name.endswith(INDEX_SUFFIX), name))
    return place, target, {name: name for name in order}, {name: found[name] for name in order}
