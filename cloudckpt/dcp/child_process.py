"""The process that `engine.upload_server` runs in, seen from the one that started it.

Law: nothing waits for a process that is gone or hangs, and none stays behind.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import spawn
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import Any

from cloudckpt.dcp.shared_memory import SharedMemory
from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.engine.deadline import Deadline
from cloudckpt.engine.tracing import Recorder
from cloudckpt.engine.upload import Written
from cloudckpt.engine.upload_server import LOGGER, LONGEST_CLEAN_UP_S, READY, Advanced, Begin, Cancel, Ended, Forget
from cloudckpt.errors import CheckpointError, DeadlineError, SaveFailedError

_LOOK_S = 1
"""How often a waiting caller looks whether the process is there: another may hold its end of the pipe open."""

_END_S = 10
"""How long a process that has nothing to do may take to end."""

_MAIN = (
    "import sys; numbers = [int(n) for n in sys.argv[1:4]]; sys.path[:] = sys.argv[4:]; "
    "from cloudckpt.engine.upload_server import main; main(*numbers)"
)


class LostError(Exception):
    """The process is gone, or hangs; ``error`` is for the caller."""

    def __init__(self, error: CheckpointError) -> None:
        super().__init__(str(error))
        self.error = error


class ChildProcess:
    """A process that uploads; for one thread at a time, but for what is said to be for any.

    Attributes:
        parent: process id of who started it; a fork of that must leave it alone.
    """

    def __init__(self, *, niceness: int, start_timeout_s: float) -> None:
        """Starts it, and does not wait. See `ProcessUploader`."""
        self.parent = os.getpid()
        self._start_timeout_s = start_timeout_s
        near, far = socket.socketpair()
        with near, far:
            numbers = map(str, (far.fileno(), self.parent, niceness))
            command = [os.fsdecode(spawn.get_executable()), "-c", _MAIN, *numbers, *sys.path]
            self._popen = subprocess.Popen(  # noqa: S603 - this interpreter
                command, stdin=subprocess.DEVNULL, pass_fds=[far.fileno()], process_group=0
            )
            self._pipe: Connection[Any, Any] = Connection(near.detach())
        self._sending = threading.Lock()
        self._sent: set[int] = set()
        self._gone: list[int] = []
        self._number = 0
        self._is_ready = False
        self._finalizer = weakref.finalize(self, _end, self._popen, self._pipe, self.parent)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._popen.pid

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._popen.poll() is None

    def upload(
        self,
        order: bytes,
        memories: Sequence[SharedMemory],
        cancellation: Cancellation,
        deadline: Deadline,
        recorder: Recorder,
    ) -> list[Written] | CheckpointError:
        """Has it carry an order out.

        Args:
            order: a pickled `Order`.
            memories: that it needs.
            cancellation: of the save.
            deadline: of the save, which the process keeps itself, unless it hangs.
            recorder: takes over what the process recorded, and is told of its progress.

        Returns:
            What was written, or why nothing was.

        Raises:
            SaveCancelledError: it was cancelled before it began.
            LostError: what became of the upload is not known.
        """
        self._number += 1
        number, has_begun = self._number, False
        with cancellation.told(partial(self._cancel, number)):
            try:
                self._await_ready()
                self._begin(number, order, memories)
                has_begun = True
                return self._outcome(number, time.monotonic() + deadline.left_s + LONGEST_CLEAN_UP_S, recorder)
            except LostError:
                raise
            except BaseException:  # the caller was interrupted
                self._break_off(number if has_begun else None)
                raise

    def forget(self, memory: int) -> None:
        """Has it unmap a memory: now, or before the next upload. Never waits; from any thread."""
        self._gone.append(memory)
        if self._is_ready and self._sending.acquire(blocking=False):
            try:
                self._send_forgotten()
            except OSError:
                pass  # the next upload learns of it
            finally:
                self._sending.release()

    def end(self) -> None:
        """Ends it; it has nothing to do."""
        self._finalizer()

    def kill(self) -> None:
        """Ends it at once."""
        with suppress(OSError):
            self._popen.kill()
        self._finalizer()

    def _await_ready(self) -> None:
        if not self._is_ready:
            hangs = SaveFailedError(
                f"the upload process (pid {self.pid}) did not start within {self._start_timeout_s:g} s and was "
                "killed. If the machine is only slow, give ProcessUploader a longer start_timeout_s"
            )
            self._is_ready = self._receive(time.monotonic() + self._start_timeout_s, hangs) == READY

    def _begin(self, number: int, order: bytes, memories: Sequence[SharedMemory]) -> None:
        new = [memory for memory in memories if memory.number not in self._sent]
        level = logging.getLogger(LOGGER).getEffectiveLevel()
        try:
            with self._sending:
                self._send_forgotten()
                sizes = [(memory.number, memory.stop - memory.start) for memory in new]
                self._pipe.send(Begin(number=number, new=sizes, log_level=level))
                for memory in new:
                    send_handle(self._pipe, memory.descriptor, self.pid)
                    self._sent.add(memory.number)
                self._pipe.send_bytes(order)
        except OSError as e:
            raise LostError(self._death()) from e

    def _cancel(self, number: int) -> None:
        with suppress(OSError), self._sending:
            self._pipe.send(Cancel(number))

    def _break_off(self, number: int | None) -> None:
        """Returns when that upload is cleaned up; kills the process if it does not, or has half a message."""
        try:
            if number is not None:
                self._cancel(number)
                self._outcome(number, time.monotonic() + LONGEST_CLEAN_UP_S, Recorder())
                return
        except LostError:
            pass
        self.kill()

    def _send_forgotten(self) -> None:
        gone = []
        while self._gone:
            number = self._gone.pop()
            if number in self._sent:
                self._sent.discard(number)
                gone.append(number)
        if gone:
            self._pipe.send(Forget(gone))

    def _outcome(self, number: int, until: float, recorder: Recorder) -> list[Written] | CheckpointError:
        hangs = DeadlineError(
            f"the upload process (pid {self.pid}) did not answer in time and was killed; nothing was committed"
        )
        while True:
            message = self._receive(until, hangs)
            if isinstance(message, Ended) and message.number == number:
                recorder.absorb(message.recorded)
                return message.outcome
            if isinstance(message, Advanced) and message.number == number and recorder.report is not None:
                recorder.report(message.done, message.total)

    def _receive(self, until: float, hangs: CheckpointError) -> object:
        """The next message; log records are handled on the way."""
        while True:
            try:
                if self._pipe.poll(min(_LOOK_S, max(0, until - time.monotonic()))):
                    message = self._pipe.recv()
                    if not isinstance(message, logging.LogRecord):
                        return message
                    logger = logging.getLogger(message.name)
                    if logger.isEnabledFor(message.levelno):
                        logger.handle(message)
                elif not self.is_alive:
                    raise LostError(self._death())
            except (EOFError, OSError) as e:
                raise LostError(self._death()) from e
            if time.monotonic() > until:
                raise LostError(hangs)

    def _death(self) -> SaveFailedError:
        """What to say of a process whose end of the pipe is closed."""
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(_END_S)
        code = self._popen.returncode
        what = f"ended with exit code {code}; its stderr says why"
        if code is None:
            what = "closed its pipe"
        elif code < 0:
            what = f"was killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            what += " (if nobody did that, the machine ran out of memory: lower max_inflight_nbytes)"
        return SaveFailedError(
            f"the upload process (pid {self.pid}) {what}; nothing was committed, and the next save starts another. "
            "What it had uploaded is removed, as far as the store can be reached"
        )


def _end(popen: "subprocess.Popen[bytes]", pipe: "Connection[Any, Any]", parent: int) -> None:
    pipe.close()
    if os.getpid() != parent:
        popen.returncode = 0  # somebody else's, and so is its end
        return
    try:
        popen.wait(_END_S)
    except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()
