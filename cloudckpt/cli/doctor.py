"""``cloudckpt doctor``: what is wrong with a place to save to, and what to do about it.

Law: parses and shows; the catalog decides.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from cloudckpt.cli.output import show_json
from cloudckpt.cli.place import Url
from cloudckpt.cli.tables import Column, show_table

if TYPE_CHECKING:
    from cloudckpt.catalog.doctor import Diagnosis


@click.command()
@click.argument("url", type=Url())
@click.option("--read-only", is_flag=True, help="Write nothing, and look at less.")
@click.option("--json", "is_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def command(ctx: click.Context, url: str, *, read_only: bool, is_json: bool) -> None:
    """Looks at what saves to URL and loads from it hang on, and says what to do about what is wrong.

    Credentials, endpoint, bucket, rights, conditional writes, checksums, uploads, speed, clock and versions. Small
    objects are put below URL and removed again. Exits with 1 if there are problems.
    """
    from cloudckpt.catalog.doctor import doctor

    with _silence():
        found = doctor(url, read_only=read_only)
    if is_json:
        show_json(found, is_healthy=found.is_healthy)
    else:
        _show(found)
    ctx.exit(0 if found.is_healthy else 1)


def _show(found: "Diagnosis") -> None:
    columns = [Column("checked"), Column("verdict"), Column("what was seen, and what to do")]
    rows = [(f.name, f.verdict, f"{f.what} -> {f.advice}" if f.advice else f.what) for f in found.findings]
    show_table(columns, rows)
    count = Counter(finding.verdict for finding in found.findings)
    click.echo(f"{found.url}: {count['problem']} problem(s), {count['warning']} warning(s)", err=True)


@contextmanager
def _silence() -> Iterator[None]:
    """Without what would be logged to stderr of things that are findings; who set up logging still gets it."""
    handler, logger = logging.NullHandler(), logging.getLogger("cloudckpt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
