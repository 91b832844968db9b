"""A state dict copied to host memory, so that training may go on while it is saved.

Law: a staged state dict does not change until it is released, and no memory is taken anew that one released can lend.
"""

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import TracebackType
from typing import Any, Self

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from cloudckpt.dcp.dtypes import name_of
from cloudckpt.dcp.staging.buffer import HostBuffer, over_specs, wait_for
from cloudckpt.dcp.staging.containers import path_to, rebuilt, tensors_in
from cloudckpt.dcp.staging.layout import Spot, tensors_over
from cloudckpt.dcp.staging.move import Mover
from cloudckpt.errors import UnstorableError, UsageError

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


class Stager:
    """Copies state dicts to host memory that is used again and again.

    The copy has the same dicts, lists and tuples, with tensors of host memory in the place of tensors (equal
    tensors are one, overlapping views of one storage stay so) and DTensors over them in the place of DTensors; their
    gradients and attributes do not come along. Everything else is deep-copied, on its device.

    Memory: as much as one state dict takes for each that is in use at one time. `stage` is for one thread at a
    time; what it returns may be released by any.
    """

    def __init__(self, *, leases: int = 1, share: bool = False, pin: bool = True, threads: int | None = None) -> None:
        """Takes no memory yet.

        Args:
            leases: staged state dicts that may be in use at a time.
            share: stage to shared memory, so that `Staged` can be sent to another process.
            pin: pin the memory where tensors come from a CUDA device: copies from there need it to be fast.
            threads: that copy what is in host memory; None for as many as torch uses (torchrun sets that to 1).

        Raises:
            UsageError: fewer than one lease or thread.
        """
        if leases < 1 or (threads is not None and threads < 1):
            msg = f"leases and threads must be at least 1, not {leases} and {threads}"
            raise UsageError(msg)
        self._leases = leases
        self._share = share
        self._pin = pin
        self._threads = threads
        self._mover = Mover()
        self._lock = threading.Lock()
        self._free: list[HostBuffer] = []
        self._used: set[HostBuffer] = set()
        self._is_closed = False

    @property
    def is_busy(self) -> bool:
        """Whether all leases are taken: `stage` would refuse."""
        with self._lock:
            return len(self._used) >= self._leases

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, in use or not."""
        with self._lock:
            return sum(buffer.nbytes for buffer in (*self._free, *self._used))

    @property
    def memories(self) -> list[torch.Tensor]:
        """The pieces of memory held, in use or not; with ``share``, those that staged tensors lie in."""
        with self._lock:
            held = [buffer.memory for buffer in (*self._free, *self._used)]
        return [memory for memory in held if memory is not None]

    def stage(self, state_dict: dict[str, Any]) -> "Staged":
        """Copies a state dict; on return it may change.

        What lies on a CUDA device is copied by a side stream: behind the work that the current stream had been given,
        and before the work that it is given from now on. Work on other streams must not change it before
        `Staged.wait` returns.

        Returns:
            The copy, to be released.

        Raises:
            UsageError: all leases are taken, or the stager is closed.
            UnstorableError: a value cannot be copied. No lease is taken.
        """
        buffer = self._take()
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                return Staged(_copied(state_dict, buffer), self)
        except BaseException:
            self._give(buffer)
            raise

    def close(self) -> None:
        """Gives all memory back: that of staged state dicts still in use when they are released."""
        with self._lock:
            self._is_closed = True
            self._free.clear()
        self._mover.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> HostBuffer:
        with self._lock:
            if self._is_closed:
                msg = "the stager is closed"
                raise UsageError(msg)
            if len(self._used) >= self._leases:
                msg = (
                    f"{self._leases} staged state dict(s) are still in use: release one before the next is staged, "
                    "or make the Stager with more leases (each takes the memory of a state dict)"
                )
                raise UsageError(msg)
            buffer = self._free.pop() if self._free else self._new_buffer()
            self._used.add(buffer)
            return buffer

    def _new_buffer(self) -> HostBuffer:
        return HostBuffer(self._mover, share=self._share, pin=self._pin, threads=self._threads)

    def _give(self, buffer: HostBuffer) -> None:
        with self._lock:
            self._used.discard(buffer)
            if not self._is_closed:
                self._free.append(buffer)


class Staged:
    """A staged state dict; a context manager that releases it.

    One in shared memory can be sent to another process (through a `multiprocessing` queue, pipe or argument), which
    sees the same memory: only what lies around the tensors is pickled. It must not be released here before the
    other process is done with it; released there, its memory is only unmapped.
    """

    def __init__(self, copied: "_Copied", stager: Stager | None = None) -> None:
        """Made by `Stager.stage`, and by `pickle` without a stager."""
        self._copied: _Copied | None = copied
        self._stager = stager
        self._lock = threading.Lock()

    @property
    def state_dict(self) -> dict[str, Any]:
        """The copy, whole (see `wait`); not to be changed, nor used after `release`.

        Raises:
            UsageError: it was released.
        """
        copied = self._unreleased()
        wait_for(copied.events)
        return copied.state_dict

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes; 0 once it is released."""
        copied = self._copied
        return 0 if copied is None else copied.buffer.nbytes

    def wait(self) -> None:
        """Waits until what lay on CUDA devices is copied.

        Raises:
            UsageError: it was released.
        """
        wait_for(self._unreleased().events)

    def release(self) -> None:
        """Lends the memory to the next state dict. May be called again."""
        with self._lock:
            copied, self._copied = self._copied, None
        if copied is not None:
            wait_for(copied.events)  # or they would write over the next one
            if self._stager is not None:
                self._stager._give(copied.buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __reduce__(self) -> tuple[Any, ...]:
        """For `multiprocessing`'s pickler, which passes the memory itself on.

        Raises:
            UsageError: it was released, or is not in shared memory.
        """
        copied = self._unreleased()
        wait_for(copied.events)
        return _received, _handed_over(copied)

    def _unreleased(self) -> "_Copied":
        if self._copied is None:
            msg = "the staged state dict was released"
            raise UsageError(msg)
        return self._copied


@dataclass(frozen=True, slots=True)
class _Copied:
    """A staged state dict, and what it lies in."""

    state_dict: dict[str, Any]
    buffer: HostBuffer
    events: list[torch.cuda.Event]


@dataclass(frozen=True, slots=True)
class _Place:
    """Stands for a tensor in a state dict on its way to another process."""

    index: int


def _copied(state_dict: dict[str, Any], buffer: HostBuffer) -> _Copied:
    leaves = tensors_in(state_dict)
    tensors, specs, others = _sorted_out(leaves)
    staged, events = buffer.fill(tensors, specs)
    try:
        places = dict(zip(map(id, leaves), staged, strict=True))
        for i in others:
            places.pop(id(leaves[i]), None)
        copied = rebuilt(state_dict, places, lambda value, memo: _copied_alone(value, memo, state_dict))
    except BaseException:
        wait_for(events)  # nothing may be written to memory that may be given back
        raise
    return _Copied(copied, buffer, events)


def _handed_over(copied: _Copied) -> tuple[Any, ...]:
    """What `_received` makes the same of, in another process."""
    memory, layout = copied.buffer.memory, copied.buffer.layout
    assert memory is not None  # noqa: S101 - it is in use
    assert layout is not None  # noqa: S101 - likewise
    if not memory.is_shared():  # type: ignore[no-untyped-call]
        msg = "only a state dict in shared memory can be sent to another process: make the Stager with share=True"
        raise UsageError(msg)
    places = {id(leaf): _Place(i) for i, leaf in enumerate(copied.buffer.leaves)}
    specs = {i: leaf._spec for i, leaf in enumerate(copied.buffer.leaves) if isinstance(leaf, DTensor)}
    return memory, layout.spots, specs, rebuilt(copied.state_dict, places, lambda value, _: value)


def _received(
    memory: torch.Tensor, spots: Sequence[Spot], specs: dict[int, DTensorSpec], skeleton: dict[str, Any]
) -> Staged:
    leaves = over_specs(tensors_over(memory, spots), specs)
    state_dict = rebuilt(skeleton, {}, lambda value, _: leaves[value.index] if type(value) is _Place else value)
    buffer = HostBuffer(Mover(), share=True, pin=False, threads=None)
    buffer.memory = memory
    return Staged(_Copied(state_dict, buffer, []))


def _sorted_out(leaves: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], dict[int, DTensorSpec], list[int]]:
    """A plain tensor with memory for each leaf, the specs of those that are DTensors, and which have no memory."""
    if set(map(type, leaves)) <= _PLAIN and _have_memory(leaves):
        return leaves, {}, []
    locals_: list[torch.Tensor] = []
    specs: dict[int, DTensorSpec] = {}
    others: list[int] = []
    for i, leaf in enumerate(leaves):
        tensor = leaf
        if type(leaf) is DTensor:
            specs[i] = leaf._spec
            tensor = leaf._local_tensor
        if isinstance(tensor, AsyncCollectiveTensor):
            tensor = tensor.wait()
        if type(tensor) not in _PLAIN or not _have_memory([tensor]):
            specs.pop(i, None)
            others.append(i)
            tensor = torch.empty(0)
        locals_.append(tensor)
    return locals_, specs, others


