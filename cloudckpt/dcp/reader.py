"""DCP's storage reader over object storage.

Law: translates. No collectives unless a process group was given, so that one rank of many, or a subgroup, can
load alone.
"""

import logging
import os
import time
from collections.abc import Mapping
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
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from cloudckpt.convert.find import find, manifest_contents
from cloudckpt.dcp.border import border
from cloudckpt.dcp.dtypes import dtype_of
from cloudckpt.dcp.loading import Loading
from cloudckpt.dcp.ranks.info import rank_and_world_size
from cloudckpt.dtypes import DTYPES
from cloudckpt.engine import telemetry
from cloudckpt.engine.access import Access
from cloudckpt.engine.commit import read_manifest_blob
from cloudckpt.engine.contents import Contents
from cloudckpt.engine.read import ReadOptions, Stats
from cloudckpt.engine.session import Session
from cloudckpt.engine.tracing import FETCH, PLAN, Outcome, Recorder
from cloudckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    IntegrityError,
    LoadFailedError,
    NotCommittedError,
    StoreError,
    UsageError,
)
from cloudckpt.manifest import TensorEntry
from cloudckpt.progress import Progress, show_size, shown
from cloudckpt.selection import Rename, select
from cloudckpt.store.url import StoreOptions, check_url, with_overrides

log = logging.getLogger(__name__)

_AFTER_FAILURE = {
    False: "the tensors that were being loaded into are undefined now; load again before using them",
    True: "the tensors that were being loaded into hold, frame by frame, what they held or what was saved",
}
"""By whether nothing was placed before it was verified."""


