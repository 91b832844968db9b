"""What failed on some ranks, as text that every rank can read, and the one error that all of them raise for it.

Law: an exception never travels as a pickle. Its text, its traceback and the name of our nearest class do: nothing
that arrives can fail to be read, and no rank needs the classes of another.
"""

import traceback
from collections.abc import Iterable
from typing import Self

import msgspec
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt import errors
from cloudckpt.dcp.ranks.info import RankInfo
from cloudckpt.errors import CheckpointError, RanksFailedError, RanksLostError, unwrap


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank failed of."""

    who: RankInfo
    kind: str
    """The nearest class in `cloudckpt.errors`, or empty for a foreign exception."""
    said: str
    notes: list[str]
    trace: str

    @classmethod
    def of(cls, error: BaseException, who: RankInfo) -> Self:
        """Takes down an exception; of a group the first one, the others as its notes."""
        shown = unwrap(error)
        ours = _nearest(_types_in(shown))
        said = _text_of(shown).removeprefix(f"{who}: ")  # our border to DCP names the rank too
        if ours is None or isinstance(shown, CheckpointException):
            said = f"{type(shown).__name__}: {said}"
        return cls(
            who=who,
            kind=ours.__name__ if ours else "",
            said=said,
            notes=[_clean(str(note)) for note in getattr(shown, "__notes__", ())],
            trace=_clean("".join(traceback.format_exception(shown))),
        )

    @classmethod
    def lost(cls, who: RankInfo, said: str, why: str) -> Self:
        """A rank that cannot be reached, and what the network says of it."""
        return cls(who=who, kind=RanksLostError.__name__, said=said, notes=[f"of {who}: {_clean(why)}"], trace="")


def error_of(name: str, failures: Iterable[Failure]) -> CheckpointError:
    """The one error for what failed on some ranks, the same on every rank.

    Its class is the nearest class of ours that all the failures share, so that ``except`` finds on every rank what
    it would find on the one that failed; `RanksFailedError` where they share none, and `RanksLostError` where a rank
    is lost, whatever else failed. Its message names each rank that failed, with its host; the traceback of each
    different failure is a note.

    Args:
        name: what all did together.
        failures: at least one.
    """
    alike: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        alike.setdefault((failure.kind, failure.said), []).append(failure)
    kinds = [getattr(errors, kind, None) for kind, _ in alike]
    shared = RanksLostError if RanksLostError in kinds else _nearest(kinds) or RanksFailedError
    parts = []
    for (kind, said), group in alike.items():
        named = f"{kind}: {said}" if kind and kind != shared.__name__ else said
        parts.append(f"{', '.join(str(f.who) for f in group)}: {named}")
    error = shared(f"{name} failed on {'; and on '.join(parts)}")
    for group in alike.values():
        for note in group[0].notes:
            error.add_note(note)
        if group[0].trace:
            error.add_note(f"on {group[0].who}:\n{group[0].trace}")
    return error


def _types_in(error: BaseException) -> list[type | None]:
    """The classes of what failed; DCP's exception holds those of several ranks."""
    if isinstance(error, CheckpointException):
        return [type(failure) for failure, _ in error.failures.values()]
    return [type(error)]


def _nearest(kinds: list[type | None]) -> type[CheckpointError] | None:
    """The nearest class in `cloudckpt.errors` that all of the classes are of, but for the base of all."""
    found = [kind for kind in kinds if kind is not None]
    if not found or len(found) < len(kinds):
        return None
    for kind in found[0].__mro__:
        is_ours = getattr(errors, kind.__name__, None) is kind
        if is_ours and issubclass(kind, CheckpointError) and all(issubclass(k, kind) for k in found):
            return kind if kind is not CheckpointError else None
    return None


def _text_of(error: BaseException) -> str:
    try:
        return _clean(str(error))
    except Exception as e:
        return f"(its text cannot be made: {type(e).__name__})"


def _clean(text: str) -> str:
    """The text as UTF-8 can spell it; file names may hold bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
