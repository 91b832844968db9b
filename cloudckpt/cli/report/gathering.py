"""What a page tells of a checkpoint, gathered.

Law: sync; reads manifests and traces, and no shard. Whatever the checkpoint's size, what is gathered is a few MB.
"""

import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

from cloudckpt.catalog.traces import KINDS, Traces, read_traces
from cloudckpt.catalog.tree import Leaf, tree_of
from cloudckpt.checkpoint import Checkpoint
from cloudckpt.checkpoint import open as open_checkpoint
from cloudckpt.cli.report.changes import Changes, changes_since, step_before
from cloudckpt.cli.report.timeline import Timeline, timeline_of
from cloudckpt.cli.report.treemap import Node, View, leaves_of, views_of
from cloudckpt.cli.report.words import cut
from cloudckpt.engine.regions import Locator
from cloudckpt.errors import EncryptionKeyError, StoreError
from cloudckpt.manifest import Summary

MOST_ROWS = 100
"""Of a table."""

_MOST_METADATA = 20_000
"""Characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The checkpoint in numbers; ``dtypes`` has the plain bytes of each, the most first."""

    entry_count: int
    tensor_count: int
    parameter_count: int
    nbytes: int
    chunk_count: int
    object_count: int
    dtypes: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRow:
    """An object that entries lie in.

    Attributes:
        key: relative to the checkpoint's URL.
        nbytes: plain bytes of what lies in it.
        size: of the object; None where the format does not say.
        extensions: that its bytes went through.
    """

    key: str
    nbytes: int
    size: int | None
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRow:
    """A tensor."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    parameter_count: int
    nbytes: int
    chunk_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that a page shows.

    Attributes:
        url: of the checkpoint.
        made: when this was gathered.
        made_by: what gathered it.
        format: what wrote the checkpoint.
        summary: None where the format has none.
        metadata: the user's own, as JSON, cut if long; None where it is encrypted.
        totals: of all entries.
        extensions: of any shard.
        shards: the largest.
        tensors: the largest.
        views: the checkpoint as nested rectangles.
        timelines: of saving and of loading, as far as there are traces; None where nobody said where they lie.
        changes: since another checkpoint; None where there is none.
        notes: what was left out, and why.
    """

    url: str
    made: datetime
    made_by: str
    format: str
    summary: Summary | None
    metadata: str | None
    totals: Totals
    extensions: tuple[str, ...]
    shards: tuple[ShardRow, ...]
    tensors: tuple[TensorRow, ...]
    views: dict[View, Node]
    timelines: tuple[Timeline, ...] | None
    changes: Changes | None
    notes: tuple[str, ...]


def look(url: str, *, since: str | None = None, place: str | None = None) -> tuple[Report, Traces | None]:
    """Reads what a page shows.

    Args:
        url: of the checkpoint.
        since: of the one that it is compared with; None for the step before, if there is one.
        place: where traces lie, if anybody left some.

    Raises:
        As `cloudckpt.open` and `read_traces`.
    """
    with open_checkpoint(url) as checkpoint:
        summary = checkpoint.summary
        traces = None
        if place is not None:
            traces = read_traces(place, checkpoint.url, save_id=summary.save_id if summary else None)
        notes = list(traces.problems) if traces is not None else []
        before = open_checkpoint(since) if since is not None else _before(checkpoint.url, notes)
        return _report(checkpoint, before, traces, notes), traces


def _before(url: str, notes: list[str]) -> Checkpoint | None:
    try:
        return step_before(url)
    except StoreError as e:
        notes.append(f"what changed since the step before, which cannot be looked for: {e}")
        return None


def _report(checkpoint: Checkpoint, before: Checkpoint | None, traces: Traces | None, notes: list[str]) -> Report:
    tree = tree_of(checkpoint)
    leaves = {leaf.key: leaf for leaf in leaves_of(tree)}
    shards = _shards(checkpoint, leaves.values())
    timelines = None
    if traces is not None:
        timelines = tuple(line for kind in KINDS if (line := timeline_of(traces.of(kind))) is not None)
    return Report(
        url=checkpoint.url,
        made=datetime.now(UTC),
        made_by=f"cloudckpt {version('cloudckpt')}",
        format=checkpoint.format,
        summary=checkpoint.summary,
        metadata=_metadata(checkpoint),
        totals=Totals(
            entry_count=tree.entry_count,
            tensor_count=tree.tensor_count,
            parameter_count=tree.parameter_count,
            nbytes=tree.nbytes,
            chunk_count=tree.chunk_count,
            object_count=len(shards),
            dtypes=dict(tree.dtypes),
        ),
        extensions=tuple(dict.fromkeys(name for shard in shards for name in shard.extensions)),
        shards=tuple(heapq.nlargest(MOST_ROWS, shards, key=lambda shard: shard.nbytes)),
        tensors=tuple(map(_tensor, _largest(leaves.values()))),
        views=views_of(leaves.values()),
        timelines=timelines,
        changes=changes_since(before, checkpoint, leaves) if before is not None else None,
        notes=tuple(notes),
    )


def _largest(leaves: Iterable[Leaf]) -> list[Leaf]:
    tensors = (leaf for leaf in leaves if leaf.kind == "tensor")
    return heapq.nlargest(MOST_ROWS, tensors, key=lambda leaf: leaf.nbytes)


def _tensor(leaf: Leaf) -> TensorRow:
    return TensorRow(
        key=cut(leaf.key),
        dtype=leaf.dtype or "",
        shape=leaf.shape or (),
        parameter_count=leaf.parameter_count,
        nbytes=leaf.nbytes,
        chunk_count=leaf.chunk_count,
    )


def _shards(checkpoint: Checkpoint, leaves: Iterable[Leaf]) -> list[ShardRow]:
    contents = checkpoint._access.contents
    known = {shard.key: shard for shard in contents.shards} if isinstance(contents, Locator) else {}
    nbytes = dict.fromkeys(known, 0)
    for leaf in leaves:
        for key, count in leaf.objects:
            nbytes[key] = nbytes.get(key, 0) + count
    return [
        ShardRow(
            key=cut(key),
            nbytes=count,
            size=known[key].size if key in known else None,
            extensions=known[key].extensions if key in known else (),
        )
        for key, count in nbytes.items()
    ]


def _metadata(checkpoint: Checkpoint) -> str | None:
    try:
        return cut(json.dumps(checkpoint.metadata, indent=2, ensure_ascii=False), _MOST_METADATA)
    except EncryptionKeyError:
        return None
