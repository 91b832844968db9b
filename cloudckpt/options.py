"""Keyword arguments into option dataclasses.

Law: pure; knows no option by name.
"""

from dataclasses import fields, replace
from typing import Any, TypeVar

from cloudckpt.errors import UsageError

T = TypeVar("T")


def overridden(options: T, overrides: dict[str, Any]) -> T:
    """A copy of an options dataclass with those of ``overrides`` that are its fields, which are removed."""
    mine = {f.name: overrides.pop(f.name) for f in fields(options) if f.name in overrides}  # type: ignore[arg-type]
    return replace(options, **mine) if mine else options  # type: ignore[type-var]


def refuse_unknown(overrides: dict[str, Any], *known: object) -> None:
    """Raises for keyword arguments that no options took.

    Raises:
        UsageError: names them, and what is known.
    """
    if overrides:
        names = sorted(f.name for options in known for f in fields(options))  # type: ignore[arg-type]
        msg = f"unknown option(s) {', '.join(sorted(overrides))}; known are {', '.join(names)}"
        raise UsageError(msg)
