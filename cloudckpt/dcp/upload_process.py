"""Uploads in a process of its own, so that their Python work takes no turn from training's.

Law: tensors in shared memory are not copied: the process maps the same memory, once. It runs nothing of the script
that was started.
"""

import logging
import os
import pickle
import threading
from functools import partial
from typing import Any, Protocol, Self

import msgspec
import torch

from cloudckpt.dcp.child_process import ChildProcess, LostError
from cloudckpt.dcp.shared_memory import Place, SharedMemories
from cloudckpt.dcp.uploading import UploadJob
from cloudckpt.engine.upload import Written
from cloudckpt.engine.upload_server import Order
from cloudckpt.engine.write import ShardWriter
from cloudckpt.errors import CheckpointError, UsageError

log = logging.getLogger(__name__)
NICENESS = 5


class HoldsMemory(Protocol):
    """A `Stager` that shares."""

    @property
    def memories(self) -> list[torch.Tensor]:
        """The pieces of shared memory that tensors may lie in, as bytes."""
        ...


class ProcessUploader:
    """An `Uploader` that has a process of its own; a context manager. Safe to use from several threads, in turn.

    The process is started when it is first needed, ends with this or with the process that made it, however that
    ends, and is replaced if it dies. It is a new interpreter that imports neither the script that was started nor
    torch; what extensions, keys and credentials name must be importable there. Its log records come out here.

    Tensors that lie in the stager's shared memory are sent from there. Whatever else is uploaded is copied to shared
    memory first, which is kept for the next upload; so is everything where the sharing strategy of
    `torch.multiprocessing` is not ``file_descriptor``.
    """

    def __init__(
        self, stager: HoldsMemory | None = None, *, niceness: int = NICENESS, start_timeout_s: float = 120
    ) -> None:
        """Starts nothing yet.

        Args:
            stager: whose shared memory staged tensors lie in.
            niceness: by how much the process steps back behind others where processors are short; see nice(2).
            start_timeout_s: how long it may take to start.
        """
        self._stager = stager
        self._niceness = niceness
        self._start_timeout_s = start_timeout_s
        self._lock = threading.Lock()
        self._memories = SharedMemories(self._forget)
        self._process: ChildProcess | None = None
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """Of the process; None where there is none."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Starts the process, if there is none; does not wait for it.

        Raises:
            UsageError: this was closed.
        """
        with self._lock:
            self._started()

    def upload(self, job: UploadJob) -> list[Written]:
        """See `Uploader.upload`.

        Raises:
            SaveFailedError: the process died; the next upload starts another.
            UsageError: something cannot be sent to it, or this was closed.
        """
        if job.session.url.startswith("memory:"):
            msg = f"{job.session.url} lies in the memory of this process; upload to it in a thread"
            raise UsageError(msg)
        with self._lock:
            process = self._started()
            held = [] if self._stager is None else self._stager.memories
            places, memories = self._memories.place(job.items, job.sources, held)
            try:
                outcome = process.upload(
                    _pickled(job, places), memories, job.cancellation, job.deadline, job.recorder
                )
            except LostError as e:
                process.kill()
                self._process = None
                _clean_up_after(job)
                raise e.error from None
        if isinstance(outcome, list):
            return outcome
        raise outcome

    def close(self) -> None:
        """Ends the process, after the upload that is under way. May be called again."""
        with self._lock:
            self._is_closed = True
            process, self._process = self._process, None
            self._memories.clear()
            if process is not None:
                process.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return partial(ProcessUploader, niceness=self._niceness, start_timeout_s=self._start_timeout_s), ()

    def _started(self) -> ChildProcess:
        if self._is_closed:
            msg = "the upload process was closed"
            raise UsageError(msg)
        process = self._process
        if process is not None and process.parent == os.getpid():
            if process.is_alive:
                return process
            process.kill()
        self._process = ChildProcess(niceness=self._niceness, start_timeout_s=self._start_timeout_s)
        return self._process

    def _forget(self, number: int) -> None:
        process = self._process
        if process is not None:
            process.forget(number)


def _clean_up_after(job: UploadJob) -> None:
    """Removes what a process that is gone had uploaded."""
    keys = [plan.key for plan in job.plans]
    try:
        job.session.run(lambda store: ShardWriter(store, job.options).remove(keys))
    except CheckpointError as e:  # why the process is gone is what has to be told
        log.warning("shards of a failed save to %s stay until they are swept: %s", job.session.url, e)


def _pickled(job: UploadJob, places: list[Place]) -> bytes:
    try:
        order = Order(
            url=job.session.url,
            store=job.session.options,
            options=job.options,
            deadline=job.deadline,
            plans=job.plans,
            items=msgspec.msgpack.encode(job.items),
            places=places,
            is_reported=job.recorder.report is not None,
        )
        return pickle.dumps(order, pickle.HIGHEST_PROTOCOL)
    except Exception as e:
        msg = (
            f"what an upload needs cannot be sent to its process: {type(e).__name__}: {e}. Give extensions=, keys= "
            "and credentials= that pickle (functions and classes of modules), or upload in a thread"
        )
        raise UsageError(msg) from e
