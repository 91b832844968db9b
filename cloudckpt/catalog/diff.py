"""What differs between two checkpoints, whoever wrote them.

Law: writes nothing; what manifests prove is not fetched, and memory is bounded as `catalog.elements` says.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal

from cloudckpt.catalog.elements import BATCH_NBYTES, Batch, Elements, batches, has_numbers, read_batch, spread
from cloudckpt.catalog.numbers import Change
from cloudckpt.catalog.proof import Prover
from cloudckpt.catalog.statistics import Report
from cloudckpt.catalog.witness import witnessed
from cloudckpt.checkpoint import Checkpoint
from cloudckpt.checkpoint import open as open_checkpoint
from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.read import ReadOptions
from cloudckpt.errors import UsageError
from cloudckpt.manifest import BytesEntry, SealedEntry, TensorEntry, ValueEntry
from cloudckpt.selection import Patterns
from cloudckpt.store.url import StoreOptions

Kind = Literal["tensor", "bytes", "value"]
Why = Literal["kind", "shape", "dtype", "value"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one of the two checkpoints has under a key.

    Attributes:
        kind: of the entry.
        dtype: of a tensor, as `cloudckpt.dtypes.DTYPES` spells it; else None.
        shape: of a tensor; else None.
        nbytes: of a tensor or a byte string, plain; 0 of a value.
        value: the plain value; else None.
    """

    kind: Kind
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    nbytes: int = 0
    value: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """An entry that differs.

    Attributes:
        key: of both.
        why: the first of these that differs: what it is, the tensor's shape, its dtype, the value or the elements.
        left, right: what is there.
        change: how the elements differ; None where they were not compared.
    """

    key: str
    why: Why
    left: Side
    right: Side
    change: Change | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How two checkpoints differ.

    Attributes:
        left, right: URLs.
        has_values: whether values were compared, or only what manifests prove was told.
        only_left, only_right: keys that the other one lacks.
        changed: entries that both have, and that differ; in the left one's order.
        unknown: keys of entries of which it cannot be told: manifests do not prove it, or it is a value that is
            encrypted.
        equal_count: entries that are equal.
        proven_count: those of them that the checksums in both manifests show to be: nothing of them was fetched.
        nbytes_fetched: of entries, from both.
    """

    left: str
    right: str
    has_values: bool
    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    changed: tuple[Changed, ...]
    unknown: tuple[str, ...]
    equal_count: int
    proven_count: int
    nbytes_fetched: int

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs, and nothing is unknown."""
        return not (self.only_left or self.only_right or self.changed or self.unknown)


def diff(
    left: str,
    right: str,
    *,
    patterns: Patterns = "*",
    values: bool = True,
    rtol: float = 0.0,
    atol: float = 0.0,
    options: ReadOptions | None = None,
    store: StoreOptions | None = None,
    report: Report | None = None,
) -> Difference:
    """Tells what differs between two checkpoints, of any format that `cloudckpt.open` opens.

    Tensors are read piece by piece, at most 8 at a time of 8 MiB from each checkpoint. Those that are stored plainly
    and alike, and whose frames have the same checksums, are equal, and nothing of them is fetched. NaN equals NaN.

    Args:
        left: URL of a checkpoint.
        right: URL of the other.
        patterns: of keys; what they leave out is left out on both sides.
        values: read what manifests do not prove equal. Without it two manifests are all that is read, and what they
            prove is told: tensors and byte strings whose bytes are equal, those whose bytes are not (which may be
            equal numbers: 0 and -0), and of others that it is unknown.
        rtol: elements that differ by at most ``atol + rtol * abs(right)`` are not counted as differing.
        atol: see ``rtol``.
        options: how to read.
        store: how to reach the store.
        report: is told how far it is: of the left one's bytes that are to be read.

    Raises:
        UsageError: a negative tolerance.
        CheckpointChangedError, CheckpointNotFoundError: one was replaced or removed meanwhile.
        StoreError, IntegrityError, ManifestError: as `cloudckpt.open` and what reads from it.
    """
    with (
        open_checkpoint(left, options=options, store=store) as one,
        open_checkpoint(right, options=options, store=store) as other,
    ):
        return diff_open(one, other, patterns=patterns, values=values, rtol=rtol, atol=atol, report=report)


