"""What a doctor says of one thing that can be wrong with a place to save to.

Law: pure.
"""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "problem", "not looked at"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was seen.

    Attributes:
        name: of what was looked at.
        verdict: a warning is of what works, and less well than it might.
        what: was seen, or why nothing was.
        advice: what to do about it; empty where there is nothing to do.
    """

    name: str
    verdict: Verdict
    what: str
    advice: str = ""


def ok(name: str, what: str) -> Finding:
    """Nothing to do."""
    return Finding(name=name, verdict="ok", what=what)


def warning(name: str, what: str, advice: str) -> Finding:
    """It works, and less well than it might."""
    return Finding(name=name, verdict="warning", what=what, advice=advice)


def problem(name: str, what: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(name=name, verdict="problem", what=what, advice=advice)


def not_looked_at(name: str, why: str) -> Finding:
    """Something else stood in the way, or nobody asked."""
    return Finding(name=name, verdict="not looked at", what=why)
