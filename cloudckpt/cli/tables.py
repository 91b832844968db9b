"""Rows as a table on a terminal, and elsewhere as lines of fields with tabs between them.

Law: data to stdout. What is shown is text; nobody's names are taken for markup, or for what a terminal obeys.
"""

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import click

from cloudckpt.cli.output import printable


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: shown on a terminal only.
        is_number: set to the right, and never broken.
    """

    title: str
    is_number: bool = False


def is_narrow() -> bool:
    """Whether stdout is a terminal that has room for few columns only."""
    return sys.stdout.isatty() and shutil.get_terminal_size().columns < 80


def show_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows, each with one text for each column.

    On a terminal as a table as wide as that, with long texts folded; elsewhere as they are, for other programs.
    """
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(map(printable, row)))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            Text(printable(column.title)),
            justify="right" if column.is_number else "left",
            no_wrap=column.is_number,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(printable(field)) for field in row))
    Console(highlight=False).print(table)
