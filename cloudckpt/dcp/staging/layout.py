"""Where each tensor of a state dict lies in the one buffer that it is staged to, and by which copies it gets there.

Law: copies nothing. Equal facts, equal places.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from cloudckpt.ranges import strides_of

ALIGNMENT = 64
"""Bytes: a cache line, and more than any dtype asks for."""

_WIDEST = 16
"""Bytes of an element of the widest dtype."""

_SMALL = 64 << 10
"""Bytes of a tensor below which the call that copies it costs more than the copy (docs/design/0009-staging.md)."""

_Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What decides where tensors are put, but for how they share storages. Holds none of them."""

    pointers: list[int] = field(compare=False)
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    strides: dict[int, tuple[int, ...]]
    """Of those that are not contiguous."""
    flags: list[tuple[bool, bool]]
    """Whether conjugated, whether negated, of all tensors if one of them is either."""

    @classmethod
    def of(cls, tensors: _Tensors) -> Self:
        """Reads them, attribute by attribute: that is a third of the time of tensor by tensor."""
        kind = torch.Tensor
        in_order = list(map(kind.is_contiguous, tensors))
        conjugated, negated = list(map(kind.is_conj, tensors)), list(map(kind.is_neg, tensors))
        return cls(
            pointers=list(map(kind.data_ptr, tensors)),
            shapes=[t.shape for t in tensors],
            dtypes=[t.dtype for t in tensors],
            strides={} if all(in_order) else {i: t.stride() for i, t in enumerate(tensors) if not in_order[i]},
            flags=list(zip(conjugated, negated, strict=True)) if any(conjugated) or any(negated) else [],
        )


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a staged tensor lies: in a region of the buffer, which is a storage of its own."""

    start: int
    nbytes: int
    dtype: torch.dtype
    offset: int
    """Elements from the region's first byte."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """Small tensors of host memory that lie side by side: one call copies them all."""

    indices: tuple[int, ...]
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of all together: joined along the first axis, or scalars stacked."""
    is_stack: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteCopy:
    """The bytes of a tensor, or of several that overlap, from the first to the last, as they lie."""

    index: int
    """Of the tensor that begins there."""
    start: int
    nbytes: int
    is_host: bool

    def source(self, tensors: _Tensors) -> torch.Tensor:
        """The bytes, in the tensor's storage."""
        tensor = tensors[self.index]
        start = int(tensor.storage_offset()) * tensor.itemsize
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        return whole[start : start + self.nbytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where all tensors of a state dict lie, and which copies bring them there."""

    facts: Facts
    aliases: list[tuple[int, int, torch.device]]
    nbytes: int
    spots: list[Spot]
    """Of each tensor; equal ones share one."""
    gathers: list[Gather]
    bytes: list[ByteCopy]
    elements: list[int]
    """Tensors that are copied element for element."""

    @classmethod
    def of(cls, tensors: _Tensors, facts: Facts) -> Self:
        """Lays them out; views of one storage that overlap stay so, unless copies of each take fewer bytes."""
        builder = _Builder(tensors)
        firsts: dict[tuple[object, ...], int] = {}
        same: list[int] = []
        storages: defaultdict[int, list[_Extent]] = defaultdict(list)
        for i, tensor in enumerate(tensors):
            extent = _Extent.of(i, tensor)
            first = firsts.setdefault(extent.identity, i)
            same.append(first)
            if first == i:
                storages[tensor.untyped_storage()._cdata].append(extent)
        for extents in storages.values():
            for cluster in _clusters(extents):
                builder.add(cluster)
        builder.gather()
        return cls(
            facts=facts,
            aliases=_aliases(tensors),
            nbytes=builder.nbytes,
            spots=[builder.spots[i] for i in same],
            gathers=builder.gathers,
            bytes=builder.bytes,
            elements=builder.elements,
        )

    def suits(self, tensors: _Tensors, facts: Facts) -> bool:
        """Whether the same places and copies serve these tensors: where they lie may have changed."""
        if facts != self.facts:
            return False
        return facts.pointers == self.facts.pointers or _aliases(tensors) == self.aliases


def _aliases(tensors: _Tensors) -> list[tuple[int, int, torch.device]]:
    """For each tensor the first one of its storage, where in it it begins, and on which device."""
    firsts: dict[int, int] = {}
    return [
        (firsts.setdefault(t.untyped_storage()._cdata, i), int(t.storage_offset()), t.device)
        for i, t in enumerate(tensors)
    ]


def tensors_over(buffer: torch.Tensor, spots: Sequence[Spot]) -> list[torch.Tensor]:
    """The staged tensors: equal spots are one tensor, spots in one region share its storage, and no others.

    So a staged tensor that is pickled takes its own region along, not the whole buffer.
    """
    memory = buffer.numpy().data
    regions: dict[int, torch.UntypedStorage] = {}
    made: dict[int, torch.Tensor] = {}
    for spot in spots:
        if id(spot) in made:
            continue
        if not spot.nbytes:
            made[id(spot)] = torch.empty(spot.shape, dtype=spot.dtype, device="cpu")
            continue
        if spot.start not in regions:
            region = torch.frombuffer(memory[spot.start : spot.start + spot.nbytes], dtype=torch.uint8)
            regions[spot.start] = region.untyped_storage()
        blank = torch.empty(0, dtype=spot.dtype, device="cpu")
        made[id(spot)] = view_of(blank, regions[spot.start], spot.offset, spot.shape, spot.stride)
    return [made[id(spot)] for spot in spots]


def view_of(
    blank: torch.Tensor,
    storage: torch.UntypedStorage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> torch.Tensor:
    """``blank`` over a storage; ``offset`` and ``stride`` in elements."""
    return blank.set_(storage, offset, shape, stride)


@dataclass(frozen=True, slots=True)
class _Extent:
    """The bytes of its storage that a tensor lies in, half-open."""

    start: int
    stop: int
    index: int
    nbytes: int
    """Of its elements, each counted once for each place in the tensor."""
    is_flagged: bool
    identity: tuple[object, ...]
    """Tensors with an equal one are one and the same."""

    @classmethod
    def of(cls, index: int, tensor: torch.Tensor) -> Self:
        size, stride = tensor.itemsize, tensor.stride()
        start = int(tensor.storage_offset()) * size
        span = 0
        if tensor.numel():
            span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, stride, strict=True))
        flags = (tensor.is_conj(), tensor.is_neg())
        storage = tensor.untyped_storage()._cdata
        identity = (storage, start, tensor.dtype, tensor.shape, stride, flags)
        return cls(start, start + span * size, index, tensor.numel() * size, any(flags), identity)


def _clusters(extents: list[_Extent]) -> Iterator[list[_Extent]]:
    """Those that overlap, together."""
    cluster: list[_Extent] = []
    stop = 0
    for extent in sorted(extents, key=lambda e: (e.start, e.stop)):
        if cluster and extent.start >= stop:
            yield cluster
            cluster = []
        cluster.append(extent)
        stop = max(stop, extent.stop)
    yield cluster


class _Builder:
    """A layout in the making."""

    def __init__(self, tensors: _Tensors) -> None:
        self._tensors = tensors
        self._groups: defaultdict[tuple[object, ...], list[_Extent]] = defaultdict(list)
        self.nbytes = 0
        self.spots: dict[int, Spot] = {}
        self.gathers: list[Gather] = []
        self.bytes: list[ByteCopy] = []
        self.elements: list[int] = []

    def add(self, cluster: list[_Extent]) -> None:
        """Places tensors of one storage that overlap, or a single one."""
        start, stop = cluster[0].start, max(e.stop for e in cluster)
        is_flagged = any(e.is_flagged for e in cluster)
        if len(cluster) == 1 and not is_flagged and self._tensors[cluster[0].index].is_contiguous():
            self._place(cluster[0])
        elif stop - start <= sum(e.nbytes for e in cluster) and not is_flagged:
            self._place_bytes(cluster)
        else:
            for extent in cluster:
                self._place_elements(extent.index)

    def gather(self) -> None:
        """Places the small tensors, when all are known."""
        for extents in self._groups.values():
            if len(extents) == 1:
                self._place_bytes(extents)
                continue
            indices = tuple(e.index for e in extents)
            first = self._tensors[indices[0]]
            is_stack = first.dim() == 0
            rows = len(indices) if is_stack else sum(self._tensors[i].shape[0] for i in indices)
            at = start = self._room(sum(e.nbytes for e in extents))
            for extent in extents:
                self.spots[extent.index] = _in_order(at, self._tensors[extent.index])
                at += extent.nbytes
            shape = (rows, *first.shape[1:])
            one = Gather(indices=indices, start=start, dtype=first.dtype, shape=shape, is_stack=is_stack)
            self.gathers.append(one)

    def _place(self, extent: _Extent) -> None:
        tensor = self._tensors[extent.index]
        if not extent.nbytes:
            self.spots[extent.index] = _in_order(self.nbytes, tensor)
        elif tensor.is_cpu and extent.nbytes <= _SMALL:
            self._groups[(tensor.dtype, tensor.dim() == 0, *tensor.shape[1:])].append(extent)
        else:
            self._place_bytes([extent])

    def _place_elements(self, index: int) -> None:
        tensor = self._tensors[index]
        self.spots[index] = _in_order(self._room(tensor.numel() * tensor.itemsize), tensor)
        self.elements.append(index)

    def _place_bytes(self, cluster: list[_Extent]) -> None:
        start, stop = cluster[0].start, max(e.stop for e in cluster)
        pad = start % _WIDEST  # so that every element keeps its alignment
        at = self._room(pad + stop - start)
        for extent in cluster:
            tensor = self._tensors[extent.index]
            offset = (pad + extent.start - start) // tensor.itemsize
            shape, stride = tuple(tensor.shape), tensor.stride()
            self.spots[extent.index] = Spot(at, pad + stop - start, tensor.dtype, offset, shape, stride)
        first = cluster[0].index
        is_host = self._tensors[first].is_cpu
        self.bytes.append(ByteCopy(index=first, start=at + pad, nbytes=stop - start, is_host=is_host))

    def _room(self, nbytes: int) -> int:
        start = self.nbytes
        self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return start


def _in_order(start: int, tensor: torch.Tensor) -> Spot:
    nbytes = tensor.numel() * tensor.itemsize
    return Spot(start, nbytes, tensor.dtype, 0, tuple(tensor.shape), strides_of(tensor.shape, 1))
