"""What is measured of saves behind training, and the arithmetic on it.

Law: pure. A ratio is of two figures of the same round, taken one right after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

from cloudckpt.cli.bench.async_parts import BLOCKING, RANKS, TRAINING
from cloudckpt.cli.bench.claims import Claim, at_least, at_most

FED = "bytes from elsewhere"
"""A process sends as many bytes as the state dict has: what the server and the kernel take of training anyway."""
MOST_OF_COPY = 1.2
"""Of the time of one copy into warm memory: how long `Checkpointer.async_save` may hold up training."""
LEAST_THROUGHPUT = 0.95
"""Of training's without a save: what is left of it during the upload."""
MOST_COORDINATION_MS = 50.0
"""From a save's beginning to its commit, staging and bytes left out, from the second save of a structure on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The median of figures, and the least and the greatest of them."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one."""
        return cls(median=median(values), least=min(values), greatest=max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocking:
    """One async save of a contender, beside one copy of the same tensors into warm memory.

    Attributes:
        case: which state dict.
        threads: of torch.
        nbytes: of the tensors.
        blocked_s: until the state dict might change.
        copy_s: of the copy, just before: the fastest of a few.
    """

    case: str
    threads: int
    contender: str
    round: int
    nbytes: int
    blocked_s: float
    copy_s: float

    @property
    def ratio(self) -> float:
        """How many copies it took."""
        return self.blocked_s / self.copy_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Steps of training during one upload, beside steps just before and after it.

    Attributes:
        nbytes: of the state dict.
        blocked_s: until the state dict might change; no step was made meanwhile.
        upload_s: from then until it was saved.
        idle_s: of each step while nothing was saved.
        busy_s: of each step that began and ended during the upload.
        server_cpu_s: of the server, during the upload.
    """

    contender: str
    round: int
    nbytes: int
    blocked_s: float
    upload_s: float
    idle_s: Sequence[float]
    busy_s: Sequence[float]
    server_cpu_s: float

    @property
    def ratio(self) -> float:
        """What was left of the throughput."""
        return mean(self.idle_s) / mean(self.busy_s)

    @property
    def lost_s(self) -> float:
        """Seconds of training that the save cost: a slow upload costs more of them than a quick one."""
        return self.blocked_s + self.upload_s * (1 - self.ratio)

    @property
    def server_cores(self) -> float:
        """How many cores the server kept busy."""
        return self.server_cpu_s / self.upload_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordination:
    """One async save of all ranks; seconds of the slowest rank.

    Attributes:
        case: which state dict, on which server.
        coordination_s: as `Saved` tells it: in the background, without the upload.
        begin_s: in which `Checkpointer.async_save` held up training, without the copy.
    """

    case: str
    round: int
    coordination_s: float
    begin_s: float

    @property
    def all_s(self) -> float:
        """Everything but staging and bytes."""
        return self.coordination_s + self.begin_s


Figure = Blocking | Training | Coordination


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The rounds of one contender in one case.

    Attributes:
        part: one of `BLOCKING`, `TRAINING` and `RANKS`.
        measures: what was spread, by name; the first is what counts.
    """

    part: str
    case: str
    contender: str
    rounds: int
    measures: dict[str, Spread]


def rows(figures: Sequence[Figure]) -> list[Row]:
    """A row for each contender in each case, in the order of the first figures."""
    groups: dict[tuple[str, str, str], list[Figure]] = {}
    for figure in figures:
        groups.setdefault(_place(figure), []).append(figure)
    found = [_row(*place, group) for place, group in groups.items()]
    fed = {f.round: f.ratio for f in figures if isinstance(f, Training) and f.contender == FED}
    for row in found:
        ratios = [(f.round, f.ratio) for f in figures if isinstance(f, Training) and f.contender == row.contender]
        if row.part == TRAINING and all(round_ in fed for round_, _ in ratios):
            row.measures["of_fed"] = Spread.of([ratio / fed[round_] for round_, ratio in ratios])
    return found


def claims(found: Sequence[Row]) -> list[Claim]:
    """What this project says of its saves behind training."""
    made = []
    for row in found:
        if row.contender.startswith("cloudckpt"):
            name, of = f"{row.case}: {row.contender}", next(iter(row.measures.values())).median
            if row.part == BLOCKING:
                says = f"{name} blocks for at most {{}} times one copy"
                made.append(at_most(BLOCKING, says, of, MOST_OF_COPY))
            elif row.part == TRAINING:
                says = f"{name} leaves at least {{}} of the throughput"
                made.append(at_least(TRAINING, says, of, LEAST_THROUGHPUT))
            else:
                says = f"{name} takes at most {{}} ms for everything but staging and bytes"
                made.append(at_most(RANKS, says, 1000 * of, MOST_COORDINATION_MS))
    return made


def _place(figure: Figure) -> tuple[str, str, str]:
    if isinstance(figure, Blocking):
        return BLOCKING, f"{figure.case}, {figure.threads} thread{'s' * (figure.threads > 1)}", figure.contender
    if isinstance(figure, Training):
        return TRAINING, "training", figure.contender
    return RANKS, figure.case, "cloudckpt, 2 ranks"


def _row(part: str, case: str, contender: str, group: Sequence[Figure]) -> Row:
    spreads = {name: Spread.of([getattr(figure, name) for figure in group]) for name in _MEASURES[part]}
    return Row(part=part, case=case, contender=contender, rounds=len(group), measures=spreads)


_MEASURES = {
    BLOCKING: ("ratio", "blocked_s", "copy_s"),
    TRAINING: ("ratio", "lost_s", "blocked_s", "upload_s", "server_cores"),
    RANKS: ("all_s", "coordination_s", "begin_s"),
}
