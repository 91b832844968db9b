"""Tensors as sources and sinks of bytes.

Law: bytes are taken by viewing a resolved, flat, contiguous tensor as uint8, never from a bare data pointer:
conjugated and negated views call themselves contiguous, meta and fake tensors have no memory.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cloudckpt.dcp.dtypes import RAW
from cloudckpt.errors import UnstorableError
from cloudckpt.ranges import Range, Region, strides_of


def storable(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The plain strided tensor whose elements are ``tensor``'s.

    Raises:
        UnstorableError: it has no memory of its own, or is not a plain array of elements.
    """
    if isinstance(tensor, AsyncCollectiveTensor):
        tensor = tensor.wait()
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        msg = f"{name} is on the meta device or fake: it has no data to save; materialize it first"
        raise UnstorableError(msg)
    given: object = tensor  # its static type would rule the next line out
    if is_traceable_wrapper_subclass(given):
        msg = (
            f"{name} is a {type(given).__name__}, a tensor subclass that wraps others; save the tensors it "
            "wraps (its state_dict or __tensor_flatten__ gives them)"
        )
        raise UnstorableError(msg)
    if tensor.layout != torch.strided or tensor.is_quantized:
        msg = f"{name} is {tensor.layout}, {tensor.dtype}; convert it with .to_dense() or .dequantize()"
        raise UnstorableError(msg)
    return tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg()


def lies_in_order(tensor: torch.Tensor) -> bool:
    """Whether a tensor's bytes are in host memory, in row-major order."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def memory_of(tensor: torch.Tensor) -> memoryview | None:
    """The bytes of a tensor in host memory that lie in row-major order; None where they do not."""
    if not lies_in_order(tensor):
        return None
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class TensorSource:
    """An item that is a tensor: in host memory and contiguous it is sent as it lies, else by slices.

    A tensor on a GPU is copied on a side stream that waits for what the caller's stream had been given when
    this was made, so the caller may go on queueing work that does not write to it.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        """Takes a tensor that `storable` returned; it must not change until it is sent."""
        self._tensor = tensor
        self._memory = memory_of(tensor)
        self._ready: torch.cuda.Event | None = None
        self._side: torch.cuda.Stream | None = None
        if tensor.device.type == "cuda":
            self._ready = torch.cuda.current_stream(tensor.device).record_event()
            self._side = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]

    @property
    def address(self) -> int | None:
        """Of its first byte, where its bytes lie in host memory in order; None where they do not."""
        return None if self._memory is None else self._tensor.data_ptr()

    def scratch_nbytes(self, at: Range) -> int:
        """See `Source.scratch_nbytes`."""
        return 0 if self._memory is not None else len(self._elements(at)) * self._tensor.itemsize

    def stage(self, at: Range, scratch: memoryview) -> memoryview:
        """See `Source.stage`."""
        if self._memory is not None:
            return self._memory[at.start : at.stop]
        if not len(at):
            return scratch
        elements = self._elements(at)
        out = torch.frombuffer(scratch, dtype=RAW[self._tensor.itemsize])
        if self._side is not None and self._ready is not None:
            with torch.cuda.stream(self._side):
                self._side.wait_event(self._ready)
                _copy_flat(self._raw(), elements, out)
                self._side.synchronize()
        else:
            _copy_flat(self._raw(), elements, out)
        start = at.start - elements.start * self._tensor.itemsize
        return scratch[start : start + len(at)]

    def _raw(self) -> torch.Tensor:
        return self._tensor.view(RAW[self._tensor.itemsize])

    def _elements(self, at: Range) -> Range:
        size = self._tensor.itemsize
        return Range(at.start // size, -(-at.stop // size))


def _copy_flat(tensor: torch.Tensor, at: Range, out: torch.Tensor) -> None:
    """Copies elements ``at`` of the row-major order of ``tensor`` into the flat ``out``, with no copy between."""
    if tensor.is_contiguous():
        out.copy_(tensor.reshape(-1)[at.start : at.stop])
        return
    row = tensor[0].numel()
    first, last = -(-at.start // row), at.stop // row
    if first > last:  # all within one row
        _copy_flat(tensor[last], at.shift(-last * row), out)
        return
    head = first * row - at.start
    if head:
        _copy_flat(tensor[first - 1], Range(row - head, row), out[:head])
    middle = (last - first) * row
    if middle:
        out[head : head + middle].view(last - first, *tensor.shape[1:]).copy_(tensor[first:last])
    if head + middle < len(at):
        _copy_flat(tensor[last], Range(0, len(at) - head - middle), out[head + middle :])


class TensorSink:
    """A destination that is a tensor (or a view of one), of the size of the region that it receives."""

    __slots__ = ("_chunk_shape", "_origin", "_stored", "_tensor", "is_direct")

    def __init__(
        self, tensor: torch.Tensor, stored: torch.dtype, chunk_shape: tuple[int, ...], region: Region
    ) -> None:
        """Takes the destination.

        Args:
            tensor: the destination; is written to.
            stored: dtype of the elements that arrive; they are cast where the destination's differs.
            chunk_shape: elements per axis of the chunk that the region is cut from.
            region: counted from the chunk's first element.
        """
        self.is_direct = tensor.dtype == stored and lies_in_order(tensor)
        self._tensor = tensor
        self._stored = stored
        self._chunk_shape = chunk_shape
        self._origin = region.offsets

    @property
    def memory(self) -> memoryview | None:
        """See `Sink.memory`; made anew each time, so that a load of many small tensors does not keep it of all."""
        return memory_of(self._tensor) if self.is_direct else None

    def place(self, region: Region, data: memoryview) -> None:
        """See `Sink.place`."""
        out = self._tensor.detach()
        inside = region.relative_to(self._origin)
        for axis, (start, size) in enumerate(zip(inside.offsets, inside.sizes, strict=True)):
            out = out.narrow(axis, start, size)
        same = out.dtype == self._stored and not out.is_conj() and not out.is_neg()
        dtype = RAW[self._stored.itemsize] if same else self._stored
        if data.readonly or address_of(data) % dtype.itemsize:
            # torch warns of read-only memory, and dies of complex128 that is not aligned
            data = memoryview(bytearray(data))
        rows = torch.frombuffer(data, dtype=dtype).as_strided(region.sizes, strides_of(self._chunk_shape, 1))
        (out.view(dtype) if same else out).copy_(rows)


def address_of(data: memoryview) -> int:
    """Where these bytes lie; 0 for none."""
    return torch.frombuffer(data, dtype=torch.uint8).data_ptr() if len(data) else 0
