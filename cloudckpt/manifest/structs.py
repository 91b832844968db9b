"""What a manifest is made of, as frozen structs.

Law: pure; `docs/format.md` leads, this follows. Nothing here judges.
"""

import sys
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from datetime import datetime
from math import prod
from typing import Any, Literal

import msgspec

from cloudckpt.dtypes import DTYPES

FORMAT: Literal["cloudckpt"] = "cloudckpt"
VERSION = 1
SUMMARY_NBYTES = 4096
"""The summary lies within this many first bytes of the manifest."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What listings show, within the manifest's first `SUMMARY_NBYTES`.

    Attributes:
        save_id: random, made by the coordinator for this commit.
        created: when the manifest was made, by the coordinator's clock.
        writer: the program that made it.
        step: the training step, where the writer was told.
        nbytes: bytes of all items as the user knows them.
        stored_nbytes: bytes of all shards.
        is_tombstone: `sweep` put this where no manifest was: no checkpoint is here, nor will the attempt that
            was swept become one.
        metrics: what the step measured, where the writer was told: at most `metrics.MAX_METRICS` finite numbers.
    """

    format: Literal["cloudckpt"]
    version: int
    save_id: str
    created: datetime
    writer: str
    step: int | None = None
    nbytes: int = 0
    stored_nbytes: int = 0
    shard_count: int = 0
    entry_count: int = 0
    chunk_count: int = 0
    is_tombstone: bool = False
    metrics: dict[str, float] = {}  # msgspec makes a new one for each


class Shard(msgspec.Struct, frozen=True, kw_only=True):
    """One data object.

    Attributes:
        key: relative to the checkpoint's URL.
        size: bytes of the object.
        crc32c: of the whole object.
        extensions: descriptors in the order they were applied; none for a plain shard.
        frame_size: plain bytes per frame; each item's last frame may be shorter.
        frame_checksums: the CRC32C of each frame as stored, packed (see `pack`).
        frame_sizes: the stored bytes of each frame, packed; empty for a plain shard, where stored is plain.
        extension_params: for each extension, what it must be told again of this shard; anyone can read it.
    """

    key: str
    size: int
    crc32c: int
    frame_size: int
    frame_checksums: str
    extensions: tuple[str, ...] = ()
    frame_sizes: str = ""
    extension_params: tuple[dict[str, str], ...] = ()


class Chunk(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One rectangle of a tensor, row-major, as an item of a shard.

    Attributes:
        offsets: of its first element in the tensor.
        sizes: elements per axis.
        shard: index into the manifest's shards.
        start: first byte in the shard object.
        stop: one past the last.
        frame: index of its first frame among the shard's.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shard: int
    start: int
    stop: int
    frame: int


class TensorEntry(msgspec.Struct, frozen=True, array_like=True, tag="tensor", gc=False):
    """A tensor: ``dtype`` as in `dtypes.DTYPES`, its global ``shape``, and the chunks that cover it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class BytesEntry(msgspec.Struct, frozen=True, array_like=True, tag="bytes", gc=False):
    """A byte string: ``nbytes`` plain, in the shard as a `Chunk` has it."""

    nbytes: int
    shard: int
    start: int
    stop: int
    frame: int


class ValueEntry(msgspec.Struct, frozen=True, array_like=True, tag="value", gc=False):
    """A plain JSON value, kept in the manifest itself."""

    value: Any


class SealedEntry(msgspec.Struct, frozen=True, array_like=True, tag="sealed", gc=False):
    """A plain JSON value that is encrypted in the manifest's seal."""


OpenEntry = TensorEntry | BytesEntry | ValueEntry
Entry = OpenEntry | SealedEntry
PlannerPath = tuple[str | int, ...]


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest carries when encryption is on.

    Attributes:
        key_id: names the key under which this manifest's own data key is encrypted.
        wrapped_key: that data key, encrypted, in base64.
        values: the user's metadata and the plain JSON values, encrypted, in base64.
        mac: authenticates all bytes of the manifest before it, as hex digits; empty before it is known.
    """

    key_id: str
    wrapped_key: str
    values: str
    mac: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One checkpoint.

    Attributes:
        metadata: the user's own, plain JSON.
        planner_paths: DCP's flatten mapping: where each key stands in the nested state dict. Keys that
            stand under their own name at the top are left out. None where the planner kept none.
        seal: where encryption is on; ``metadata`` is empty then, unless it was opened with a key.
    """

    summary: Summary
    metadata: dict[str, Any]
    planner_paths: dict[str, PlannerPath] | None
    shards: tuple[Shard, ...]
    entries: dict[str, TensorEntry | BytesEntry | ValueEntry | SealedEntry]
    seal: Seal | msgspec.UnsetType = msgspec.UNSET


def pack(numbers: Iterable[int]) -> str:
    """Unsigned 32-bit numbers as base64 of their little-endian bytes."""
    return b64encode(_little_endian(array("I", numbers)).tobytes()).decode()


def unpack(text: str) -> Sequence[int]:
    """The inverse of `pack`."""
    numbers = array("I")
    numbers.frombytes(b64decode(text))
    return _little_endian(numbers)


def plain_nbytes(entries: dict[str, Entry]) -> int:
    """Bytes of all items as the user knows them."""
    total = 0
    for entry in entries.values():
        if isinstance(entry, TensorEntry):
            total += DTYPES[entry.dtype].itemsize * sum(prod(chunk.sizes) for chunk in entry.chunks)
        elif isinstance(entry, BytesEntry):
            total += entry.nbytes
    return total


def _little_endian(numbers: "array[int]") -> "array[int]":
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
