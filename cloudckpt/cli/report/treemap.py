"""A checkpoint as nested rectangles, small ones folded into one.

Law: pure. However many entries there are, a tree has about `MOST_NODES` nodes, and a node that is opened has exactly
the bytes of its children.
"""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec import Struct

from cloudckpt.catalog.tree import MAX_DEPTH, Leaf, Module
from cloudckpt.cli.report.words import cut

MOST_NODES = 1500
"""Of a tree."""

_MOST_CHILDREN = 48
"""Of a node; the smallest are folded into one where there are more."""

View = Literal["module", "dtype", "shard"]


class Node(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A rectangle.

    Attributes:
        name: what tells it from others in the node around it.
        path: an entry's key, or what those of a module begin with.
        kind: ``module``, ``dtype``, ``shard``, ``more`` (small ones, folded), or that of an entry.
        nbytes: plain; the area.
        count: entries in it; in the view by shard, those that lie in the shard, some of them only in part.
        dtype: of a tensor.
        shape: of a tensor, all of it.
        children: none of an entry, and of what is not opened.
    """

    name: str
    path: str = ""
    kind: str
    nbytes: int
    count: int = 1
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    children: tuple["Node", ...] = ()


def views_of(leaves: Iterable[Leaf], most: int = MOST_NODES) -> dict[View, Node]:
    """The three ways to look at a checkpoint: each a tree of the same bytes."""
    pieces = [_Piece(leaf, leaf.nbytes) for leaf in leaves if leaf.nbytes]
    dtypes: dict[str, list[_Piece]] = {}
    shards: dict[str, list[_Piece]] = {}
    for piece in pieces:
        dtypes.setdefault(piece.leaf.dtype or "bytes", []).append(piece)
        for key, nbytes in piece.leaf.objects:
            if nbytes:
                shards.setdefault(key, []).append(_Piece(piece.leaf, nbytes))
    everything = _Growing(kind="module", pieces=pieces)
    return {
        "module": _tree(everything, _children(everything), most),
        "dtype": _tree(everything, _folded(_groups("dtype", dtypes), ""), most),
        "shard": _tree(everything, _folded(_groups("shard", shards), ""), most),
    }


def leaves_of(module: Module) -> Iterator[Leaf]:
    """All entries below a module."""
    yield from module.leaves
    for child in module.children:
        yield from leaves_of(child)


@dataclass(frozen=True, slots=True)
class _Piece:
    """An entry, or what of it lies in one shard."""

    leaf: Leaf
    nbytes: int


@dataclass(slots=True, kw_only=True)
class _Growing:
    """A node that may still be opened; the keys of its pieces begin alike for ``start`` characters."""

    kind: str
    pieces: Sequence[_Piece]
    name: str = ""
    path: str = ""
    start: int = 0
    depth: int = 0
    children: list["_Growing"] = field(default_factory=list)
    nbytes: int = 0

    def __post_init__(self) -> None:
        self.nbytes = sum(piece.nbytes for piece in self.pieces)

    def next_part(self, piece: _Piece) -> tuple[str, bool]:
        """What tells the piece from others here, and whether that is the rest of its key."""
        key = piece.leaf.key
        dot = key.find(".", self.start) if self.depth < MAX_DEPTH else -1
        return (key[self.start :], True) if dot < 0 else (key[self.start : dot], False)

    def frozen(self) -> Node:
        """The node, and all in it."""
        leaf = self.pieces[0].leaf if self.kind in {"tensor", "bytes"} else None
        return Node(
            name=cut(self.name),
            path=cut(self.path),
            kind=self.kind,
            nbytes=self.nbytes,
            count=len(self.pieces),
            dtype=leaf.dtype if leaf else None,
            shape=leaf.shape if leaf else None,
            children=tuple(child.frozen() for child in self.children),
        )


def _tree(root: _Growing, children: list[_Growing], most: int) -> Node:
    """Opens the largest node that can be opened, again and again, until there are enough."""
    root.children = children
    waiting = [(-child.nbytes, number, child) for number, child in enumerate(children)]
    heapq.heapify(waiting)
    count = len(children)
    while waiting and count < most:
        _, _, node = heapq.heappop(waiting)
        node.children = _children(node)
        for child in node.children:
            count += 1
            heapq.heappush(waiting, (-child.nbytes, count, child))
    return root.frozen()


def _children(node: _Growing) -> list[_Growing]:
    """What is in a node; nothing in an entry, nor in what was folded."""
    if node.kind not in {"module", "dtype", "shard"}:
        return []
    parts: dict[tuple[str, bool], list[_Piece]] = {}
    for piece in node.pieces:
        parts.setdefault(node.next_part(piece), []).append(piece)
    path = node.path + "." if node.path else ""
    children = []
    for (name, is_entry), pieces in parts.items():
        if is_entry:
            leaf = pieces[0].leaf
            children.append(_Growing(kind=leaf.kind, pieces=pieces, name=name, path=leaf.key))
        else:
            child = _Growing(kind="module", pieces=pieces, name=name, path=path + name)
            child.start, child.depth = node.start + len(name) + 1, node.depth + 1
            children.append(_lengthened(child))
    return _folded(children, node.path)


def _lengthened(node: _Growing) -> _Growing:
    """The same, called after all that its keys have in common: ``model.layers``."""
    while node.depth < MAX_DEPTH:
        part, is_entry = node.next_part(node.pieces[0])
        if is_entry or any(node.next_part(piece) != (part, False) for piece in node.pieces):
            break
        node.name, node.path = f"{node.name}.{part}", f"{node.path}.{part}"
        node.start, node.depth = node.start + len(part) + 1, node.depth + 1
    return node


def _groups(kind: str, groups: Mapping[str, Sequence[_Piece]]) -> list[_Growing]:
    return [_Growing(kind=kind, pieces=pieces, name=name) for name, pieces in groups.items()]


def _folded(nodes: list[_Growing], path: str) -> list[_Growing]:
    """The nodes, the largest first, and the smallest as one."""
    nodes = sorted(nodes, key=lambda node: -node.nbytes)
    if len(nodes) <= _MOST_CHILDREN:
        return nodes
    kept, rest = nodes[: _MOST_CHILDREN - 1], nodes[_MOST_CHILDREN - 1 :]
    pieces = [piece for node in rest for piece in node.pieces]
    return [*kept, _Growing(kind="more", pieces=pieces, name=f"{len(rest)} more", path=path)]
