"""What this project says of itself, held against what was measured. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from cloudckpt.cli.bench.figures import OPERATIONS, Ratio, Summary
from cloudckpt.cli.bench.partial import NAME as PARTIAL
from cloudckpt.cli.bench.partial import Partial
from cloudckpt.cli.bench.rows import MOST_FRAMES, ROWS, RowsFigure
from cloudckpt.cli.bench.sizes import spelled
from cloudckpt.cli.bench.weights import NAME as WEIGHTS
from cloudckpt.cli.bench.weights import PLANES, WeightsFigure

MOST_CPU = 0.5
"""Of a peer's client CPU."""
LEAST_LOAD_SPEED = 3.0
LEAST_STOCK_LOAD_SPEED = 4.0
LEAST_SLICE_SPEED = 50.0
"""Of a peer's."""
MOST_FETCHED = 1.05
"""Bytes, for each that is needed."""
MOST_OF_FASTEST = 1.5
"""Of the time that the fastest of several ways takes, where bytes cost as little as on one machine."""
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


def about_speed(workload: str, ratios: Sequence[Ratio], least_load_speed: float = LEAST_LOAD_SPEED) -> list[Claim]:
    """Client CPU and load speed beside each peer."""
    claims = []
    for ratio in ratios:
        says = f"{ratio.operation}: client CPU at most {MOST_CPU:g} of {ratio.peer}'s"
        claims.append(Claim(workload=workload, says=says, measured=f"{ratio.cpu:.2f}", holds=ratio.cpu <= MOST_CPU))
        if ratio.operation == "load":
            says = f"load: at least {least_load_speed:g} times as fast as {ratio.peer}"
            holds = ratio.speed >= least_load_speed
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


def about_partial(figures: Partial) -> list[Claim]:
    """What partial loads fetch, and how fast ten rows are."""
    found = []
    for f in figures.fetched:
        says = f"{f.case}: at most {MOST_FETCHED:g} bytes fetched for each needed"
        found.append(Claim(workload=PARTIAL, says=says, measured=f"{f.ours:.3f}", holds=f.ours <= MOST_FETCHED))
    for tensor in dict.fromkeys(way.tensor for way in figures.ways):
        ways = [way for way in figures.ways if way.tensor == tensor]
        chosen = next(way for way in ways if way.is_default)
        fastest = min(way.wall_s for way in ways)
        says = f"columns of {tensor}: the way chosen takes at most {MOST_OF_FASTEST:g} of the fastest's time"
        measured = f"{chosen.wall_s / fastest:.2f}"
        holds = chosen.wall_s <= MOST_OF_FASTEST * fastest
        found.append(Claim(workload=PARTIAL, says=says, measured=measured, holds=holds))
    for s in figures.slices:
        says = f"ten rows, {s.ours}: at least {LEAST_SLICE_SPEED:g} times as fast as FsspecReader, {s.peer}"
        holds = s.speed >= LEAST_SLICE_SPEED
        found.append(Claim(workload=PARTIAL, says=says, measured=f"{s.speed:.0f}", holds=holds))
    return found


def about_rows(figure: RowsFigure) -> list[Claim]:
    """What a slice of a compressed and encrypted tensor costs."""
    says = f"{ROWS} rows of {spelled(figure.nbytes)}, compressed and encrypted: at most {MOST_FRAMES} frames fetched"
    measured = f"{figure.frames} frames: {figure.bytes_fetched} bytes in {figure.requests} request(s)"
    return [Claim(workload="rows", says=says, measured=measured, holds=figure.frames <= MOST_FRAMES)]
