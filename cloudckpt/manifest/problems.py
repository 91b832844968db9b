"""What is wrong with a manifest that could be decoded.

Law: pure, and tells; who asks refuses. No number of a manifest is used for anything before it was judged here.
"""

from base64 import b64decode
from collections.abc import Sequence
from math import prod
from typing import Any

import msgspec

from cloudckpt.dtypes import DTYPES
from cloudckpt.layout import is_shard_key
from cloudckpt.manifest.places import all_places, place_problems
from cloudckpt.manifest.structs import (
    BytesEntry,
    Chunk,
    Entry,
    PlannerPath,
    Seal,
    SealedEntry,
    Shard,
    Summary,
    TensorEntry,
    ValueEntry,
    unpack,
)
from cloudckpt.manifest.tiling import tiling_problem

MAX_AXES = 64
"""Of a tensor: what torch can hand to numpy (numpy 2, ``NPY_MAXDIMS``), and what this reads into."""

MAX_EXTENSIONS = 16
"""Of a shard: each may make its frames take more memory on the way."""

MAX_PARAMS_NBYTES = 1 << 20
"""Of the texts that a shard's extensions are told again, all together."""

_MAX_NBYTES = 1 << 63
"""Byte counts are signed 64-bit numbers in torch, in numpy and in every file system."""

_Shards = Sequence[Shard | None]


def find_problems(tree: Any) -> list[str]:
    """Every problem in a decoded but untyped manifest, each with the place where it stands."""
    if not isinstance(tree, dict):
        return [f"the top level is {type(tree).__name__}, not an object"]
    problems: list[str] = []
    _convert(tree.get("summary"), Summary, "summary", problems)
    _convert(tree.get("metadata"), dict[str, Any], "metadata", problems)
    _convert(tree.get("planner_paths"), dict[str, PlannerPath] | None, "planner_paths", problems)
    if "seal" in tree:
        _convert(tree["seal"], Seal, "seal", problems)
    shards = _find_shard_problems(tree.get("shards"), problems)
    sound: dict[str, Entry] = {}
    entries = _convert(tree.get("entries"), dict[str, Any], "entries", problems) or {}
    for key, raw in entries.items():
        entry = _convert(raw, TensorEntry | BytesEntry | ValueEntry | SealedEntry, f"entries[{key!r}]", problems)
        if entry is not None:
            found = entry_problems(entry, shards)
            problems += (f"entries[{key!r}]: {p}" for p in found)
            if not found:
                sound[key] = entry
    problems += (f"entries: {p}" for p in place_problems(all_places(sound, shards), shards))
    return problems


def _find_shard_problems(raw_shards: Any, problems: list[str]) -> list[Shard | None]:
    """The shards, None in place of those that nothing can be planned from."""
    shards: list[Shard | None] = []
    first: dict[str, int] = {}
    for i, raw in enumerate(_convert(raw_shards, list[Any], "shards", problems) or ()):
        shard = _convert(raw, Shard, f"shards[{i}]", problems)
        if shard is not None:
            found = shard_problems(shard)
            problems += (f"shards[{i}]: {p}" for p in found or frame_problems(shard))
            if first.setdefault(shard.key, i) != i:
                problems.append(f"shards[{i}]: its key is that of shards[{first[shard.key]}]")
        shards.append(shard if shard is not None and shard.frame_size > 0 else None)
    return shards


def _convert(raw: Any, kind: Any, place: str, problems: list[str]) -> Any:
    try:
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, RecursionError) as e:
        problems.append(f"{place}: {e}")
        return None


def shard_problems(shard: Shard) -> list[str]:
    """What is wrong with a shard by itself; readers ask when they open a checkpoint."""
    problems = []
    if not is_shard_key(shard.key):
        problems.append(f"the key {shard.key!r} is not one of a shard")
    if not 0 <= shard.size < _MAX_NBYTES or not 1 <= shard.frame_size < _MAX_NBYTES:
        problems.append(f"size {shard.size} and frame_size {shard.frame_size} must be positive, and below 2^63")
    if not 0 <= shard.crc32c < 1 << 32:
        problems.append(f"crc32c {shard.crc32c} is no 32-bit number")
    for name in ("frame_checksums", "frame_sizes"):
        try:
            if len(b64decode(getattr(shard, name), validate=True)) % 4:
                problems.append(f"{name} does not hold whole 32-bit numbers")
        except ValueError as e:
            problems.append(f"{name} is not base64: {e}")
    if len(shard.extensions) > MAX_EXTENSIONS:
        problems.append(f"{len(shard.extensions)} extensions are more than {MAX_EXTENSIONS}")
    nbytes = sum(len(name) + len(text) for params in shard.extension_params for name, text in params.items())
    if nbytes > MAX_PARAMS_NBYTES:
        problems.append(f"extension_params has {nbytes} characters, more than {MAX_PARAMS_NBYTES}")
    return problems


