"""What the ranks agree on before a save.

Law: one small message around; nothing is copied or written before it has come back.
"""

import operator
from collections.abc import Callable
from typing import NamedTuple, SupportsIndex

from cloudckpt.dcp.ranks import Collectives
from cloudckpt.errors import CheckpointError, SaveFailedError, UsageError


class Failure(NamedTuple):
    """A save of before that failed."""

    step: int
    error: BaseException


class Agreed(NamedTuple):
    """What was agreed on.

    Attributes:
        step: to be saved.
        is_busy: whether a save is under way on some rank.
        failure: what is known on some rank of a save of before, and nobody was told, in words.
    """

    step: int
    is_busy: bool
    failure: str | None


class _Said(NamedTuple):
    step: int
    is_busy: bool
    failure: str | None


def agree(
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

    def say() -> _Said:
        number = checked_step(step)
        prepare(number)
        return _Said(number, is_busy, None if failure is None else str(told(failure)))

    return Agreed(*collectives.all_reduce("beginning a save", say, _agreed))


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


def told(failure: Failure) -> CheckpointError:
    """The failure of a save of before, as it is raised later."""
    error = failure.error
    kind = type(error) if isinstance(error, CheckpointError) else SaveFailedError
    mine = kind(f"the save of step {failure.step}, of before, failed: {error}")
    for note in getattr(error, "__notes__", ()):
        mine.add_note(note)
    mine.__cause__ = error
    return mine


def _agreed(said: list[_Said]) -> tuple[int, bool, str | None]:
    steps = sorted({each.step for each in said})
    if len(steps) > 1:
        msg = f"ranks are about to save different steps: {', '.join(map(str, steps))}"
        raise UsageError(msg)
    failures = [each.failure for each in said if each.failure is not None]
    return steps[0], any(each.is_busy for each in said), failures[0] if failures else None
