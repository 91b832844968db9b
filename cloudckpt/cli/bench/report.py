"""The results, as tables for people and as JSON for programs.

Law: shows what others worked out; the only file that writes to stdout.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from cloudckpt.cli.bench import claims
from cloudckpt.cli.bench.claims import Claim
from cloudckpt.cli.bench.contenders import OUR_KINDS, OURS, OURS_ON_STOCK
from cloudckpt.cli.bench.figures import OPERATIONS, Operation, Ratio, Summary, Traffic, compare, summarize
from cloudckpt.cli.bench.null_server import CLOUD
from cloudckpt.cli.bench.partial import Fetched, Slice, Way
from cloudckpt.cli.bench.session import Results
from cloudckpt.cli.bench.weights import WeightsFigure
from cloudckpt.cli.bench.workloads import Workload
from cloudckpt.cli.sizes import spelled
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.write import WriteOptions


def show(results: Results) -> None:
    """Prints the tables and the claims to stdout."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    machine = results.machine
    console.print(f"{machine.cpu}, {machine.cores} cores, Python {machine.python}")
    if results.weights:
        console.print(_weights_table(results.weights))
    for workload in results.workloads.values():
        console.print(_figures_table(workload, summaries_of(results, workload), _traffic(results, workload)))
        ratios = _ratios(results, workload)
        if ratios:
            console.print(_ratios_table(workload, ratios))
    if results.partial is not None:
        console.print(_fetched_table(results.partial.fetched))
        console.print(_ways_table(results.partial.ways))
        console.print(_slices_table(results.partial.slices))
    found = _claims(results)
    if found:
        console.print(_claims_table(found))


def as_json(results: Results) -> dict[str, Any]:
    """Everything: each figure as it was measured, and all that was worked out from them."""
    return {
        "url": results.url,
        "server": results.server,
        "machine": asdict(results.machine),
        "contenders": {name: contender.settings() for name, contender in results.contenders.items()},
        "workloads": {
            name: {
                **asdict(workload),
                "figures": [{**asdict(f), "rss_growth": f.rss_growth} for f in results.figures if f.workload == name],
                "summaries": [asdict(summary) for summary in summaries_of(results, workload)],
                "traffic": [asdict(traffic) for traffic in _traffic(results, workload).values()],
                "ratios": [asdict(ratio) for ratio in _ratios(results, workload)],
            }
            for name, workload in results.workloads.items()
        },
        "weights": [asdict(figure) for figure in results.weights],
        "rows": asdict(results.rows) if results.rows is not None else None,
        "partial": asdict(results.partial) if results.partial is not None else None,
        "claims": [asdict(claim) for claim in _claims(results)],
    }


def _traffic(results: Results, workload: Workload) -> dict[tuple[str, Operation], Traffic]:
    return {(t.contender, t.operation): t for t in results.traffic if t.workload == workload.name}


def summaries_of(results: Results, workload: Workload) -> list[Summary]:
    """The medians of everybody who was measured with it, saves first."""
    names = results.contenders_of(workload.name)
    return [summarize(results.figures, workload.name, name, operation) for operation in OPERATIONS for name in names]


def _ratios(results: Results, workload: Workload) -> list[Ratio]:
    names = results.contenders_of(workload.name)
    ours = next((name for name in names if name in {OURS, OURS_ON_STOCK}), None)
    if ours is None:
        return []
    peers = [name for name in names if name not in OUR_KINDS]
    operations: tuple[Operation, ...] = ("load",) if ours == OURS_ON_STOCK else OPERATIONS
    return [compare(results.figures, workload.name, ours, peer, op) for op in operations for peer in peers]


def _claims(results: Results) -> list[Claim]:
    found = claims.about_weights(results.weights)
    if results.rows is not None:
        found += claims.about_rows(results.rows)
    if results.partial is not None:
        found += claims.about_partial(results.partial)
    budget = {"save": WriteOptions().max_inflight_nbytes, "load": ReadOptions().max_inflight_nbytes}
    for workload in results.workloads.values():
        found += _speed_claims(results, workload)
        for summary in summaries_of(results, workload):
            if summary.contender in OUR_KINDS:
                found += claims.about_memory(workload.name, [summary], budget[summary.operation])
    return found


def _speed_claims(results: Results, workload: Workload) -> list[Claim]:
    name, ratios = workload.name, _ratios(results, workload)
    if name == "stock":
        return claims.about_stock(name, ratios)
    if name == "small":
        return _small_claims(results)
    if name != "bf16-128":
        return []
    if results.server is None:
        return claims.about_peers(name, ratios)
    if results.server == "cloud":
        ours = [summary for summary in summaries_of(results, workload) if summary.contender == OURS]
        rate = CLOUD.bytes_per_s or 0.0
        return claims.about_connections(name, workload.nbytes, ours, results.concurrency, rate)
    return claims.about_cpu(name, results.server, ratios)


