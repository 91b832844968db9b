"""What a rank wrote, handed to the coordinator as one packed result per shard, and made into a manifest.

Law: pure. DCP's own objects are slow in great numbers (a million pickled WriteResults take 11.6 s), so items
travel as msgspec bytes.
"""

from typing import Any

import msgspec
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from cloudckpt.dcp.dtypes import name_of
from cloudckpt.engine.framing import AnyPlan
from cloudckpt.engine.upload import Written
from cloudckpt.errors import SaveFailedError, UsageError
from cloudckpt.manifest import BytesEntry, Chunk, Entry, PlannerPath, Shard, TensorEntry, ValueEntry


class WrittenItem(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One item of a state dict; ``dtype`` is empty for bytes, offsets and sizes are the chunk's."""

    key: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int


class _Packed(msgspec.Struct, frozen=True, array_like=True, tag="shard", gc=False):
    shard: Shard
    items: tuple[WrittenItem, ...]
    starts: tuple[int, ...]
    frames: tuple[int, ...]
    etag: str


class _Values(msgspec.Struct, frozen=True, array_like=True, tag="values"):
    values: dict[str, Any]


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Packed | _Values] = msgspec.msgpack.Decoder(_Packed | _Values)


def pack(plan: AnyPlan, written: Written, items: list[WrittenItem]) -> WriteResult:
    """One shard as one result; ``items`` are the rank's, as they were planned."""
    mine = tuple(items[i] for i in plan.items)
    packed = _encoder.encode(_Packed(written.shard, mine, written.starts, plan.frames, written.etag))
    return WriteResult(index=MetadataIndex(plan.key), size_in_bytes=written.shard.size, storage_data=packed)


def pack_values(values: dict[str, Any]) -> list[WriteResult]:
    """What a rank wants kept in the manifest itself, as one result, or none where that is nothing."""
    packed = _encoder.encode(_Values(values))
    index = MetadataIndex("")
    return [WriteResult(index=index, size_in_bytes=len(packed), storage_data=packed)] if values else []


def assemble(
    metadata: Metadata, results: list[list[WriteResult]]
) -> tuple[tuple[Shard, ...], tuple[str, ...], dict[str, Entry]]:
    """The manifest's shards, their ETags, and its entries: what the ranks wrote, held against what was planned.

    Raises:
        SaveFailedError: something planned was not written, or something else was.
    """
    shards: list[Shard] = []
    etags: list[str] = []
    chunks: dict[str, list[Chunk]] = {}
    entries: dict[str, Entry] = {}
    for result in (r for of_rank in results for r in of_rank):
        packed = _decoder.decode(result.storage_data)
        if isinstance(packed, _Values):
            entries.update((key, ValueEntry(value)) for key, value in packed.values.items())
            continue
        for item, start, stop, frame in zip(
            packed.items, packed.starts, packed.starts[1:], packed.frames, strict=False
        ):
            if item.dtype:
                chunk = Chunk(item.offsets, item.sizes, len(shards), start, stop, frame)
                chunks.setdefault(item.key, []).append(chunk)
            else:
                entries[item.key] = BytesEntry(item.nbytes, len(shards), start, stop, frame)
        shards.append(packed.shard)
        etags.append(packed.etag)
    for key, planned in metadata.state_dict_metadata.items():
        if isinstance(planned, TensorStorageMetadata):
            entries[key] = _tensor_entry(key, planned, chunks.pop(key, []))
        elif key not in entries:
            msg = f"{key!r} was planned but no rank wrote it; the planner and the ranks disagree"
            raise SaveFailedError(msg)
    if chunks:
        msg = f"ranks wrote what was not planned: {', '.join(sorted(chunks))}"
        raise SaveFailedError(msg)
    return tuple(shards), tuple(etags), {key: entries[key] for key in metadata.state_dict_metadata}


def _tensor_entry(key: str, planned: TensorStorageMetadata, chunks: list[Chunk]) -> TensorEntry:
    found = {(c.offsets, c.sizes): c for c in chunks}
    wanted = [(tuple(c.offsets), tuple(c.sizes)) for c in planned.chunks]
    if len(found) != len(chunks) or set(found) != set(wanted):
        msg = f"{key!r}: the chunks written are not those planned: {sorted(found)} against {sorted(wanted)}"
        raise SaveFailedError(msg)
    dtype = name_of(planned.properties.dtype)
    if dtype is None:
        msg = f"{key!r} has dtype {planned.properties.dtype}, which cannot be stored"
        raise SaveFailedError(msg)
    return TensorEntry(dtype, tuple(planned.size), tuple(found[w] for w in wanted))


def planner_paths(metadata: Metadata) -> dict[str, PlannerPath] | None:
    """The planner's flatten mapping as the manifest keeps it.

    Raises:
        UsageError: the planner keeps something else, which would need pickle.
    """
    data = metadata.planner_data
    if data is None:
        return None
    is_mapping = isinstance(data, dict) and all(
        isinstance(key, str) and isinstance(path, tuple) and all(type(step) in (str, int) for step in path)
        for key, path in data.items()
    )
    if not is_mapping:
        msg = (
            f"the planner's data of type {type(data).__name__} is not a mapping of keys to paths of names and "
            "numbers, and cannot be stored without pickle; keep it in the state dict instead"
        )
        raise UsageError(msg)
    return {key: path for key, path in data.items() if path != (key,)}
