"""The header of a plain shard, which is the header of a safetensors file.

Law: pure. Eight bytes of little-endian length, then JSON, padded with spaces so that the data starts at a
multiple of eight (https://github.com/huggingface/safetensors#format). Data follow without holes, in order.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

ALIGNMENT = 8
MAX_NBYTES = 64 << 20
"""A shard's header stays below this; safetensors refuses 100 MB (``MAX_HEADER_SIZE``)."""

PER_ITEM_NBYTES = 96
"""An upper bound for what an item adds to the header beside its name, its shape and its notes."""


class HeaderItem(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One tensor of the header.

    Attributes:
        name: as `layout.item_name` spells it.
        dtype: a safetensors dtype.
        shape: elements per axis of the chunk.
        nbytes: bytes of data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def encode(items: Sequence[HeaderItem], metadata: dict[str, str]) -> bytes:
    """The header of a file that holds ``items`` in that order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for item in items:
        stop = start + item.nbytes
        header[item.name] = {"dtype": item.dtype, "shape": item.shape, "data_offsets": (start, stop)}
        start = stop
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
