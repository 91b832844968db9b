"""Which steps to keep.

Law: pure. A policy says what it keeps, never what goes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Literal, Protocol

from cloudckpt.errors import UsageError
from cloudckpt.manifest import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedStep:
    """A step whose checkpoint is committed."""

    step: int
    summary: Summary

    def __hash__(self) -> int:
        return hash((self.step, self.summary.save_id))


class Policy(Protocol):
    """Decides which steps `prune` keeps; the newest is kept in any case."""

    def keep(self, steps: Sequence[CommittedStep]) -> Iterable[CommittedStep]:
        """Those of ``steps`` to keep.

        It is asked again after each commit, of what it kept before and what came since: what should stay must be
        kept each time.

        Args:
            steps: all that are committed, newest first; never none.
        """
        ...


class Combines:
    """Gives a policy ``|`` (what either keeps) and ``&`` (what both keep); inherit it in a policy of your own."""

    __slots__ = ()

    def __or__(self: Policy, other: Policy) -> "AnyOf":
        return AnyOf((self, other)) if _is_policy(other) else NotImplemented

    def __ror__(self: Policy, other: Policy) -> "AnyOf":
        return AnyOf((other, self)) if _is_policy(other) else NotImplemented

    def __and__(self: Policy, other: Policy) -> "AllOf":
        return AllOf((self, other)) if _is_policy(other) else NotImplemented

    def __rand__(self: Policy, other: Policy) -> "AllOf":
        return AllOf((other, self)) if _is_policy(other) else NotImplemented


@dataclass(frozen=True, slots=True)
class AnyOf(Combines):
    """Keeps what any of the policies keeps."""

    policies: tuple[Policy, ...]

    def keep(self, steps: Sequence[CommittedStep]) -> Iterable[CommittedStep]:
        """See `Policy.keep`."""
        kept = {found.step for policy in self.policies for found in policy.keep(steps)}
        return [found for found in steps if found.step in kept]


@dataclass(frozen=True, slots=True)
class AllOf(Combines):
    """Keeps what all of the policies keep; each is asked of all steps."""

    policies: tuple[Policy, ...]

    def keep(self, steps: Sequence[CommittedStep]) -> Iterable[CommittedStep]:
        """See `Policy.keep`."""
        kept = [{found.step for found in policy.keep(steps)} for policy in self.policies]
        return [found for found in steps if all(found.step in some for some in kept)]


@dataclass(frozen=True, slots=True)
class KeepLast(Combines):
    """Keeps the newest ``n`` steps."""

    n: int

    def __post_init__(self) -> None:
        _check_count(self, "n", self.n)

    def keep(self, steps: Sequence[CommittedStep]) -> Iterable[CommittedStep]:
        """See `Policy.keep`."""
        return steps[: self.n]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepEvery(Combines):
    """Keeps the steps whose number is a multiple of ``steps``, or one for every so many ``seconds``.

    Time is cut into windows of ``seconds`` from 1970 on, and of each the step that was committed first, by
    ``summary.created``, is kept. Windows do not move when steps go or come, so that what was kept once stays, unless
    a coordinator's clock is set back into a window that has one.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            msg = "KeepEvery takes either steps= or seconds=; for both, join two of them with |"
            raise UsageError(msg)
        if self.steps is not None:
            _check_count(self, "steps", self.steps)
        if self.seconds is not None and not (_is_number(self.seconds) and 0 < self.seconds < math.inf):
            msg = f"KeepEvery(seconds={self.seconds!r}) must be a number of seconds above 0"
            raise UsageError(msg)

    def keep(self, steps: Sequence[CommittedStep]) -> Iterable[CommittedStep]:
        """See `Policy.keep`."""
        if self.steps is not None:
            return [found for found in steps if found.step % self.steps == 0]
        first: dict[int, CommittedStep] = {}
        for found in sorted(steps, key=lambda one: (_committed_at(one), one.step)):
            first.setdefault(int(_committed_at(found) // (self.seconds or 1)), found)
        return list(first.values())


@dataclass(frozen=True, slots=True)
class KeepBest(Combines):
    """Keeps the ``n`` steps whose metric is best, the newer of two that are equal.

    Steps that were saved without that metric, or with NaN, are not kept by it: where all are, only the newest stays.
    """

    metric: str
    n: int
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric:
            msg = f"KeepBest({self.metric!r}) needs the name of a metric, as save(metrics=) has it"
            raise UsageError(msg)
        _check_count(self, "n", self.n)
        if self.mode not in ("min", "max"):
            msg = f"KeepBest(mode={self.mode!r}) must be 'min', where less is better, or 'max'"
            raise UsageError(msg)

    def keep(self, steps: Sequence[CommittedStep]) -> Iterable[CommittedStep]:
        """See `Policy.keep`."""
        sign = 1 if self.mode == "min" else -1
        measured = [
            (sign * value, found)
            for found in steps
            if math.isfinite(value := found.summary.metrics.get(self.metric, math.nan))
        ]
        return [found for _, found in sorted(measured, key=lambda one: one[0])[: self.n]]


def _committed_at(found: CommittedStep) -> float:
    created = found.summary.created
    return (created if created.tzinfo is not None else created.replace(tzinfo=UTC)).timestamp()


def _is_policy(value: object) -> bool:
    return callable(getattr(value, "keep", None))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_count(policy: object, name: str, count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        msg = f"{type(policy).__name__}({name}={count!r}) must be a whole number of at least 1"
        raise UsageError(msg)
