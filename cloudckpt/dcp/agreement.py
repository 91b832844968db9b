"""What the ranks agree on before a save or a load.

Law: one small message around; nothing is copied, written or read before it has come back.
"""

import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, SupportsIndex

from cloudckpt import errors
from cloudckpt.dcp.ranks import Collectives
from cloudckpt.errors import CheckpointError, SaveFailedError, UsageError

Missing = Literal["error", "none"]


class Failure(NamedTuple):
    """A save of before that failed.

    Attributes:
        number: of the save, the same on all ranks.
        step: that was to be saved.
        kind: the name of its error's class.
        text: of its error.
    """

    number: int
    step: int
    kind: str
    text: str

    @classmethod
    def of(cls, number: int, step: int, error: BaseException) -> "Failure":
        """Takes down an error."""
        kind = type(error) if isinstance(error, CheckpointError) else SaveFailedError
        return cls(number, step, kind.__name__, str(error))

    def error(self, cause: BaseException | None = None) -> CheckpointError:
        """What to raise for it later."""
        kind: Any = getattr(errors, self.kind, SaveFailedError)
        error: CheckpointError = kind(f"the save of step {self.step}, of before, failed: {self.text}")
        for note in getattr(cause, "__notes__", ()):
            error.add_note(note)
        error.__cause__ = cause
        return error


class Agreed(NamedTuple):
    """What was agreed on.

    Attributes:
        step: to be saved.
        is_busy: whether a save is under way on some rank.
        failure: the first of before that is known on some rank, and that nobody was told of there.
    """

    step: int
    is_busy: bool
    failure: Failure | None


class Wanted(NamedTuple):
    """What a rank wants loaded; see `Checkpointer.load`."""

    step: int | None
    fallback: bool
    missing: Missing
    missing_per_rank: Missing


def agree_to_save(
    collectives: Collectives,
    step: SupportsIndex,
    prepare: Callable[[int], None],
    *,
    is_busy: bool,
    failure: Failure | None,
) -> Agreed:
    """Has all ranks say what they are about to save, and in what state they are.

    Args:
        collectives: of the ranks.
        step: to be saved.
        prepare: given the step as a number, refuses what can be refused on this rank already.
        is_busy: whether a save is under way on this rank.
        failure: of which nobody was told on this rank.

    Raises:
        UsageError: the step is no number from 0 on, or not the same on all ranks.
        CheckpointError: ``prepare`` failed, on whichever rank.
    """

    def say() -> Agreed:
        number = checked_step(step)
        prepare(number)
        return Agreed(number, is_busy, failure)

    return collectives.all_reduce("beginning a save", say, _agreed)


def agree_to_load(
    collectives: Collectives, say: Callable[[], Wanted], choose: Callable[[Wanted], list[int]]
) -> list[int]:
    """Has all ranks say what they are about to load.

    Args:
        collectives: of the ranks.
        say: what this rank wants; refuses what can be refused on it already.
        choose: called on the coordinator; the steps to try, the first first.

    Raises:
        UsageError: ranks want different things.
        CheckpointError: ``say`` failed, on whichever rank, or ``choose``.
    """

    def decide(said: list[Wanted]) -> list[int]:
        if len(set(said)) > 1:
            told = "; ".join(f"rank {rank}: {wanted}" for rank, wanted in enumerate(said) if wanted != said[0])
            msg = f"ranks are about to load different things: rank 0: {said[0]}; {told}"
            raise UsageError(msg)
        return choose(said[0])

    return collectives.all_reduce("beginning a load", say, decide)


def checked_step(step: SupportsIndex) -> int:
    """The step as a number.

    Raises:
        UsageError: it is none, or negative.
    """
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0 or isinstance(step, bool):
        msg = f"step={step!r} is not a whole number from 0 on"
        raise UsageError(msg)
    return number


def _agreed(said: list[Agreed]) -> Agreed:
    steps = sorted({each.step for each in said})
    if len(steps) > 1:
        msg = f"ranks are about to save different steps: {', '.join(map(str, steps))}"
        raise UsageError(msg)
    failures = [each.failure for each in said if each.failure is not None]
    return Agreed(steps[0], any(each.is_busy for each in said), min(failures) if failures else None)
