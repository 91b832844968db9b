"""Checkpoints of torch's own DCP writers: a pickled ``.metadata``, and items as ``torch.save`` writes them.

Law: pure; torch's FileSystemWriter, its FsspecWriter and s3torchconnector's writer all come out the same.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from cloudckpt.convert import pickles
from cloudckpt.convert.items import Coded, ForeignContents, Item, Plain, PlainItem, elements_of, shifted, strided
from cloudckpt.convert.pickles import StoredTensor
from cloudckpt.convert.torch_zip import TorchZip
from cloudckpt.dtypes import DTYPES
from cloudckpt.engine.read import ReadOptions
from cloudckpt.errors import IntegrityError, ManifestError
from cloudckpt.extensions.base import StreamTransformExtension
from cloudckpt.extensions.registry import ExtensionRegistry
from cloudckpt.extensions.streams import read_at_most
from cloudckpt.manifest import BytesEntry, Chunk, Entry, PlannerPath, TensorEntry
from cloudckpt.ranges import Range

METADATA = ".metadata"
SUFFIX = ".distcp"

_PROBE_NBYTES = 64 << 10
"""Of an item's archive, at its beginning and at its end: what torch puts around the elements takes 1 to 2 KiB."""

_SLACK_NBYTES = 1 << 20
"""That an archive may have beside the elements of its tensor, when it was transformed and its size is not known."""

Undo = Callable[[memoryview, int], memoryview]
"""Restores a transformed item of at most so many bytes."""


def parse(data: bytes, where: str, options: ReadOptions) -> ForeignContents:
    """Reads ``.metadata``.

    Args:
        data: the whole object.
        where: it lies, for errors.
        options: ``registry`` knows the extensions that items may name.

    Raises:
        UnsafePickleError: it names a class or function that is none of DCP's.
        ManifestError: it is no metadata of DCP, or contradicts itself.
    """
    root = pickles.load(data, pickles.DCP_NAMES, where)
    try:
        return _contents(root, where, options)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as e:
        if isinstance(e, ManifestError):
            raise
        msg = f"{where} is not laid out as DCP's metadata: {type(e).__name__}: {e}"
        raise ManifestError(msg) from e


@dataclass(frozen=True, slots=True)
class _Info:
    key: str
    extent: Range
    descriptors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZippedTensor:
    """A chunk of a tensor in an archive of ``torch.save``, which may have been transformed as a whole."""

    key: str
    extent: Range
    dtype: str
    shape: tuple[int, ...]
    undo: Undo | None

    @property
    def likeness(self) -> object | None:
        """See `Item.likeness`: what torch puts around the elements depends on little else."""
        return None if self.undo is not None else (len(self.extent) - self._nbytes, self.dtype, len(self.shape))

    def probes(self) -> Sequence[Range]:
        """See `Item.probes`: both ends of the archive."""
        if self.undo is not None:
            return ()
        beside = len(self.extent) - self._nbytes
        if beside <= 0:
            msg = (
                f"{self._where} are fewer than its {self._nbytes} bytes of elements: they were compressed, or cut "
                "short, or the metadata is wrong"
            )
            raise IntegrityError(msg)
        nbytes = min(beside, _PROBE_NBYTES)
        start, stop = self.extent.start, self.extent.stop
        return Range(start, start + nbytes), Range(stop - nbytes, stop)

    def locate(self, probed: Sequence[memoryview]) -> Plain | Coded:
        """See `Item.locate`."""
        if self.undo is not None:
            return Coded(self.extent, self.decode)
        head, tail = probed
        nbytes = len(self.extent)
        return shifted(self._find(nbytes, [(0, head), (nbytes - len(tail), tail)]), self.extent.start)

    def decode(self, extent: memoryview) -> memoryview:
        """See `Item.decode`."""
        data = extent if self.undo is None else self.undo(extent, self._nbytes + _SLACK_NBYTES)
        return elements_of(self._find(len(data), [(0, data)]), data)

    @property
    def _nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def _where(self) -> str:
        return f"bytes {self.extent.start} to {self.extent.stop} of {self.key}"

    def _find(self, nbytes: int, pieces: Sequence[tuple[int, memoryview]]) -> Plain | Coded:
        archive = TorchZip(nbytes, pieces, self._where)
        archive.refuse_other_byte_order()
        tensor = pickles.load(archive.read("data.pkl"), pickles.TORCH_NAMES, self._where, is_of_torch_save=True)
        if not isinstance(tensor, StoredTensor) or (tensor.dtype, tensor.shape) != (self.dtype, self.shape):
            msg = f"{self._where} hold {tensor}, where the metadata has {self.dtype} of shape {self.shape}"
            raise IntegrityError(msg)
        return strided(tensor, archive.payload(f"data/{tensor.record}"), self._where)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformedBytes:
    """A byte string that was transformed as a whole."""

    key: str
    extent: Range
    undo: Undo
    limit: int
    likeness: None = None

    def probes(self) -> Sequence[Range]:
        """See `Item.probes`: how long it is shows when it is restored."""
        return (self.extent,)

    def locate(self, probed: Sequence[memoryview]) -> Coded:
        """See `Item.locate`."""
        return Coded(self.extent, self.decode, len(self.decode(probed[0])))

    def decode(self, extent: memoryview) -> memoryview:
        """See `Item.decode`."""
        return self.undo(extent, self.limit)