def diff_open(
    left: Checkpoint,
    right: Checkpoint,
    *,
    patterns: Patterns = "*",
    values: bool = True,
    rtol: float = 0.0,
    atol: float = 0.0,
    report: Report | None = None,
) -> Difference:
    """As `diff`, of checkpoints that are open."""
    if not (rtol >= 0 and atol >= 0):
        msg = f"rtol={rtol} and atol={atol} must not be negative"
        raise UsageError(msg)
    keys, others = left.match(patterns), right.match(patterns)
    common = [key for key in keys if key in right]
    look = _Look(left, right)
    for key in common:
        look.at(key, has_values=values)
    if values:
        between = partial(Change.between, rtol=rtol, atol=atol)
        with witnessed(left, right):
            look.read_tensors(between, report)
            look.read_byte_strings()
    return Difference(
        left=left.url,
        right=right.url,
        has_values=values,
        only_left=tuple(key for key in keys if key not in right),
        only_right=tuple(key for key in others if key not in left),
        changed=tuple(look.changed[key] for key in common if key in look.changed),
        unknown=tuple(key for key in common if key in look.unknown),
        equal_count=len(common) - len(look.changed) - len(look.unknown),
        proven_count=look.proven_count,
        nbytes_fetched=left.stats.bytes_fetched + right.stats.bytes_fetched,
    )


class _Look:
    """What was learnt so far, and what is left to be read."""

    def __init__(self, left: Checkpoint, right: Checkpoint) -> None:
        self.changed: dict[str, Changed] = {}
        self.unknown: set[str] = set()
        self.proven_count = 0
        self._left, self._right = left, right
        self._prover = Prover(left._access.contents, right._access.contents)
        self._tensors: dict[str, tuple[Side, Side]] = {}
        self._byte_strings: dict[str, tuple[Side, Side]] = {}

    def at(self, key: str, *, has_values: bool) -> None:
        """Tells what manifests say of an entry; where they do not tell, it is left to be read, or unknown."""
        left, right = _side(self._left, key), _side(self._right, key)
        if left is None or right is None:
            self.unknown.add(key)
            return
        why = _why(left, right)
        if why is not None and not (why == "dtype" and has_values and _are_numbers(left, right)):
            self.changed[key] = Changed(key=key, why=why, left=left, right=right)
        elif left.kind != "value":
            is_equal = None if why else self._prover.are_equal(self._left._entry(key), self._right._entry(key))
            if is_equal:
                self.proven_count += 1
            elif is_equal is False and not (has_values and left.kind == "tensor"):
                self.changed[key] = Changed(key=key, why="value", left=left, right=right)
            elif has_values:
                (self._tensors if left.kind == "tensor" else self._byte_strings)[key] = left, right
            else:
                self.unknown.add(key)

    def read_tensors(self, between: "_Between", report: Report | None) -> None:
        """Compares the elements of tensors that nothing is known of."""
        total, done = sum(left.nbytes for left, _ in self._tensors.values()), 0
        changes = dict.fromkeys(self._tensors, Change())

        def read(batch: Batch) -> list[Change]:
            return [
                between(a, b)
                for a, b in zip(
                    read_batch(self._left._access, batch), read_batch(self._right._access, batch), strict=True
                )
            ]

        for batch, found in spread(read, batches(self._left._access, self._tensors)):
            for piece, change in zip(batch, found, strict=True):
                changes[piece.key] += change
                done += piece.nbytes
            if report is not None:
                report(done, total)
        for key, (left, right) in self._tensors.items():
            why = _why(left, right) or ("value" if changes[key].changed_count else None)
            if why is not None:
                self.changed[key] = Changed(key=key, why=why, left=left, right=right, change=changes[key])

    def read_byte_strings(self) -> None:
        """Compares byte strings that nothing is known of."""
        for key, are_same in spread(self._are_same, self._byte_strings):
            if not are_same:
                left, right = self._byte_strings[key]
                self.changed[key] = Changed(key=key, why="value", left=left, right=right)

    def _are_same(self, key: str) -> bool:
        with self._left.open_file(key) as one, self._right.open_file(key) as other:
            while True:
                piece = one.read(BATCH_NBYTES)
                if piece != other.read(BATCH_NBYTES):
                    return False
                if not piece:
                    return True


_Between = Callable[[Elements, Elements], Change]


def _side(checkpoint: Checkpoint, key: str) -> Side | None:
    """What is there; None of a value that is encrypted."""
    if isinstance(checkpoint._access.contents.entries[key], SealedEntry):
        return None
    match checkpoint._entry(key):
        case TensorEntry(dtype, shape):
            nbytes = prod(shape) * DTYPES[dtype].itemsize
            return Side(kind="tensor", dtype=dtype, shape=shape, nbytes=nbytes)
        case BytesEntry(nbytes):
            return Side(kind="bytes", nbytes=nbytes)
        case ValueEntry(value):
            return Side(kind="value", value=value)


def _why(left: Side, right: Side) -> Why | None:
    """What differs, of what can be told without reading."""
    if left.kind != right.kind:
        return "kind"
    if left.shape != right.shape:
        return "shape"
    if left.dtype != right.dtype:
        return "dtype"
    return None if _spelled(left.value) == _spelled(right.value) else "value"


def _spelled(value: object) -> str:
    """As JSON: 1, 1.0 and true are three."""
    return json.dumps(value, sort_keys=True)


def _are_numbers(left: Side, right: Side) -> bool:
    return all(side.dtype is not None and has_numbers(side.dtype) for side in (left, right))
