"""What a training rank tells the demo, one JSON line each on its stdout.

Law: pure; no torch. A line that is none of these is somebody's chatter, and not ours to read.
"""

from typing import TypeVar

import msgspec


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """A rank is running; ``pid`` leads a process group of its own."""

    rank: int
    pid: int


class Built(msgspec.Struct, frozen=True, kw_only=True, tag="built"):
    """The model stands; ``parameters`` of it, of which ``trained`` are not frozen."""

    parameters: int
    trained: int


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """A checkpoint was loaded; ``requests`` and ``nbytes`` are those of rank 0."""

    step: int
    seconds: float
    requests: int
    nbytes: int


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag="stepped"):
    """A training step is done; ``loss`` is the mean over ranks as `float.hex` spells it: every bit."""

    step: int
    loss: str


class Saving(msgspec.Struct, frozen=True, kw_only=True, tag="saving"):
    """All ranks are about to call ``dcp.save``."""

    step: int


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag="saved"):
    """``dcp.save`` returned."""

    step: int
    seconds: float


Event = Ready | Built | Loaded | Stepped | Saving | Saved

E = TypeVar("E", bound=Event)


def to_line(event: Event) -> str:
    """The event as a line, newline included."""
    return msgspec.json.encode(event).decode() + "\n"


def from_line(line: str) -> Event | None:
    """The event in a line, or None where it holds none."""
    try:
        event: Event = msgspec.json.decode(line, type=Event)
    except msgspec.DecodeError:
        return None
    return event
