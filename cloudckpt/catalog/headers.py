"""The headers of plain shards, read from a store, and what they say for a rebuild.

Law: what a header claims is proven before it is used. Async only in `describe_all`.
"""

import asyncio
from collections.abc import Iterator, Sequence
from datetime import datetime

import msgspec

from cloudckpt.convert.find import read_safetensors_header
from cloudckpt.convert.safetensors import Header
from cloudckpt.dtypes import DTYPES, RAW
from cloudckpt.errors import ManifestError, ObjectNotFoundError, UnsupportedVersionError
from cloudckpt.layout import item_name, key_of_item, token_of
from cloudckpt.manifest import VERSION, PlannerPath
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import GetRange, ObjectInfo
from cloudckpt.threads import in_thread

_CONCURRENCY = 8
"""Headers that are read at a time; each has 64 MiB at most, if it is ours."""

NOTES = "cloudckpt"
"""The member of a header's metadata that holds what a rebuild needs."""


class _ItemNote(msgspec.Struct, frozen=True):
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    chunk: tuple[int, ...] | None = None
    kind: str = "tensor"
    path: PlannerPath | None = None


class _Notes(msgspec.Struct, frozen=True):
    version: int
    rank: int
    attempt: str
    items: dict[str, _ItemNote] = {}


class DescribedItem(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An item as its shard's header describes it.

    Attributes:
        key: of its entry.
        name: in the header.
        dtype: as a manifest has it; empty for bytes.
        shape: of the whole tensor.
        offsets, sizes: of the chunk.
        at: its bytes in the object.
        path: where its key stands in the nested state dict, where that is not at the top.
    """

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    at: Range
    path: PlannerPath | None


class DescribedShard(msgspec.Struct, frozen=True, kw_only=True):
    """A plain shard as its header describes it: the rank that wrote it, and its items in the order they lie."""

    key: str
    size: int
    modified: datetime
    rank: int
    items: tuple[DescribedItem, ...]


async def describe_all(
    store: GetRange, found: Sequence[ObjectInfo], where: str
) -> list[DescribedShard | ManifestError]:
    """Reads what shards say of themselves, or why that cannot be believed, in the order of ``found``.

    Raises:
        StoreError: one could not be read.
    """
    slots = asyncio.Semaphore(_CONCURRENCY)

    async def one(info: ObjectInfo) -> DescribedShard | ManifestError:
        async with slots:
            try:
                header = await read_safetensors_header(store, info.key, info.size, f"{where}/{info.key}")
                return await in_thread(describe, info, header, f"{where}/{info.key}")
            except ManifestError as e:
                return e
            except ObjectNotFoundError as e:
                return ManifestError(f"{info.key} is gone: {e}")

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(info)) for info in found]
    return [task.result() for task in tasks]


def describe(info: ObjectInfo, header: Header, where: str) -> DescribedShard:
    """What a header says for a rebuild.

    Raises:
        UnsupportedVersionError: of a version this release does not know.
        ManifestError: it is not a header of ours, or contradicts itself; lists every problem.
    """
    try:
        notes = msgspec.json.decode(header.metadata.get(NOTES, ""), type=_Notes)
    except (msgspec.MsgspecError, RecursionError) as e:
        msg = f"the header of {where} does not have what a rebuild needs: {e}"
        raise ManifestError(msg) from e
    if notes.version != VERSION:
        msg = f"the header of {where} is of format version {notes.version}; this release reads version {VERSION}"
        raise UnsupportedVersionError(msg)
    problems = [] if notes.attempt == token_of(info.key) else [f"it is of another shard, {notes.attempt!r}"]
    problems += (f"it has a note on {name!r}, which it lacks" for name in notes.items if name not in header.tensors)
    items: list[DescribedItem] = []
    for name, (dtype, sizes, at) in sorted(header.tensors.items(), key=lambda item: item[1][2]):
        note = notes.items.get(name, _ItemNote())
        item = _item(name, dtype, sizes, at, note)
        found = (
            ["its name or its notes cannot be"] if item is None else list(_item_problems(item, note, dtype, sizes))
        )
        problems += (f"{name!r}: {problem}" for problem in found)
        if item is not None:
            items.append(item)
    if problems:
        listing = "".join(f"\n  - {problem}" for problem in problems[:20])
        msg = f"the header of {where} cannot be rebuilt from; {len(problems)} problem(s):{listing}"
        raise ManifestError(msg)
    return DescribedShard(key=info.key, size=info.size, modified=info.modified, rank=notes.rank, items=tuple(items))


def _item(name: str, dtype: str, sizes: tuple[int, ...], at: Range, note: _ItemNote) -> DescribedItem | None:
    try:
        key, offsets = key_of_item(name)
        is_spelled_so = item_name(key, offsets) == name
    except ValueError:
        return None
    if not is_spelled_so:
        return None
    if note.kind == "bytes":
        return DescribedItem(key=key, name=name, dtype="", shape=(), offsets=(), sizes=(), at=at, path=note.path)
    sizes = sizes if note.chunk is None else note.chunk
    return DescribedItem(
        key=key,
        name=name,
        dtype=dtype if note.dtype is None else note.dtype,
        shape=sizes if note.shape is None else note.shape,
        offsets=(0,) * len(sizes) if offsets is None else offsets,
        sizes=sizes,
        at=at,
        path=note.path,
    )


def _item_problems(item: DescribedItem, note: _ItemNote, dtype: str, shape: tuple[int, ...]) -> Iterator[str]:
    if note.kind not in {"tensor", "bytes"}:
        yield f"it is of kind {note.kind!r}"
    if (not item.dtype or note.dtype is not None) and (dtype != RAW or len(shape) != 1):
        yield f"raw bytes are {dtype} {list(shape)}"
    if not item.dtype:
        if "@" in item.name:
            yield "bytes have offsets"
        return
    known = DTYPES.get(item.dtype)
    if known is None:
        yield f"unknown dtype {item.dtype!r}"
    elif (note.dtype is None) != known.is_safetensors or (note.dtype is None) != (note.chunk is None):
        yield f"its dtype is {item.dtype!r}, in {dtype}"
    if ("@" in item.name) == (item.sizes == item.shape):
        yield f"it is named as {'a part' if '@' in item.name else 'the whole'} of {list(item.shape)}"