def _small_claims(results: Results) -> list[Claim]:
    found = []
    counted = _traffic(results, results.workloads["small"]).get((OURS, "save"))
    if counted is not None:
        found.append(claims.about_small_requests("small", counted))
    if all(OURS in results.contenders_of(name) for name in ("small", "small-as-one")):
        loads = [summarize(results.figures, name, OURS, "load") for name in ("small", "small-as-one")]
        found.append(claims.about_small_loads("small", *loads))
    return found


def _weights_table(figures: Sequence[WeightsFigure]) -> Table:
    table = Table(
        title="weights of all-MiniLM-L6-v2: MiB/s of plain bytes, beside zstd in the same round", title_justify="left"
    )
    for name in ("dtype", "chain"):
        table.add_column(name)
    for name in ("threads", "left", "transform", "times zstd's", "restore", "times zstd's"):
        table.add_column(name, justify="right")
    for f in figures:
        speeds = f"{f.up_mib_s:.0f}", f"{f.up_ratio:.2f}", f"{f.down_mib_s:.0f}", f"{f.down_ratio:.2f}"
        table.add_row(f.dtype, f.chain, str(f.threads), f"{f.stored:.1%}", *speeds)
    return table


def _fetched_table(figures: Sequence[Fetched]) -> Table:
    table = Table(title="bytes fetched for each byte needed, counted at the server", title_justify="left")
    table.add_column("load")
    for name in ("needed MiB", "cloudckpt", "cloudckpt on stock", "FsspecReader on stock"):
        table.add_column(name, justify="right")
    for f in figures:
        table.add_row(
            f.case, f"{f.needed / (1 << 20):.1f}", f"{f.ours:.3f}", f"{f.ours_on_stock:.3f}", f"{f.peer:.3f}"
        )
    return table


def _ways_table(figures: Sequence[Way]) -> Table:
    table = Table(title="a column shard out of row-major chunks, by the knob max_gap", title_justify="left")
    for name in ("tensor", "way"):
        table.add_column(name)
    for name in ("requests", "fetched / needed", "wall s", "CPU s"):
        table.add_column(name, justify="right")
    for f in figures:
        way = f"{f.way} (the default)" if f.is_default else f.way
        figures_ = str(f.requests), f"{f.fetched / f.needed:.2f}", f"{f.wall_s:.3f}", f"{f.cpu_s:.3f}"
        table.add_row(f.tensor, way, *figures_)
    return table


def _slices_table(figures: Sequence[Slice]) -> Table:
    table = Table(title="ten rows of a stock tensor of 256 MiB: times as fast as FsspecReader", title_justify="left")
    for name in ("cloudckpt", "FsspecReader"):
        table.add_column(name)
    for name in ("s", "its s", "times as fast"):
        table.add_column(name, justify="right")
    for f in figures:
        table.add_row(f.ours, f.peer, f"{f.our_s:.4f}", f"{f.peer_s:.3f}", f"{f.speed:.0f}")
    return table


def _figures_table(
    workload: Workload, summaries: list[Summary], traffic: Mapping[tuple[str, Operation], Traffic]
) -> Table:
    rounds = f"median of {workload.rounds} rounds" if workload.rounds > 1 else "one round"
    title = f"{workload.name}: {spelled(workload.nbytes)}, {workload.description}, {rounds}"
    table = Table(title=title, title_justify="left")
    for name in ("operation", "contender"):
        table.add_column(name)
    for name in ("wall s", "CPU s", "MiB/s", "peak memory MiB", "MiB sent", "MiB received"):
        table.add_column(name, justify="right")
    table.add_column("requests")
    for s in summaries:
        growth = "-" if s.rss_growth is None else f"{s.rss_growth / (1 << 20):.0f}"
        rate = f"{workload.nbytes / (1 << 20) / s.wall_s:.0f}"
        counted = _counted(traffic.get((s.contender, s.operation)))
        table.add_row(s.operation, s.contender, f"{s.wall_s:.2f}", f"{s.cpu_s:.2f}", rate, growth, *counted)
    return table


def _counted(traffic: Traffic | None) -> tuple[str, str, str]:
    if traffic is None:
        return "-", "-", "-"
    requests = ", ".join(f"{count} {method}" for method, count in sorted(traffic.requests.items()))
    return f"{traffic.sent / (1 << 20):.2f}", f"{traffic.received / (1 << 20):.2f}", requests or "none"


def _ratios_table(workload: Workload, ratios: list[Ratio]) -> Table:
    table = Table(
        title=f"{workload.name}: {ratios[0].contender} beside its peers, median of the rounds' ratios",
        title_justify="left",
    )
    for name in ("operation", "peer"):
        table.add_column(name)
    for name in ("times as fast", "CPU of the peer's"):
        table.add_column(name, justify="right")
    for r in ratios:
        table.add_row(r.operation, r.peer, f"{r.speed:.2f}", f"{r.cpu:.2f}")
    return table


def _claims_table(found: list[Claim]) -> Table:
    table = Table(title="Does it hold?", title_justify="left")
    for name in ("workload", "claim", "measured", "holds"):
        table.add_column(name, overflow="fold")
    for claim in found:
        holds = {True: "yes", False: "NO", None: "?"}[claim.holds]
        table.add_row(claim.workload, claim.says, claim.measured, holds)
    return table
