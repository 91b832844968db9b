"""Which steps to keep.

Law: pure. A policy says what it keeps, never what goes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cloudckpt.errors import UsageError
from cloudckpt.manifest import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedStep:
    """A step whose checkpoint is committed."""

    step: int
    summary: Summary


class Policy(Protocol):
    """Decides which steps `prune` keeps; the newest is kept in any case."""

    def keep(self, steps: Sequence[CommittedStep]) -> Iterable[CommittedStep]:
        """Those of ``steps`` to keep.

        Args:
            steps: all that are committed, newest first; never none.
        """
        ...


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keeps the newest ``count`` steps."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            msg = f"KeepLast({self.count}) must keep at least 1"
            raise UsageError(msg)

    def keep(self, steps: Sequence[CommittedStep]) -> Iterable[CommittedStep]:
        """See `Policy.keep`."""
        return steps[: self.count]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepEvery:
    """Keeps the steps whose number is a multiple of ``steps``."""

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            msg = f"KeepEvery(steps={self.steps}) must be at least 1"
            raise UsageError(msg)

    def keep(self, steps: Sequence[CommittedStep]) -> Iterable[CommittedStep]:
        """See `Policy.keep`."""
        return [found for found in steps if found.step % self.steps == 0]
