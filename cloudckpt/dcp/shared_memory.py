"""Memory that another process can map, and what lies in it.

Law: a piece of memory has one number for as long as it is there, and no other ever has that.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, count

import torch
from torch.multiprocessing import get_sharing_strategy

from cloudckpt.dcp.tensors import TensorSource, address_of
from cloudckpt.engine.framing import Item
from cloudckpt.engine.sources import Source
from cloudckpt.ranges import Range

_ALIGNMENT = 64

Place = tuple[int, int, int]
"""Where bytes lie: in which memory, by number, from where, to where. No bytes lie in none, whose number is 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """A piece of memory.

    Attributes:
        number: of the memory.
        descriptor: of the file that it is; belongs to the memory.
        start: its address here.
        stop: one past its last.
    """

    number: int
    descriptor: int
    start: int
    stop: int


class SharedMemories:
    """The pieces of memory that sources lie in, and one more for what lies elsewhere."""

    def __init__(self, on_gone: Callable[[int], None]) -> None:
        """Takes no memory yet.

        Args:
            on_gone: called with the number of a piece that is no more, by whichever thread let it go; must not wait.
        """
        self._on_gone = on_gone
        self._numbers = count(1)
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], SharedMemory]] = {}
        self._spare: torch.Tensor | None = None

    def place(
        self, items: Sequence[Item], sources: Sequence[Source], memories: Sequence[torch.Tensor]
    ) -> tuple[list[Place], list[SharedMemory]]:
        """Where the bytes of each source lie; copies what lies in none of ``memories``.

        What is copied stays until the next call.

        Returns:
            The places, and the pieces of memory that they are in.
        """
        by_descriptor = get_sharing_strategy() == "file_descriptor"  # type: ignore[no-untyped-call]
        mapped = [memory for memory in memories if by_descriptor and memory.untyped_storage().is_shared()]
        shared = [self._shared(memory) for memory in mapped]  # others it would move, under the tensors that lie there
        places: list[Place] = []
        others: list[int] = []
        for i, (item, source) in enumerate(zip(items, sources, strict=True)):
            place = _found(source, item.header.nbytes, shared)
            if place is None:
                others.append(i)
            places.append(place or (0, 0, 0))
        if others:
            spare, copies = self._copied([(sources[i], items[i].header.nbytes) for i in others])
            shared.append(spare)
            for i, place in zip(others, copies, strict=True):
                places[i] = place
        used = {number for number, _, _ in places}
        return places, [memory for memory in shared if memory.number in used]

    def clear(self) -> None:
        """Gives back what was taken."""
        self._spare = None

    def _shared(self, memory: torch.Tensor) -> SharedMemory:
        ref, known = self._known.get(id(memory), (None, None))
        if ref is not None and known is not None and ref() is memory:
            return known
        descriptor, nbytes = memory.untyped_storage()._share_fd_cpu_()
        start = memory.data_ptr()
        made = SharedMemory(number=next(self._numbers), descriptor=descriptor, start=start, stop=start + nbytes)
        self._known[id(memory)] = weakref.ref(memory), made
        weakref.finalize(memory, _gone, weakref.ref(self), id(memory), made.number).atexit = False
        return made

    def _copied(self, sources: Sequence[tuple[Source, int]]) -> tuple[SharedMemory, list[Place]]:
        """Copies whole sources of so many bytes each to the spare memory."""
        room = [
            -(-max(nbytes, s.scratch_nbytes(Range(0, nbytes))) // _ALIGNMENT) * _ALIGNMENT for s, nbytes in sources
        ]
        *starts, total = accumulate(room, initial=0)
        if self._spare is None or not total <= self._spare.numel() <= 2 * total:
            self._spare = None  # before more is taken
            taken = torch.UntypedStorage._new_using_fd_cpu(total)
            self._spare = torch.empty(0, dtype=torch.uint8, device="cpu").set_(taken)
        spare = self._shared(self._spare)
        memory = self._spare.numpy().data
        places: list[Place] = []
        for (source, nbytes), start in zip(sources, starts, strict=True):
            at = Range(0, nbytes)
            needed = source.scratch_nbytes(at)
            staged = source.stage(at, memory[start : start + needed])
            if not needed:
                memory[start : start + nbytes] = staged
            first = address_of(staged) - spare.start if needed else start
            places.append((spare.number, first, first + nbytes))
        return spare, places


def _found(source: Source, nbytes: int, shared: Sequence[SharedMemory]) -> Place | None:
    if not nbytes:
        return 0, 0, 0
    address = source.address if isinstance(source, TensorSource) else None
    if address is not None:
        for memory in shared:
            if memory.start <= address and address + nbytes <= memory.stop:
                start = address - memory.start
                return memory.number, start, start + nbytes
    return None


def _gone(memories: "weakref.ref[SharedMemories]", identity: int, number: int) -> None:
    there = memories()
    if there is not None:
        ref, known = there._known.get(identity, (None, None))
        if ref is not None and known is not None and known.number == number:
            del there._known[identity]
        there._on_gone(number)
