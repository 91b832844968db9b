"""Host memory for one staged state dict.

Law: knows no containers; memory is taken in one piece, and given back in one.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter

import numpy as np
import torch
from torch.cuda import _pin_memory_utils as pinning
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from cloudckpt.dcp.staging.layout import Facts, Layout, tensors_over, view_of
from cloudckpt.dcp.staging.move import Mover
from cloudckpt.ranges import strides_of


class HostBuffer:
    """One piece of memory that tensors are copied to, again and again."""

    def __init__(self, mover: Mover, *, share: bool, pin: bool, threads: int | None) -> None:
        """Takes no memory yet.

        Args:
            mover: moves what is in host memory.
            share: take memory that other processes can map.
            pin: pin it where a tensor comes from a CUDA device.
            threads: that copy what is in host memory; None for as many as torch uses.
        """
        self._mover = mover
        self._share = share
        self._pin = pin
        self._threads = threads
        self._is_pinned = False
        self._sides: dict[torch.device, torch.cuda.Stream] = {}
        self.memory: torch.Tensor | None = None
        self.layout: Layout | None = None
        self.leaves: list[torch.Tensor] = []
        self._specs: dict[int, DTensorSpec] = {}
        self._tensors: list[torch.Tensor] = []
        self._joined: list[torch.Tensor] = []

    @property
    def nbytes(self) -> int:
        """What is held."""
        return 0 if self.memory is None else self.memory.numel()

    def fill(
        self, tensors: Sequence[torch.Tensor], specs: Mapping[int, DTensorSpec]
    ) -> tuple[list[torch.Tensor], list[torch.cuda.Event]]:
        """Copies them, over what was copied before.

        Args:
            tensors: plain, strided, with memory.
            specs: of those that a DTensor is to be made over, by index.

        Returns:
            For each its copy, and the events after which the copies are whole; what lies in host memory is
            copied on return. Work that is queued later on the current streams waits for the copies.
        """
        facts = Facts.of(tensors)
        layout = self.layout
        if layout is None or not layout.suits(tensors, facts):
            layout = self._lay_out(tensors, facts)
        elif layout.facts.pointers != facts.pointers:
            layout = self.layout = replace(layout, facts=facts)
        memory = self.memory
        assert memory is not None  # noqa: S101 - `_lay_out` took it
        for gather, out in zip(layout.gathers, self._joined, strict=True):
            join = torch.stack if gather.is_stack else torch.cat
            join(itemgetter(*gather.indices)(tensors), out=out)
        pairs = [(self._tensors[i], tensors[i]) for i in layout.elements]
        moves = []
        for each in layout.bytes:
            if each.is_host:
                moves.append((memory.data_ptr() + each.start, facts.pointers[each.index], each.nbytes))
            else:
                pairs.append((memory[each.start : each.start + each.nbytes], each.source(tensors)))
        events = self._copy(pairs)
        try:
            self._mover.move(moves, threads=self._threads or torch.get_num_threads())
        except BaseException:
            wait_for(events)  # nothing may be written to memory that may be given back
            raise
        if specs != self._specs:
            self.leaves, self._specs = over_specs(self._tensors, specs), dict(specs)
        return self.leaves, events

    def free(self) -> None:
        """Gives the memory back, as soon as no staged tensor is held by others either."""
        self.memory = self.layout = None
        self._tensors, self._joined, self.leaves, self._specs = [], [], [], {}

    def _lay_out(self, tensors: Sequence[torch.Tensor], facts: Facts) -> Layout:
        layout = Layout.of(tensors, facts)
        pin = self._pin and any(t.is_cuda for t in tensors)
        held = self.nbytes
        if self.memory is None or not layout.nbytes <= held <= 2 * layout.nbytes or pin != self._is_pinned:
            self.free()  # before more is taken
            self.memory, self._is_pinned = _take(layout.nbytes, share=self._share, pin=pin), pin
        memory = self.memory
        assert memory is not None  # noqa: S101 - it was just taken
        self.layout = layout
        self._tensors = self.leaves = tensors_over(memory, layout.spots)
        self._specs = {}
        self._joined = []
        for gather in layout.gathers:
            joined = torch.empty(0, dtype=gather.dtype, device="cpu")
            offset = gather.start // gather.dtype.itemsize
            stride = strides_of(gather.shape, 1)
            self._joined.append(view_of(joined, memory.untyped_storage(), offset, gather.shape, stride))
        return layout

    def _copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.cuda.Event]:
        by_device: defaultdict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for out, source in pairs:
            by_device[source.device].append((out, source))
        events: list[torch.cuda.Event] = []
        try:
            for device, those in by_device.items():
                if device.type == "cuda":
                    events.append(self._copy_on_side(device, those))
                else:
                    torch._foreach_copy_([out for out, _ in those], [source for _, source in those])
        except BaseException:
            wait_for(events)
            raise
        return events

    def _copy_on_side(self, device: torch.device, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event:
        """Queues the copies behind the caller's work, and the caller's later work behind the copies."""
        if device not in self._sides:
            self._sides[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side, callers = self._sides[device], torch.cuda.current_stream(device)
        side.wait_stream(callers)
        try:
            with torch.cuda.stream(side):
                for out, source in pairs:
                    out.copy_(source, non_blocking=True)
        except BaseException:
            side.synchronize()
            raise
        done: torch.cuda.Event = side.record_event()
        callers.wait_event(done)
        return done


def over_specs(tensors: Sequence[torch.Tensor], specs: Mapping[int, DTensorSpec]) -> list[torch.Tensor]:
    """The tensors, with DTensors over those that have a spec; `from_local` would move them to the mesh's device."""
    return [
        DTensor(t, specs[i], requires_grad=False) if i in specs else t  # type: ignore[no-untyped-call]
        for i, t in enumerate(tensors)
    ]


def wait_for(events: Iterable[torch.cuda.Event]) -> None:
    """Waits until all have happened."""
    for event in events:
        event.synchronize()


def _take(nbytes: int, *, share: bool, pin: bool) -> torch.Tensor:
    """New memory as bytes.

    torch's own pinned memory comes in powers of two, and is never shared; this is registered as it is.
    """
    if share and nbytes:
        shared = torch.UntypedStorage._new_shared(nbytes, device="cpu")  # type: ignore[no-untyped-call]
        memory = torch.empty(0, dtype=torch.uint8, device="cpu").set_(shared)
    else:  # numpy asks the kernel for huge pages: copies to them take a tenth less time
        memory = torch.from_numpy(np.empty(nbytes, np.uint8))
    if pin and nbytes:
        pinning.pin_memory(memory.data_ptr(), nbytes)
        unpin = weakref.finalize(memory, pinning.unpin_memory, memory.data_ptr())
        unpin.atexit = False  # CUDA is gone by then
    return memory
