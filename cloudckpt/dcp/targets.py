"""torch tensors as destinations of `Checkpoint.load`.

Law: nothing is fetched here.
"""

from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cloudckpt.dcp.dtypes import dtype_of
from cloudckpt.dcp.tensors import TensorSink
from cloudckpt.engine.memory import too_large
from cloudckpt.errors import UsageError
from cloudckpt.ranges import Region

__all__ = ["TensorTarget", "dtype_of", "empty"]


class TensorTarget:
    """A tensor as a `cloudckpt.array.Target`."""

    def __init__(self, tensor: torch.Tensor, stored: torch.dtype) -> None:
        """Takes the destination.

        Args:
            tensor: is written to, past autograd.
            stored: dtype of the elements that arrive; they are cast where the tensor's differs.

        Raises:
            UsageError: it has no memory of its own, or wraps other tensors.
        """
        given: object = tensor  # its static type would rule the next line out
        if is_traceable_wrapper_subclass(given):
            msg = (
                f"cannot load into a {type(given).__name__}: load sharded tensors with "
                "dcp.load(state_dict, storage_reader=ObjectStoreReader(url)), or give the tensors that it wraps"
            )
            raise UsageError(msg)
        if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.layout != torch.strided:
            msg = f"cannot load into a tensor that is meta, fake or {tensor.layout}; materialize it first (to_empty)"
            raise UsageError(msg)
        self._tensor = tensor.detach()
        self._stored = stored
        torch.autograd.graph.increment_version(tensor)  # its memory is written behind autograd's back

    def sink(self, place: Region, chunk_shape: tuple[int, ...], inside: Region) -> TensorSink:
        """See `Target.sink`."""
        part = self._tensor
        for axis, (start, size) in enumerate(zip(place.offsets, place.sizes, strict=True)):
            part = part.narrow(axis, start, size)
        return TensorSink(part, self._stored, chunk_shape, inside)


def empty(key: str, name: str, shape: tuple[int, ...], dtype: torch.dtype | None, device: Any) -> torch.Tensor:
    """A tensor to load into.

    Args:
        key: of the entry, for messages.
        name: of the stored dtype, as the manifest spells it.
        shape: elements per axis.
        dtype: instead of the stored one, where that is of floating point and torch can convert it (not float4).
        device: where.

    Raises:
        TooLargeError: the device has no room for it.
    """
    stored = dtype_of(name)
    is_castable = stored.is_floating_point and stored is not torch.float4_e2m1fn_x2
    chosen = dtype if dtype is not None and is_castable else stored
    torch.empty(0, dtype=chosen, device=device)  # what is wrong with these is told by torch
    try:
        return torch.empty(shape, dtype=chosen, device=device)
    except (RuntimeError, TypeError, MemoryError, OverflowError) as e:
        raise too_large(repr(key), prod(shape) * chosen.itemsize) from e
