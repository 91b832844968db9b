"""Files of another format, planned: what stands in them as it is, and where bytes of a checkpoint go.

Law: pure. Nobody here has seen a byte of data, and whoever moves them need not know the format.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from cloudckpt.dtypes import DTYPES
from cloudckpt.errors import UnstorableError
from cloudckpt.manifest import BytesEntry, OpenEntry, PlannerPath, TensorEntry
from cloudckpt.ranges import Region


@dataclass(frozen=True, slots=True)
class Elements:
    """Bytes of the checkpoint.

    Attributes:
        key: of a tensor, whose elements they are, row-major and little-endian, or of a byte string.
        region: the rectangle of the tensor that they are of; None for all of it, and for byte strings.
    """

    key: str
    region: Region | None = None


Piece = bytes | Elements


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """A file.

    Attributes:
        name: relative to where all of them go.
        pieces: its bytes, one after another.
    """

    name: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What is to be written.

    Attributes:
        entries: by key, opened.
        metadata: the user's own.
        planner_paths: see `manifest.Manifest.planner_paths`.
    """

    entries: Mapping[str, OpenEntry]
    metadata: Mapping[str, Any]
    planner_paths: Mapping[str, PlannerPath] | None


def piece_nbytes(piece: Piece, entries: Mapping[str, OpenEntry]) -> int:
    """How long it is."""
    if isinstance(piece, bytes):
        return len(piece)
    entry = entries[piece.key]
    if isinstance(entry, BytesEntry):
        return entry.nbytes
    assert isinstance(entry, TensorEntry)  # noqa: S101 - values have no bytes
    numel = prod(entry.shape) if piece.region is None else piece.region.numel
    return numel * DTYPES[entry.dtype].itemsize


def refuse(keys: list[str], why: str) -> None:
    """Raises for entries that the format has no place for.

    Raises:
        UnstorableError: there are some; names the first few.
    """
    if keys:
        some = ", ".join(map(repr, keys[:5])) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        msg = f"{some}: {why}"
        raise UnstorableError(msg)
