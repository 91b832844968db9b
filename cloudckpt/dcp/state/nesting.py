"""What DCP's flattening would lose of a nested state dict, kept through it.

Law: pure. DCP takes every key of a mapping for text, and a mapping without members for nothing; what it keeps whole
is handed on as it is, so that others who load through DCP find what they know.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cloudckpt.errors import ReservedNameError, UnstorableError

RESERVED = "cloudckpt:"
"""Keys of a state dict that begin so are ours."""

KEYS = f"{RESERVED}keys"
"""The member beside those of a mapping whose keys are not all text: the keys themselves, in their order."""

_BOX = "cloudckpt.box/1"
_Key = str | int | float | bool | None
_PLAIN = {str, int, float, bool, type(None)}


def is_tensor(value: object) -> bool:
    """Whether DCP stores it by itself, wherever it stands."""
    return isinstance(value, torch.Tensor)


def fold(value: Any, *, is_open: Callable[[object], bool] = is_tensor, path: str = "") -> Any:
    """The value with what DCP would lose put in boxes, which DCP takes for values of their own.

    Containers are new, what they hold is not copied. A mapping without members, or with keys that are not text, is
    boxed whole, unless something in it has to stay open; then its keys stand in a member of their own.

    Args:
        value: dicts and lists of anything.
        is_open: what must not lie in a box.
        path: where it stands, for errors; what stands at the root is never boxed itself.

    Raises:
        ReservedNameError: a key is one of ours.
        UnstorableError: a mapping's keys cannot be told apart as text, or are of a kind that cannot be kept.
    """
    if is_open(value):
        return value
    if isinstance(value, Mapping):
        return _fold_mapping(value, is_open, path)
    if isinstance(value, list):
        if is_flat(value):
            return list(value)
        return [fold(one, is_open=is_open, path=f"{path}.{i}") for i, one in enumerate(value)]
    return _box(value) if _is_box(value) else value


def unfold(value: Any) -> Any:
    """The inverse of `fold`, of what came back through DCP; every mapping is a dict then, but for those in boxes."""
    if _is_box(value):
        return value[1]
    if isinstance(value, Mapping):
        if KEYS in value:
            return {key: unfold(value[str(key)]) for key in unbox(value[KEYS])}
        return {key: unfold(one) for key, one in value.items()}
    if isinstance(value, list):
        return value if is_flat(value) else [unfold(one) for one in value]
    return value


def unbox(value: Any) -> Any:
    """What is in a box; any other value as it is."""
    return value[1] if _is_box(value) else value


def is_flat(value: list[Any]) -> bool:
    """Whether nothing can be in the list's members, so that a long one (an order of samples) is looked at once."""
    return set(map(type, value)) <= _PLAIN


def is_empty_box(value: Any) -> bool:
    """Whether it stands for a mapping without members, of which DCP by itself would have kept nothing."""
    return _is_box(value) and isinstance(value[1], Mapping) and not value[1]


def _fold_mapping(value: Mapping[Any, Any], is_open: Callable[[object], bool], path: str) -> Any:
    if KEYS in value:
        msg = f"{path or 'the state dict'} has the key {KEYS!r}, which cloudckpt keeps for itself; rename it"
        raise ReservedNameError(msg)
    is_text = all(isinstance(key, str) for key in value)
    if not path or (value and (is_text or _has_open(value, is_open))):
        folded = {str(key): fold(one, is_open=is_open, path=_below(path, key)) for key, one in value.items()}
        return folded if is_text else {**folded, KEYS: _box(_told_apart(value, path))}
    return _box(value if type(value) in (dict, OrderedDict, Counter) else dict(value))


def _told_apart(value: Mapping[Any, Any], path: str) -> list[_Key]:
    keys = list(value)
    strange = [key for key in keys if type(key) not in _PLAIN]
    if strange:
        msg = (
            f"{path or 'the state dict'} has the key {strange[0]!r} of type {type(strange[0]).__name__} over tensors"
        )
        raise UnstorableError(f"{msg}; use text or numbers")
    if len({str(key) for key in keys}) != len(keys):
        msg = f"{path or 'the state dict'} has keys that are the same as text, such as 0 and '0'; rename them"
        raise UnstorableError(msg)
    return keys


def _has_open(value: object, is_open: Callable[[object], bool]) -> bool:
    if is_open(value):
        return True
    if isinstance(value, list):
        return not is_flat(value) and any(_has_open(one, is_open) for one in value)
    return isinstance(value, Mapping) and any(_has_open(one, is_open) for one in value.values())


def _below(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _box(value: Any) -> tuple[str, Any]:
    return (_BOX, value)


def _is_box(value: object) -> bool:
    return type(value) is tuple and len(value) == 2 and isinstance(value[0], str) and value[0] == _BOX
