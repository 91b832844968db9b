"""How what a command did is told: as JSON, and sizes as people read them.

Law: data to stdout, talk to stderr.
"""

import dataclasses
import json
import re
from datetime import datetime
from typing import Any

import click

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves, paints, breaks a line, turns its direction, or cannot be encoded."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def show_json(result: Any, **more: object) -> None:
    """Prints a dataclass, or a mapping, and what more there is to say, as one JSON object."""
    fields = result if isinstance(result, dict) else dataclasses.asdict(result)
    click.echo(json.dumps({**fields, **more}, indent=2, default=_plain))


def show_size(nbytes: int) -> str:
    """A number of bytes as people read it."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def printable(text: str) -> str:
    """A text of others on one line, with what would do something to a terminal spelled out."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def tell_dry() -> None:
    """Says that a plan was shown and nothing was done."""
    click.echo("nothing was changed; run it again with --yes", err=True)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(value)
