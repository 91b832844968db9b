"""Bytes items that are pickles, proven harmless before DCP's planner loads them.

Law: nothing from storage is unpickled here but by torch's restricted unpickler (``weights_only=True``).
"""

import io
import pickle

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from cloudckpt.errors import UnsafePickleError


def prove_safe(data: memoryview, name: str) -> None:
    """Loads the item as ``torch.load(weights_only=True)`` does, and drops it.

    Args:
        data: what ``torch.save`` wrote.
        name: the entry's key, for the error.

    Raises:
        UnsafePickleError: it would load something that torch does not hold safe; names what.
    """
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as e:
        raise UnsafePickleError(_refusal(data, name, e)) from e


def _refusal(data: memoryview, name: str, error: Exception) -> str:
    try:
        unsafe = get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        unsafe = []
    what = f"would load {', '.join(unsafe)}" if unsafe else f"cannot be loaded safely ({error})"
    return (
        f"the entry {name!r} is a pickle that {what}. If you trust whoever wrote this checkpoint, allow the "
        "classes with torch.serialization.add_safe_globals, or pass unsafe_pickle=True to the reader"
    )
