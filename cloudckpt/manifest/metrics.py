"""What a step measured, as small numbers in its summary.

Law: pure. A number that JSON cannot spell is left out and told in the log: a loss that diverged must not fail a save.
"""

import logging
import math
from collections.abc import Mapping

import msgspec

from cloudckpt.errors import UsageError

log = logging.getLogger(__name__)

MAX_METRICS = 32
"""Of a step. With the next, what keeps a summary within its first 4 KiB: they take at most 2,976 bytes of them."""

MAX_METRIC_NAME_NBYTES = 64
"""Of a metric's name, as JSON spells it."""


def check_metrics(metrics: object) -> dict[str, float]:
    """What of a caller's metrics goes into a summary.

    Args:
        metrics: numbers by name, or None; ints become floats. NaN and infinities are left out, with a warning.

    Raises:
        UsageError: too many, a name that is none or too long, or a value that is no number of Python's.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        msg = f"metrics= is {type(metrics).__name__}; pass numbers by name, such as metrics={{'loss': loss.item()}}"
        raise UsageError(msg)
    checked = {_checked_name(name): _checked_value(name, value) for name, value in metrics.items()}
    kept = {name: value for name, value in checked.items() if math.isfinite(value)}
    if len(kept) > MAX_METRICS:
        msg = f"metrics= has {len(kept)}, more than {MAX_METRICS}; keep the others in metadata="
        raise UsageError(msg)
    for name, value in checked.items():
        if name not in kept:
            log.warning("metric %r is %s: it is left out of the checkpoint, for JSON cannot spell it", name, value)
    return kept


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not name:
        msg = f"metrics= has a name {name!r}; name each by a text"
        raise UsageError(msg)
    try:
        nbytes = len(msgspec.json.encode(name)) - len('""')
    except UnicodeEncodeError as e:
        msg = f"metrics= has a name {name!r}, which is not valid Unicode; rename it"
        raise UsageError(msg) from e
    if nbytes > MAX_METRIC_NAME_NBYTES:
        msg = f"metrics= has a name {name!r} of {nbytes} bytes, more than {MAX_METRIC_NAME_NBYTES}; shorten it"
        raise UsageError(msg)
    return name


def _checked_value(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        advice = "; pass value.item()" if hasattr(value, "item") else ""
        msg = f"metrics[{name!r}] is {type(value).__name__}, and not a float or an int{advice}"
        raise UsageError(msg)
    try:
        return float(value)
    except OverflowError as e:
        msg = f"metrics[{name!r}] is an int that is too large for a float"
        raise UsageError(msg) from e
