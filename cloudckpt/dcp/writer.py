"""DCP's storage writer over object storage.

Law: translates. Nothing that belongs to one attempt lives in the plan: DCP's plan cache hands it out again.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from secrets import token_hex
from threading import get_ident
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from cloudckpt import layout, manifest
from cloudckpt.dcp.border import border
from cloudckpt.dcp.hooks import CommitInfo, HookFailure, WriterHook, check_hooks, run_post_commit, run_pre_commit
from cloudckpt.dcp.resolving import refuse_unstorable, resolve, take_values
from cloudckpt.dcp.results import assemble, pack, pack_values, planner_paths
from cloudckpt.dcp.state.values import room_of_rank
from cloudckpt.dcp.uploading import HereUploader, Uploader, UploadJob
from cloudckpt.engine import commit
from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.engine.commit import Uploaded
from cloudckpt.engine.deadline import Deadline
from cloudckpt.engine.framing import MAX_PARTS, AnyPlan, Item, plan_frames, plan_shards
from cloudckpt.engine.sealing import seal
from cloudckpt.engine.session import Session
from cloudckpt.engine.write import WriteOptions
from cloudckpt.errors import SaveFailedError, StoreError, UsageError
from cloudckpt.extensions.aesgcm import DataKey
from cloudckpt.extensions.chain import Rules
from cloudckpt.manifest import Entry, Manifest, PlannerPath, Shard, Summary
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, check_url, with_overrides

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A checkpoint that exists from now on.

    Attributes:
        info: what there is.
        hook_failures: of the hooks that failed after the commit.
    """

    info: CommitInfo
    hook_failures: tuple[HookFailure, ...]


