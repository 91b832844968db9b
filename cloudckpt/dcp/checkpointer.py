"""The one object that a training loop holds.

Law: composes. Each rank makes the same calls in the same order, and what fails on one of them is raised on all.
"""

import logging
import math
import os
import signal
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from types import TracebackType
from typing import Any, Literal, Self, SupportsIndex, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions

from cloudckpt import catalog
from cloudckpt.dcp.agreement import Missing, Wanted, checked_step
from cloudckpt.dcp.background import Saved, SaveHandle
from cloudckpt.dcp.groups import own_collectives
from cloudckpt.dcp.hooks import WriterHook, check_hooks
from cloudckpt.dcp.loads import Loader, LoadPolicy
from cloudckpt.dcp.preemption import PreemptionWatch
from cloudckpt.dcp.retention import Retention
from cloudckpt.dcp.saving import OnBusy, OnExists, SavePolicy, Saver, SaveRequest
from cloudckpt.dcp.staging import Stager
from cloudckpt.dcp.uploading import HereUploader
from cloudckpt.engine.read import ReadOptions, Stats
from cloudckpt.engine.write import WriteOptions
from cloudckpt.errors import CheckpointError, UsageError
from cloudckpt.options import overridden
from cloudckpt.progress import Progress
from cloudckpt.store.url import StoreOptions, check_url, with_overrides

log = logging.getLogger(__name__)
T = TypeVar("T")

_LEAST_S = 0.1
"""Of time for a save that comes too late: it fails of its deadline, and says so."""


