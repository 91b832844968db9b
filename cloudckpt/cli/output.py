"""How what a command did is told: as JSON, and sizes as people read them.

Law: data to stdout, talk to stderr.
"""

import dataclasses
import json
from datetime import datetime
from typing import Any

import click

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


def tell_dry() -> None:
    """Says that a plan was shown and nothing was done."""
    click.echo("nothing was changed; run it again with --yes", err=True)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(value)
