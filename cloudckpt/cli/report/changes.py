"""What changed since another checkpoint, as far as manifests tell.

Law: reads nothing but manifests. Entries that manifests cannot tell apart are counted as such, and not guessed at.
"""

import heapq
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cloudckpt.catalog.diff import Changed, Side, diff_open
from cloudckpt.catalog.steps import listed_steps, step_url
from cloudckpt.catalog.tree import Leaf, tree_of
from cloudckpt.checkpoint import Checkpoint
from cloudckpt.checkpoint import open as open_checkpoint
from cloudckpt.cli.report.treemap import leaves_of
from cloudckpt.cli.report.words import cut
from cloudckpt.errors import CheckpointNotFoundError, ManifestError, UnsupportedUrlError
from cloudckpt.layout import step_of
from cloudckpt.store.url import check_url

_MOST_ROWS = 100
_WHY = {"kind": "another kind", "shape": "another shape", "dtype": "another dtype", "value": "other bytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedRow:
    """An entry that is new, gone, or not as it was; ``nbytes`` are the new one's, or the gone one's."""

    key: str
    what: str
    before: str
    after: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What changed.

    Attributes:
        since: URL of the checkpoint that this one is compared with.
        created: when that was saved, where its format says.
        counts: entries: ``new``, ``gone``, ``other bytes`` and so on, ``the same``, and ``not known``.
        nbytes: of these, plain.
        rows: the largest that are not the same.
    """

    since: str
    created: datetime | None
    counts: dict[str, int]
    nbytes: dict[str, int]
    rows: tuple[ChangedRow, ...]


def step_before(url: str) -> Checkpoint | None:
    """The committed checkpoint of the step before, where the URL is that of a step and there is one.

    Raises:
        StoreError: the store refused.
    """
    root, _, name = url.rpartition("/")
    step = step_of(name)
    try:
        root = check_url(root)
    except UnsupportedUrlError:
        return None
    for earlier in listed_steps(root) if step is not None else ():
        if step is not None and earlier < step:
            try:
                return open_checkpoint(step_url(root, earlier))
            except (CheckpointNotFoundError, ManifestError):
                continue
    return None


def changes_since(before: Checkpoint, now: Checkpoint, leaves: Mapping[str, Leaf]) -> Changes:
    """Compares two open checkpoints.

    Args:
        before: the other one.
        now: the one that the report is of.
        leaves: of the latter, by key.

    Raises:
        ManifestError: what is claimed of an entry cannot be.
    """
    found = diff_open(before, now, values=False)
    rows = [_row_of(changed) for changed in found.changed]
    rows += [_lone("new", leaves[key]) for key in found.only_right]
    if found.only_left:
        gone = {leaf.key: leaf for leaf in leaves_of(tree_of(before))}
        rows += [_lone("gone", gone[key]) for key in found.only_left]
    counts, nbytes = Counter({"the same": found.equal_count}), Counter[str]()
    for row in rows:
        counts[row.what] += 1
        nbytes[row.what] += row.nbytes
    if found.unknown:
        counts["not known"] = len(found.unknown)
        nbytes["not known"] = sum(leaves[key].nbytes for key in found.unknown)
    other = sum(count for what, count in nbytes.items() if what != "gone")
    nbytes["the same"] = sum(leaf.nbytes for leaf in leaves.values()) - other
    return Changes(
        since=before.url,
        created=before.summary.created if before.summary else None,
        counts=dict(counts),
        nbytes=dict(nbytes),
        rows=tuple(heapq.nlargest(_MOST_ROWS, rows, key=lambda row: row.nbytes)),
    )


def _row_of(changed: Changed) -> ChangedRow:
    left, right = changed.left, changed.right
    is_value = changed.why == "value" and right.kind == "value"
    return ChangedRow(
        key=cut(changed.key),
        what="another value" if is_value else _WHY[changed.why],
        before=_shown(left.kind, left.dtype, left.shape, left),
        after=_shown(right.kind, right.dtype, right.shape, right),
        nbytes=right.nbytes,
    )


def _lone(what: str, leaf: Leaf) -> ChangedRow:
    shown = _shown(leaf.kind, leaf.dtype, leaf.shape, None)
    before, after = ("", shown) if what == "new" else (shown, "")
    return ChangedRow(key=cut(leaf.key), what=what, before=before, after=after, nbytes=leaf.nbytes)


def _shown(kind: str, dtype: str | None, shape: tuple[int, ...] | None, side: Side | None) -> str:
    if shape is not None:
        return f"{dtype} [{', '.join(map(str, shape))}]"
    return kind if side is None or side.kind != "value" else cut(json.dumps(side.value, ensure_ascii=False), 60)
