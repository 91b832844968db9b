"""Which entries a load takes, and under which names.

Law: pure.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from cloudckpt.errors import MissingKeyError, UsageError

Patterns = str | Iterable[str]
"""As `fnmatch.fnmatchcase` reads them; a name is taken that matches any."""

Rename = Mapping[str, str] | Callable[[str], str]
"""From an entry's key in the checkpoint to the name it is loaded under; keys that a mapping lacks keep theirs."""

_COMPARED = 20_000
"""Comparing a name with that many others takes about a tenth of a second."""
_SHOWN = 10


def matching(names: Iterable[str], patterns: Patterns) -> list[str]:
    """Those of ``names`` that match, in their order."""
    some = [patterns] if isinstance(patterns, str) else list(patterns)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in some)]


def nearest(name: str, names: Collection[str]) -> str:
    """A sentence that names those of ``names`` that look like ``name``; empty where none do."""
    some = names
    if len(names) > _COMPARED:
        last = name.rpartition(".")[2]
        some = [other for other in names if other.rpartition(".")[2] == last][:_COMPARED]
    found = get_close_matches(name, some, n=3)
    return f"did you mean {' or '.join(map(repr, found))}?" if found else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a load takes, and what it does not.

    Attributes:
        keys: of the entries to load, by the names they are loaded under.
        missing: names that were asked for and that no entry has.
        unexpected: names of entries that nobody asked for.
    """

    keys: Mapping[str, str]
    missing: list[str]
    unexpected: list[str]

    def refuse_differences(self, where: str) -> None:
        """Raises where something is missing or unexpected.

        Raises:
            MissingKeyError: names what, and what looks like it.
        """
        parts = []
        if self.missing:
            first = self.missing[0]
            hint = nearest(first, [*self.keys, *self.unexpected])
            parts.append(f"lacks {_listed(self.missing)}{f' ({hint})' if hint else ''}")
        if self.unexpected:
            parts.append(f"has {_listed(self.unexpected)}, which there is nothing to load into for")
        if parts:
            msg = f"{where} {' and '.join(parts)}. Choose with patterns= and rename=, or pass strict=False"
            raise MissingKeyError(msg)


def select(
    keys: Collection[str],
    *,
    patterns: Patterns = "*",
    rename: Rename | None = None,
    names: Collection[str] | None = None,
) -> Selection:
    """Matches entries with what is asked for.

    Args:
        keys: of the checkpoint's entries.
        patterns: of names; what they leave out is left out on both sides.
        rename: see `Rename`.
        names: what is asked for; all entries where it is None.

    Raises:
        MissingKeyError: ``rename`` names a key that no entry has.
        UsageError: two entries would get one name.
    """
    if isinstance(rename, Mapping):
        for key in rename:
            if key not in keys:
                msg = f"rename= names {key!r}, which the checkpoint does not have; {nearest(key, keys)}".rstrip("; ")
                raise MissingKeyError(msg)
    by_name: dict[str, str] = {}
    for key in keys:
        name = key if rename is None else rename.get(key, key) if isinstance(rename, Mapping) else rename(key)
        if name in by_name:
            msg = f"rename= gives both {by_name[name]!r} and {key!r} the name {name!r}"
            raise UsageError(msg)
        by_name[name] = key
    there = matching(by_name, patterns)
    wanted = there if names is None else matching(names, patterns)
    asked = set(wanted)
    return Selection(
        keys={name: by_name[name] for name in wanted if name in by_name},
        missing=[name for name in wanted if name not in by_name],
        unexpected=[name for name in there if name not in asked],
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