class ObjectStoreReader(StorageReader):
    """Loads a checkpoint from object storage, for ``dcp.load`` onto any mesh.

    Fetches the rows that the state dict asks for, straight into its tensors' memory where they are
    contiguous. After a failed load the state dict's tensors are undefined: load again before using them. With
    ``verify="before"`` each part of them then holds what it held, or what was saved.

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
        rename: Rename | None = None,
        progress: Progress = False,
        options: ReadOptions | None = None,
        store: StoreOptions | None = None,
        **overrides: Any,
    ) -> None:
        """Makes a reader; nothing is opened yet.

        Args:
            url: of the checkpoint, or None where each load gives ``checkpoint_id``.
            process_group: its first rank reads the manifest for all; every rank of it must load. Without one,
                each rank reads the manifest.
            rename: from a key in the checkpoint to the name that the state dict has for it: a mapping, or a function.
            progress: show how far the coordinator's reading has come: True for a bar where stderr is a terminal, and
                lines in the log elsewhere; or a function, given bytes that are done and bytes in all.
            options: how to read.
            store: how to reach the store.
            **overrides: any field of `ReadOptions`, `S3Options`, `RetryOptions` or `TrafficOptions`, by name.

        Raises:
            UsageError: an unknown or impossible option, a URL no store serves.
        """
        super().__init__()
        self._options, self._store = with_overrides(options or ReadOptions(), store, overrides)
        self._url = check_url(os.fspath(url)) if url is not None else None
        self._group = process_group
        self._rename = rename
        self._progress = progress
        self._is_coordinator = False
        self._recorder: Recorder | None = None
        self._access: Access | None = None
        self._keys: Mapping[str, str] = {}
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
        self._close()
        self._failure = None
        recorder = self._begun()
        try:
            with border(LoadFailedError, "reading the manifest"), recorder.step(PLAN):
                return self._read_metadata()
        except CheckpointError as e:
            self._close()
            self._failure = e
            self._tell(None, e)
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
        del metadata, args, kwargs
        self._is_coordinator = is_coordinator
        if self._failure is not None:
            raise self._failure

    def _close(self) -> None:
        if self._access is not None:
            self._access.close()
            self._access = None

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
            IntegrityError, StoreError: what was being loaded into is undefined, unless ``verify="before"``.
        """
        access, self._access = self._access, None
        try:
            with border(LoadFailedError, "the load"):
                if access is None:
                    msg = "read_data without read_metadata; use dcp.load"
                    raise UsageError(msg)
                with access:
                    self._load(plan, planner, access)
        except CheckpointError as e:
            self._tell(access, e)
            raise
        self._tell(access)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _load(self, plan: LoadPlan, planner: LoadPlanner, access: Access) -> None:
        loading = Loading(plan, planner, access.contents, self._keys, self._options)
        try:
            with shown(f"loading {self._url}", self._is_coordinator and self._progress) as report:
                access.recorder.report = report
                access.read(loading.asks, loading.build)
        except (IntegrityError, StoreError) as e:
            e.add_note(_AFTER_FAILURE[self._options.verify == "before"])
            raise
        loading.commit()

    def fetch_manifest(self) -> bytes | None:
        """The manifest, for one rank to give to all: each hands it to `read_metadata_from`.

        Returns:
            None where there is none of cloudckpt's; it may be a checkpoint of others, which each rank looks for.

        Raises:
            NotCommittedError, ManifestError, StoreError: see `engine.commit.read_manifest_blob`.
        """
        with border(LoadFailedError, "reading the manifest"), Session(self._checked_url(), self._store) as session:
            try:
                return bytes(session.run(read_manifest_blob).data)
            except NotCommittedError:
                raise
            except CheckpointNotFoundError:
                return None

    def read_metadata_from(self, data: bytes | None) -> Metadata:
        """As `read_metadata`, from what `fetch_manifest` returned on whichever rank; raises what it runs into."""
        self._close()
        recorder = self._begun()
        with border(LoadFailedError, "reading the manifest"), recorder.step(PLAN):
            return self._read_metadata_from(data)

    def _read_metadata(self) -> Metadata:
        if self._group is None:
            return self._opened(*find(self._checked_url(), self._options, self._store))
        found: list[bytes | CheckpointError | None] = [None]
        if dist.get_rank(self._group) == 0:
            try:
                found = [self.fetch_manifest()]
            except CheckpointError as e:
                found = [e]
        dist.broadcast_object_list(found, group=self._group, group_src=0)
        if isinstance(found[0], CheckpointError):
            raise found[0]
        return self._read_metadata_from(found[0])

    def _read_metadata_from(self, data: bytes | None) -> Metadata:
        url = self._checked_url()
        if data is None:
            return self._opened(*find(url, self._options, self._store))
        return self._opened(manifest_contents(data, url, self._options), Session(url, self._store))

    def _opened(self, contents: Contents, session: Session) -> Metadata:
        rank, world_size = rank_and_world_size()
        self._access = Access(
            contents,
            session,
            self._options,
            self.stats,
            recorder=self._recorder,
            rank=rank,
            world_size=world_size,
        )
        self._keys = select(contents.entries, rename=self._rename).keys
        return _metadata_of(contents, self._keys, str(self._url))

    def _begun(self) -> Recorder:
        self._recorder = Recorder(keeps_events=self._options.trace is not None, context=telemetry.current_context())
        return self._recorder

    def _tell(self, access: Access | None, error: CheckpointError | None = None) -> None:
        """Tells whoever wants to know that the load is over, and of what it failed, if it did."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return
        kind = "" if error is None else type(error).__name__
        outcome = Outcome(kind="load", url=str(self._url), error=kind) if access is None else access.outcome(kind)
        telemetry.tell(recorder, outcome)
        if error is None:
            fetched, seconds = recorder.tally(FETCH), time.time() - recorder.began
            log.info(
                "loaded from %s: %s, %s fetched in %d request(s), %.2f s, %s/s",
                outcome.url,
                show_size(outcome.nbytes),
                show_size(fetched.nbytes),
                fetched.count,
                seconds,
                show_size(round(fetched.nbytes / max(seconds, 1e-6))),
            )

    def __getstate__(self) -> dict[str, Any]:
        """All but a load under way: what goes to another process begins none."""
        return self.__dict__ | {"_access": None, "_recorder": None}

    def _checked_url(self) -> str:
        if self._url is None:
            msg = "no URL to load from; give one to ObjectStoreReader(...) or as checkpoint_id="
            raise UsageError(msg)
        return self._url


def _metadata_of(contents: Contents, keys: Mapping[str, str], url: str) -> Metadata:
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, key in keys.items():
        entry = contents.entries[key]
        if isinstance(entry, TensorEntry):
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in entry.chunks]
            if entry.dtype not in DTYPES:
                contents.entry(key)  # which says so
            properties = TensorProperties(dtype=dtype_of(entry.dtype))
            state[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        else:
            state[name] = BytesStorageMetadata()
    paths = contents.planner_paths
    planner_data = None
    if paths is not None:
        planner_data = {name: paths.get(key, (key,)) if name == key else (name,) for name, key in keys.items()}
    save_id = contents.summary.save_id if contents.summary is not None else None
    return Metadata(state, planner_data=planner_data, storage_meta=StorageMeta(checkpoint_id=url, save_id=save_id))
