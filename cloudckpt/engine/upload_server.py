"""The process that uploads for another one: serves what it is told through a pipe.

Law: no torch, no process groups, and nothing of the script that was started. It ends with the process that started
it, however that ends, and cleans up before.
"""

import gc
import logging
import mmap
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, Final

import msgspec

from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.engine.deadline import Deadline
from cloudckpt.engine.framing import AnyPlan, Item
from cloudckpt.engine.loop import CLEAN_UP_S
from cloudckpt.engine.session import Session
from cloudckpt.engine.sources import BytesSource
from cloudckpt.engine.tracing import Recorded, Recorder
from cloudckpt.engine.upload import Written
from cloudckpt.engine.write import ShardWriter, WriteOptions
from cloudckpt.errors import CheckpointError, SaveFailedError, UsageError, unwrap
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions

READY: Final = "ready"
"""The first message of the process: it takes orders."""

LOGGER: Final = "cloudckpt"
"""Whose records are sent to the process that gives the orders."""

LONGEST_CLEAN_UP_S: Final = 3 * CLEAN_UP_S
"""After an upload was told to stop: it aborts uploads, deletes shards, and looks for what else there is."""

_LOOK_S = 5
"""How often the process looks whether its parent is there: forks of that may keep the pipe open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """Announces an upload; the descriptors of new memories come next, and then a pickled `Order`.

    Attributes:
        number: of the upload, rising.
        new: number and bytes of each memory that is used from now on.
        log_level: from which on records are sent.
    """

    number: int
    new: Sequence[tuple[int, int]]
    log_level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to upload.

    Attributes:
        url: of the checkpoint.
        store: how to reach it.
        options: how to write.
        deadline: of the save.
        plans: one for each shard.
        items: in the order that the plans number them in, as MessagePack, which takes a twentieth of pickle's time.
        places: of their bytes, likewise: in which memory, from where, to where. Memory 0 has no bytes.
        is_reported: whether the other end wants to know of bytes that are done.
    """

    url: str
    store: StoreOptions
    options: WriteOptions
    deadline: Deadline
    plans: Sequence[AnyPlan]
    items: bytes
    places: Sequence[tuple[int, int, int]]
    is_reported: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """Breaks the upload of that number off, if it is still under way, or when it comes."""

    number: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Memories, by number, that no later upload uses."""

    memories: Sequence[int]


@dataclass(frozen=True, slots=True)
class Advanced:
    """How far the upload of that number has come; see `progress.Report`."""

    number: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of the upload of that number: what was written, or why nothing was; and what was recorded of it."""

    number: int
    outcome: list[Written] | CheckpointError
    recorded: Recorded


class UploadServer:
    """Takes orders from a pipe; one upload at a time."""

    def __init__(self, pipe: "Connection[Any, Any]", parent: int) -> None:
        """Takes the pipe, and the process id of who holds its other end."""
        self._pipe = pipe
        self._parent = parent
        self._sending = threading.Lock()
        self._memories: dict[int, mmap.mmap] = {}
        self._number = 0
        self._cancelled = 0
        self._cancellation = Cancellation()
        self._worker: threading.Thread | None = None

    def serve(self) -> None:
        """Returns when the other end is gone, and what was under way has been cleaned up."""
        self.send(READY)
        while True:
            match self._next():
                case Begin() as begin:
                    self._begin(begin)
                case Cancel(number):
                    self._cancelled = number
                    if self._number <= number:
                        self._cancellation.cancel()
                case Forget(memories):
                    for number in memories:
                        del self._memories[number]
                case _:
                    break
        self._cancellation.cancel()
        if self._worker is not None:
            self._worker.join(LONGEST_CLEAN_UP_S)

    def send(self, message: object) -> None:
        """Sends to the other end, from any thread. What nobody is there for is lost."""
        try:
            with self._sending:
                self._pipe.send(message)
        except OSError:
            pass  # `serve` learns of it too

    def _next(self) -> object:
        """The next message, or None when the other end is gone."""
        try:
            while not self._pipe.poll(_LOOK_S):
                if os.getppid() != self._parent:
                    return None
            return self._pipe.recv()
        except (EOFError, OSError):
            return None

    def _begin(self, begin: Begin) -> None:
        for number, nbytes in begin.new:
            descriptor = recv_handle(self._pipe)
            try:
                self._memories[number] = mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ)
            finally:
                os.close(descriptor)
        order = self._pipe.recv_bytes()
        logging.getLogger(LOGGER).setLevel(begin.log_level)
        self._number, self._cancellation = begin.number, Cancellation()
        if begin.number <= self._cancelled:
            self._cancellation.cancel()
        work = (begin.number, order, dict(self._memories), self._cancellation)
        self._worker = threading.Thread(target=self._work, args=work, name="cloudckpt-upload", daemon=True)
        self._worker.start()

    def _work(self, number: int, order: bytes, memories: Mapping[int, mmap.mmap], cancellation: Cancellation) -> None:
        recorder = Recorder()
        try:
            read = _read(order)
            recorder = Recorder(keeps_events=read.options.trace is not None)
            if read.is_reported:
                recorder.report = lambda done, total: self.send(Advanced(number, done, total))
            outcome: list[Written] | CheckpointError = _upload(read, memories, cancellation, recorder)
        except BaseException as e:
            outcome = portable(e)
        self.send(Ended(number, outcome, recorder.recorded()))
        if not isinstance(outcome, list):
            del outcome, memories
            gc.collect()  # or its traceback may hold on to memory for long


