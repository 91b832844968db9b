"""A signal that asks for a last checkpoint, heard by some ranks and acted on by all at the same step.

Law: a handler only takes note. Nothing is saved, sent or raised from within one.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

from cloudckpt.errors import UsageError

_Heard = tuple[bool, float]
"""Whether a rank was asked, and the seconds that are left to it."""


class AllReduces(Protocol):
    """Ranks that decide together."""

    def all_reduce(self, name: str, map_fn: Callable[[], _Heard], reduce_fn: Callable[[list[_Heard]], _Heard]) -> Any:
        """What ``reduce_fn`` makes of every rank's ``map_fn()``, the same on all ranks; all ranks must call it."""


class PreemptionWatch:
    """Takes note of signals between its making and its `close`.

    Handlers that stood there before are put back by `close`, unless somebody put another in the place of ours
    meanwhile. Until then they are not called, unless ``is_chained``.

    Example:
        >>> with PreemptionWatch(deadline_s=30) as watch:
        ...     for step in range(steps):
        ...         train(step)
        ...         if watch.agree(collectives):
        ...             checkpointer.save(step, state_dict)
        ...             break
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        *,
        deadline_s: float = math.inf,
        is_chained: bool = False,
    ) -> None:
        """Installs the handlers.

        Args:
            signals: that ask for a last checkpoint.
            deadline_s: how long after the signal the process will be killed; what is left, `remaining_s` says.
            is_chained: call the handlers that stood there before too, after the note was taken. Python's own default
                actions are not called: they would end the process.

        Raises:
            UsageError: not in the main thread, where alone Python lets handlers be installed; or a signal that cannot
                be handled, or has a handler that could not be put back. No handler was changed.
        """
        if threading.current_thread() is not threading.main_thread():
            msg = "PreemptionWatch installs signal handlers, allowed in the main thread alone; make it there"
            raise UsageError(msg)
        if not signals or deadline_s <= 0:
            msg = f"signals={tuple(signals)} must name some, and deadline_s={deadline_s} be positive"
            raise UsageError(msg)
        self._is_chained = is_chained
        self._deadline_s = deadline_s
        self._deadline: float | None = None
        self._has_agreed = False
        self._previous: dict[int, Any] = {}
        try:
            for number in dict.fromkeys(signals):
                self._install(number)
        except UsageError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_requested(self) -> bool:
        """Whether this process was asked, or all ranks agreed."""
        return self._deadline is not None

    @property
    def remaining_s(self) -> float:
        """Until the deadline, 0 at least; endless before anyone asked, or without one."""
        return math.inf if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def agree(self, ranks: AllReduces) -> bool:
        """Whether any rank was asked: the same answer on all of them, so that they act at the same step.

        Every rank must call it, at every step boundary or at every so many of them: it costs one small collective.
        Once all agreed, the deadline is the earliest of any rank, and later calls answer without asking.

        Raises:
            Whatever the collective raises.
        """
        if not self._has_agreed:
            is_asked, left_s = ranks.all_reduce("preemption", self._heard, _any_and_earliest)
            if is_asked:
                self._deadline, self._has_agreed = time.monotonic() + left_s, True
        return self._has_agreed

    def close(self) -> None:
        """Puts back the handlers that stood there before; what was heard stays. May be called twice.

        Raises:
            UsageError: not in the main thread; nothing was changed.
        """
        if self._previous and threading.current_thread() is not threading.main_thread():
            msg = "signal handlers can be put back in the main thread alone; close the PreemptionWatch there"
            raise UsageError(msg)
        while self._previous:
            number, handler = self._previous.popitem()
            if signal.getsignal(number) == self._take_note:
                signal.signal(number, handler)

    def _install(self, number: int) -> None:
        previous = signal.getsignal(number) if number in signal.valid_signals() else None
        if previous is None:
            msg = f"signal {number} has a handler that is no Python function, or is no signal; choose another"
            raise UsageError(msg)
        try:
            signal.signal(number, self._take_note)
        except OSError as e:
            msg = f"signal {number} cannot be handled: {e}; choose another"
            raise UsageError(msg) from e
        self._previous[number] = previous

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._deadline_s
        previous = self._previous.get(number)
        if self._is_chained and callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def _heard(self) -> _Heard:
        return self.is_requested, self.remaining_s


def _any_and_earliest(heard: list[_Heard]) -> _Heard:
    return any(is_asked for is_asked, _ in heard), min(left_s for _, left_s in heard)
