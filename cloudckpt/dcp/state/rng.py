"""The states of the random number generators of a process, as tensors and plain values.

Law: nothing is pickled, and nothing is set unless all of it can be.
"""

# ruff: noqa: NPY002 - the legacy global generator is what training loops use

import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cloudckpt.errors import LoadFailedError, UsageError


class RngStates:
    """The process's generators as one object of a state dict, most often ``per_rank={"rng": RngStates()}``.

    Python's `random`, numpy's global generator where numpy's random module is imported, torch's on the CPU, and that
    of each CUDA device if CUDA is initialized. Generators that the user made are not among them.
    """

    def __init__(self, *, strict: bool = True) -> None:
        """Holds nothing; states are read when they are saved.

        Args:
            strict: see `load_rng_states`.
        """
        self._strict = strict

    def state_dict(self) -> dict[str, Any]:
        """See `rng_states`."""
        return rng_states()

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """See `load_rng_states`."""
        load_rng_states(states, strict=self._strict)


def rng_states() -> dict[str, Any]:
    """The states of all generators of this process, see `RngStates`; copies."""
    version, words, gauss = random.getstate()
    states: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    if "numpy.random" in sys.modules:
        states["numpy"] = _with_tensors(np.random.get_state(legacy=False))
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = {str(i): state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def load_rng_states(states: Mapping[str, Any], *, strict: bool = True) -> None:
    """Puts the generators into these states.

    Generators of which there is no state are left as they are.

    Args:
        states: from `rng_states`, or as they came back from a checkpoint.
        strict: refuse states of CUDA devices that this process does not have; otherwise they are left out.

    Raises:
        UsageError: ``strict``, and such a device is missing; nothing was set.
        LoadFailedError: these are no states; the generators are as they were.
    """
    devices = {int(i): state for i, state in states.get("cuda", {}).items()}
    missing = sorted(set(devices) - set(range(torch.cuda.device_count())))
    if missing and strict:
        msg = (
            f"there are states of the generators of CUDA devices {missing}, and this process has "
            f"{torch.cuda.device_count()}; pass strict=False to leave them out"
        )
        raise UsageError(msg)
    before = rng_states()
    try:
        _set({**states, "cuda": {i: state for i, state in devices.items() if i not in missing}})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        _set(before)
        msg = f"these are no states of random number generators: {type(e).__name__}: {e}"
        raise LoadFailedError(msg) from e


def _set(states: Mapping[str, Any]) -> None:
    if "python" in states:
        python = states["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if "numpy" in states:
        np.random.set_state(_with_arrays(states["numpy"]))
    if "torch" in states:
        torch.set_rng_state(states["torch"].cpu())
    for i, state in states.get("cuda", {}).items():
        torch.cuda.set_rng_state(state.cpu(), int(i))


def _with_tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tensors(one) for key, one in value.items()}
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _with_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_arrays(one) for key, one in value.items()}
    return value.numpy() if isinstance(value, torch.Tensor) else value
