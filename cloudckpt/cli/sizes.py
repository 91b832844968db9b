"""Sizes as people write them. Pure."""

import re
from typing import Any

import click

_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


class _Size(click.ParamType[int]):
    """A number of bytes, as in ``512MiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Returns the bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9.]+) *([a-z]*)", str(value).strip(), re.IGNORECASE)
        unit = _UNITS.get(found[2].upper()) if found else None
        try:
            return int(float(found[1]) * unit)  # type: ignore[index, operator]
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a size; write it as 64MiB or 1GiB", param, ctx)


SIZE = _Size()


def spelled(nbytes: float) -> str:
    """Bytes for people: ``1 GiB``, ``8.5 MiB``."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:.4g} {name}"
    return f"{nbytes:.0f} B"
