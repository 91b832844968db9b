"""One call of the benchmark, from its options to its results.

Law: talks to stderr; the results say everything that the report shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from secrets import token_hex
from typing import TypeVar

import click

from cloudckpt.cli.bench import partial, rows, weights
from cloudckpt.cli.bench.claims import LEAST_LOAD_SPEED, LEAST_STOCK_LOAD_SPEED
from cloudckpt.cli.bench.contenders import Contender, all_contenders
from cloudckpt.cli.bench.figures import Figure
from cloudckpt.cli.bench.machine import Machine, describe
from cloudckpt.cli.bench.partial import Partial
from cloudckpt.cli.bench.place import Place
from cloudckpt.cli.bench.rows import RowsFigure
from cloudckpt.cli.bench.runner import run
from cloudckpt.cli.bench.weights import WeightsFigure
from cloudckpt.cli.bench.workloads import Workload, all_workloads

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What was measured, of whom, on what."""

    url: str
    machine: Machine
    contenders: Mapping[str, Contender]
    workloads: Mapping[str, Workload]
    figures: list[Figure]
    weights: list[WeightsFigure]
    rows: RowsFigure | None
    partial: Partial | None

    def least_load_speed(self, workload: str) -> float:
        """How many times as fast as its peers' its loads are said to be."""
        return LEAST_STOCK_LOAD_SPEED if workload == "stock" else LEAST_LOAD_SPEED

    def contenders_of(self, workload: str) -> list[str]:
        """Those that were measured with it, in the order they were asked for."""
        return list(dict.fromkeys(f.contender for f in self.figures if f.workload == workload))


def measure(
    url: str,
    *,
    rounds: int,
    size: int,
    tensors: int,
    one_tensor_size: int,
    contenders: str | None,
    workloads: str,
    addressing_style: str,
    create_bucket: bool,
) -> Results:
    """Measures what was asked for.

    Raises:
        click.ClickException: an option names nothing there is, or a contender failed.
        StoreError: the bucket cannot be reached.
    """
    known = all_contenders(addressing_style)
    at_hand = all_workloads(size=size, tensors=tensors, one_tensor_size=one_tensor_size, rounds=rounds)
    asked_for = _named(workloads, {**at_hand, weights.NAME: None, rows.NAME: None, partial.NAME: None}, "--workloads")
    chosen = {name: workload for name, workload in asked_for.items() if workload is not None}
    asked = _named(contenders, known, "--contenders") if contenders is not None else None
    Place(url.rstrip("/"), addressing_style).check(create_bucket=create_bucket)
    url = f"{url.rstrip('/')}/cloudckpt-bench-{token_hex(4)}"
    place = Place(url, addressing_style)
    figures: list[Figure] = []
    found_rows = found_partial = None
    found_weights = list(weights.measure(rounds)) if weights.NAME in asked_for else []
    try:
        if rows.NAME in asked_for:
            found_rows = rows.measure(f"{url}/{rows.NAME}", place.store)
        if partial.NAME in asked_for:
            found_partial = partial.measure(f"{url}/{partial.NAME}", rounds, addressing_style)
        for workload in chosen.values():
            taking_part = list(asked.values()) if asked else [known[name] for name in workload.contenders]
            for figure in run(workload, taking_part, url, place):
                _tell(figure, workload)
                figures.append(figure)
    finally:
        place.remove()
    used = {name: known[name] for name in dict.fromkeys(f.contender for f in figures)}
    machine = describe({module for contender in used.values() for module in contender.modules})
    return Results(
        url=url,
        machine=machine,
        contenders=used,
        workloads=chosen,
        figures=figures,
        weights=found_weights,
        rows=found_rows,
        partial=found_partial,
    )


def _named(names: str, known: Mapping[str, T], option: str) -> dict[str, T]:
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in known:
            raise click.UsageError(f"{option}: no {name!r}; there are {', '.join(known)}")
    if not asked:
        raise click.UsageError(f"{option}: names none of {', '.join(known)}")
    return {name: known[name] for name in asked}


def _tell(figure: Figure, workload: Workload) -> None:
    round_ = f"round {figure.round}/{workload.rounds}" if figure.round else "warm-up"
    cost = figure.cost
    text = f"{workload.name}, {round_}: {figure.contender} {figure.operation}"
    click.echo(f"{text} {cost.wall_s:.2f} s, CPU {cost.cpu_s:.2f} s", err=True)
