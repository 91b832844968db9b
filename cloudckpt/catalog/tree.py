"""A checkpoint's entries as a tree of modules, by the dots in their keys.

Law: pure but for what `Contents.entry` checks. Nothing is fetched: all of it stands in what was read to open it.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from cloudckpt.checkpoint import Checkpoint
from cloudckpt.convert.items import ForeignContents
from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.contents import Contents
from cloudckpt.engine.regions import Locator
from cloudckpt.manifest import BytesEntry, Chunk, SealedEntry, TensorEntry, ValueEntry
from cloudckpt.selection import Patterns

MAX_DEPTH = 64
"""Of modules in modules; what more dots a key has stand in the name of its leaf."""

Kind = Literal["tensor", "bytes", "value", "sealed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """An entry.

    Attributes:
        name: its key without the path of its module.
        key: of the entry.
        kind: ``sealed`` is a plain value that is encrypted, of a checkpoint that was opened without keys.
        dtype: of a tensor, as `cloudckpt.dtypes.DTYPES` spells it; else None.
        shape: of a tensor; else None.
        nbytes: plain; 0 of a value.
        chunk_count: in how many pieces a tensor is stored; 1 of a byte string, 0 of a value.
        objects: the keys of the objects that it lies in, relative to the checkpoint's URL, each with how many of its
            plain bytes it holds.
    """

    name: str
    key: str
    kind: Kind
    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    nbytes: int = 0
    chunk_count: int = 0
    objects: tuple[tuple[str, int], ...] = ()

    @property
    def parameter_count(self) -> int:
        """Elements of a tensor; 0 of others."""
        return 0 if self.shape is None else prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """What the keys that begin alike have in common, up to a dot.

    Attributes:
        name: the last part of its path, or several where modules were `joined`; empty for the whole checkpoint.
        path: what its keys begin with, without the dot behind it; empty for the whole checkpoint.
        entry_count: of all entries below it.
        tensor_count: those of them that are tensors.
        parameter_count: elements of these tensors.
        nbytes: plain bytes of all entries below it.
        dtypes: plain bytes of its tensors by dtype, the most first.
        chunk_count: pieces that its entries are stored in.
        object_count: objects that these lie in.
        children: modules, in the order of their first keys.
        leaves: entries that lie in it directly, in their order.
    """

    name: str
    path: str
    entry_count: int
    tensor_count: int
    parameter_count: int
    nbytes: int
    dtypes: Mapping[str, int]
    chunk_count: int
    object_count: int
    children: tuple["Module", ...]
    leaves: tuple[Leaf, ...]


def tree_of(checkpoint: Checkpoint, patterns: Patterns = "*") -> Module:
    """The tree of an open checkpoint's entries: of those whose keys match.

    Raises:
        ManifestError: what is claimed of an entry cannot be.
    """
    contents = checkpoint._access.contents
    root = _Growing("", "", "")
    where = _object_of(contents)
    for key in checkpoint.match(patterns):
        *path, name = key.split(".", MAX_DEPTH)
        at = root
        for part in path:
            at = at.child(part)
        at.leaves.append(_leaf(contents, key, name, where))
    return root.grown()[0]


def joined(module: Module) -> Module:
    """The same, with each module that holds one module and nothing else made one with it: ``model.layers``."""
    return replace(module, children=tuple(map(_joined, module.children)))


def _joined(module: Module) -> Module:
    if len(module.children) == 1 and not module.leaves:
        only = _joined(module.children[0])
        return replace(only, name=f"{module.name}.{only.name}")
    return joined(module)


@dataclass(slots=True)
class _Growing:
    """A module that entries are still added to; ``prefix`` is what the paths of those below it begin with."""

    name: str
    path: str
    prefix: str
    children: dict[str, "_Growing"] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)

    def child(self, name: str) -> "_Growing":
        if name not in self.children:
            path = self.prefix + name
            self.children[name] = _Growing(name, path, f"{path}.")
        return self.children[name]

    def grown(self) -> tuple[Module, set[str]]:
        """The module, and the objects that its entries lie in."""
        children, objects = [], {key for leaf in self.leaves for key, _ in leaf.objects}
        for growing in self.children.values():
            child, its_objects = growing.grown()
            children.append(child)
            objects |= its_objects
        dtypes: Counter[str] = Counter()
        for leaf in self.leaves:
            if leaf.dtype is not None:
                dtypes[leaf.dtype] += leaf.nbytes
        for child in children:
            dtypes.update(child.dtypes)
        tensors = [leaf for leaf in self.leaves if leaf.kind == "tensor"]
        parts: list[Leaf | Module] = [*self.leaves, *children]
        module = Module(
            name=self.name,
            path=self.path,
            entry_count=len(self.leaves) + sum(child.entry_count for child in children),
            tensor_count=len(tensors) + sum(child.tensor_count for child in children),
            parameter_count=sum(part.parameter_count for part in parts),
            nbytes=sum(part.nbytes for part in parts),
            dtypes=dict(dtypes.most_common()),
            chunk_count=sum(part.chunk_count for part in parts),
            object_count=len(objects),
            children=tuple(children),
            leaves=tuple(self.leaves),
        )
        return module, objects


_Where = Callable[[Chunk | BytesEntry], str]


def _object_of(contents: Contents) -> _Where:
    """Tells the key of the object that an item lies in."""
    if isinstance(contents, ForeignContents):
        items = contents.items
        return lambda at: items[at.frame].key
    assert isinstance(contents, Locator)  # noqa: S101 - there are no others
    shards = contents.shards
    return lambda at: shards[at.shard].key


def _leaf(contents: Contents, key: str, name: str, where: _Where) -> Leaf:
    if isinstance(contents.entries[key], SealedEntry):
        return Leaf(name=name, key=key, kind="sealed")
    match contents.entry(key):
        case TensorEntry(dtype, shape, chunks):
            itemsize = DTYPES[dtype].itemsize
            objects: dict[str, int] = {}
            for chunk in chunks:
                at = where(chunk)
                objects[at] = objects.get(at, 0) + prod(chunk.sizes) * itemsize
            return Leaf(
                name=name,
                key=key,
                kind="tensor",
                dtype=dtype,
                shape=shape,
                nbytes=prod(shape) * itemsize,
                chunk_count=len(chunks),
                objects=tuple(objects.items()),
            )
        case BytesEntry() as entry:
            at = where(entry)
            return Leaf(
                name=name, key=key, kind="bytes", nbytes=entry.nbytes, chunk_count=1, objects=((at, entry.nbytes),)
            )
        case ValueEntry():
            return Leaf(name=name, key=key, kind="value")
