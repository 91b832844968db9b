"""DCP's storage reader over object storage.

Law: translates. No collectives unless a process group was given, so that one rank of many, or a subgroup, can
load alone.
"""

import io
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from cloudckpt.dcp.border import border
from cloudckpt.dcp.dtypes import dtype_of
from cloudckpt.dcp.pickles import prove_safe
from cloudckpt.dcp.tensors import TensorSink
from cloudckpt.engine import loop
from cloudckpt.engine.commit import read_manifest_blob
from cloudckpt.engine.read import ReadOptions, Stats, Wanted, read_regions
from cloudckpt.engine.regions import Locator, MemorySink
from cloudckpt.engine.sealing import open_manifest
from cloudckpt.errors import (
    CheckpointError,
    DtypeMismatchError,
    LoadFailedError,
    MissingKeyError,
    ShapeMismatchError,
    UsageError,
)
from cloudckpt.manifest import BytesEntry, Chunk, Manifest, TensorEntry, ValueEntry
from cloudckpt.ranges import Region
from cloudckpt.store.url import StoreOptions, check_url, open_store, with_overrides

log = logging.getLogger(__name__)


class ObjectStoreReader(StorageReader):
    """Loads a checkpoint from object storage, for ``dcp.load`` onto any mesh.

    Fetches the rows that the state dict asks for, straight into its tensors' memory where they are
    contiguous. After a failed load the state dict's tensors are undefined: load again before using them.

    Example:
        >>> dcp.load(state_dict, storage_reader=ObjectStoreReader("s3://bucket/run/step-100"))

    Attributes:
        stats: what loads through this reader did so far, on this rank.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        options: ReadOptions | None = None,
        store: StoreOptions | None = None,
        **overrides: Any,
    ) -> None:
        """Makes a reader; nothing is opened yet.

        Args:
            url: of the checkpoint, or None where each load gives ``checkpoint_id``.
            process_group: its first rank reads the manifest for all; every rank of it must load. Without one,
                each rank reads the manifest.
            options: how to read.
            store: how to reach the store.
            **overrides: any field of `ReadOptions`, `S3Options` or `RetryOptions`, by name.

        Raises:
            UsageError: an unknown or impossible option, a URL no store serves.
        """
        super().__init__()
        self._options, self._store = with_overrides(options or ReadOptions(), store, overrides)
        self._url = check_url(os.fspath(url)) if url is not None else None
        self._group = process_group
        self._manifest: Manifest | None = None
        self._failure: CheckpointError | None = None
        self.stats = Stats()

    @property
    def checkpoint_id(self) -> str | None:
        """The URL that is loaded from."""
        return self._url

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a store serves that URL."""
        try:
            check_url(os.fspath(checkpoint_id))
        except UsageError:
            return False
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Takes the URL of the next load."""
        if checkpoint_id is not None:
            self._url = check_url(os.fspath(checkpoint_id))

    def read_metadata(self) -> Metadata:
        """Reads the manifest.

        DCP would bury an error from here in an AssertionError of its own, so one is kept for
        `set_up_storage_reader` to raise.
        """
        self._manifest, self._failure = None, None
        try:
            with border(LoadFailedError, "reading the manifest"):
                self._manifest = self._read_manifest()
                return _metadata_of(self._manifest, str(self._url))
        except CheckpointError as e:
            self._failure = e
            return Metadata({}, planner_data={})

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,  # noqa: FBT001 - DCP's signature
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Raises what `read_metadata` ran into.

        Raises:
            CheckpointNotFoundError, NotCommittedError, ManifestError, StoreError: see `engine.commit`.
        """
        del metadata, is_coordinator, args, kwargs
        if self._failure is not None:
            raise self._failure

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fetches what the plan asks for; returns when it is in place.

        Raises:
            DtypeMismatchError: ``cast=False`` and a destination has another dtype; nothing was fetched.
            UnsafePickleError: a bytes item would load a class; tensors are loaded, no bytes item is.
            IntegrityError, StoreError: what was being loaded into is undefined.
        """
        with border(LoadFailedError, "the load"):
            if self._manifest is None or self._url is None:
                msg = "read_data without read_metadata; use dcp.load"
                raise UsageError(msg)
            locator = Locator(self._manifest, self._options)
            tensors = [
                _TensorItem.of(item, planner, locator, self._options)
                for item in plan.items
                if item.type == LoadItemType.TENSOR
            ]
            strings = [_BytesItem.of(item, locator) for item in plan.items if item.type == LoadItemType.BYTE_IO]
            url = self._url
            wanted = [w for w in (*(t.wanted for t in tensors), *(s.wanted for s in strings)) if w is not None]
            try:
                loop.run(lambda: self._fetch(url, wanted))
            except CheckpointError as e:
                e.add_note("the tensors that were being loaded into are undefined now; load again before using them")
                raise
            if not self._options.unsafe_pickle:
                for string in strings:
                    prove_safe(string.data, string.item.storage_index.fqn)
            for tensor in tensors:
                tensor.commit(planner)
            for string in strings:
                planner.load_bytes(string.item, io.BytesIO(string.data))
            log.info("loaded from %s: %s", url, self.stats)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    async def _fetch(self, url: str, wanted: list[Wanted]) -> None:
        async with open_store(url, self._store) as store:
            await read_regions(store, wanted, self._options, self.stats)

    def _read_manifest(self) -> Manifest:
        if self._url is None:
            msg = "no URL to load from; give one to ObjectStoreReader(...) or as checkpoint_id="
            raise UsageError(msg)
        url = self._url
        if self._group is None:
            return open_manifest(loop.run(lambda: self._get_manifest(url)), url, self._options)
        first = dist.get_rank(self._group) == 0
        found: list[bytes | CheckpointError | None] = [None]
        if first:
            try:
                with border(LoadFailedError, "reading the manifest"):
                    found = [loop.run(lambda: self._get_manifest(url))]
            except CheckpointError as e:
                found = [e]
        dist.broadcast_object_list(found, group=self._group, group_src=0)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        if found[0] is None:
            msg = "the first rank of the process group sent no manifest"
            raise LoadFailedError(msg)
        return open_manifest(found[0], url, self._options)

    async def _get_manifest(self, url: str) -> bytes:
        async with open_store(url, self._store) as store:
            return (await read_manifest_blob(store)).data


@dataclass(frozen=True, slots=True)
class _TensorItem:
    item: ReadItem
    resolved: torch.Tensor
    wanted: Wanted | None

    @classmethod
    def of(cls, item: ReadItem, planner: LoadPlanner, locator: Locator, options: ReadOptions) -> "_TensorItem":
        key = item.storage_index.fqn
        entry = locator.entry(key)
        if not isinstance(entry, TensorEntry):
            msg = f"{key!r} is not a tensor in this checkpoint"
            raise ShapeMismatchError(msg)
        chunk = _find_chunk(entry, item)
        region = Region(tuple(item.storage_offsets), tuple(item.lengths))
        resolved = planner.resolve_tensor(item)
        stored = dtype_of(entry.dtype)
        if tuple(resolved.shape) != region.sizes or not region.is_inside(chunk.sizes):
            msg = (
                f"{key!r}: a destination of {tuple(resolved.shape)} cannot take {region} of a chunk of {chunk.sizes}"
            )
            raise ShapeMismatchError(msg)
        if resolved.dtype != stored and not options.cast:
            msg = f"{key!r} is stored as {stored}, the destination is {resolved.dtype}, and cast=False"
            raise DtypeMismatchError(msg)
        sink = TensorSink(resolved, stored, chunk.sizes, region)
        read = locator.read_chunk(key, entry, chunk, region, is_direct=sink.memory is not None)
        return cls(item, resolved, Wanted(repr(key), read, sink) if region.numel else None)

    def commit(self, planner: LoadPlanner) -> None:
        torch.autograd.graph.increment_version(self.resolved)  # its memory was written behind autograd's back
        planner.commit_tensor(self.item, self.resolved)


@dataclass(frozen=True, slots=True)
class _BytesItem:
    item: ReadItem
    data: memoryview
    wanted: Wanted | None

    @classmethod
    def of(cls, item: ReadItem, locator: Locator) -> "_BytesItem":
        key = item.storage_index.fqn
        entry = locator.entry(key)
        match entry:
            case BytesEntry():
                sink = MemorySink(entry.nbytes)
                return cls(item, sink.memory, Wanted(repr(key), locator.read_bytes(key, entry), sink))
            case ValueEntry():
                saved = io.BytesIO()
                torch.save(entry.value, saved)
                return cls(item, saved.getbuffer(), None)
            case _:
                msg = f"{key!r} is a tensor in this checkpoint, and the state dict has none to load it into"
                raise ShapeMismatchError(msg)


def _find_chunk(entry: TensorEntry, item: ReadItem) -> Chunk:
    index = item.storage_index
    offsets = tuple(index.offset) if index.offset is not None else (0,) * len(entry.shape)
    hint = index.index
    if hint is not None and hint < len(entry.chunks) and entry.chunks[hint].offsets == offsets:
        return entry.chunks[hint]
    for chunk in entry.chunks:
        if chunk.offsets == offsets:
            return chunk
    msg = f"{index.fqn!r} has no chunk at {offsets} in this checkpoint"
    raise MissingKeyError(msg)


def _metadata_of(manifest: Manifest, url: str) -> Metadata:
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for key, entry in manifest.entries.items():
        if isinstance(entry, TensorEntry):
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            properties = TensorProperties(dtype=dtype_of(entry.dtype))
            state[key] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        else:
            state[key] = BytesStorageMetadata()
    paths = manifest.planner_paths
    planner_data = None if paths is None else {key: paths.get(key, (key,)) for key in manifest.entries}
    meta = StorageMeta(checkpoint_id=url, save_id=manifest.summary.save_id)
    return Metadata(state, planner_data=planner_data, storage_meta=meta)
