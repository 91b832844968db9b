"""What this project says of itself, held against what was measured. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from cloudckpt.cli.bench.figures import OPERATIONS, Ratio, Summary
from cloudckpt.cli.bench.rows import MOST_FRAMES, ROWS, RowsFigure
from cloudckpt.cli.bench.sizes import spelled
from cloudckpt.cli.bench.weights import NAME as WEIGHTS
from cloudckpt.cli.bench.weights import PLANES, WeightsFigure

MOST_CPU = 0.5
"""Of a peer's client CPU."""
LEAST_LOAD_SPEED = 3.0
"""Of a peer's."""
OVERHEAD_NBYTES = 100 << 20
"""That a save or a load may take beside its byte budget."""
MOST_STORED = {"bf16": 0.69, "fp32": 0.84}
"""Of the plain bytes of real weights, after byte planes and zstd."""
LEAST_TRANSFORM_SPEED = 0.9
"""Of zstd alone."""


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
        bound = f"at most {spelled(most)} (budget + {spelled(OVERHEAD_NBYTES)})"
        says = f"{summary.operation} by {summary.contender}: peak memory {bound}"
        growth = summary.rss_growth
        measured = "not told by this system" if growth is None else spelled(growth)
        holds = None if growth is None else growth <= most
        claims.append(Claim(workload=workload, says=says, measured=measured, holds=holds))
    return claims


def about_weights(figures: Sequence[WeightsFigure]) -> list[Claim]:
    """What byte planes make of real weights."""
    claims = []
    for f in figures:
        if f.chain != PLANES:
            continue
        if f.threads == 1:
            says = f"{f.dtype}: byte planes and zstd leave at most {MOST_STORED[f.dtype]:.0%}"
            holds = f.stored <= MOST_STORED[f.dtype]
            claims.append(Claim(workload=WEIGHTS, says=says, measured=f"{f.stored:.1%}", holds=holds))
        says = f"{f.dtype}, {f.threads} threads: at least {LEAST_TRANSFORM_SPEED:g} times as fast as zstd alone"
        holds = f.up_ratio >= LEAST_TRANSFORM_SPEED
        claims.append(Claim(workload=WEIGHTS, says=says, measured=f"{f.up_ratio:.2f}", holds=holds))
    return claims


def about_rows(figure: RowsFigure) -> list[Claim]:
    """What a slice of a compressed and encrypted tensor costs."""
    says = f"{ROWS} rows of {spelled(figure.nbytes)}, compressed and encrypted: at most {MOST_FRAMES} frames fetched"
    measured = f"{figure.frames} frames: {figure.bytes_fetched} bytes in {figure.requests} request(s)"
    return [Claim(workload="rows", says=says, measured=measured, holds=figure.frames <= MOST_FRAMES)]
