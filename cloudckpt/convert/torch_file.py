"""A single file of ``torch.save``.

Law: pure. Keys are those that DCP would give the same object: the path of a leaf, joined with dots.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloudckpt.convert import pickles
from cloudckpt.convert.items import Coded, ForeignContents, Item, Plain, elements_of, shifted, strided
from cloudckpt.convert.pickles import StoredTensor
from cloudckpt.convert.torch_zip import TorchZip
from cloudckpt.errors import ManifestError
from cloudckpt.manifest import Chunk, Entry, PlannerPath, TensorEntry, ValueEntry
from cloudckpt.ranges import Range

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

_MAX_LEAVES = 500_000
_MAX_DEPTH = 500
"""A pickle of a few bytes can describe more than there are atoms."""


@dataclass(frozen=True, slots=True)
class RecordTensor:
    """A tensor whose storage is a record of the archive."""

    key: str
    archive: TorchZip
    tensor: StoredTensor
    likeness: None = None

    @property
    def extent(self) -> Range:
        """See `Item.extent`: the record with its header."""
        return self.archive.extent(self._record)

    def probes(self) -> Sequence[Range]:
        """See `Item.probes`: the record's header."""
        return (self.archive.header(self._record),)

    def locate(self, probed: Sequence[memoryview]) -> Plain | Coded:
        """See `Item.locate`."""
        return strided(self.tensor, self.archive.payload(self._record, probed[0]), self.key)

    def decode(self, extent: memoryview) -> memoryview:
        """See `Item.decode`."""
        header = self.archive.header(self._record)
        found = self.locate([extent[: len(header)]])
        return elements_of(shifted(found, -self.extent.start), extent)

    @property
    def _record(self) -> str:
        return f"data/{self.tensor.record}"


def contents_of(key: str, archive: TorchZip, where: str) -> ForeignContents:
    """The contents of a file, from its directory and its pickle.

    Args:
        key: of the file.
        archive: with its pickle at hand.
        where: it lies, for errors.

    Raises:
        UnsafePickleError: the pickle names something else than tensors, containers and plain values.
        ManifestError, IntegrityError: it is not what ``torch.save`` writes.
    """
    archive.refuse_other_byte_order()
    root = pickles.load(archive.read("data.pkl"), pickles.TORCH_NAMES, where, is_of_torch_save=True)
    items: list[Item] = []
    entries: dict[str, Entry] = {}
    paths: dict[str, PlannerPath] = {}
    try:
        for path, leaf in _leaves(root):
            name = ".".join(map(str, path)) or "data"
            if name in entries:
                msg = f"{where} has two entries of the name {name!r}"
                raise ManifestError(msg)
            paths[name] = path
            entries[name] = ValueEntry(leaf)
            if isinstance(leaf, StoredTensor):
                item = RecordTensor(key, archive, leaf)
                at, shape = item.extent, leaf.shape
                chunk = Chunk((0,) * len(shape), shape, 0, at.start, at.stop, len(items))
                entries[name] = TensorEntry(leaf.dtype, shape, (chunk,))
                items.append(item)
            if len(entries) > _MAX_LEAVES:
                msg = f"{where} describes more than {_MAX_LEAVES} values"
                raise ManifestError(msg)
    except RecursionError as e:
        msg = f"{where} describes an object that holds itself, or is nested too deep"
        raise ManifestError(msg) from e
    return ForeignContents(format="torch.save", items=items, entries=entries, planner_paths=paths)


def _leaves(root: Any) -> Iterator[tuple[PlannerPath, Any]]:
    """As DCP flattens a state dict: a list is opened where it holds tensors or mappings."""
    is_open: dict[int, bool] = {}
    waiting: list[tuple[PlannerPath, Any]] = [((), list(root) if isinstance(root, tuple) else root)]
    while waiting:
        path, value = waiting.pop()
        if len(path) > _MAX_DEPTH:
            raise RecursionError
        if isinstance(value, Mapping):
            waiting += [((*path, str(key)), inner) for key, inner in reversed(list(value.items()))]
        elif isinstance(value, list) and _has_tensors(value, is_open):
            waiting += [((*path, i), value[i]) for i in reversed(range(len(value)))]
        else:
            yield path, value


def _has_tensors(values: list[Any], known: dict[int, bool]) -> bool:
    if id(values) not in known:
        known[id(values)] = False  # for a list that holds itself
        known[id(values)] = any(
            isinstance(value, StoredTensor | Mapping) or (isinstance(value, list) and _has_tensors(value, known))
            for value in values
        )
    return known[id(values)]
