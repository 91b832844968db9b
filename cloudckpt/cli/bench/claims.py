"""What this project says of itself, held against what was measured. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from cloudckpt.cli.bench.counter import PART
from cloudckpt.cli.bench.figures import OPERATIONS, Operation, Ratio, Summary, Traffic
from cloudckpt.cli.bench.partial import NAME as PARTIAL
from cloudckpt.cli.bench.partial import Partial
from cloudckpt.cli.bench.rows import MOST_FRAMES, ROWS, RowsFigure
from cloudckpt.cli.bench.weights import NAME as WEIGHTS
from cloudckpt.cli.bench.weights import PLANES, WeightsFigure
from cloudckpt.cli.bench.workloads import RAW
from cloudckpt.cli.sizes import spelled

LEAST_LOAD_SPEED = {"fsspec": 6.0, "fsspec-default": 6.0, "fsspec-8": 4.0, "s3torchconnector": 2.0}
MOST_SAVE_CPU = {"fsspec": 0.25, "fsspec-8": 0.25, "s3torchconnector": 0.5}
"""Of a peer's client CPU."""
LEAST_OF_RAW_SPEED = 0.9
MOST_OF_RAW_CPU: dict[str, dict[tuple[Operation, str], float]] = {
    "null": {
        ("load", "raw-sockets"): 1.6,
        ("save", "raw-sockets"): 2.0,
        ("load", "raw-aiobotocore"): 0.55,
        ("save", "raw-aiobotocore"): 0.8,
    },
    "null-tls": {("load", "raw-aiobotocore"): 0.85, ("save", "raw-aiobotocore"): 0.85},
}
"""By null server."""
LEAST_OF_CONNECTIONS = 0.85
"""Of what they could carry."""
MOST_REQUESTS_BEYOND_PARTS = 3
CHECKPOINT_REQUESTS = 2
"""A look at what is there, and the manifest."""
MOST_MORE_S = 1.0
MOST_STOCK_CPU = 0.5
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


def about_stock(workload: str, ratios: Sequence[Ratio]) -> list[Claim]:
    """Client CPU and speed of loading what torch saved, beside each peer."""
    found = []
    for r in ratios:
        found.append(at_most(workload, f"load: client CPU at most {{}} of {r.peer}'s", r.cpu, MOST_STOCK_CPU))
        found.append(
            at_least(workload, f"load: at least {{}} times as fast as {r.peer}", r.speed, LEAST_STOCK_LOAD_SPEED)
        )
    return found


def about_peers(workload: str, ratios: Sequence[Ratio]) -> list[Claim]:
    """Saves and loads beside other checkpoint libraries and the fastest of the raw references, on a real server."""
    found = []
    for r in ratios:
        if r.operation == "load" and r.peer in LEAST_LOAD_SPEED:
            says = f"load: at least {{}} times as fast as {r.peer}"
            found.append(at_least(workload, says, r.speed, LEAST_LOAD_SPEED[r.peer]))
        if r.operation == "save" and r.peer in MOST_SAVE_CPU:
            says = f"save: client CPU at most {{}} of {r.peer}'s"
            found.append(at_most(workload, says, r.cpu, MOST_SAVE_CPU[r.peer]))
    raw = [r for r in ratios if r.operation == "save" and r.peer in RAW]
    if raw:
        fastest = min(raw, key=lambda r: r.speed)
        says = f"save: at least {{}} of the speed of the fastest raw reference, {fastest.peer}"
        found.append(at_least(workload, says, fastest.speed, LEAST_OF_RAW_SPEED))
    return found


def about_cpu(workload: str, server: str, ratios: Sequence[Ratio]) -> list[Claim]:
    """Client CPU beside raw references, on a null server."""
    bounds = MOST_OF_RAW_CPU.get(server, {})
    return [
        at_most(workload, f"{r.operation}: client CPU at most {{}} of {r.peer}'s", r.cpu, bounds[r.operation, r.peer])
        for r in ratios
        if (r.operation, r.peer) in bounds
    ]


def about_connections(
    workload: str, nbytes: int, summaries: Sequence[Summary], concurrency: int, bytes_per_s: float
) -> list[Claim]:
    """How much of what the connections could carry was used."""
    could = concurrency * bytes_per_s
    says = f"at least {{}} of what {concurrency} connections of {bytes_per_s / 1e6:g} MB/s carry"
    return [
        at_least(workload, f"{s.operation} by {s.contender}: {says}", nbytes / s.wall_s / could, LEAST_OF_CONNECTIONS)
        for s in summaries
    ]


def about_small_requests(workload: str, traffic: Traffic) -> Claim:
    """What saving many small tensors asks of the server, a rank's shard being one."""
    beyond = sum(count for method, count in traffic.requests.items() if method != PART)
    says = "save: at most {} requests for its shard beyond the parts, and two for the checkpoint"
    return at_most(workload, says, beyond - CHECKPOINT_REQUESTS, MOST_REQUESTS_BEYOND_PARTS)


def about_small_loads(workload: str, small: Summary, as_one: Summary) -> Claim:
    """How much longer many small tensors take than the same bytes as one."""
    says = "load: at most {} s more than the same bytes as one tensor"
    return at_most(workload, says, small.wall_s - as_one.wall_s, MOST_MORE_S)


def at_least(workload: str, says: str, measured: float, bound: float) -> Claim:
    """What was measured has to reach a bound, which the sentence names by ``{}``."""
    return Claim(
        workload=workload, says=says.format(f"{bound:g}"), measured=f"{measured:.2f}", holds=measured >= bound
    )


def at_most(workload: str, says: str, measured: float, bound: float) -> Claim:
    """What was measured must not pass a bound, which the sentence names by ``{}``."""
    return Claim(
        workload=workload, says=says.format(f"{bound:g}"), measured=f"{measured:.2f}", holds=measured <= bound
    )


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
