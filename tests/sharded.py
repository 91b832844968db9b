"""Checkpoints cut and laid out as a test wants them: what a save by many ranks leaves, without the ranks."""

import asyncio
from datetime import UTC, datetime
from itertools import pairwise
from secrets import token_hex

import ml_dtypes
import numpy as np
from awscrt.checksums import crc32c

from cloudckpt.layout import MANIFEST, SAFETENSORS, shard_key
from cloudckpt.manifest import (
    FORMAT,
    VERSION,
    BytesEntry,
    Chunk,
    Manifest,
    Shard,
    Summary,
    TensorEntry,
    ValueEntry,
    encode,
    pack,
)
from cloudckpt.store.url import open_store

NAMES = {
    np.dtype("float32"): "F32", np.dtype("float64"): "F64", np.dtype("int64"): "I64", np.dtype("uint8"): "U8",
    np.dtype("bool"): "BOOL", np.dtype("complex64"): "C64", np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}  # fmt: skip


def summary_of(**more):
    said = {"save_id": token_hex(16), "created": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "writer": "a test"}
    return Summary(format=FORMAT, version=VERSION, **(said | more))


def put_object(url, key, data):
    async def put():
        async with open_store(url) as store:
            await store.put(key, [memoryview(data)])

    asyncio.run(put())


def put_checkpoint(url, state, *, cuts=None, frame_size=4096, metadata=None, **summary):
    """Puts a checkpoint of numpy arrays, byte strings and plain values.

    Args:
        url: where.
        state: by key.
        cuts: by key, the indices where a tensor's first axis is cut; each chunk goes to a shard of its own number.
        frame_size: see `manifest.Shard`.
        metadata: the user's.
        **summary: fields of the summary.
    """
    data, checksums, entries = {}, {}, {}

    def item(shard, raw):
        at = data.setdefault(shard, bytearray(b"header"))
        frames = checksums.setdefault(shard, [])
        start, frame = len(at), len(frames)
        at += raw
        frames += [crc32c(raw[i : i + frame_size]) for i in range(0, len(raw), frame_size)]
        return shard, start, len(at), frame

    for key, value in state.items():
        if isinstance(value, np.ndarray):
            bounds = [0, *(cuts or {}).get(key, ()), len(value) if value.ndim else 1]
            chunks = []
            for i, (start, stop) in enumerate(pairwise(bounds)):
                part = value[start:stop] if value.ndim else value
                offsets = (start, *(0,) * (value.ndim - 1))[: value.ndim]
                chunks.append(Chunk(offsets, part.shape, *item(i, part.tobytes())))
            entries[key] = TensorEntry(NAMES[value.dtype], value.shape, tuple(chunks))
        elif isinstance(value, bytes):
            entries[key] = BytesEntry(len(value), *item(0, value))
        else:
            entries[key] = ValueEntry(value)
    shards = []
    for i in range(len(data)):
        key = shard_key(token_hex(16), SAFETENSORS)
        put_object(url, key, bytes(data[i]))
        shards.append(
            Shard(
                key=key,
                size=len(data[i]),
                crc32c=crc32c(bytes(data[i])),
                frame_size=frame_size,
                frame_checksums=pack(checksums[i]),
            )
        )
    said = summary_of(shard_count=len(shards), entry_count=len(entries), **summary)
    manifest = Manifest(
        summary=said, metadata=metadata or {}, planner_paths=None, shards=tuple(shards), entries=entries
    )
    put_object(url, MANIFEST, encode(manifest))
    return manifest
