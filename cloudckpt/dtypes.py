"""The names of element types: what the manifest calls them, how wide they are, what numpy calls them.

Law: pure, and the only table of dtypes without torch. Names of the safetensors format are used where it
has one that its torch reader opens (safetensors 0.8, ``safetensors.torch._TYPES``); the others carry torch's
own name and are stored in shards as raw bytes.
"""

from dataclasses import dataclass

RAW = "U8"
"""The safetensors dtype under which bytes items and dtypes unknown to safetensors are stored."""


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type.

    Attributes:
        name: as the manifest spells it.
        itemsize: bytes per element.
        torch: the name torch knows it by.
        numpy: the name numpy, or ``ml_dtypes`` (``ml:`` before it), knows it by; None if neither does.
        is_safetensors: whether the safetensors format knows the name.
    """

    name: str
    itemsize: int
    torch: str
    numpy: str | None
    is_safetensors: bool = True

    @property
    def number_size(self) -> int:
        """Bytes of each number in an element: a complex one has two."""
        is_complex = self.name == "C64" or self.name.startswith("complex")
        return self.itemsize // 2 if is_complex else self.itemsize


DTYPES = {
    d.name: d
    for d in (
        Dtype("BOOL", 1, "bool", "bool"),
        Dtype("U8", 1, "uint8", "uint8"),
        Dtype("I8", 1, "int8", "int8"),
        Dtype("U16", 2, "uint16", "uint16"),
        Dtype("I16", 2, "int16", "int16"),
        Dtype("U32", 4, "uint32", "uint32"),
        Dtype("I32", 4, "int32", "int32"),
        Dtype("U64", 8, "uint64", "uint64"),
        Dtype("I64", 8, "int64", "int64"),
        Dtype("F16", 2, "float16", "float16"),
        Dtype("BF16", 2, "bfloat16", "ml:bfloat16"),
        Dtype("F32", 4, "float32", "float32"),
        Dtype("F64", 8, "float64", "float64"),
        Dtype("C64", 8, "complex64", "complex64"),
        Dtype("F8_E4M3", 1, "float8_e4m3fn", "ml:float8_e4m3fn"),
        Dtype("F8_E5M2", 1, "float8_e5m2", "ml:float8_e5m2"),
        Dtype("F8_E4M3FNUZ", 1, "float8_e4m3fnuz", "ml:float8_e4m3fnuz"),
        Dtype("F8_E5M2FNUZ", 1, "float8_e5m2fnuz", "ml:float8_e5m2fnuz"),
        Dtype("float8_e8m0fnu", 1, "float8_e8m0fnu", "ml:float8_e8m0fnu", is_safetensors=False),
        Dtype("float4_e2m1fn_x2", 1, "float4_e2m1fn_x2", None, is_safetensors=False),
        Dtype("complex32", 4, "complex32", None, is_safetensors=False),
        Dtype("complex128", 16, "complex128", "complex128", is_safetensors=False),
    )
}
"""Every dtype that can be stored, by name."""
