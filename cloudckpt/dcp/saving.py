"""A training job's saves: agreed on by its ranks, copied, and done by the background.

Law: what the ranks must do alike they do in step; what fails on one of them before the background has it is told to
the others there.
"""

import logging
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, SupportsIndex

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions

from cloudckpt.catalog import step_url
from cloudckpt.dcp.agreement import agree_to_save
from cloudckpt.dcp.background import Background, Saved, SaveHandle
from cloudckpt.dcp.border import border
from cloudckpt.dcp.driving import Done, SaveDriver
from cloudckpt.dcp.hooks import WriterHook
from cloudckpt.dcp.ranks import Collectives
from cloudckpt.dcp.staging import Staged, Stager
from cloudckpt.dcp.staging.containers import tensors_in
from cloudckpt.dcp.state.per_rank import attach
from cloudckpt.dcp.state.stateful import to_save
from cloudckpt.dcp.stats import SaveStats
from cloudckpt.dcp.uploading import HereUploader, Uploader
from cloudckpt.dcp.writer import ObjectStoreWriter
from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.engine.tracing import STAGE, Recorder
from cloudckpt.engine.write import WriteOptions
from cloudckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    SaveCancelledError,
    SaveFailedError,
    UsageError,
)
from cloudckpt.progress import Progress
from cloudckpt.store.url import StoreOptions

