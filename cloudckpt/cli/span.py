"""A length of time on the command line.

Law: parses; what it is for is the command's business.
"""

import re
from typing import Any

import click

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)")


class Span(click.ParamType[float]):
    """A length of time, such as 90, 90s, 15m, 24h or 7d; in seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """See `click.ParamType.convert`."""
        found = _SPAN.fullmatch(str(value))
        if found is None:
            self.fail(f"{value!r} is no length of time such as 90s, 15m, 24h or 7d", param, ctx)
        return float(found[1]) * _UNITS[found[2]]
