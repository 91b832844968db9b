"""torch's dtypes under the manifest's names.

Law: a table and nothing else.
"""

import torch

_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "float8_e8m0fnu",
    torch.float4_e2m1fn_x2: "float4_e2m1fn_x2",
    torch.complex32: "complex32",
    torch.complex128: "complex128",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""By itemsize, a dtype that every copy supports, for moving elements as they are."""


def name_of(dtype: torch.dtype) -> str | None:
    """The manifest's name for ``dtype``; None where it cannot be stored (quantized, sub-byte)."""
    return _NAMES.get(dtype)


def dtype_of(name: str) -> torch.dtype:
    """The inverse of `name_of`, for names in `cloudckpt.dtypes.DTYPES`."""
    return _DTYPES[name]
