"""DCP's storage writer over object storage.

Law: translates. Nothing that belongs to one attempt lives in the plan: DCP's plan cache hands it out again.
"""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from secrets import token_hex
from threading import get_ident
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from cloudckpt import manifest
from cloudckpt.dcp.attempt import Attempt, Committed, Prepared
from cloudckpt.dcp.border import border
from cloudckpt.dcp.hooks import CommitInfo, WriterHook, check_hooks, run_post_commit, run_pre_commit
from cloudckpt.dcp.planning import plan_rank
from cloudckpt.dcp.ranks.info import rank_and_world_size
from cloudckpt.dcp.resolving import refuse_unstorable, resolve, take_values
from cloudckpt.dcp.results import assemble, pack, pack_values, planner_paths
from cloudckpt.dcp.state.values import room_of_rank
from cloudckpt.dcp.stats import SaveStats
from cloudckpt.dcp.uploading import HereUploader, Uploader, UploadJob
from cloudckpt.engine import commit, telemetry
from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.engine.commit import Uploaded
from cloudckpt.engine.deadline import Deadline
from cloudckpt.engine.sealing import seal
from cloudckpt.engine.session import Session
from cloudckpt.engine.traces import check_place
from cloudckpt.engine.tracing import COMMIT, PLAN, Recorder
from cloudckpt.engine.write import WriteOptions
from cloudckpt.errors import CheckpointError, SaveFailedError, StoreError, UsageError
from cloudckpt.extensions.chain import Rules
from cloudckpt.manifest import Entry, Manifest, PlannerPath, Shard, Summary
from cloudckpt.progress import Progress, show_size, shown
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, check_url, with_overrides

log = logging.getLogger(__name__)


