"""Which values of a state dict the manifest can keep as plain JSON.

Law: pure. A value is kept so only if JSON gives it back the same, to the type and the bit; all others go as bytes.
"""

import math
from collections.abc import Iterable
from typing import Any

import msgspec

from cloudckpt.dcp.state.nesting import unbox

MAX_VALUE_NBYTES = 64 << 10
"""Of one value's JSON text."""

MAX_VALUES_NBYTES = 1 << 20
"""Of all values' and their keys', so that the manifest stays small."""

MIN_SHARE_NBYTES = 16 << 10
"""What each rank may keep, however many there are."""

MAX_DEPTH = 32
"""Lists and dicts in each other."""

_INTS = range(-(1 << 63), 1 << 63)


def choose(found: Iterable[tuple[str, Any]], *, room: int = MAX_VALUES_NBYTES) -> dict[str, Any]:
    """Those of the values that the manifest is to keep, by key; the others go as bytes.

    Args:
        found: keys and values, as DCP flattens a state dict. What `nesting` boxed comes out of its box.
        room: bytes of JSON text for all of them together.
    """
    chosen: dict[str, Any] = {}
    for key, value in found:
        plain = unbox(value)
        nbytes = json_nbytes(plain)
        if nbytes is None or nbytes > MAX_VALUE_NBYTES or not _is_utf8(key) or nbytes + len(key) > room:
            continue
        room -= nbytes + len(key)
        chosen[key] = plain
    return chosen


def room_of_rank(world_size: int) -> int:
    """A rank's share of the room, since ranks choose by themselves."""
    return max(MAX_VALUES_NBYTES // world_size, MIN_SHARE_NBYTES)


def json_nbytes(value: Any) -> int | None:
    """The size of the value's JSON text; None where JSON would not give back the same, or it is surely too large.

    Plain are None, bools, ints of 64 bits, finite floats, text that UTF-8 can spell, and lists and dicts of these
    with text for keys, of exactly these types, at most `MAX_DEPTH` deep.
    """
    return len(msgspec.json.encode(value)) if _is_plain(value, MAX_DEPTH) else None


def _is_plain(value: Any, depth: int) -> bool:
    kind = type(value)
    if value is None or kind is bool:
        return True
    if kind is int:
        return value in _INTS
    if kind is float:
        return math.isfinite(value)
    if kind is str:
        return len(value) < MAX_VALUE_NBYTES and _is_utf8(value)
    if depth and kind is list:
        return len(value) < MAX_VALUE_NBYTES and all(_is_plain(one, depth - 1) for one in value)
    if depth and kind is dict:
        return all(type(key) is str and _is_utf8(key) and _is_plain(one, depth - 1) for key, one in value.items())
    return False


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
