"""What the demo found out.

Law: pure; numbers first, then how they are said.
"""

from dataclasses import dataclass
from statistics import median

import msgspec

from cloudckpt.cli.demo.events import Loaded
from cloudckpt.cli.demo.runs import KEPT, RANKS, Settings
from cloudckpt.cli.demo.watch import Sighting


@dataclass(frozen=True, slots=True, kw_only=True)
class Undisturbed:
    """A run from the beginning to the end: its losses, and of each save how long it took and training waited."""

    losses: dict[int, str]
    saved_s: list[float]
    waited_s: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A run that was killed: the step whose save it died in, what that had brought, the losses it had told."""

    step: int
    seen: Sighting
    losses: dict[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """A run that went on from a checkpoint, and the steps that are committed at its end."""

    loaded: Loaded
    steps: list[int]
    losses: dict[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A slice that was read from a checkpoint."""

    fetched_nbytes: int
    tensor_nbytes: int
    is_equal: bool


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """All of it; ``--json`` prints it."""

    steps: int
    first_loss: float
    last_loss: float
    killed_in_save_of: int
    shards_at_death: int
    resumed_from: int
    load_seconds: float
    steps_at_the_end: list[int]
    resumed_steps: int
    steps_that_differ: list[int]
    rows_fetched_nbytes: int
    rows_tensor_nbytes: int
    rows_are_equal: bool
    waited_ms: float
    saved_ms: float
    seconds: float

    @property
    def are_as_promised(self) -> bool:
        """The curve went on bit for bit, and the rows are the model's."""
        return not self.steps_that_differ and self.rows_are_equal

    def rows(self) -> list[tuple[str, str]]:
        """The findings in words."""
        same = self.steps - len(self.steps_that_differ)
        verdict = "equal" if self.rows_are_equal else "NOT EQUAL"
        share = 100 * self.rows_fetched_nbytes / self.rows_tensor_nbytes
        return [
            ("trained", f"{self.steps} steps, loss {self.first_loss:.3f} to {self.last_loss:.3f}"),
            (
                "killed in the save of",
                f"step {self.killed_in_save_of}: {self.shards_at_death} of {RANKS} shards up, not committed",
            ),
            ("resumed from", f"step {self.resumed_from}, loaded in {self.load_seconds:.1f} s"),
            (
                "losses equal to the last bit",
                f"{same} of {self.steps}, {self.resumed_steps} of them after the resume",
            ),
            (
                "training waited for a save",
                f"{self.waited_ms:.0f} ms of the {self.saved_ms:.0f} that it took",
            ),
            ("steps kept", f"{', '.join(map(str, self.steps_at_the_end))}, by KeepLast({KEPT})"),
            (
                "bytes fetched for ten rows",
                f"{self.rows_fetched_nbytes:,} of {self.rows_tensor_nbytes:,} ({share:.2f} %), {verdict}",
            ),
            ("wall time", f"{self.seconds:.0f} s"),
        ]


def findings_of(
    settings: Settings, before: Undisturbed, death: Death, resumed: Resumed, rows: Rows, *, seconds: float
) -> Findings:
    """Puts the findings together.

    Args:
        settings: of the training.
        before: the undisturbed run; its losses are as `float.hex` spells them.
        death: of the second run.
        resumed: what became of it.
        rows: read from its last checkpoint.
        seconds: that the demo took.
    """
    curve = before.losses
    differ = {s for s, bits in curve.items() if resumed.losses.get(s, death.losses.get(s)) != bits}
    differ |= {s for s, bits in death.losses.items() if curve.get(s) != bits}
    return Findings(
        steps=settings.steps,
        first_loss=float.fromhex(curve[1]),
        last_loss=float.fromhex(curve[settings.steps]),
        killed_in_save_of=death.step,
        shards_at_death=death.seen.shards,
        resumed_from=resumed.loaded.step,
        load_seconds=round(resumed.loaded.seconds, 3),
        steps_at_the_end=resumed.steps,
        resumed_steps=len(resumed.losses),
        steps_that_differ=sorted(differ),
        rows_fetched_nbytes=rows.fetched_nbytes,
        rows_tensor_nbytes=rows.tensor_nbytes,
        rows_are_equal=rows.is_equal,
        waited_ms=round(1000 * median(before.waited_s)),
        saved_ms=round(1000 * median(before.saved_s)),
        seconds=round(seconds, 1),
    )
