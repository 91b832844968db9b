"""Models, optimizers and other objects of a state dict, as what they would be saved as, and back.

Law: translates; fetches and stores nothing. What an object is loaded from is what was saved of it, not what a fresh
one happens to have.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from cloudckpt.dcp.state.nesting import KEYS, fold, is_empty_box, is_flat, is_tensor, unfold
from cloudckpt.errors import CheckpointError, LoadFailedError, MissingKeyError, SaveFailedError, UnstorableError

_Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class _Held:
    """An object, where it stands, and the model whose parameters it optimizes, if that stands there too."""

    path: _Path
    it: Any
    model: nn.Module | None

    @property
    def is_of_model(self) -> bool:
        """Whether torch knows names for what is in it, the same however the model is wrapped and sharded."""
        return self.model is not None or isinstance(self.it, nn.Module)

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))!r} ({type(self.it).__name__})"


def is_object(value: object) -> bool:
    """Whether it has ``state_dict()`` and ``load_state_dict(...)``."""
    if isinstance(value, type | torch.Tensor) or type(value) in (dict, list, tuple, str, int, float):
        return False  # at once, for there are a great many
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def to_save(state_dict: Mapping[str, Any], *, options: StateDictOptions | None = None) -> dict[str, Any]:
    """The state dict for DCP: objects by what they hold, and what DCP would lose in boxes (see `nesting`).

    Models go through torch's `get_model_state_dict`, an optimizer through `get_optimizer_state_dict` with the model
    in the state dict whose parameters it has; so their keys are the same with DDP, FSDP2 and without. Other objects,
    and optimizers whose model is not there, through their own ``state_dict()``. All ranks must hold the same models
    and optimizers, since torch may talk between ranks here. Tensors are not copied.

    Args:
        state_dict: values, tensors and objects, in dicts and lists.
        options: for torch's functions; with pipeline stages, ``StateDictOptions(flatten_optimizer_state_dict=True)``.

    Raises:
        SaveFailedError: an object's own failure; the message names its key.
        UnstorableError, ReservedNameError: see `nesting.fold`.
    """
    folded = fold(state_dict, is_open=_is_open)
    for held in _find(folded):
        with _blamed(held, SaveFailedError, "gave no state dict"):
            set_element(folded, held.path, _state_of(held, options))
    return dict(folded)


class Destination:
    """What is loaded into: made before DCP plans the load, and finished after it.

    Attributes:
        state_dict: for DCP, which puts what it loads into it. Tensors of models and of the user's own are the very
            ones that are in use.
    """

    def __init__(
        self, state_dict: MutableMapping[str, Any], metadata: Metadata, *, options: StateDictOptions | None = None
    ) -> None:
        """Asks the objects for what is to be loaded into; an optimizer without state yet is given some by torch.

        Args:
            state_dict: as it was given to `to_save`, with objects that are to be loaded into.
            metadata: of the checkpoint, as its reader gives it.
            options: as at the save.

        Raises:
            MissingKeyError: the checkpoint has nothing of an object.
            LoadFailedError: an object's own failure; the message names its key.
        """
        self._into = state_dict
        self._options = options
        self.state_dict: dict[str, Any] = dict(fold(state_dict, is_open=_is_open))
        self._held = list(_find(self.state_dict))
        states = {}
        for held in self._held:
            with _blamed(held, LoadFailedError, "cannot be loaded into"):
                states[held.path] = _state_of(held, self._options)
        own = [held for held in self._held if not held.is_of_model]
        saved = _saved_states(metadata, own, states)
        for held in self._held:
            set_element(self.state_dict, held.path, {} if held in own else states[held.path])
        self._withheld = list(_withhold(self.state_dict, metadata))
        for held in own:
            set_element(self.state_dict, held.path, saved[held.path])

    def finish(self) -> None:
        """Puts what was loaded where the user looks for it: values into the state dict, states into the objects.

        Models come first, then optimizers, then other objects, each in the order of the state dict.

        Raises:
            LoadFailedError: an object did not take its state; the message names its key. Others may have theirs.
        """
        for container, key, value in self._withheld:
            container[key] = value
        states = {held.path: unfold(_at(self.state_dict, held.path)) for held in self._held}
        for held in self._held:
            set_element(self.state_dict, held.path, held.it)
        loaded: dict[Any, Any] = unfold(self.state_dict)
        _merge(self._into, loaded)
        for held in sorted(self._held, key=lambda held: (not isinstance(held.it, nn.Module), held.model is None)):
            with _blamed(held, LoadFailedError, "did not take its state"):
                _restore(held, states[held.path], self._options)


def _is_open(value: object) -> bool:
    return is_tensor(value) or is_object(value)


def _find(folded: Any) -> Iterator[_Held]:
    found = list(_objects(folded, ()))
    models = [it for _, it in found if isinstance(it, nn.Module)]
    for path, it in found:
        yield _Held(path, it, _model_of(it, models) if isinstance(it, Optimizer) else None)


def _objects(value: Any, path: _Path) -> Iterator[tuple[_Path, Any]]:
    if is_object(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _objects(one, (*path, key))
    elif isinstance(value, list) and not is_flat(value):
        for i, one in enumerate(value):
            yield from _objects(one, (*path, i))


def _model_of(optimizer: Optimizer, models: Sequence[nn.Module]) -> nn.Module | None:
    """The smallest model that has all of the optimizer's parameters."""
    own = {id(parameter) for parameter in _parameters(optimizer)}
    sized = [({id(parameter) for parameter in model.parameters()}, model) for model in models]
    fitting = [(len(ids), model) for ids, model in sized if own <= ids]
    return min(fitting, key=lambda sized: sized[0])[1] if own and fitting else None


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _state_of(held: _Held, options: StateDictOptions | None) -> Any:
    """The object's state, folded."""
    state: Any
    if isinstance(held.it, nn.Module):
        state = get_model_state_dict(held.it, options=options)
    elif held.model is not None:
        with _without_gradients(held.it):
            state = get_optimizer_state_dict(held.model, held.it, options=options)
    else:
        state = held.it.state_dict()
    if not isinstance(state, Mapping):
        msg = f"its state_dict() is a {type(state).__name__}; it must be a dict"
        raise UnstorableError(msg)
    return fold(state, path=".".join(map(str, held.path)))


