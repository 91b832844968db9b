"""What is measured, and the arithmetic on it.

Law: pure; figures of one round are only ever compared with figures of the same round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Operation = Literal["save", "load"]
OPERATIONS: tuple[Operation, ...] = ("save", "load")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one operation took from the process it ran in.

    Attributes:
        wall_s: by the clock.
        cpu_s: user and system, of all threads.
        rss_before, rss_peak: resident bytes just before, and at most during it; None where the
            system does not tell.
    """

    wall_s: float
    cpu_s: float
    rss_before: int | None
    rss_peak: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One operation of one contender in one round; round 0 warms up and counts for memory only.

    Attributes:
        rss_baseline: resident bytes of the process once its libraries, its connections and its state
            dict were there, before it first saved or loaded that: all later growth counts as memory.
    """

    workload: str
    contender: str
    round: int
    operation: Operation
    cost: Cost
    rss_baseline: int | None

    @property
    def rss_growth(self) -> int | None:
        """The peak above the baseline."""
        if self.cost.rss_peak is None or self.rss_baseline is None:
            return None
        return self.cost.rss_peak - self.rss_baseline


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one operation asked of the server, counted in front of it in a pass that is not timed.

    Attributes:
        requests: by method; ``PART`` is a PUT of a part.
        sent, received: bytes to the server and from it, headers included.
    """

    workload: str
    contender: str
    operation: Operation
    requests: Mapping[str, int]
    sent: int
    received: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The medians of one contender's operation over its rounds, and its highest memory."""

    contender: str
    operation: Operation
    wall_s: float
    cpu_s: float
    rss_growth: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A contender beside a peer: medians, over the rounds, of each round's ratio.

    Attributes:
        speed: the peer's wall time by ours: above 1 where we are faster.
        cpu: our CPU by the peer's: below 1 where we take less.
    """

    contender: str
    peer: str
    operation: Operation
    speed: float
    cpu: float


def summarize(figures: Sequence[Figure], workload: str, contender: str, operation: Operation) -> Summary:
    """The medians of what was measured."""
    chosen = [f for f in figures if (f.workload, f.contender, f.operation) == (workload, contender, operation)]
    growths = [f.rss_growth for f in chosen if f.rss_growth is not None]
    return Summary(
        contender=contender,
        operation=operation,
        wall_s=median(f.cost.wall_s for f in chosen if f.round),
        cpu_s=median(f.cost.cpu_s for f in chosen if f.round),
        rss_growth=max(growths) if growths else None,
    )


def compare(figures: Sequence[Figure], workload: str, contender: str, peer: str, operation: Operation) -> Ratio:
    """The medians of the rounds' ratios."""
    of = {(f.contender, f.round): f.cost for f in figures if (f.workload, f.operation) == (workload, operation)}
    rounds = sorted({round_ for name, round_ in of if name == contender and round_})

    def over_rounds(ratio: Callable[[Cost, Cost], float]) -> float:
        return median(ratio(of[contender, n], of[peer, n]) for n in rounds)

    return Ratio(
        contender=contender,
        peer=peer,
        operation=operation,
        speed=over_rounds(lambda ours, theirs: theirs.wall_s / ours.wall_s),
        cpu=over_rounds(lambda ours, theirs: ours.cpu_s / theirs.cpu_s),
    )