class ObjectStoreWriter(StorageWriter):
    """Saves a checkpoint straight to object storage.

    For ``dcp.save`` and ``dcp.async_save`` on any number of ranks. When the save returns, the checkpoint is
    committed; when it raises, there is none, or (with ``overwrite``) still the old one. One writer may save
    again and again, to the same URL or to others given as ``checkpoint_id``.

    Example:
        >>> dcp.save(state_dict, storage_writer=ObjectStoreWriter("s3://bucket/run/step-100"))

    Attributes:
        stats: what the last save did on this rank, when its part in it is over; None before.
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
        progress: Progress = False,
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
            progress: show how far the coordinator's upload has come: True for a bar where stderr is a terminal, and
                lines in the log elsewhere; or a function, given bytes that are done and bytes in all.
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
        self._progress = progress
        self.stats: SaveStats | None = None
        self._attempts: dict[int, Attempt] = {}  # by thread: a save runs in one, several may be under way

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
            **kwargs: DCP's; and ``cancellation``, a `Cancellation`, and ``recorder``, a `Recorder`, of this save.

        Raises:
            UsageError: no URL, or ``use_collectives=False``; or traces would lie below the URL.
            CheckpointExistsError: a committed checkpoint is there and ``overwrite`` is off.
            EncryptionKeyError, MissingLibraryError: encryption is on and cannot be done.
            StoreError: the bucket cannot be reached.
        """
        del args
        self._attempts.pop(get_ident(), None)
        with self._told(), border(SaveFailedError, "setting up the save"):
            if self._url is None:
                msg = "no URL to save to; give one to ObjectStoreWriter(...) or as checkpoint_id="
                raise UsageError(msg)
            if not kwargs.get("use_collectives", True):
                msg = (
                    "dcp.save(use_collectives=False) would commit each rank's part by itself; cloudckpt commits "
                    "one checkpoint for all ranks. Save with collectives"
                )
                raise UsageError(msg)
            check_place(self._options.trace, self._url)
            attempt = self._begun(self._url, is_coordinator, kwargs.get("cancellation"), kwargs.get("recorder"))
            self._attempts[get_ident()] = attempt
            attempt.cancellation.refuse()
            if is_coordinator:
                overwrite = self._options.overwrite
                attempt.key = self._rules.new_data_key()
                attempt.replaces = attempt.session.run(
                    lambda store: commit.prepare(store, overwrite=overwrite), attempt.recorder
                )

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
        with self._told(), border(SaveFailedError, "the save"):
            attempt = self._attempt()
            with attempt.recorder.step(PLAN):
                room = room_of_rank(attempt.world_size) if self._inlines_values else 0
                plan, values = take_values(plan, planner, room)
                written, items, sources = resolve(plan, planner)
                keys = [w.key for w in written]
                plans = plan_rank(items, keys, rules=self._rules, options=self._options, rank=attempt.rank)
            attempt.shard_keys = tuple(planned.key for planned in plans)
            attempt.nbytes = sum(w.nbytes for w in written)
            job = UploadJob(
                session=attempt.session,
                options=self._options,
                deadline=attempt.deadline,
                cancellation=attempt.cancellation,
                plans=plans,
                items=items,
                sources=sources,
                recorder=attempt.recorder,
            )
            with shown(f"saving {attempt.session.url}", attempt.is_coordinator and self._progress) as report:
                attempt.recorder.report = report
                shards = self._uploader.upload(job)
            attempt.stored_nbytes = sum(shard.shard.size for shard in shards)
            results = [pack(p, shard, written) for p, shard in zip(plans, shards, strict=True)]
            results += pack_values(values)
            if not attempt.is_coordinator:
                self._end(attempt)
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
        with self._told(), border(SaveFailedError, "preparing the commit"):
            attempt = self._attempt()
            with attempt.recorder.step(COMMIT):
                shards, etags, entries = assemble(metadata, results)
                made = self._manifest(shards, entries, planner_paths(metadata))
                attempt.prepared = Prepared(
                    manifest.encode(made) if attempt.key is None else seal(made, attempt.key),
                    [Uploaded(s.key, s.size, etag) for s, etag in zip(shards, etags, strict=True)],
                    CommitInfo.of(made, attempt.session.url),
                )
            run_pre_commit(self._hooks, attempt.prepared.info)
            attempt.cancellation.refuse()

    def commit(self) -> Committed:
        """Puts the manifest (coordinator only): when this returns, the checkpoint exists.

        Raises:
            IntegrityError: a shard is not there as it was uploaded.
            CommitConflictError, CommitUnknownError, StoreError: see `engine.commit.commit`.
        """
        with self._told(), border(SaveFailedError, "the commit"):
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

            with attempt.recorder.step(COMMIT):
                attempt.session.run(put, attempt.recorder)
            info, seconds = prepared.info, time.time() - attempt.recorder.began
            log.info(
                "saved %s: %s (%s stored) in %d shard(s), %d entries, %.2f s, %s/s",
                info.url,
                show_size(info.nbytes),
                show_size(info.stored_nbytes),
                info.shard_count,
                info.entry_count,
                seconds,
                show_size(round(info.stored_nbytes / max(seconds, 1e-6))),
            )
            self._end(attempt)
            failures = tuple(run_post_commit(self._hooks, info))
            for failure in failures:
                log.warning("%s is committed; %s", info.url, failure)
            return Committed(info=info, hook_failures=failures)

    def fail(self, error: CheckpointError) -> None:
        """Takes note that the save failed, on whichever rank."""
        attempt = self._attempts.get(get_ident())
        if attempt is not None:
            self._end(attempt, error)

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

    def _begun(
        self,
        url: str,
        is_coordinator: bool,  # noqa: FBT001
        cancellation: Cancellation | None,
        recorder: Recorder | None,
    ) -> Attempt:
        rank, world_size = rank_and_world_size()
        return Attempt(
            session=Session(url, self._store),
            deadline=Deadline(self._options.deadline_s),
            cancellation=cancellation or Cancellation(),
            recorder=recorder or self.new_recorder(),
            trace=self._options.trace,
            rank=rank,
            world_size=world_size,
            is_coordinator=is_coordinator,
        )

    def new_recorder(self) -> Recorder:
        """For a save that begins now, asked for by who calls this."""
        return Recorder(keeps_events=self._options.trace is not None, context=telemetry.current_context())

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Has what fails in this context be known as a failure of this thread's save."""
        try:
            yield
        except CheckpointError as e:
            self.fail(e)
            raise

    def _end(self, attempt: Attempt, error: CheckpointError | None = None) -> None:
        self.stats = attempt.stats()
        attempt.end(error)

    def _attempt(self) -> Attempt:
        try:
            return self._attempts[get_ident()]
        except KeyError:
            msg = "write_data or finish without set_up_storage_writer in the same thread; use dcp.save"
            raise UsageError(msg) from None


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
