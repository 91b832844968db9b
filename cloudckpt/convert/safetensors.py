"""Files of safetensors: one, or those of a sharded model with its index.

Law: pure. What a header claims is proven before anything is planned from it
(https://github.com/huggingface/safetensors#format).
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import msgspec

from cloudckpt.convert.items import ForeignContents, PlainItem
from cloudckpt.dtypes import DTYPES
from cloudckpt.errors import ManifestError
from cloudckpt.manifest import Chunk, Entry, TensorEntry
from cloudckpt.ranges import Range

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
LENGTH_NBYTES = 8
"""Of the number before the header, little-endian: the header's bytes."""

_MAX_HEADER_NBYTES = 100_000_000  # safetensors, `MAX_HEADER_SIZE`
_MAX_PROBLEMS = 20


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}


class Header(msgspec.Struct, frozen=True):
    """What a file says of itself.

    Attributes:
        tensors: dtype, shape and place in the file, by name.
        metadata: the writer's own.
    """

    tensors: dict[str, tuple[str, tuple[int, ...], Range]]
    metadata: dict[str, str]


def header_range(head: bytes | memoryview, size: int, where: str) -> Range:
    """Where the header lies in the file.

    Args:
        head: at least the file's first `LENGTH_NBYTES` bytes, if it has as many.
        size: of the file.
        where: it lies, for errors.

    Raises:
        ManifestError: it cannot be a file of safetensors.
    """
    nbytes = int.from_bytes(head[:LENGTH_NBYTES], "little")
    if size < LENGTH_NBYTES or not 2 <= nbytes <= min(_MAX_HEADER_NBYTES, size - LENGTH_NBYTES):
        msg = f"{where} is no safetensors file: it has {size} bytes and claims a header of {nbytes}"
        raise ManifestError(msg)
    return Range(LENGTH_NBYTES, LENGTH_NBYTES + nbytes)


def parse_header(data: bytes | memoryview, size: int, where: str) -> Header:
    """Reads a header.

    Args:
        data: its bytes.
        size: of the file.
        where: it lies, for errors.

    Raises:
        ManifestError: it contradicts itself or the file; lists every problem.
    """
    try:
        raw = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(raw.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        found = {name: msgspec.json.decode(text, type=_Tensor) for name, text in raw.items()}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        msg = f"the header of {where} is not that of a safetensors file: {e}"
        raise ManifestError(msg) from e
    first = LENGTH_NBYTES + len(data)
    problems = _problems(found, size - first)
    if problems:
        more = f"\n  ... and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        listing = "".join(f"\n  - {problem}" for problem in problems[:_MAX_PROBLEMS])
        msg = f"the header of {where} is not sound; {len(problems)} problem(s):{listing}{more}"
        raise ManifestError(msg)
    tensors = {name: (t.dtype, t.shape, Range(*t.data_offsets).shift(first)) for name, t in found.items()}
    return Header(tensors, metadata)


def parse_index(data: bytes, where: str) -> Mapping[str, str]:
    """The file of each tensor, from the index of a sharded model.

    Raises:
        ManifestError: it is none, or names a file that lies elsewhere.
    """
    try:
        index = msgspec.json.decode(data, type=_Index)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as e:
        msg = f"{where} is no index of safetensors files: {e}"
        raise ManifestError(msg) from e
    for name in index.weight_map.values():
        if "/" in name or "\\" in name or not name.endswith(SUFFIX):
            msg = f"{where} names a file {name!r}, which is none of {SUFFIX} beside it"
            raise ManifestError(msg)
    return index.weight_map


def contents_of(headers: Mapping[str, Header], weights: Mapping[str, str] | None, where: str) -> ForeignContents:
    """The contents of one file, or of several.

    Args:
        headers: by the files' keys.
        weights: the file of each tensor; None for all tensors of all files.
        where: they lie, for errors.

    Raises:
        ManifestError: a file lacks a tensor that the index says it has.
    """
    if weights is None:
        weights = {name: key for key, header in headers.items() for name in header.tensors}
    items: list[PlainItem] = []
    entries: dict[str, Entry] = {}
    for name, key in weights.items():
        if name not in headers[key].tensors:
            msg = f"{where}: {key} has no tensor {name!r}, although the index says so"
            raise ManifestError(msg)
        dtype, shape, at = headers[key].tensors[name]
        chunk = Chunk((0,) * len(shape), shape, 0, at.start, at.stop, len(items))
        entries[name] = TensorEntry(dtype, shape, (chunk,))
        items.append(PlainItem(key, at))
    metadata = {name: text for header in headers.values() for name, text in header.metadata.items()}
    return ForeignContents(format="safetensors", items=items, entries=entries, metadata=metadata)


def _problems(found: Mapping[str, _Tensor], nbytes: int) -> Sequence[str]:
    problems = []
    position = 0
    for name, tensor in sorted(found.items(), key=lambda item: item[1].data_offsets):
        start, stop = tensor.data_offsets
        dtype = DTYPES.get(tensor.dtype)
        if any(n < 0 for n in tensor.shape):
            problems.append(f"{name!r} has the shape {tensor.shape}")
        elif dtype is not None and prod(tensor.shape) * dtype.itemsize != stop - start:
            problems.append(f"{name!r} of {tensor.dtype} {tensor.shape} has {stop - start} bytes")
        if start != position:
            problems.append(f"{name!r} begins at {start}, where {position} is next: there is a hole, or an overlap")
        if not start <= stop <= nbytes:
            problems.append(f"{name!r} ends at {stop} of {nbytes} bytes of data")
        position = stop
    if position != nbytes:
        problems.append(f"the tensors end at {position} of {nbytes} bytes of data")
    return problems
