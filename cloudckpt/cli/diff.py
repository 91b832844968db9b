"""``cloudckpt diff``: what differs between two checkpoints.

Law: parses and shows; the catalog decides.
"""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from cloudckpt.cli.output import show_json, show_size
from cloudckpt.cli.place import Url
from cloudckpt.cli.tables import Column, is_narrow, show_table

if TYPE_CHECKING:
    from cloudckpt.catalog import Changed, Difference, Side

_COLUMNS = (
    Column(""),
    Column("key"),
    Column("what"),
    Column("max abs", is_number=True),
    Column("max rel", is_number=True),
    Column("differing", is_number=True),
)
_NARROW = (0, 1, 2, 3)
"""Those that a narrow terminal has room for."""

_SHOWN_VALUE = 40
"""Characters of a plain value."""


@click.command()
@click.argument("left", type=Url())
@click.argument("right", type=Url())
@click.argument("patterns", nargs=-1, metavar="[PATTERN]...")
@click.option("--no-values", is_flag=True, help="Read manifests only, and tell what they prove.")
@click.option("--rtol", type=click.FloatRange(min=0), default=0.0, help="Relative difference that does not count.")
@click.option("--atol", type=click.FloatRange(min=0), default=0.0, help="Absolute difference that does not count.")
@click.option("--json", "is_json", is_flag=True, help="Print the differences as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    left: str,
    right: str,
    *,
    patterns: tuple[str, ...],
    no_values: bool,
    rtol: float,
    atol: float,
    is_json: bool,
) -> None:
    """Compares the checkpoints LEFT and RIGHT: keys, shapes, dtypes and values; of keys that match a PATTERN, or all.

    Elements count as differing if they do by more than atol + rtol * abs(right). Exits with 0 if the two are equal
    and with 1 if they are not, or if it could not be told.
    """
    from cloudckpt.catalog import diff
    from cloudckpt.progress import shown

    with shown("comparing", progress=sys.stderr.isatty()) as report:
        found = diff(left, right, patterns=patterns or "*", values=not no_values, rtol=rtol, atol=atol, report=report)
    if is_json:
        show_json(found, is_equal=found.is_equal)
    else:
        _show(found)
    ctx.exit(0 if found.is_equal else 1)


def _show(found: "Difference") -> None:
    shown = _NARROW if is_narrow() else range(len(_COLUMNS))
    show_table([_COLUMNS[i] for i in shown], ([row[i] for i in shown] for row in _rows(found)))
    parts = [
        f"{len(found.only_left)} only left" if found.only_left else "",
        f"{len(found.only_right)} only right" if found.only_right else "",
        f"{len(found.changed)} changed" if found.changed else "",
        f"{len(found.unknown)} unknown" if found.unknown else "",
        f"{found.equal_count} equal",
    ]
    told = ", ".join(filter(None, parts))
    proven = f"{found.proven_count} by their checksums alone" if found.proven_count else ""
    fetched = f"{show_size(found.nbytes_fetched)} read" if found.nbytes_fetched else "none of their bytes read"
    click.echo(f"{told} ({', '.join(filter(None, [proven, fetched]))})", err=True)


def _rows(found: "Difference") -> Iterator[list[str]]:
    for key in found.only_left:
        yield ["-", key, "only left", "", "", ""]
    for key in found.only_right:
        yield ["+", key, "only right", "", "", ""]
    for changed in found.changed:
        yield ["~", changed.key, _what(changed), *_numbers(changed)]
    for key in found.unknown:
        yield ["?", key, "unknown", "", "", ""]


def _what(changed: "Changed") -> str:
    if changed.why == "value" and changed.left.kind == "tensor":
        special = changed.change.special_count if changed.change else 0
        return f"elements, {special} NaN or infinite" if special else "elements"
    return f"{_told(changed.left)} -> {_told(changed.right)}"


def _told(side: "Side") -> str:
    match side.kind:
        case "tensor":
            return f"{side.dtype} {list(side.shape or ())}"
        case "bytes":
            return f"{side.nbytes} bytes"
        case "value":
            told = json.dumps(side.value)
            return told if len(told) <= _SHOWN_VALUE else f"{told[: _SHOWN_VALUE - 3]}..."


def _numbers(changed: "Changed") -> list[str]:
    change = changed.change
    if change is None:
        return ["", "", ""]
    most = ["" if number is None else f"{number:.3g}" for number in (change.max_abs, change.max_rel)]
    return [*most, f"{change.changed_count}/{change.count}"]
