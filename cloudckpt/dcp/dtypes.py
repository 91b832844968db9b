"""torch's dtypes under the manifest's names.

Law: a table and nothing else.
"""

import torch

from cloudckpt.dtypes import DTYPES

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype.torch) for name, dtype in DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""By itemsize, a dtype that every copy supports, for moving elements as they are."""


def name_of(dtype: torch.dtype) -> str | None:
    """The manifest's name for ``dtype``; None where it cannot be stored (quantized, sub-byte)."""
    return _NAMES.get(dtype)


def dtype_of(name: str) -> torch.dtype:
    """The inverse of `name_of`, for names in `cloudckpt.dtypes.DTYPES`."""
    return _DTYPES[name]
