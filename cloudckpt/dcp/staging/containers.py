"""A state dict as containers and what lies in them.

Law: knows dicts, lists and tuples, and nothing of tensors' memory. It is short where there are many leaves: a call
more for each of 10,000 small tensors shows in how long training stands still.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_ATOMS = frozenset(
    (
        *(type(None), bool, int, float, complex, str, bytes, type),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
    )
)
"""Types of values that cannot change, so that a copy of one is itself."""

_MAPPINGS = frozenset((dict, OrderedDict, defaultdict))

OnOther = Callable[[Any, dict[int, Any]], Any]
"""What stands in the new structure for a value that is no container: takes it, and the memo of `copy.deepcopy`."""


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors that lie in dicts, lists and tuples, each as often as it is met; those within other objects not."""
    found: list[torch.Tensor] = []
    _collect((value,), found, set())
    return found


def _collect(values: Any, found: list[torch.Tensor], seen: set[int]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
            continue
        kind = type(value)
        is_mapping = kind in _MAPPINGS
        if (is_mapping or _is_sequence(value, kind)) and id(value) not in seen:
            seen.add(id(value))
            _collect(value.values() if is_mapping else value, found, seen)


def rebuilt(value: Any, places: Mapping[int, Any], on_other: OnOther) -> Any:
    """The same containers anew; one that is met twice is one there too. Keys are taken as they are.

    Args:
        value: a container.
        places: by `id`, what stands in the place of values.
        on_other: gives what stands in the place of all others that could change.
    """
    return _rebuilt(value, places, on_other, {})


def _rebuilt(value: Any, places: Mapping[int, Any], on_other: OnOther, memo: dict[int, Any]) -> Any:
    found = places.get(id(value))
    if found is not None:
        return found
    kind = type(value)
    if kind in _ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in _MAPPINGS:
        return _mapping(value, places, on_other, memo)
    if _is_sequence(value, kind):
        return _sequence(value, places, on_other, memo)
    memo[id(value)] = on_other(value, memo)
    return memo[id(value)]


def _mapping(value: Any, places: Mapping[int, Any], on_other: OnOther, memo: dict[int, Any]) -> Any:
    kind = type(value)
    out = defaultdict(value.default_factory) if kind is defaultdict else kind()
    memo[id(value)] = out
    for key, inner in value.items():
        found = places.get(id(inner))
        out[key] = _rebuilt(inner, places, on_other, memo) if found is None else found
    if kind is OrderedDict and value.__dict__:  # a module's has its `_metadata` there
        out.__dict__.update(_rebuilt(value.__dict__, places, on_other, memo))
    return out


def _sequence(value: Any, places: Mapping[int, Any], on_other: OnOther, memo: dict[int, Any]) -> Any:
    kind = type(value)
    out: list[Any] = []
    if kind is list:
        memo[id(value)] = out
    for inner in value:
        out.append(_rebuilt(inner, places, on_other, memo))  # noqa: PERF401 - it may lie within itself
    if kind is not list and id(value) not in memo:  # else a list within it led back to it
        memo[id(value)] = tuple(out) if kind is tuple else kind._make(out)
    return memo[id(value)]


def _is_sequence(value: Any, kind: Any) -> bool:
    return kind is list or kind is tuple or (isinstance(value, tuple) and hasattr(value, "_fields"))


def path_to(sought: object, value: Any) -> tuple[Any, ...]:
    """The keys and indices that lead to an object, the first way found; none if it is not there."""
    return next(_paths(sought, value, (), set()), ())


def _paths(sought: object, value: Any, path: tuple[Any, ...], seen: set[int]) -> Iterator[tuple[Any, ...]]:
    if value is sought:
        yield path
    kind = type(value)
    is_mapping = kind in _MAPPINGS
    if (is_mapping or _is_sequence(value, kind)) and id(value) not in seen:
        seen.add(id(value))
        for key, inner in value.items() if is_mapping else enumerate(value):
            yield from _paths(sought, inner, (*path, key), seen)