log = logging.getLogger(__name__)
OnExists = Literal["refuse", "replace", "skip"]
OnBusy = Literal["wait", "skip", "queue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """What a rank is to save; see `Checkpointer.save`."""

    step: SupportsIndex
    state_dict: Mapping[str, Any]
    per_rank: MutableMapping[str, Any] | None
    metrics: Mapping[str, float] | None
    metadata: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePolicy:
    """How all saves of a job are done; see `Checkpointer`."""

    root: str
    hooks: Sequence[WriterHook]
    on_exists: OnExists
    on_busy: OnBusy
    progress: Progress
    state_options: StateDictOptions | None
    options: WriteOptions
    store: StoreOptions


class Saver:
    """Saves for one rank.

    Attributes:
        last_saved: the last step that was committed here; the same on all ranks when none is under way.
    """

    def __init__(
        self,
        policy: SavePolicy,
        front: Collectives,
        back: Collectives,
        *,
        stager: Stager,
        uploader: Uploader,
        after_commit: Callable[[int], None],
    ) -> None:
        """Starts no thread yet.

        Args:
            policy: how.
            front: for the thread that trains.
            back: for the background.
            stager: copies state dicts for async saves: one, and one more with ``on_busy="queue"``.
            uploader: for async saves.
            after_commit: called on the coordinator, in the background, with the step.
        """
        self._policy = policy
        self._front = front
        self._driver = SaveDriver(back)
        self._stager = stager
        self._uploader = uploader
        self._after_commit = after_commit
        self._background = Background()
        self._count = 0
        self.last_saved: int | None = None

    def save(self, request: SaveRequest) -> Saved:
        """See `Checkpointer.save`."""
        self._background.wait()
        return self._save(request, self._begin(request, HereUploader(), self._policy.options))

    def save_last(self, request: SaveRequest, left_s: Callable[[], float]) -> None:
        """Saves what no later save will, if it is not saved yet; what failed before does not stop it.

        Args:
            request: what.
            left_s: the seconds that are left for it.
        """
        self._background.wait()
        while (failure := self._background.failure) is not None:
            log.warning("%s", self._background.tell(failure))
        options, left = self._policy.options, left_s()
        limited = replace(
            options,
            deadline_s=min(options.deadline_s, left),
            commit_deadline_s=min(options.commit_deadline_s, left),
        )
        begun = self._begin(request, HereUploader(), limited)
        if begun.step != self.last_saved:
            self._save(request, begun)

    def async_save(self, request: SaveRequest) -> SaveHandle:
        """See `Checkpointer.async_save`."""
        on_busy = self._policy.on_busy
        if on_busy != "skip":
            self._background.wait(most=1 if on_busy == "queue" else 0)
        begun = self._begin(request, self._uploader, self._policy.options)
        if begun.is_busy and on_busy == "skip":
            return SaveHandle.of_skipped(begun.step, str(begun.writer.checkpoint_id))
        began = time.monotonic()
        try:
            with begun.recorder.step(STAGE):
                staged = self._stager.stage(self._state(request))
        except BaseException as e:
            self._fail(begun, e)
            raise
        begun = begun._replace(staged=staged, staging_s=time.monotonic() - began)
        return self._submit(begun, lambda: staged.state_dict)

    def wait(self) -> None:
        """Waits until no save is under way, whatever becomes of them."""
        self._background.wait()

    def forget_last(self) -> None:
        """The state of training is another now, whatever step it is at: the last step has to be saved again."""
        self.last_saved = None

    def close(self, *, cancel: bool) -> CheckpointError | None:
        """Waits for the saves that are under way, or has them stop; returns a failure that nobody was told of."""
        self._background.close(cancel=cancel)
        failure = self._background.failure
        if failure is None or (cancel and failure.kind == SaveCancelledError.__name__):
            return None
        return self._background.tell(failure)

    def _save(self, request: SaveRequest, begun: "_Begun") -> Saved:
        """Saves from the state dict itself, while training waits."""
        try:
            state = self._state(request)
            _await_devices(state)
        except BaseException as e:
            self._fail(begun, e)
            raise
        return self._submit(begun, lambda: state).result_or_nothing()

    def _begin(self, request: SaveRequest, uploader: Uploader, options: WriteOptions) -> "_Begun":
        """Has the ranks agree on a save, before anything is copied."""
        made: list[ObjectStoreWriter] = []

        def make(number: int) -> None:
            given: object = request.state_dict
            if not isinstance(given, Mapping):
                msg = f"the state dict is a {type(given).__name__}; pass a dict"
                raise UsageError(msg)
            writer = ObjectStoreWriter(
                step_url(self._policy.root, number),
                step=number,
                metadata=request.metadata,
                metrics=request.metrics,
                inline_values=True,
                hooks=self._policy.hooks,
                uploader=uploader,
                progress=self._policy.progress,
                options=options,
                store=self._policy.store,
            )
            made.append(writer)

        is_busy = bool(self._background.under_way)
        agreed = agree_to_save(self._front, request.step, make, is_busy=is_busy, failure=self._background.failure)
        if agreed.failure is not None:
            raise self._background.tell(agreed.failure)
        self._count += 1
        return _Begun(agreed.step, self._count, made[-1], made[-1].new_recorder(), agreed.is_busy)

    def _submit(self, begun: "_Begun", state: Callable[[], dict[str, Any]]) -> SaveHandle:
        """Has the background save it; there ``state`` gives the state dict, or raises."""
        cancellation = Cancellation()

        def save() -> Saved:
            label = f"step {begun.step} (save {begun.number} of this job)"
            try:
                done = self._driver.save(state, begun.writer, cancellation, begun.recorder, label)
            except BaseException as e:
                if isinstance(e, CheckpointExistsError) and self._policy.on_exists == "skip":
                    return Saved(step=begun.step, url=str(begun.writer.checkpoint_id), was_skipped=True)
                if begun.staged is not None:
                    log.error("the async save of step %d failed: %s", begun.step, e)  # noqa: TRY400 - it is raised too
                raise
            finally:
                if begun.staged is not None:
                    begun.staged.release()
            self.last_saved = begun.step
            if self._front.is_coordinator:
                self._after_commit(begun.step)
            return _saved(begun, done)

        return self._background.submit(begun.number, begun.step, cancellation, save)

    def _fail(self, begun: "_Begun", error: BaseException) -> None:
        """Has the other ranks learn, in the background where they are, why this one saves nothing."""
        told = error if isinstance(error, Exception) else SaveFailedError(f"{type(error).__name__}: {error}")

        def fail() -> dict[str, Any]:
            raise told

        self._submit(begun, fail).tell()  # here it is raised at once

    def _state(self, request: SaveRequest) -> dict[str, Any]:
        """What is to be stored, asked of the objects here and now."""
        with border(SaveFailedError, "asking for what is to be saved"):
            given = attach(dict(request.state_dict), request.per_rank, self._front.rank)
            return to_save(given, options=self._policy.state_options)


class _Begun(NamedTuple):
    """A save that the ranks agreed on."""

    step: int
    number: int
    writer: ObjectStoreWriter
    recorder: Recorder
    is_busy: bool
    staged: Staged | None = None
    staging_s: float = 0.0


def _await_devices(state: dict[str, Any]) -> None:
    """Waits for the work of this thread that may still be writing to tensors: the background has other streams."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in {tensor.device for tensor in tensors_in(state) if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()


def _saved(begun: _Begun, done: Done) -> Saved:
    return Saved(
        step=begun.step,
        url=done.info.url,
        save_id=done.info.save_id,
        nbytes=done.info.nbytes,
        stored_nbytes=done.info.stored_nbytes,
        is_replanned=done.is_replanned,
        staging_s=begun.staging_s,
        upload_s=done.upload_s,
        coordination_s=done.coordination_s,
        hook_failures=done.hook_failures,
        stats=begun.writer.stats or SaveStats(),
    )
