"""Files of safetensors, planned: one, or those of a sharded model with its index, as Hugging Face lays them out.

Law: pure. Tensors lie as their readers want them (wide elements first), and else as they lie already.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from cloudckpt import safetensors_header
from cloudckpt.convert.files import Elements, Exported, FilePlan, piece_nbytes, refuse
from cloudckpt.convert.safetensors import INDEX_SUFFIX, SUFFIX
from cloudckpt.dtypes import DTYPES
from cloudckpt.errors import UsageError
from cloudckpt.manifest import TensorEntry
from cloudckpt.safetensors_header import HeaderItem

MAX_FILE_NBYTES = 5_000_000_000
"""Of a file of a sharded model: what ``save_pretrained`` long had as its ``max_shard_size``."""

_STEM = "model"
SINGLE = _STEM + SUFFIX
"""The file of a model that is not sharded."""

INDEX = _STEM + INDEX_SUFFIX
"""The index of one that is."""

_RESERVED = "__metadata__"


def plan_safetensors(
    exported: Exported,
    *,
    file_name: str | None = None,
    max_file_nbytes: int = MAX_FILE_NBYTES,
    place_of: Callable[[str], tuple[str, int]] = lambda key: (key, 0),
) -> list[FilePlan]:
    """Plans the files; the last is the index, where there is one.

    Args:
        exported: tensors only.
        file_name: of the one file that there is to be; None for as many as ``max_file_nbytes`` asks for.
        max_file_nbytes: of tensors in a file; a larger tensor has one to itself.
        place_of: what to order tensors by whose elements are equally wide: the object that one lies in, and where.

    Raises:
        UnstorableError: some entries are no tensors, or of dtypes that safetensors does not know.
        UsageError: a header would be larger than readers take.
    """
    tensors = _tensors(exported)
    order = sorted(tensors, key=lambda key: (-DTYPES[tensors[key].dtype].itemsize, place_of(key), key))
    sizes = {key: piece_nbytes(Elements(key), exported.entries) for key in order}
    metadata = {"format": "pt", **{name: _text(value) for name, value in exported.metadata.items()}}
    groups = [order] if file_name is not None else _groups(order, sizes, max_file_nbytes)
    if len(groups) <= 1:
        return [_file(file_name or SINGLE, order, tensors, sizes, metadata)]
    names = [f"{_STEM}-{i:05}-of-{len(groups):05}{SUFFIX}" for i in range(1, len(groups) + 1)]
    files = [_file(name, group, tensors, sizes, metadata) for name, group in zip(names, groups, strict=True)]
    weights = {key: name for name, group in zip(names, groups, strict=True) for key in group}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weights.items()))}
    return [*files, FilePlan(name=INDEX, pieces=(msgspec.json.format(msgspec.json.encode(index)),))]


def _tensors(exported: Exported) -> dict[str, TensorEntry]:
    tensors = {key: entry for key, entry in exported.entries.items() if isinstance(entry, TensorEntry)}
    others = [key for key in exported.entries if key not in tensors]
    refuse(others, "safetensors holds tensors only; leave the others out with --tensors-only")
    strange = [key for key, entry in tensors.items() if not DTYPES[entry.dtype].is_safetensors]
    refuse(strange, "safetensors does not know their dtypes; leave them out with --only PATTERN")
    refuse([_RESERVED] if _RESERVED in tensors else [], "safetensors keeps this name for itself")
    return tensors


def _groups(order: Iterable[str], sizes: Mapping[str, int], most: int) -> list[list[str]]:
    groups: list[list[str]] = []
    room = 0
    for key in order:
        if not groups or sizes[key] > room:
            groups.append([])
            room = most
        groups[-1].append(key)
        room -= sizes[key]
    return groups


def _file(
    name: str,
    keys: Iterable[str],
    tensors: Mapping[str, TensorEntry],
    sizes: Mapping[str, int],
    metadata: dict[str, str],
) -> FilePlan:
    items = [
        HeaderItem(name=key, dtype=tensors[key].dtype, shape=tensors[key].shape, nbytes=sizes[key]) for key in keys
    ]
    header = safetensors_header.encode(items, metadata)
    if len(header) > safetensors_header.MAX_NBYTES:
        msg = (
            f"the header of {name} would have {len(header)} bytes, and readers take {safetensors_header.MAX_NBYTES}: "
            "let there be several files, by giving a directory, with --max-file-size"
        )
        raise UsageError(msg)
    return FilePlan(name=name, pieces=(header, *(Elements(item.name) for item in items)))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
