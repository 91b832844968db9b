"""The manifest as frozen structs: what a checkpoint is, in one small JSON object.

Law: pure. Parse at the border and report every problem at once; `docs/format.md` leads, this follows.
"""

import json
import re
import sys
from array import array
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from math import prod
from typing import Any, Literal, NoReturn

import msgspec
from awscrt.checksums import crc32c

from cloudckpt.dtypes import DTYPES
from cloudckpt.errors import ManifestError, UnsupportedVersionError
from cloudckpt.layout import is_shard_key

FORMAT: Literal["cloudckpt"] = "cloudckpt"
VERSION = 1
SUMMARY_NBYTES = 4096
"""The summary lies within this many first bytes of the manifest."""

_TAIL = re.compile(rb',"crc32c":"([0-9a-f]{8})"}')
_TAIL_NBYTES = len(b',"crc32c":"00000000"}')
_SEALED_TAIL = re.compile(rb',"mac":"([0-9a-f]{32})"},"crc32c":"[0-9a-f]{8}"}')
_SEALED_TAIL_NBYTES = len(b',"mac":""}') + 32 + _TAIL_NBYTES
_MAX_PROBLEMS = 100
_HEAD = b'{"summary":'
_UNREADABLE = (ValueError, RecursionError)


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


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Manifest)


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


def encode(manifest: Manifest, mac: Callable[[bytes], bytes] | None = None) -> bytes:
    """The manifest's bytes: JSON whose last member is the CRC32C of all bytes before it.

    Args:
        manifest: what it says.
        mac: makes the 16 bytes that authenticate what comes before them; if, and only if, it has a seal.
    """
    body = _encoder.encode(manifest)[:-1]
    if mac is not None:
        head = body.removesuffix(b',"mac":""}')
        body = head + b',"mac":"%s"}' % mac(head).hex().encode()
    return body + b',"crc32c":"%08x"}' % crc32c(body)


def authenticated(data: bytes) -> tuple[memoryview, bytes]:
    """The bytes that a sealed manifest's MAC covers, and the MAC.

    Raises:
        ManifestError: it does not end as a sealed one does.
    """
    tail = _SEALED_TAIL.fullmatch(data[-_SEALED_TAIL_NBYTES:])
    if tail is None:
        msg = "the manifest does not end in its MAC"
        raise ManifestError(msg)
    return memoryview(data)[:-_SEALED_TAIL_NBYTES], bytes.fromhex(tail[1].decode())


def encode_tombstone(summary: Summary) -> bytes:
    """The bytes of a tombstone."""
    return encode(Manifest(summary=summary, metadata={}, planner_paths=None, shards=(), entries={}))


def parse(data: bytes, where: str) -> Manifest:
    """Reads a manifest that came from storage.

    Args:
        data: the whole object.
        where: its URL, for the error.

    Raises:
        UnsupportedVersionError: of a version this release does not know.
        ManifestError: truncated, altered or malformed; lists every problem.
    """
    try:
        manifest = _decoder.decode(data)
    except _UNREADABLE as e:
        _refuse(data, where, e)
    if manifest.summary.version != VERSION:
        raise _unsupported(manifest.summary.version, where)
    if not _checksum_matches(data) or any(map(shard_problems, manifest.shards)):
        _refuse(data, where, None)
    return manifest


def parse_summary(head: bytes, where: str) -> Summary:
    """Reads the summary from a manifest's first `SUMMARY_NBYTES` (or from more of it).

    Raises:
        ManifestError, UnsupportedVersionError: as `parse`.
    """
    try:
        if not head.startswith(_HEAD):
            msg = f"it does not begin with {_HEAD.decode()}"
            raise ValueError(msg)
        raw, _ = json.JSONDecoder().raw_decode(head[len(_HEAD) :].decode(errors="ignore"))
        version = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise _unsupported(version, where)
        summary = msgspec.convert(raw, Summary)
    except UnsupportedVersionError:
        raise
    except _UNREADABLE as e:
        _refuse(head, where, e)
    if summary.version != VERSION:
        raise _unsupported(summary.version, where)
    return summary


def _checksum_matches(data: bytes) -> bool:
    tail = _TAIL.fullmatch(data[-_TAIL_NBYTES:])
    return tail is not None and int(tail[1], 16) == crc32c(data[:-_TAIL_NBYTES])


def _unsupported(version: object, where: str) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        f"{where} is of format version {version}; this release reads version {VERSION}. "
        "Read it with a newer cloudckpt (pip install --upgrade cloudckpt)."
    )


