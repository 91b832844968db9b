"""A save plan's items, resolved: what each is called and how its bytes are had.

Law: refuses what cannot be stored, and what is not what was planned, before a byte of it is written.
"""

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from cloudckpt import layout
from cloudckpt.dcp.dtypes import name_of
from cloudckpt.dcp.results import WrittenItem
from cloudckpt.dcp.state.values import choose
from cloudckpt.dcp.tensors import TensorSource, storable
from cloudckpt.dtypes import DTYPES, RAW
from cloudckpt.engine.framing import Item
from cloudckpt.engine.sources import BytesSource, Source
from cloudckpt.errors import SaveFailedError, UnstorableError
from cloudckpt.safetensors_header import HeaderItem


def refuse_unstorable(item: WriteItem) -> None:
    """Raises for what the plan shows cannot be stored."""
    data = item.tensor_data
    if data is None:
        return
    if data.properties.layout != torch.strided:
        msg = f"{item.index.fqn!r} is {data.properties.layout}; only strided tensors can be stored: use .to_dense()"
        raise UnstorableError(msg)
    if name_of(data.properties.dtype) is None:
        msg = f"{item.index.fqn!r} has dtype {data.properties.dtype}, which cannot be stored; convert it first"
        raise UnstorableError(msg)


def take_values(plan: SavePlan, planner: SavePlanner, room: int) -> tuple[SavePlan, dict[str, Any]]:
    """The plan without the values that the manifest can keep, and these values by key.

    Nothing is taken where a planner spells values in its own way.
    """
    kind: Any = type(planner)
    if (
        not isinstance(planner, DefaultSavePlanner)
        or kind.transform_object is not DefaultSavePlanner.transform_object
        or kind.resolve_data is not DefaultSavePlanner.resolve_data
    ):
        return plan, {}
    found = ((i.index.fqn, planner.lookup_object(i.index)) for i in plan.items if i.type == WriteItemType.BYTE_IO)
    values = choose(found, room=room)
    return replace(plan, items=[item for item in plan.items if item.index.fqn not in values]), values


def resolve(plan: SavePlan, planner: SavePlanner) -> tuple[list[WrittenItem], list[Item], list[Source]]:
    """Asks the planner for every item; refuses what cannot be stored before a byte is written."""
    paths = plan.planner_data if isinstance(plan.planner_data, dict) else {}
    written: list[WrittenItem] = []
    items: list[Item] = []
    sources: list[Source] = []
    for item in plan.items:
        key = item.index.fqn
        path = paths.get(key, (key,))
        notes: dict[str, object] = {} if path == (key,) else {"path": list(path)}
        resolved = planner.resolve_data(item)
        if item.type == WriteItemType.BYTE_IO:
            if isinstance(resolved, torch.Tensor):
                msg = f"the planner planned {key!r} as bytes and resolved it to a tensor"
                raise SaveFailedError(msg)
            data = resolved.getbuffer()
            header = HeaderItem(name=layout.item_name(key, None), dtype=RAW, shape=(len(data),), nbytes=len(data))
            written.append(WrittenItem(key, "", (), (), len(data)))
            items.append(Item(header=header, notes={"kind": "bytes", **notes}))
            sources.append(BytesSource(data))
        else:
            tensor = storable(_checked_tensor(item, resolved), repr(key))
            one, header, more = _describe(item, tensor)
            written.append(one)
            number_size = DTYPES[one.dtype].number_size
            items.append(Item(header=header, notes={**more, **notes}, width=tensor.itemsize, number_size=number_size))
            sources.append(TensorSource(tensor))
    names = [i.header.name for i in items]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        msg = f"the plan writes the same chunk more than once: {', '.join(twice)}"
        raise SaveFailedError(msg)
    return written, items, sources


def _checked_tensor(item: WriteItem, resolved: object) -> torch.Tensor:
    """The resolved tensor, if it is still what was planned: a cached plan overlooks a changed dtype."""
    key, data = item.index.fqn, item.tensor_data
    if not isinstance(resolved, torch.Tensor) or data is None:
        msg = f"the planner planned {key!r} as a tensor and resolved it to {type(resolved).__name__}"
        raise SaveFailedError(msg)
    if resolved.dtype != data.properties.dtype or resolved.shape != data.chunk.sizes:
        msg = (
            f"{key!r} is {resolved.dtype} {tuple(resolved.shape)} now but was planned as {data.properties.dtype} "
            f"{tuple(data.chunk.sizes)}; with DCP's plan cache, save a changed state dict through a new planner class"
        )
        raise SaveFailedError(msg)
    return resolved


def _describe(item: WriteItem, tensor: torch.Tensor) -> tuple[WrittenItem, HeaderItem, dict[str, object]]:
    data = item.tensor_data
    assert data is not None  # noqa: S101 - `_checked_tensor` saw to it
    offsets, shape = tuple(data.chunk.offsets), tuple(data.size)
    is_whole = tuple(tensor.shape) == shape
    dtype = DTYPES[str(name_of(tensor.dtype))]
    nbytes = prod(tensor.shape) * dtype.itemsize
    notes: dict[str, object] = {} if is_whole else {"shape": list(shape)}
    if not dtype.is_safetensors:
        notes |= {"dtype": dtype.name, "chunk": list(tensor.shape)}
    header = HeaderItem(
        name=layout.item_name(item.index.fqn, None if is_whole else offsets),
        dtype=dtype.name if dtype.is_safetensors else RAW,
        shape=tuple(tensor.shape) if dtype.is_safetensors else (nbytes,),
        nbytes=nbytes,
    )
    written = WrittenItem(item.index.fqn, dtype.name, offsets, tuple(tensor.shape), nbytes)
    return written, header, notes
