"""``cloudckpt ls``: the checkpoints below a root.

Law: parses and shows; the catalog decides.
"""

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import click

from cloudckpt.cli.output import show_json, show_size
from cloudckpt.cli.place import Url
from cloudckpt.cli.tables import Column, is_narrow, show_table

if TYPE_CHECKING:
    from cloudckpt.catalog import Listed, Listing

_COLUMNS = (
    Column("name"),
    Column("step", is_number=True),
    Column("created"),
    Column("size", is_number=True),
    Column("stored", is_number=True),
    Column("shards", is_number=True),
    Column("state"),
    Column("metrics"),
)
_NARROW = (0, 3, 6)
"""Those that a narrow terminal has room for."""

_TIME = "%Y-%m-%d %H:%M"
_TIME_TO_READ = "%Y-%m-%d %H:%M:%S%z"
"""For other programs. Both are UTC."""


@click.command()
@click.argument("root", type=Url())
@click.option("--check", is_flag=True, help="Look whether shards are there, too: two requests more for each.")
@click.option(
    "--sort",
    "order",
    type=click.Choice(["newest", "name"]),
    default="newest",
    show_default=True,
    help="What is first.",
)
@click.option("--json", "is_json", is_flag=True, help="Print what is there as JSON.")
@click.pass_context
def command(ctx: click.Context, root: str, *, check: bool, order: Literal["newest", "name"], is_json: bool) -> None:
    """Shows the checkpoints right below ROOT, and ROOT itself where it is one.

    Reads the first 4 KiB of each one's manifest and nothing else. With --check, exits with 1 if one is damaged.
    """
    from cloudckpt.catalog import list_checkpoints

    found = list_checkpoints(root, order=order, check=check)
    if is_json:
        show_json(found)
    else:
        _show(found)
    ctx.exit(1 if any(listed.state == "damaged" for listed in found.checkpoints) else 0)


def _show(found: "Listing") -> None:
    rows = [_row(listed) for listed in found.checkpoints]
    shown: Sequence[int] = _NARROW if is_narrow() else range(len(_COLUMNS))
    if sys.stdout.isatty():
        shown = [i for i in shown if any(row[i] for row in rows)]
    show_table([_COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in rows])
    for listed in found.checkpoints:
        for problem in listed.problems:
            click.echo(f"{listed.name or '.'}: {problem}", err=True)
    if not found.checkpoints:
        click.echo(f"nothing lies at {found.root}", err=True)
    elif all(listed.state == "no manifest" for listed in found.checkpoints):
        below = found.checkpoints[0].url
        click.echo(f"no checkpoint lies right below {found.root}; look deeper: cloudckpt ls {below}", err=True)


def _row(listed: "Listed") -> list[str]:
    state = f"{listed.state}, pinned" if listed.is_pinned else listed.state
    return [
        listed.name or ".",
        "" if listed.step is None else str(listed.step),
        "" if listed.created is None else _time(listed.created),
        *("" if nbytes is None else show_size(nbytes) for nbytes in (listed.nbytes, listed.stored_nbytes)),
        "" if listed.shard_count is None else str(listed.shard_count),
        state,
        " ".join(f"{name}={value:g}" for name, value in listed.metrics.items()),
    ]


def _time(at: datetime) -> str:
    return at.astimezone(UTC).strftime(_TIME if sys.stdout.isatty() else _TIME_TO_READ)