def _read(order: bytes) -> Order:
    try:
        return pickle.loads(order)  # type: ignore[no-any-return]  # noqa: S301 - from the process that started this one
    except Exception as e:
        msg = (
            f"the upload process cannot unpickle what it needs: {type(e).__name__}: {e}. Classes and functions that "
            "extensions=, keys= or credentials= name must lie in a module that can be imported, not in the script "
            "that was started or in a notebook; or upload in a thread"
        )
        raise UsageError(msg) from e


def _upload(
    order: Order, memories: Mapping[int, mmap.mmap], cancellation: Cancellation, recorder: Recorder
) -> list[Written]:
    views = {0: memoryview(b"")} | {number: memoryview(memory) for number, memory in memories.items()}
    items = msgspec.msgpack.decode(order.items, type=list[Item])
    sources = [BytesSource(views[memory][start:stop]) for memory, start, stop in order.places]

    async def upload(store: Store) -> list[Written]:
        async with order.deadline.kept(), cancellation.kept():
            return await ShardWriter(store, order.options, recorder).write(order.plans, items, sources)

    return Session(order.url, order.store).run(upload, recorder)


def portable(error: BaseException) -> CheckpointError:
    """An error of ours that says the same and survives pickle."""
    shown = unwrap(error)
    if isinstance(shown, CheckpointError):
        try:
            if type(pickle.loads(pickle.dumps(shown))) is type(shown):  # noqa: S301 - just dumped
                return shown
        except Exception:  # noqa: S110 - told as any other
            pass
    mine = SaveFailedError(f"{type(shown).__name__}: {shown}")
    mine.add_note("".join(traceback.format_exception(shown)))
    for note in getattr(shown, "__notes__", ()):
        mine.add_note(str(note))
    return mine


class _Forwarding(logging.Handler):
    """Sends records to the other end, where they are handled as if they were made there."""

    def __init__(self, server: UploadServer) -> None:
        super().__init__()
        self._server = server

    def emit(self, record: logging.LogRecord) -> None:
        """Makes text of what may not pickle, and sends it."""
        record.message = record.getMessage()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        record.msg, record.args, record.exc_info = record.message, None, None
        self._server.send(record)


def main(descriptor: int, parent: int, niceness: int) -> None:
    """What the process runs.

    Args:
        descriptor: of its end of the pipe.
        parent: process id of who holds the other.
        niceness: by how much it steps back behind others.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the other end decides, and says so
    os.nice(niceness)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # an extension that imports torch must not take a device
    server = UploadServer(Connection(descriptor), parent)
    ours = logging.getLogger(LOGGER)
    ours.addHandler(_Forwarding(server))
    ours.propagate = False
    server.serve()
