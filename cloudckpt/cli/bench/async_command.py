"""``cloudckpt bench-async``: saves behind training, beside PyTorch's own.

Law: parses, refuses, and shows what others measured; torch is imported in the processes that measure.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import click

from cloudckpt.cli.bench import _refuse_missing
from cloudckpt.cli.bench.async_parts import BLOCKING, RANKS, TRAINING
from cloudckpt.cli.bench.machine import Machine, describe
from cloudckpt.cli.sizes import SIZE

if TYPE_CHECKING:
    from cloudckpt.cli.bench.async_figures import Figure, Row, Spread

PARTS = (BLOCKING, TRAINING, RANKS)
TITLES = {
    BLOCKING: "how long an async save holds up training, beside one copy into warm memory",
    TRAINING: "what an upload of 100 MB/s leaves of training's throughput",
    RANKS: "what two ranks spend on a save besides staging and bytes",
}
HEADINGS = {
    "ratio": "ratio",
    "blocked_s": "blocked s",
    "copy_s": "copy s",
    "lost_s": "lost s a save",
    "upload_s": "upload s",
    "server_cores": "server's cores",
    "of_fed": "beside bytes from elsewhere",
    "all_s": "all s",
    "coordination_s": "coordination s",
    "begin_s": "begin s",
}
_URL = "s3://bench/async"
_TRAINERS = "cloudckpt-thread,cloudckpt-process,torch-thread-kept,torch-process-kept"
_DISTRIBUTIONS = ("torch", "s3fs", "fsspec", "aiobotocore", "aiohttp")


@click.command()
@click.argument("url", required=False)
@click.option("--parts", default=",".join(PARTS), show_default=True, metavar="NAMES", help="What to measure.")
@click.option("--contenders", metavar="NAMES", help="Comma-separated; each part has its own by default.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="After a warm-up.")
@click.option("--size", default="1GiB", show_default=True, type=SIZE, help="Of the state dict that is copied.")
@click.option("--training-size", default="256MiB", show_default=True, type=SIZE, help="Of the one that is trained.")
@click.option("--create-bucket", is_flag=True, help="Create the bucket where it does not exist.")
@click.option("--json", "json_file", type=click.File("w", lazy=True), help="Write every figure there (- for stdout).")
def command(url: str | None, parts: str, contenders: str | None, json_file: Any, **options: Any) -> None:
    """Measures what saves behind training take of it.

    How long an async save blocks, beside one copy; what is left of training's throughput during an upload of 100
    MB/s; and what two ranks spend on anything but staging and bytes. All on null servers of its own; with URL
    (s3://bucket/prefix), which AWS's variables lead to, the last is measured there too. Every ratio is of figures
    from one round. What is written is removed again.
    """
    _refuse_missing("torch", "s3fs", "rich")
    from cloudckpt.cli.bench.async_figures import rows

    figures = list(_measured(url, parts, contenders, **options))
    found = rows(figures)
    machine = describe(_DISTRIBUTIONS)
    if json_file is None or json_file.name != "-":
        _show(machine, found)
    if json_file is not None:
        json.dump(_as_json(machine, figures, found), json_file, indent=2)
        json_file.write("\n")


def _measured(
    url: str | None,
    parts: str,
    contenders: str | None,
    *,
    rounds: int,
    size: int,
    training_size: int,
    create_bucket: bool,
) -> "Iterator[Figure]":
    from cloudckpt.cli.bench import async_blocking, async_ranks, async_training
    from cloudckpt.cli.bench.async_contenders import CONTENDERS
    from cloudckpt.cli.bench.async_process import in_own_process
    from cloudckpt.cli.bench.null_process import KINDS, serving
    from cloudckpt.cli.bench.place import Place
    from cloudckpt.cli.bench.session import _named

    asked = _named(parts, dict.fromkeys(PARTS), "--parts")
    savers = list(_named(contenders or ",".join(CONTENDERS), CONTENDERS, "--contenders").values())
    trainers = list(_named(contenders or _TRAINERS, CONTENDERS, "--contenders").values())
    if BLOCKING in asked:
        for case in async_blocking.CASES:
            with serving(KINDS["null"]) as server, _leading_to(server.environ):
                yield from in_own_process(
                    async_blocking.measure,
                    case,
                    nbytes=size,
                    threads=(2, 1),
                    rounds=rounds,
                    contenders=savers,
                    url=_URL,
                )
    if TRAINING in asked:
        with serving(async_training.SLOW) as server, _leading_to(server.environ):
            yield from in_own_process(async_training.measure, training_size, rounds, trainers, server, _URL)
    if RANKS in asked:
        with serving(KINDS["null"]) as server:
            for case in async_ranks.CASES:
                yield from async_ranks.measure(case, "null server", 3 * rounds, _URL, server.environ)
        if url is not None:
            Place(url, "auto").check(create_bucket=create_bucket)
            below = f"{url.rstrip('/')}/cloudckpt-bench-{token_hex(4)}"
            place = Place(below, "auto")
            try:
                for case in async_ranks.CASES:
                    yield from async_ranks.measure(case, "the server", 3 * rounds, below, {})
            finally:
                place.remove()


@contextmanager
def _leading_to(environ: dict[str, str]) -> Iterator[None]:
    """Leads this process and those it starts there."""
    before = dict(os.environ)
    os.environ.update(environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _as_json(machine: Machine, figures: "Sequence[Figure]", found: "Sequence[Row]") -> dict[str, Any]:
    from cloudckpt.cli.bench.async_figures import claims

    return {
        "machine": asdict(machine),
        "figures": [{"kind": type(figure).__name__.lower(), **asdict(figure)} for figure in figures],
        "rows": [asdict(row) for row in found],
        "claims": [asdict(claim) for claim in claims(found)],
    }


def _show(machine: Machine, found: "Sequence[Row]") -> None:
    from rich.console import Console

    from cloudckpt.cli.bench.async_figures import claims
    from cloudckpt.cli.bench.report import _claims_table

    console = Console(width=None if sys.stdout.isatty() else 140)
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    console.print(f"{machine.cpu}, {machine.cores} cores, Python {machine.python}, {versions}")
    for part in PARTS:
        of_part = [row for row in found if row.part == part]
        if of_part:
            console.print(_table(part, of_part))
    console.print(_claims_table(claims(found)))


def _table(part: str, found: "Sequence[Row]") -> Any:
    from rich.table import Table

    rounds = ", ".join(dict.fromkeys(str(row.rounds) for row in found))
    table = Table(title=f"{part}: {TITLES[part]}; medians of {rounds} rounds, in brackets least and greatest")
    table.title_justify = "left"
    for name in ("case", "contender"):
        table.add_column(name)
    for name in found[0].measures:
        table.add_column(HEADINGS[name], justify="right")
    for row in found:
        table.add_row(row.case, row.contender, *map(_spelled, row.measures.values()))
    return table


def _spelled(spread: "Spread") -> str:
    return f"{spread.median:.3f} ({spread.least:.3f} to {spread.greatest:.3f})"