def frame_problems(shard: Shard) -> list[str]:
    """What is wrong with the frames of a shard that is sound by itself; readers ask before they plan."""
    if len(shard.extension_params) > len(shard.extensions):
        return [f"extension_params has {len(shard.extension_params)} for {len(shard.extensions)} extensions"]
    if not shard.extensions:
        return ["it has frame_sizes, but no extensions"] if shard.frame_sizes else []
    sizes = unpack(shard.frame_sizes)
    count = len(unpack(shard.frame_checksums))
    if len(sizes) != count:
        return [f"{len(sizes)} frame_sizes are not those of its {count} frames"]
    if sum(sizes) != shard.size:
        return [f"its frame sizes make up {sum(sizes)} bytes, and its size is {shard.size}"]
    return []


def entry_problems(entry: Entry, shards: _Shards) -> list[str]:
    """What is wrong with an entry, given the shards it points into; readers ask before they plan.

    Args:
        entry: of a manifest.
        shards: all of its, None in place of one that nothing can be planned from.
    """
    match entry:
        case ValueEntry() | SealedEntry():
            return []
        case BytesEntry():
            return _place_problems(entry, entry.nbytes, shards)
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        return [f"unknown dtype {entry.dtype!r}"]
    impossible = shape_problem(entry.shape, dtype.itemsize)
    if impossible is not None:
        return [impossible]
    problems = []
    for i, chunk in enumerate(entry.chunks):
        outside = _outside(chunk, entry.shape)
        if outside is not None:
            problems.append(f"chunks[{i}] {outside}")
            continue
        found = _place_problems(chunk, prod(chunk.sizes) * dtype.itemsize, shards)
        if found:
            problems += (f"chunks[{i}]: {p}" for p in found)
    if not problems:
        problem = tiling_problem(entry.shape, entry.chunks)
        problems = [problem] if problem is not None else []
    return problems


def shape_problem(shape: tuple[int, ...], itemsize: int) -> str | None:
    """What keeps an array from having that shape, and strides; None if nothing does."""
    if len(shape) > MAX_AXES:
        return f"it has {len(shape)} axes, more than {MAX_AXES}"
    if any(n < 0 for n in shape) or prod(max(n, 1) for n in shape) * itemsize >= _MAX_NBYTES:
        return f"its shape {shape} cannot be: it is negative, or has 2^63 bytes or more"
    return None


def _outside(chunk: Chunk, shape: tuple[int, ...]) -> str | None:
    if len(chunk.offsets) != len(shape) or len(chunk.sizes) != len(shape):
        return f"has not the tensor's {len(shape)} axes"
    for o, s, n in zip(chunk.offsets, chunk.sizes, shape, strict=True):
        if o < 0 or s < 0 or o + s > n:
            return f"lies outside the tensor's shape {shape}"
    return None


def _place_problems(at: Chunk | BytesEntry, nbytes: int, shards: _Shards) -> list[str]:
    if not 0 <= at.shard < len(shards):
        return [f"shard {at.shard} does not exist"]
    shard = shards[at.shard]
    if shard is None:
        return []
    problems = []
    if nbytes < 0:
        problems.append(f"it has {nbytes} bytes")
    if not 0 <= at.start <= at.stop <= shard.size:
        problems.append(f"bytes {at.start} to {at.stop} are not in its shard of {shard.size}")
    if not shard.extensions and at.stop - at.start != nbytes:
        problems.append(f"bytes {at.start} to {at.stop} cannot hold its {nbytes} bytes")
    count = -(-nbytes // shard.frame_size)
    if at.frame < 0 or at.frame + count > len(shard.frame_checksums) * 3 // 16:
        problems.append(f"{count} frames from {at.frame} on are more than its shard has checksums for")
    return problems