def _refuse(data: bytes, where: str, first: Exception | None) -> NoReturn:
    """Raises with every problem that an untyped pass over ``data`` finds."""
    try:
        tree = msgspec.json.decode(data)
    except _UNREADABLE as e:
        msg = f"{where} is not a whole manifest ({len(data)} bytes): {e}. It was truncated or is no manifest."
        raise ManifestError(msg) from e
    summary = tree.get("summary") if isinstance(tree, dict) else None
    version = summary.get("version") if isinstance(summary, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise _unsupported(version, where)
    problems = find_problems(tree)
    if not _checksum_matches(data):
        problems.append("crc32c: the checksum at its end does not match: the object was altered")
    if first is not None and not problems:
        problems.append(str(first))
    shown = problems[:_MAX_PROBLEMS]
    more = f"\n  ... and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    listing = "".join(f"\n  - {p}" for p in shown)
    raise ManifestError(f"{where} is not a sound manifest; {len(problems)} problem(s):{listing}{more}")


def find_problems(tree: Any) -> list[str]:
    """Every problem in a decoded but untyped manifest, each with the place where it stands."""
    if not isinstance(tree, dict):
        return [f"the top level is {type(tree).__name__}, not an object"]
    problems: list[str] = []
    _convert(tree.get("summary"), Summary, "summary", problems)
    _convert(tree.get("metadata"), dict[str, Any], "metadata", problems)
    _convert(tree.get("planner_paths"), dict[str, PlannerPath] | None, "planner_paths", problems)
    shards: list[Shard | None] = []
    for i, raw in enumerate(_convert(tree.get("shards"), list[Any], "shards", problems) or ()):
        shard = _convert(raw, Shard, f"shards[{i}]", problems)
        shards.append(shard)
        if shard is not None:
            problems += (f"shards[{i}]: {p}" for p in shard_problems(shard))
    if "seal" in tree:
        _convert(tree["seal"], Seal, "seal", problems)
    entries = _convert(tree.get("entries"), dict[str, Any], "entries", problems) or {}
    for key, raw in entries.items():
        entry = _convert(raw, TensorEntry | BytesEntry | ValueEntry | SealedEntry, f"entries[{key!r}]", problems)
        if entry is not None:
            problems += (f"entries[{key!r}]: {p}" for p in entry_problems(entry, shards))
    return problems


def _convert(raw: Any, kind: Any, place: str, problems: list[str]) -> Any:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as e:
        problems.append(f"{place}: {e}")
        return None


def shard_problems(shard: Shard) -> list[str]:
    """What is wrong with a shard by itself."""
    problems = []
    if not is_shard_key(shard.key):
        problems.append(f"the key {shard.key!r} is not one of a shard")
    if shard.size < 0 or shard.frame_size < 1:
        problems.append(f"size {shard.size} and frame_size {shard.frame_size} must be positive")
    for name in ("frame_checksums", "frame_sizes"):
        try:
            if len(b64decode(getattr(shard, name), validate=True)) % 4:
                problems.append(f"{name} does not hold whole 32-bit numbers")
        except ValueError as e:
            problems.append(f"{name} is not base64: {e}")
    return problems


def entry_problems(entry: Entry, shards: "list[Shard | None] | tuple[Shard, ...]") -> list[str]:
    """What is wrong with an entry, given the shards it points into; readers ask before they plan."""
    match entry:
        case ValueEntry() | SealedEntry():
            return []
        case BytesEntry():
            return _place_problems(entry, entry.nbytes, shards)
    dtype = DTYPES.get(entry.dtype)
    if dtype is None:
        return [f"unknown dtype {entry.dtype!r}"]
    problems = []
    for i, chunk in enumerate(entry.chunks):
        if len(chunk.offsets) != len(entry.shape) or len(chunk.sizes) != len(entry.shape):
            problems.append(f"chunks[{i}] has not the tensor's {len(entry.shape)} axes")
        elif any(
            o < 0 or s < 0 or o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, entry.shape, strict=True)
        ):
            problems.append(f"chunks[{i}] lies outside the tensor's shape {entry.shape}")
        else:
            nbytes = prod(chunk.sizes) * dtype.itemsize
            problems += (f"chunks[{i}]: {p}" for p in _place_problems(chunk, nbytes, shards))
    return problems


def _place_problems(
    at: Chunk | BytesEntry, nbytes: int, shards: "list[Shard | None] | tuple[Shard, ...]"
) -> list[str]:
    if not 0 <= at.shard < len(shards):
        return [f"shard {at.shard} does not exist"]
    shard = shards[at.shard]
    if shard is None:
        return []
    problems = []
    if not 0 <= at.start <= at.stop <= shard.size:
        problems.append(f"bytes {at.start} to {at.stop} are not in its shard of {shard.size}")
    if not shard.extensions and at.stop - at.start != nbytes:
        problems.append(f"bytes {at.start} to {at.stop} cannot hold its {nbytes} bytes")
    last_frame = at.frame + -(-nbytes // max(1, shard.frame_size))
    if at.frame < 0 or last_frame > len(shard.frame_checksums) * 3 // 16:
        problems.append(f"frames {at.frame} to {last_frame} are more than its shard has checksums for")
    return problems