def _have_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all are plain arrays of elements in memory, of dtypes that can be stored."""
    layouts, dtypes = set(map(attrgetter("layout"), tensors)), set(map(attrgetter("dtype"), tensors))
    is_plain = layouts <= {torch.strided} and all(name_of(dtype) for dtype in dtypes)
    return is_plain and not any(map(attrgetter("is_meta"), tensors))


def _copied_alone(value: Any, memo: dict[int, Any], state_dict: dict[str, Any]) -> Any:
    """A deep copy of what has no place in the buffer."""
    try:
        return _tensor_alone(value, memo) if isinstance(value, torch.Tensor) else copy.deepcopy(value, memo)
    except Exception as e:
        name = ".".join(map(str, path_to(value, state_dict)))
        msg = f"{name!r} is a {type(value).__name__}, which cannot be copied: {type(e).__name__}: {e}"
        raise UnstorableError(msg) from e


def _tensor_alone(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return tensor  # there is nothing that could change
    if type(tensor) is DTensor:
        local = _tensor_alone(tensor._local_tensor, memo)
        return DTensor(local, tensor._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    if name_of(tensor.dtype) is None and not tensor.is_quantized:
        return copy.deepcopy(tensor.detach(), memo)  # elements of less than a byte cannot be cloned
    return tensor.detach().clone()  # of a subclass that does not say how, torch makes no deep copy