@dataclass(slots=True)
class _Attempt:
    """One save: where it goes, whatever the writer is told meanwhile, what it replaces there, and what it wrote."""

    session: Session
    deadline: Deadline
    cancellation: Cancellation
    replaces: commit.Replaced | None = None
    key: DataKey | None = None
    shard_keys: tuple[str, ...] = ()
    prepared: "_Prepared | None" = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All that a commit takes."""

    manifest: bytes
    uploaded: list[Uploaded]
    info: CommitInfo


class ObjectStoreWriter(StorageWriter):
    """Saves a checkpoint straight to object storage.

    For ``dcp.save`` and ``dcp.async_save`` on any number of ranks. When the save returns, the checkpoint is
    committed; when it raises, there is none, or (with ``overwrite``) still the old one. One writer may save
    again and again, to the same URL or to others given as ``checkpoint_id``.

    Example:
        >>> dcp.save(state_dict, storage_writer=ObjectStoreWriter("s3://bucket/run/step-100"))
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        metadata: dict[str, Any] | None = None,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        inline_values: bool = False,
        hooks: Sequence[WriterHook] = (),
        uploader: Uploader | None = None,
        options: WriteOptions | None = None,
        store: StoreOptions | None = None,
        **overrides: Any,
    ) -> None:
        """Makes a writer; nothing is opened yet.

        Args:
            url: of the checkpoint, or None where each save gives ``checkpoint_id``.
            metadata: kept in the manifest: a dict that JSON can spell.
            step: the training step, kept in the manifest.
            metrics: numbers by name, kept in the manifest's summary (see `manifest.check_metrics`).
            inline_values: keep plain values of the state dict (see `dcp.values`) in the manifest, as JSON, instead
                of as pickled bytes in a shard. They are lost if the manifest is.
            hooks: run on the coordinator around the commit.
            uploader: uploads this rank's shards; None to do it in this process.
            options: how to write.
            store: how to reach the store.
            **overrides: any field of `WriteOptions`, `S3Options`, `RetryOptions` or `TrafficOptions`, by name.

        Raises:
            UsageError: an unknown or impossible option, a URL no store serves, metadata or metrics that JSON
                cannot spell, a hook that cannot be run.
        """
        super().__init__()
        self._options, self._store = with_overrides(options or WriteOptions(), store, overrides)
        self._url = check_url(os.fspath(url)) if url is not None else None
        self._rules = Rules(self._options.extensions)
        self._metadata = _checked(metadata or {})
        self._step = step
        self._metrics = manifest.check_metrics(metrics)
        self._inlines_values = inline_values
        self._hooks = check_hooks(hooks)
        self._uploader = uploader or HereUploader()
        self._attempts: dict[int, _Attempt] = {}  # by thread: a save runs in one, several may be under way

    @property
    def checkpoint_id(self) -> str | None:
        """The URL that is saved to."""
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
        """Takes the URL of the next save."""
        if checkpoint_id is not None:
            self._url = check_url(os.fspath(checkpoint_id))

    def storage_meta(self) -> StorageMeta:
        """What the planner may know of this save."""
        return StorageMeta(checkpoint_id=self._url)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        """Refuses what cannot work; the coordinator looks at what is there. Nothing is written.

        Args:
            is_coordinator: whether this rank commits.
            *args: DCP's.
            **kwargs: DCP's; and ``cancellation``, a `Cancellation` of this save.

        Raises:
            UsageError: no URL, or ``use_collectives=False``.
            CheckpointExistsError: a committed checkpoint is there and ``overwrite`` is off.
            EncryptionKeyError, MissingLibraryError: encryption is on and cannot be done.
            StoreError: the bucket cannot be reached.
        """
        del args
        with border(SaveFailedError, "setting up the save"):
            if self._url is None:
                msg = "no URL to save to; give one to ObjectStoreWriter(...) or as checkpoint_id="
                raise UsageError(msg)
            if not kwargs.get("use_collectives", True):
                msg = (
                    "dcp.save(use_collectives=False) would commit each rank's part by itself; cloudckpt commits "
                    "one checkpoint for all ranks. Save with collectives"
                )
                raise UsageError(msg)
            attempt = _Attempt(
                Session(self._url, self._store),
                Deadline(self._options.deadline_s),
                kwargs.get("cancellation") or Cancellation(),
            )
            attempt.cancellation.refuse()
            if is_coordinator:
                overwrite = self._options.overwrite
                attempt.key = self._rules.new_data_key()
                attempt.replaces = attempt.session.run(lambda store: commit.prepare(store, overwrite=overwrite))
            self._attempts[get_ident()] = attempt

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuses what cannot be stored, by what the plan knows of it."""
        with border(SaveFailedError, "planning the save"):
            for item in plan.items:
                refuse_unstorable(item)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing to add."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Uploads this rank's items; returns when they are up."""
        with border(SaveFailedError, "the save"):
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
            plan, values = take_values(plan, planner, room_of_rank(ranks) if self._inlines_values else 0)
            written, items, sources = resolve(plan, planner)
            plans = self._plan(items, [w.key for w in written], rank)
            attempt = self._attempt()
            attempt.shard_keys = tuple(planned.key for planned in plans)
            shards = self._uploader.upload(
                UploadJob(
                    session=attempt.session,
                    options=self._options,
                    deadline=attempt.deadline,
                    cancellation=attempt.cancellation,
                    plans=plans,
                    items=items,
                    sources=sources,
                )
            )
            results = [pack(p, shard, written) for p, shard in zip(plans, shards, strict=True)]
            results += pack_values(values)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commits: `prepare_commit`, then `commit` (coordinator only)."""
        self.prepare_commit(metadata, results)
        self.commit()

    def prepare_commit(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Makes the manifest, and runs the hooks that come before the commit (coordinator only).

        Args:
            metadata: of the global plan.
            results: of every rank's `write_data`.

        Raises:
            SaveFailedError, UsageError: what ranks wrote is not what was planned, or cannot be told without pickle.
            SaveCancelledError: the save was cancelled.
            CheckpointError: from a hook.
        """
        with border(SaveFailedError, "preparing the commit"):
            shards, etags, entries = assemble(metadata, results)
            made = self._manifest(shards, entries, planner_paths(metadata))
            attempt = self._attempt()
            attempt.prepared = _Prepared(
                manifest.encode(made) if attempt.key is None else seal(made, attempt.key),
                [Uploaded(s.key, s.size, etag) for s, etag in zip(shards, etags, strict=True)],
                _info(made, attempt.session.url),
            )
            run_pre_commit(self._hooks, attempt.prepared.info)
            attempt.cancellation.refuse()

    def commit(self) -> Committed:
        """Puts the manifest (coordinator only): when this returns, the checkpoint exists.

        Raises:
            IntegrityError: a shard is not there as it was uploaded.
            CommitConflictError, CommitUnknownError, StoreError: see `engine.commit.commit`.
        """
        with border(SaveFailedError, "the commit"):
            attempt = self._attempt()
            prepared = attempt.prepared
            if prepared is None:
                msg = "commit without prepare_commit"
                raise UsageError(msg)

            async def put(store: Store) -> None:
                async with attempt.deadline.kept():
                    await commit.check(store, prepared.uploaded)
                await commit.commit(
                    store,
                    prepared.manifest,
                    prepared.info.save_id,
                    replaces=attempt.replaces,
                    shard_keys=[shard.key for shard in prepared.uploaded],
                    deadline_s=self._options.commit_deadline_s,
                )

            attempt.session.run(put)
            info = prepared.info
            log.info(
                "saved %s: %d bytes in %d shards, %d entries",
                info.url,
                info.nbytes,
                info.shard_count,
                info.entry_count,
            )
            failures = tuple(run_post_commit(self._hooks, info))
            for failure in failures:
                log.warning("%s is committed; %s", info.url, failure)
            return Committed(info=info, hook_failures=failures)

    def discard(self) -> None:
        """Deletes the shards that this rank uploaded for a save that will not be committed.

        Only for a save of which every rank knows that its commit was never tried. What cannot be deleted stays, for
        `cloudckpt sweep`.
        """
        attempt = self._attempts.pop(get_ident(), None)
        if attempt is None or not attempt.shard_keys:
            return
        keys = attempt.shard_keys
        try:
            attempt.session.run(lambda store: store.delete(keys))
        except StoreError as e:
            log.warning("shards of a failed save to %s stay until they are swept: %s", attempt.session.url, e)

    def _plan(self, items: list[Item], keys: list[str], rank: int) -> list[AnyPlan]:
        """The rank's shards: for each chain of extensions its own."""
        options = self._options
        plans: list[AnyPlan] = []
        for chain, chosen in self._rules.group(keys):
            if chain.extensions:
                plans += plan_frames(
                    items,
                    chosen,
                    chain,
                    frame_size=options.frame_size,
                    new_key=lambda: layout.shard_key(token_hex(16), layout.FRAMES),
                    max_size=MAX_PARTS * options.frames_part_size // 2,
                )
            else:
                plans += plan_shards(
                    items,
                    chosen,
                    rank=rank,
                    frame_size=options.frame_size,
                    new_token=lambda: token_hex(16),
                    key_of=lambda token: layout.shard_key(token, layout.SAFETENSORS),
                )
        return plans

    def _manifest(
        self, shards: tuple[Shard, ...], entries: dict[str, Entry], paths: dict[str, PlannerPath] | None
    ) -> Manifest:
        chunks = [c for e in entries.values() if isinstance(e, manifest.TensorEntry) for c in e.chunks]
        return Manifest(
            summary=Summary(
                format=manifest.FORMAT,
                version=manifest.VERSION,
                save_id=token_hex(16),
                created=datetime.now(UTC),
                writer=f"cloudckpt {version('cloudckpt')}, torch {torch.__version__}",
                step=self._step,
                nbytes=manifest.plain_nbytes(entries),
                stored_nbytes=sum(s.size for s in shards),
                shard_count=len(shards),
                entry_count=len(entries),
                chunk_count=len(chunks),
                metrics=self._metrics,
            ),
            metadata=self._metadata,
            planner_paths=paths,
            shards=shards,
            entries=entries,
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but the saves under way: what goes to another process begins none of them."""
        return self.__dict__ | {"_attempts": {}}

    def _attempt(self) -> _Attempt:
        try:
            return self._attempts[get_ident()]
        except KeyError:
            msg = "write_data or finish without set_up_storage_writer in the same thread; use dcp.save"
            raise UsageError(msg) from None


def _info(made: Manifest, url: str) -> CommitInfo:
    summary = made.summary
    return CommitInfo(
        url=url,
        step=summary.step,
        metadata=made.metadata,
        save_id=summary.save_id,
        created=summary.created,
        nbytes=summary.nbytes,
        stored_nbytes=summary.stored_nbytes,
        shard_count=summary.shard_count,
        entry_count=summary.entry_count,
    )


def _checked(metadata: dict[str, Any]) -> dict[str, Any]:
    try:
        as_read = msgspec.json.decode(msgspec.json.encode(metadata))
    except (TypeError, ValueError) as e:
        msg = f"metadata= must be what JSON can spell: {e}"
        raise UsageError(msg) from e
    if as_read != metadata:
        msg = "metadata= holds values that JSON would read back as others (tuples, bytes, dates, keys not text)"
        raise UsageError(msg)
    return metadata
