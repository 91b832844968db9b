"""What is in one checkpoint, whoever wrote it.

Law: writes nothing. Only the elements of tensors that are asked for are fetched, and memory is bounded as
`catalog.elements` says.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cloudckpt.catalog.statistics import Report, statistics
from cloudckpt.catalog.tree import Module, tree_of
from cloudckpt.checkpoint import Checkpoint
from cloudckpt.checkpoint import open as open_checkpoint
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.regions import Locator
from cloudckpt.errors import EncryptionKeyError
from cloudckpt.selection import Patterns
from cloudckpt.store.url import StoreOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """How some shards are stored.

    Attributes:
        extensions: descriptors in the order they were applied; none where the bytes are plain.
        shard_count: of shards that are.
    """

    extensions: tuple[str, ...]
    shard_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDetails:
    """What a tensor's elements are like.

    Attributes:
        key: of the tensor.
        dtype, shape: see `Leaf`.
        is_magnitude: whether its elements are complex, and all that follows is told of their magnitudes.
        count: of elements.
        nan_count, inf_count, zero_count: those of them that are no numbers, infinite, zero.
        minimum, maximum, mean, std: of the finite ones; None where there are none, or it is too large for a float.
        bin_edges, bin_counts: a histogram of the finite ones; see `Histogram`.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    is_magnitude: bool
    count: int
    nan_count: int
    inf_count: int
    zero_count: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None
    bin_edges: tuple[float, ...]
    bin_counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What is in a checkpoint.

    Attributes:
        url: of it.
        format: what wrote it: ``cloudckpt``, ``dcp``, ``safetensors`` or ``torch.save``.
        step, created, writer, save_id, stored_nbytes: see `manifest.Summary`; None where the format does not say.
        metrics: what the step measured.
        metadata: the user's own; None where it is encrypted.
        chains: how its shards are stored, those most shards are first; none where the format has no shards of ours.
        tree: its entries, of those that were asked for.
        tensors: those whose elements were asked for.
    """

    url: str
    format: str
    step: int | None
    created: datetime | None
    writer: str | None
    save_id: str | None
    stored_nbytes: int | None
    metrics: dict[str, float]
    metadata: dict[str, Any] | None
    chains: tuple[Chain, ...]
    tree: Module
    tensors: tuple[TensorDetails, ...]


def inspect(
    url: str,
    patterns: Patterns = "*",
    *,
    tensors: Sequence[str] = (),
    options: ReadOptions | None = None,
    store: StoreOptions | None = None,
    report: Report | None = None,
) -> Inspection:
    """Tells what is in a checkpoint, of any format that `cloudckpt.open` opens; opening it is all that it reads.

    Args:
        url: of the checkpoint.
        patterns: of keys, for the tree.
        tensors: keys of tensors to read, once each and piece by piece, and tell the elements of.
        options: how to read.
        store: how to reach the store.
        report: is told how far reading a tensor is.

    Raises:
        CheckpointError: as from `cloudckpt.open` and `statistics`.
    """
    with open_checkpoint(url, options=options, store=store) as checkpoint:
        summary = checkpoint.summary
        return Inspection(
            url=checkpoint.url,
            format=checkpoint.format,
            step=None if summary is None else summary.step,
            created=None if summary is None else summary.created,
            writer=None if summary is None else summary.writer,
            save_id=None if summary is None else summary.save_id,
            stored_nbytes=None if summary is None else summary.stored_nbytes,
            metrics=summary.metrics if summary else {},
            metadata=_metadata(checkpoint),
            chains=_chains(checkpoint),
            tree=tree_of(checkpoint, patterns),
            tensors=tuple(_details(checkpoint, key, report) for key in tensors),
        )


def _metadata(checkpoint: Checkpoint) -> dict[str, Any] | None:
    try:
        return checkpoint.metadata
    except EncryptionKeyError:
        return None


def _chains(checkpoint: Checkpoint) -> tuple[Chain, ...]:
    contents = checkpoint._access.contents
    if not isinstance(contents, Locator):
        return ()
    counts = Counter(shard.extensions for shard in contents.shards)
    return tuple(Chain(extensions=extensions, shard_count=count) for extensions, count in counts.most_common())


def _details(checkpoint: Checkpoint, key: str, report: Report | None) -> TensorDetails:
    found = statistics(checkpoint, key, report=report)
    entry = checkpoint._tensor_entry(key)
    return TensorDetails(
        key=key,
        dtype=entry.dtype,
        shape=entry.shape,
        is_magnitude=entry.dtype == "C64" or entry.dtype.startswith("complex"),
        count=found.count,
        nan_count=found.nan_count,
        inf_count=found.inf_count,
        zero_count=found.zero_count,
        minimum=found.minimum,
        maximum=found.maximum,
        mean=_finite(found.mean),
        std=_finite(found.std),
        bin_edges=found.histogram.edges,
        bin_counts=found.histogram.counts,
    )


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