@contextmanager
def _without_gradients(optimizer: Optimizer) -> Iterator[None]:
    """While an optimizer has no state, torch makes it some, but where there are gradients it leaves it without."""
    kept = [] if optimizer.state else [(p, p.grad) for p in _parameters(optimizer) if p.grad is not None]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def _restore(held: _Held, state: Any, options: StateDictOptions | None) -> None:
    if isinstance(held.it, nn.Module):
        set_model_state_dict(held.it, state, options=options)
    elif held.model is not None:
        set_optimizer_state_dict(held.model, held.it, state, options=options)
    else:
        held.it.load_state_dict(state)


def _saved_states(metadata: Metadata, own: Sequence[_Held], now: Mapping[_Path, Any]) -> dict[_Path, Any]:
    """What the checkpoint has of these objects, as folded states to load into."""
    paths: Mapping[str, _Path] = metadata.planner_data or {}
    by_path = {held.path: held for held in own}
    lengths = sorted({len(path) for path in by_path})
    roots: dict[_Path, dict[str, Any]] = {}
    for key, kind in metadata.state_dict_metadata.items():
        path = paths.get(key, (key,))
        held = next((by_path[path[:n]] for n in lengths if path[:n] in by_path), None)
        if held is not None:
            tail = path[len(held.path) :]
            to = (
                _to_load_into(kind, held.it, tail, now[held.path])
                if isinstance(kind, TensorStorageMetadata)
                else None
            )
            set_element(roots.setdefault(held.path, {}), ("", *tail), to)
    for held in own:
        if held.path not in roots and not is_empty_box(now[held.path]):
            msg = f"the checkpoint has nothing of {held}; leave it out of the state dict to keep it as it is"
            raise MissingKeyError(msg)
    return {path: roots[path][""] if path in roots else {} for path in by_path}


def _to_load_into(kind: TensorStorageMetadata, it: Any, tail: _Path, now: Any) -> torch.Tensor:
    """The object's own tensor if it fits, else a new one; one like its parameter for an optimizer."""
    there = _at(now, tail)
    if is_tensor(there) and there.shape == kind.size and there.dtype == kind.properties.dtype and not there.is_meta:
        return there  # type: ignore[no-any-return]
    if isinstance(it, Optimizer) and len(tail) == 3 and tail[0] == "state" and str(tail[1]).isdecimal():
        parameters = _parameters(it)
        number = int(tail[1])
        if number < len(parameters) and parameters[number].shape == kind.size:
            return torch.empty_like(parameters[number].detach(), dtype=kind.properties.dtype)
    return torch.empty(kind.size, dtype=kind.properties.dtype)


def _withhold(value: Any, metadata: Metadata, path: _Path = ()) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Takes out what need not be loaded: the destination's own keys, and empty dicts that the checkpoint lacks."""
    members: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        members = list(value.items())
    elif isinstance(value, list) and not is_flat(value):
        members = list(enumerate(value))
    for key, one in members:
        name = ".".join(map(str, (*path, key)))
        if isinstance(value, dict) and (
            key == KEYS or (is_empty_box(one) and name not in metadata.state_dict_metadata)
        ):
            yield value, key, value.pop(key)
        else:
            yield from _withhold(one, metadata, (*path, key))


def _at(value: Any, path: _Path) -> Any:
    """What stands there; None if nothing does."""
    for step in path:
        members = dict(enumerate(value)) if isinstance(value, list) else value
        if not isinstance(members, Mapping) or step not in members:
            return None
        value = members[step]
    return value


def _merge(into: MutableMapping[Any, Any], loaded: Mapping[Any, Any]) -> None:
    """Puts values in place, so that whoever holds one of the containers sees them."""
    for key, value in loaded.items():
        there = into.get(key)
        merged = _merged(there, value)
        if merged is not there or key not in into:
            into[key] = merged


def _merged(there: Any, value: Any) -> Any:
    if is_object(there):
        return there
    if isinstance(there, MutableMapping) and isinstance(value, Mapping):
        for key in [key for key in there if key not in value]:
            del there[key]
        _merge(there, value)
        return there
    if isinstance(there, list) and isinstance(value, list):
        old = [*there, *[None] * len(value)]
        there[:] = [_merged(one, new) for one, new in zip(old, value, strict=False)]
        return there
    return value


@contextmanager
def _blamed(held: _Held, failure: type[CheckpointError], what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as e:
        mine = type(e)(f"{held}: {e}")
        for note in getattr(e, "__notes__", ()):
            mine.add_note(note)
        raise mine from e
    except Exception as e:
        msg = f"{held} {what}: {type(e).__name__}: {e}"
        raise failure(msg) from e
