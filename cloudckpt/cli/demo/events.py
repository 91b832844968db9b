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
    """A checkpoint was loaded, on all ranks."""

    step: int
    seconds: float


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag="stepped"):
    """A training step is done; ``loss`` is the mean over ranks as `float.hex` spells it: every bit."""

    step: int
    loss: str


class Saving(msgspec.Struct, frozen=True, kw_only=True, tag="saving"):
    """A save is about to begin: the state dict will be copied once the save before is over."""

    step: int


class Staged(msgspec.Struct, frozen=True, kw_only=True, tag="staged"):
    """The state dict was copied, and training goes on; it waited ``seconds``."""

    step: int
    seconds: float


class Uploaded(msgspec.Struct, frozen=True, kw_only=True, tag="uploaded"):
    """The shards of all ranks are up, and the manifest is not."""

    step: int


class Saved(msgspec.Struct, frozen=True, kw_only=True, tag="saved"):
    """The save is committed, ``seconds`` after it began."""

    step: int
    seconds: float


Event = Ready | Built | Loaded | Stepped | Saving | Staged | Uploaded | Saved

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
