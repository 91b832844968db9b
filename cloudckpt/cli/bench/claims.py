"""What this project says of itself, held against what was measured. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from cloudckpt.cli.bench.figures import OPERATIONS, Ratio, Summary
from cloudckpt.cli.bench.sizes import spelled

MOST_CPU = 0.5
"""Of a peer's client CPU."""
LEAST_LOAD_SPEED = 3.0
"""Of a peer's."""
OVERHEAD_NBYTES = 100 << 20
"""That a save or a load may take beside its byte budget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A sentence, what was measured for it, and whether it holds; None where that could not be measured."""

    workload: str
    says: str
    measured: str
    holds: bool | None


def about_speed(workload: str, ratios: Sequence[Ratio]) -> list[Claim]:
    """Client CPU and load speed beside each peer."""
    claims = []
    for ratio in ratios:
        says = f"{ratio.operation}: client CPU at most {MOST_CPU:g} of {ratio.peer}'s"
        claims.append(Claim(workload=workload, says=says, measured=f"{ratio.cpu:.2f}", holds=ratio.cpu <= MOST_CPU))
        if ratio.operation == "load":
            says = f"load: at least {LEAST_LOAD_SPEED:g} times as fast as {ratio.peer}"
            holds = ratio.speed >= LEAST_LOAD_SPEED
            claims.append(Claim(workload=workload, says=says, measured=f"{ratio.speed:.2f}", holds=holds))
    return claims


def about_memory(workload: str, summaries: Sequence[Summary], budget_nbytes: int) -> list[Claim]:
    """Peak memory of our own saves and loads."""
    most = budget_nbytes + OVERHEAD_NBYTES
    claims = []
    for summary in sorted(summaries, key=lambda s: OPERATIONS.index(s.operation)):
        says = f"{summary.operation}: peak memory at most {spelled(most)} (budget + {spelled(OVERHEAD_NBYTES)})"
        growth = summary.rss_growth
        measured = "not told by this system" if growth is None else spelled(growth)
        holds = None if growth is None else growth <= most
        claims.append(Claim(workload=workload, says=says, measured=measured, holds=holds))
    return claims