class Checkpointer:
    """Saves a training job's checkpoints below one URL, as steps, and loads them.

    Every rank makes one and calls its methods alike: making it, `save`, `async_save`, `load`, `save_if_asked` and
    `close` are collective; `steps`, `latest`, `pin` and `unpin` are not. It talks on gloo groups of its own, so
    a save behind training never meets training's collectives.

    A state dict may hold tensors, plain values, and objects with ``state_dict`` and ``load_state_dict`` (models,
    optimizers, schedulers, dataloaders) as they are. Keys may differ between ranks, as with pipeline parallelism;
    one key is one shape and dtype. Plain values are kept in the manifest as JSON, everything else as bytes, and
    a load unpickles nothing that could run code (unless ``unsafe_pickle=True``).

    Example:
        >>> with Checkpointer("s3://bucket/run", keep=KeepLast(3)) as checkpointer:
        ...     state = {"model": model, "optimizer": optimizer, "step": 0}
        ...     checkpointer.load(state, missing="none")
        ...     for step in range(state["step"], steps):
        ...         train(step)
        ...         state["step"] = step + 1
        ...         if step % 100 == 99:
        ...             checkpointer.async_save(step + 1, state)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        keep: catalog.Policy | None = None,
        keep_grace_s: float = catalog.GRACE_S,
        process_group: dist.ProcessGroup | None = None,
        timeout_s: float = 1800,
        hooks: Sequence[WriterHook] = (),
        on_exists: OnExists = "refuse",
        on_busy: OnBusy = "wait",
        uploads: Literal["thread", "process"] = "thread",
        progress: Progress = False,
        state_options: StateDictOptions | None = None,
        options: WriteOptions | None = None,
        read_options: ReadOptions | None = None,
        store: StoreOptions | None = None,
        **overrides: Any,
    ) -> None:
        """Makes its groups, with all ranks; nothing is opened yet.

        Args:
            root: URL that the steps lie below.
            keep: which steps stay when a newer one is committed; None for all.
            keep_grace_s: how long a step stays after it was the newest, for whoever may be loading it.
            process_group: of the ranks that save together; all of the job, if None.
            timeout_s: how long a rank waits for others that are alive: the longest that one may upload after
                another. Ranks that were killed are noticed at once.
            hooks: run on the coordinator, the first rank, around each commit.
            on_exists: what becomes of a save whose step is committed already: an error, it replaces the old one, or
                nothing is saved.
            on_busy: what `async_save` does while one is under way: wait for it, save nothing, or queue one more,
                whose copy takes memory of its own.
            uploads: where async saves upload: a thread of this process, or a process of its own.
            progress: show how far the first rank's saves and loads have come: True for a bar where stderr is a
                terminal, and lines in the log elsewhere; or a function, given bytes that are done and bytes in all.
            state_options: for torch's functions that take the state of models and optimizers.
            options: how to write.
            read_options: how to read.
            store: how to reach the store.
            **overrides: any field of `WriteOptions`, `ReadOptions`, `S3Options`, `RetryOptions` or `TrafficOptions`,
                by name; one that both reading and writing have goes for both.

        Raises:
            UsageError: an option or hook that cannot be; the same on all ranks, or some wait for ``timeout_s``.
        """
        self._root = check_url(os.fspath(root))
        reading = dict(overrides)
        reading_options = overridden(read_options or ReadOptions(), reading)
        for name in overrides.keys() - reading.keys() - {field.name for field in fields(WriteOptions)}:
            del overrides[name]
        self._options, self._store = with_overrides(options or WriteOptions(), store, overrides)
        if not timeout_s > 0:
            msg = f"timeout_s={timeout_s} must be positive"
            raise UsageError(msg)
        _one_of("on_exists", on_exists, ("refuse", "replace", "skip"))
        _one_of("on_busy", on_busy, ("wait", "skip", "queue"))
        is_own_process = _one_of("uploads", uploads, ("thread", "process")) == "process"
        self._retention = Retention(self._root, keep, keep_grace_s, self._store)
        self._options = replace(self._options, overwrite=self._options.overwrite or on_exists == "replace")
        policy = SavePolicy(
            root=self._root,
            hooks=check_hooks(hooks),
            on_exists=on_exists,
            on_busy=on_busy,
            progress=progress,
            state_options=state_options,
            options=self._options,
            store=self._store,
        )
        if is_own_process:
            from cloudckpt.dcp.upload_process import ProcessUploader
        self._is_closed = False
        self._watch: PreemptionWatch | None = None
        self._was_saved_when_asked = False
        self._closing = ExitStack()
        self._closing.callback(self._retention.close)
        self._front, back = own_collectives(process_group, timeout_s)
        self._loader = Loader(
            LoadPolicy(
                root=self._root,
                progress=progress,
                state_options=state_options,
                options=reading_options,
                store=self._store,
            ),
            self._front,
        )
        stager = Stager(leases=2 if on_busy == "queue" else 1, share=is_own_process)
        self._saver = Saver(
            policy,
            self._front,
            back,
            stager=self._closing.enter_context(stager),
            uploader=self._closing.enter_context(ProcessUploader(stager)) if is_own_process else HereUploader(),
            after_commit=self._retention.after_commit,
        )

    def save(
        self,
        step: SupportsIndex,
        state_dict: Mapping[str, Any],
        *,
        per_rank: MutableMapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> Saved:
        """Saves, and returns when the checkpoint is committed.

        It is saved after those that are under way. Nothing is copied: training must wait, as it does.

        Args:
            step: the training step, from 0 on; the same on all ranks.
            state_dict: of this rank.
            per_rank: what this rank holds for itself (its generators' states, its dataloader's), by name; given back
                to the rank of its number.
            metrics: finite numbers by name, for `catalog.KeepBest` and whoever lists steps; the coordinator's count.
            metadata: kept in the manifest: a dict that JSON can spell; the coordinator's counts.

        Raises:
            CheckpointExistsError: the step is committed already, and ``on_exists="refuse"``.
            CommitConflictError: another job committed it meanwhile; its checkpoint stands.
            RanksLostError: a rank was killed, or hung for ``timeout_s``; the job has to be started again.
            CheckpointError: whatever failed, on whichever rank, or of an async save before. Nothing was committed,
                but for a CommitUnknownError or a RanksLostError, after which it may have been.
        """
        self._check_open()
        return self._saver.save(_request(step, state_dict, per_rank, metrics, metadata))

    def async_save(
        self,
        step: SupportsIndex,
        state_dict: Mapping[str, Any],
        *,
        per_rank: MutableMapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> SaveHandle:
        """Copies the state dict, and saves the copy behind training. Takes what `save` takes.

        When it returns the state dict may change. A failure of the save is raised by `SaveHandle.result`, or else by
        the next save or `close`.

        Raises:
            UnstorableError: something cannot be copied; the save fails on all ranks.
            CheckpointError: an async save before failed, and nobody was told; this one was not begun.
        """
        self._check_open()
        return self._saver.async_save(_request(step, state_dict, per_rank, metrics, metadata))

    def load(
        self,
        state_dict: MutableMapping[str, Any],
        *,
        step: SupportsIndex | None = None,
        per_rank: MutableMapping[str, Any] | None = None,
        fallback: bool = False,
        missing: Missing = "error",
        missing_per_rank: Missing = "error",
    ) -> int | None:
        """Loads in place, after the saves that are under way: the newest committed step, or the one that is named.

        Tensors are loaded into the state dict's own memory, objects are given their states when all ranks have read
        all of theirs, and values are replaced.

        Args:
            state_dict: of this rank, with what is to be loaded into. What it does not name is not read.
            step: to load; None for the newest.
            per_rank: what this rank holds for itself, to be filled in place.
            fallback: if the newest is damaged, load the one before it, and say so in the log.
            missing: what to do where no step is committed: an error, or nothing.
            missing_per_rank: what to do where nothing was saved for a rank of this number: an error, or nothing.

        Returns:
            The step that was loaded; None where there was none and ``missing="none"``.

        Raises:
            CheckpointNotFoundError: no such step is committed.
            IntegrityError: it is damaged. As after the others, what was being loaded into is undefined on all ranks.
            MissingKeyError: the state dict names what was not saved.
            CheckpointError: whatever failed, on whichever rank.
        """
        self._check_open()
        self._saver.wait()

        def say() -> Wanted:
            _one_of("missing", missing, ("error", "none"))
            _one_of("missing_per_rank", missing_per_rank, ("error", "none"))
            return Wanted(None if step is None else checked_step(step), bool(fallback), missing, missing_per_rank)

        steps = self._loader.agree(say)
        self._saver.forget_last()
        return self._loader.load(steps, say(), state_dict, per_rank)

    @property
    def last_load(self) -> Stats | None:
        """What the last load did on this rank; None before the first."""
        return self._loader.stats

    def steps(self) -> list[int]:
        """The committed steps, oldest first, as this rank finds them now. Not collective.

        Raises:
            StoreError: the store refused.
        """
        return catalog.committed_steps(self._root, self._store)

    def latest(self) -> int | None:
        """The newest committed step, as this rank finds it now; None where there is none. Not collective.

        Raises:
            StoreError: the store refused.
        """
        return catalog.newest_step(self._root, self._store)

    def pin(self, step: SupportsIndex) -> None:
        """Keeps a committed step until `unpin`, whatever ``keep`` says. For one rank; not collective.

        Raises:
            CheckpointNotFoundError: it is not committed.
            StoreError: the store refused.
        """
        catalog.pin(self._root, checked_step(step), store=self._store)

    def unpin(self, step: SupportsIndex) -> None:
        """Leaves a step to ``keep`` again. For one rank; not collective.

        Raises:
            StoreError: the store refused.
        """
        catalog.unpin(self._root, checked_step(step), store=self._store)

    def save_on_signal(self, *signals: signal.Signals, deadline_s: float = math.inf) -> None:
        """From now on takes note of these signals, for `save_if_asked` to act on.

        Args:
            signals: SIGTERM, if none.
            deadline_s: how long after the signal the process will be killed: what is not saved by then fails.

        Raises:
            UsageError: not in the main thread, called before, or a signal that cannot be handled.
        """
        self._check_open()
        if self._watch is not None:
            msg = "save_on_signal was called before; name all signals in one call"
            raise UsageError(msg)
        self._watch = PreemptionWatch(signals or (signal.SIGTERM,), deadline_s=deadline_s)
        self._closing.callback(self._watch.close)

    def save_if_asked(
        self,
        step: SupportsIndex,
        state_dict: Mapping[str, Any],
        *,
        per_rank: MutableMapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> bool:
        """At a step's end: saves, once, if any rank was sent a signal since the last call. Takes what `save` takes.

        Every rank calls it at the same steps. One small message goes around each time. A save that is under way is
        waited for; if it is of this very step, that is the one.

        Returns:
            Whether a rank was asked: then the step is committed, and training is to end.

        Raises:
            UsageError: `save_on_signal` was not called.
            DeadlineError: the time did not suffice.
            CheckpointError: as from `save`.
        """
        self._check_open()
        if self._watch is None:
            msg = "save_if_asked without save_on_signal; call that once, before training"
            raise UsageError(msg)
        watch = self._watch
        if not watch.agree(self._front):
            return False
        if not self._was_saved_when_asked:
            request = _request(step, state_dict, per_rank, metrics, metadata)
            self._saver.save_last(request, lambda: max(watch.remaining_s, _LEAST_S))
        self._was_saved_when_asked = True
        return True

    def close(self, *, cancel: bool = False) -> None:
        """Waits for the saves that are under way, and frees all that was taken. May be called again.

        Args:
            cancel: have the saves stop that have not begun to commit, and delete what they uploaded; on all ranks.

        Raises:
            CheckpointError: an async save failed, and nobody was told. All is freed.
            UsageError: called by a hook; or not in the main thread after `save_on_signal`, and the handlers stay.
        """
        if self._is_closed:
            return
        failure = self._saver.close(cancel=cancel)  # interrupted here, it can be called again
        self._is_closed = True
        try:
            self._closing.close()
        finally:
            if failure is not None:
                raise failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as e:
            if error is None:
                raise
            log.error("while another error ended the training: %s", e)  # noqa: TRY400 - its trace is in its notes

    def _check_open(self) -> None:
        if self._is_closed:
            msg = f"the checkpointer of {self._root} is closed"
            raise UsageError(msg)


def _one_of(name: str, given: T, known: Sequence[T]) -> T:
    if given not in known:
        msg = f"{name}={given!r} is none of {', '.join(map(repr, known))}"
        raise UsageError(msg)
    return given


def _request(
    step: SupportsIndex,
    state_dict: Mapping[str, Any],
    per_rank: MutableMapping[str, Any] | None,
    metrics: Mapping[str, float] | None,
    metadata: dict[str, Any] | None,
) -> SaveRequest:
    return SaveRequest(step=step, state_dict=state_dict, per_rank=per_rank, metrics=metrics, metadata=metadata)