def _contents(root: Any, where: str, options: ReadOptions) -> ForeignContents:
    if not isinstance(root, pickles.DcpMetadata):
        msg = f"{where} holds {type(root).__name__}, not DCP's Metadata"
        raise ManifestError(msg)
    infos = {_place(index): _info(stored, where) for index, stored in root.state["storage_data"].items()}
    registry = options.registry or ExtensionRegistry()
    entries: dict[str, Entry] = {}
    items: list[Item] = []
    for key, meta in root.state["state_dict_metadata"].items():
        if isinstance(meta, pickles.BytesStorageMetadata):
            info = _lookup(infos, (key, None), where)
            entries[key] = BytesEntry(len(info.extent), 0, info.extent.start, info.extent.stop, len(items))
            items.append(_bytes_item(info, registry, options))
            continue
        dtype = meta.state["properties"].state[0].name
        shape = _sizes(meta.state["size"])
        chunks = []
        for chunk in meta.state["chunks"]:
            offsets, sizes = _sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])
            if len(offsets) != len(shape) or any(o + n > s for o, n, s in zip(offsets, sizes, shape, strict=True)):
                msg = f"{where}: {key!r} of shape {shape} has a chunk of {sizes} at {offsets}"
                raise ManifestError(msg)
            info = _lookup(infos, (key, offsets), where)
            chunks.append(Chunk(offsets, sizes, 0, info.extent.start, info.extent.stop, len(items)))
            undo = _undo(info.descriptors, registry)
            items.append(ZippedTensor(key=info.key, extent=info.extent, dtype=dtype, shape=sizes, undo=undo))
        entries[key] = TensorEntry(dtype, shape, tuple(chunks))
    return ForeignContents(
        format="dcp", items=items, entries=entries, planner_paths=_planner_paths(root.state.get("planner_data"))
    )


def _place(index: Any) -> tuple[str, tuple[int, ...] | None]:
    offset = index.state.get("offset")
    return index.state["fqn"], None if offset is None else _sizes(offset)


def _info(stored: Any, where: str) -> _Info:
    state = stored.state
    key, start, length = state["relative_path"], state["offset"], state["length"]
    segments = key.split("/")
    if not key or key.startswith("/") or "\\" in key or {"", ".", ".."} & set(segments):
        msg = f"{where} names a file {key!r}, which lies elsewhere"
        raise ManifestError(msg)
    if type(start) is not int or type(length) is not int or start < 0 or length < 0:
        msg = f"{where} names bytes {start!r} and {length!r} on of {key}"
        raise ManifestError(msg)
    return _Info(key, Range(start, start + length), tuple(state.get("transform_descriptors") or ()))


def _lookup(
    infos: dict[tuple[str, tuple[int, ...] | None], _Info], place: tuple[str, tuple[int, ...] | None], where: str
) -> _Info:
    if place not in infos:
        key, offsets = place
        msg = f"{where} does not say where {key!r}{f' at {offsets}' if offsets is not None else ''} is stored"
        raise ManifestError(msg)
    return infos[place]


def _sizes(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, tuple) or any(type(n) is not int or n < 0 for n in numbers):
        msg = f"{numbers!r} are no sizes"
        raise ManifestError(msg)
    return numbers


def _bytes_item(info: _Info, registry: ExtensionRegistry, options: ReadOptions) -> Item:
    undo = _undo(info.descriptors, registry)
    if undo is None:
        return PlainItem(info.key, info.extent)
    return TransformedBytes(key=info.key, extent=info.extent, undo=undo, limit=options.max_inflight_nbytes)


def _undo(descriptors: tuple[str, ...], registry: ExtensionRegistry) -> Undo | None:
    """What restores items that went through extensions; they are looked up when an item is restored.

    torch 2.13 applies them from the last to the first, and notes their descriptors in that order.
    """
    if not descriptors:
        return None

    def undo(data: memoryview, limit: int) -> memoryview:
        stream: Any = io.BytesIO(data)
        for extension in reversed(registry.from_descriptor_list(descriptors)):
            if hasattr(extension, "transform_from"):
                streamed: StreamTransformExtension = extension  # type: ignore[assignment]
                stream = streamed.transform_from(stream)
        try:
            return memoryview(read_at_most(stream, limit))
        except MemoryError:
            raise
        except Exception as e:
            msg = f"{', '.join(descriptors)} cannot restore it: {e}"
            raise IntegrityError(msg) from e

    return undo


def _planner_paths(paths: Any) -> dict[str, PlannerPath] | None:
    if not isinstance(paths, dict):
        return None
    return {
        key: path
        for key, path in paths.items()
        if isinstance(path, tuple) and all(isinstance(part, str | int) for part in path)
    }
