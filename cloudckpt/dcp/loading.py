"""What DCP's plan asks a rank to read, as reads of a checkpoint's contents, and back.

Law: translates; holds what the plan's items are received into until all of it has arrived.
"""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from cloudckpt.dcp.dtypes import dtype_of
from cloudckpt.dcp.pickles import prove_safe
from cloudckpt.dcp.tensors import TensorSink
from cloudckpt.engine.contents import Ask, Contents, Located
from cloudckpt.engine.memory import buffer_for
from cloudckpt.engine.read import ReadOptions, Wanted
from cloudckpt.engine.sinks import MemorySink
from cloudckpt.errors import DtypeMismatchError, MissingKeyError, ShapeMismatchError
from cloudckpt.manifest import BytesEntry, Chunk, TensorEntry, ValueEntry
from cloudckpt.ranges import Region


class Loading:
    """A load plan at work."""

    def __init__(
        self,
        plan: LoadPlan,
        planner: LoadPlanner,
        contents: Contents,
        keys: Mapping[str, str],
        options: ReadOptions,
    ) -> None:
        """Takes the plan.

        Args:
            plan: what DCP asks for.
            planner: knows the destinations.
            contents: what there is.
            keys: of the checkpoint, by the names that DCP knows its entries under.
            options: how to read.
        """
        self._items = plan.items
        self._keys = keys
        self._planner = planner
        self._contents = contents
        self._options = options
        self._tensors: list[tuple[ReadItem, torch.Tensor]] = []
        self._strings: list[tuple[ReadItem, memoryview]] = []
        self._values: list[tuple[ReadItem, Any]] = []

    def asks(self) -> Iterator[Ask]:
        """For all that is to be read."""
        for item in self._items:
            key = self._keys[item.storage_index.fqn]
            entry = self._contents.entry(key)
            if isinstance(entry, TensorEntry):
                yield Ask(key, _find_chunk(entry, item), _region(item))
            elif isinstance(entry, BytesEntry):
                yield Ask(key, entry, Region((0,), (entry.nbytes,)))

    def build(self, located: Located) -> list[Wanted]:
        """Makes the reads.

        Raises:
            DtypeMismatchError, ShapeMismatchError, MissingKeyError: a destination does not fit.
            TooLargeError: a byte string does not fit into memory.
        """
        self._tensors, self._strings, self._values = [], [], []
        found = []
        for item in self._items:
            key = self._keys[item.storage_index.fqn]
            if item.type == LoadItemType.TENSOR:
                wanted = self._tensor(item, key, located)
            else:
                wanted = self._string(item, key, located)
            found.append(wanted)
        return [wanted for wanted in found if wanted is not None]

    def commit(self) -> None:
        """Hands to the planner what has arrived.

        Raises:
            UnsafePickleError: a bytes item would load a class; no bytes item is handed over.
        """
        if not self._options.unsafe_pickle:
            for item, data in self._strings:
                prove_safe(data, item.storage_index.fqn)
        for item, tensor in self._tensors:
            torch.autograd.graph.increment_version(tensor)  # its memory was written behind autograd's back
            self._planner.commit_tensor(item, tensor)
        for item, data in self._strings:
            self._planner.load_bytes(item, io.BytesIO(data))
        for item, value in self._values:
            _place(self._planner, item, value)

    def _tensor(self, item: ReadItem, key: str, located: Located) -> Wanted | None:
        entry = self._contents.entry(key)
        if not isinstance(entry, TensorEntry):
            msg = f"{key!r} is not a tensor in this checkpoint"
            raise ShapeMismatchError(msg)
        chunk, region = _find_chunk(entry, item), _region(item)
        resolved = self._planner.resolve_tensor(item)
        stored = dtype_of(entry.dtype)
        if tuple(resolved.shape) != region.sizes or not region.is_inside(chunk.sizes):
            msg = (
                f"{key!r}: a destination of {tuple(resolved.shape)} cannot take {region} of a chunk of {chunk.sizes}"
            )
            raise ShapeMismatchError(msg)
        if resolved.dtype != stored and not self._options.cast:
            msg = f"{key!r} is stored as {stored}, the destination is {resolved.dtype}, and cast=False"
            raise DtypeMismatchError(msg)
        self._tensors.append((item, resolved))
        if not region.numel:
            return None
        sink = TensorSink(resolved, stored, chunk.sizes, region)
        read = located.read_chunk(key, entry, chunk, region, is_direct=sink.is_direct)
        return Wanted(repr(key), read, sink)

    def _string(self, item: ReadItem, key: str, located: Located) -> Wanted | None:
        entry = self._contents.entry(key)
        match entry:
            case BytesEntry():
                data = buffer_for(repr(key), entry.nbytes)
                self._strings.append((item, data))
                read = located.read_bytes(key, entry, Region((0,), (entry.nbytes,)))
                return Wanted(repr(key), read, MemorySink(data))
            case ValueEntry():
                self._values.append((item, entry.value))
                return None
            case _:
                msg = f"{key!r} is a tensor in this checkpoint, and the state dict has none to load it into"
                raise ShapeMismatchError(msg)


def _place(planner: LoadPlanner, item: ReadItem, value: Any) -> None:
    """Puts a plain value where torch's planner would put one that it unpickled; other planners are given bytes."""
    if not isinstance(planner, DefaultLoadPlanner) or type(planner).load_bytes is not DefaultLoadPlanner.load_bytes:
        saved = io.BytesIO()
        torch.save(value, saved)
        saved.seek(0)
        planner.load_bytes(item, saved)
    elif planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[item.dest_index.fqn], value)
    else:
        planner.state_dict[item.dest_index.fqn] = value


def _region(item: ReadItem) -> Region:
    return Region(tuple(item.storage_offsets), tuple(item.lengths))


def _find_chunk(entry: TensorEntry, item: ReadItem) -> Chunk:
    index = item.storage_index
    offsets = tuple(index.offset) if index.offset is not None else (0,) * len(entry.shape)
    hint = index.index
    if hint is not None and hint < len(entry.chunks) and entry.chunks[hint].offsets == offsets:
        return entry.chunks[hint]
    for chunk in entry.chunks:
        if chunk.offsets == offsets:
            return chunk
    msg = f"{index.fqn!r} has no chunk at {offsets} in this checkpoint"
    raise MissingKeyError(msg)
