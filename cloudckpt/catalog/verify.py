"""Whether a checkpoint is whole: what its manifest says held against what lies in storage.

Law: writes nothing. Every problem is told, and damage is told from a checkpoint that was replaced meanwhile.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cloudckpt.catalog.placing import Placed, Placing, frames_of, header_problems, placing_of
from cloudckpt.catalog.streaming import Stream, read_streams
from cloudckpt.convert.find import find, read_safetensors_header
from cloudckpt.engine.commit import find_manifest_blob, read_manifest_blob
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.sealing import open_manifest
from cloudckpt.engine.session import Session
from cloudckpt.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    ManifestError,
    ObjectNotFoundError,
    StoreError,
    UsageError,
)
from cloudckpt.layout import MANIFEST, SHARDS
from cloudckpt.manifest import Manifest, Shard, parse_summary, unpack
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import GetRange, Store
from cloudckpt.store.url import StoreOptions, check_url
from cloudckpt.threads import in_thread

_HEADERS = 4
"""Headers that are read at a time, each of 64 MiB at most, if it is ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was found.

    Attributes:
        url: of the checkpoint.
        is_deep: whether every byte was read, or only what is there was looked at.
        shard_count: that the manifest names.
        nbytes: of these shards that were found, as stored; all of them were read if ``is_deep``.
        problems: each with what is damaged, and where; none if it is sound.
    """

    url: str
    is_deep: bool
    shard_count: int
    nbytes: int
    problems: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def verify(
    url: str, *, deep: bool = False, options: ReadOptions | None = None, store: StoreOptions | None = None
) -> Verification:
    """Holds what a checkpoint's manifest says against what lies in storage.

    Without ``deep`` one GET and one listing: every shard is there with its size, and what the manifest says of
    entries, chunks and frames does not contradict itself. With it every byte is read and held against its checksums,
    so that no change of any byte goes unseen.

    Args:
        url: of a committed checkpoint of cloudckpt.
        deep: read every byte.
        options: how to read: ``concurrency``, ``max_inflight_nbytes``, and ``keys`` and ``require_seal`` to prove an
            encrypted checkpoint's manifest authentic. No key is needed for anything else.
        store: how to reach the store.

    Raises:
        NotCommittedError, CheckpointNotFoundError: no checkpoint is there, or it was removed meanwhile.
        ManifestError: its manifest is damaged.
        EncryptionKeyError, IntegrityError: see `engine.sealing.open_manifest`.
        UsageError: it is a checkpoint of others, which carries no checksums of ours.
        CheckpointChangedError: it was replaced by another save meanwhile; verify again.
        StoreError: the store refused.
    """
    url, options, store = check_url(url), options or ReadOptions(), store or StoreOptions()
    with Session(url, store) as session:
        try:
            blob = session.run(read_manifest_blob)
        except CheckpointNotFoundError:
            _refuse_foreign(url, options, store)
            raise
        manifest = open_manifest(blob.data, f"{url}/{MANIFEST}", options)
        nbytes, problems = session.run(lambda opened: _verify_in(opened, manifest, deep=deep, options=options))
    return Verification(
        url=url, is_deep=deep, shard_count=len(manifest.shards), nbytes=nbytes, problems=tuple(problems)
    )


async def _verify_in(store: Store, manifest: Manifest, *, deep: bool, options: ReadOptions) -> tuple[int, list[str]]:
    """The bytes of the shards that are there, and all problems."""
    placing = await in_thread(placing_of, manifest)
    sizes = {found.key: found.size async for found in store.list_objects(SHARDS)}
    problems = [*placing.problems, *_size_problems(manifest, sizes)]
    if deep:
        problems += await _deep_problems(store, manifest, placing, sizes, options)
    if problems:
        await _refuse_replaced(store, manifest.summary.save_id)
    return sum(sizes.get(shard.key, 0) for shard in manifest.shards), list(dict.fromkeys(problems))


def _refuse_foreign(url: str, options: ReadOptions, store: StoreOptions) -> None:
    contents, session = find(url, options, store)  # raises where nothing is
    session.close()
    msg = f"{url} is a checkpoint of {contents.format}: it carries no checksums of ours to verify it by"
    raise UsageError(msg)


async def _refuse_replaced(store: Store, save_id: str) -> None:
    """Raises if the checkpoint that has problems is not there any more."""
    blob = await find_manifest_blob(store)
    if blob is None:
        msg = f"{store.url} was removed while it was verified"
        raise CheckpointNotFoundError(msg)
    if parse_summary(blob.data, f"{store.url}/{MANIFEST}").save_id != save_id:
        msg = f"{store.url} was replaced by another save while it was verified; verify it again"
        raise CheckpointChangedError(msg)


def _size_problems(manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[str]:
    for shard in manifest.shards:
        size = sizes.get(shard.key)
        if size is None:
            yield f"{shard.key} is missing, of {shard.size} bytes"
        elif size != shard.size:
            yield f"{shard.key} has {size} bytes, not {shard.size}"


async def _deep_problems(
    store: Store, manifest: Manifest, placing: Placing, sizes: Mapping[str, int], options: ReadOptions
) -> list[str]:
    reads = [
        _ShardRead(shard, items, sizes[shard.key])
        for shard, items in zip(manifest.shards, placing.items, strict=True)
        if shard.key in sizes
    ]
    await read_streams(store, [read.stream for read in reads], options)
    problems = [problem for read in reads for problem in read.problems()]
    slots = asyncio.Semaphore(_HEADERS)

    async def look(read: _ShardRead) -> list[str]:
        async with slots:
            return await _header_problems(store, read, store.url)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(look(read)) for read in reads if not read.shard.extensions]
    return problems + [problem for task in tasks for problem in task.result()]


async def _header_problems(store: GetRange, read: "_ShardRead", where: str) -> list[str]:
    key, size = read.shard.key, read.size
    try:
        header = await read_safetensors_header(store, key, size, f"{where}/{key}")
    except ManifestError as e:
        return [f"{key}: {e}"]
    except StoreError as e:
        if isinstance(e, ObjectNotFoundError) or type(e) is StoreError:
            return []  # which reading its bytes has told
        raise
    return [f"{key}: {problem}" for problem in header_problems(read.items, header)]


class _ShardRead:
    """A shard being read, as far as it is there."""

    def __init__(self, shard: Shard, items: Sequence[Placed], size: int) -> None:
        self.shard = shard
        self.items = items
        self.size = size
        nbytes = min(size, shard.size)
        self._sizes = unpack(shard.frame_sizes)
        bounds = {bound for item in items for at in self._frames(item) for bound in (at.start, at.stop)}
        self.stream = Stream(shard.key, nbytes, sorted(bound for bound in bounds if bound < nbytes))

    def problems(self) -> Iterator[str]:
        """What the bytes show, once they were read."""
        key = self.shard.key
        if self.stream.failure is not None:
            yield f"{key} cannot be read: {self.stream.failure}"
            return
        expected = unpack(self.shard.frame_checksums)
        for item in self.items:
            for at, first, last in self._damage(item, expected):
                which = f"frame {first}" if first == last else f"frames {first} to {last}"
                yield (
                    f"{item.key!r} is damaged in bytes {at.start} to {at.stop} of {key} ({which} of {item.name!r}): "
                    "they do not match their checksums"
                )
        found = self.stream.crc32c(Range(0, self.stream.nbytes))
        if self.size == self.shard.size and found != self.shard.crc32c:
            yield f"{key} does not match its checksum: it is {found:08x}, not {self.shard.crc32c:08x}"

    def _frames(self, item: Placed) -> Iterator[Range]:
        return frames_of(self.shard, self._sizes, item)

    def _damage(self, item: Placed, expected: Sequence[int]) -> Iterator[tuple[Range, int, int]]:
        """Runs of damaged frames: their bytes, the first and the last of them."""
        run: tuple[Range, int, int] | None = None
        for i, at in enumerate(self._frames(item)):
            is_here = at.stop <= self.stream.nbytes
            if not is_here or self.stream.crc32c(at) == expected[item.frame + i]:
                continue
            if run is not None and run[2] == i - 1:
                run = Range(run[0].start, at.stop), run[1], i
                continue
            if run is not None:
                yield run
            run = at, i, i
        if run is not None:
            yield run
