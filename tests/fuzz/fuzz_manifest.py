"""Manifests that lie: whatever a checkpoint's manifest says, it is read as it was saved, or refused."""

from functools import cache

import msgspec
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from awscrt.checksums import crc32c

from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.errors import CheckpointError
from cloudckpt.extensions import BytePlane, ZStandard
from cloudckpt.manifest import SUMMARY_NBYTES, entry_problems, overlap_problems, parse, parse_summary
from cloudckpt.store.url import open_store
from fuzz.reading import read

STATE = {"a": torch.arange(24, dtype=torch.float32).reshape(4, 6), "z/b": torch.arange(1200), "n": 3, "rng": b"12345"}
TAIL_NBYTES = len(b',"crc32c":"00000000"}')


@cache
def objects():
    """Of a checkpoint with plain shards and with transformed ones."""
    url = "memory://seeds/manifest"
    chains = {"z/*": [BytePlane(), ZStandard()]}
    writer = ObjectStoreWriter(url, extensions=chains, frame_size=4096, metadata={"tags": [1, "é", None]})
    dcp.save(dict(STATE), storage_writer=writer, no_dist=True)

    async def get_all():
        async with open_store(url) as store:
            return {found.key: (await store.get(found.key)).data async for found in store.list_objects()}

    return loop.run(get_all)


def seeds():
    """Valid inputs."""
    whole = objects()["manifest.json"]
    tree = msgspec.json.decode(whole)
    tree["entries"]["value"] = ["value", {"x": [1, 2.5, "é"]}]
    return [whole, resealed_tree(tree)]


def resealed(data):
    """The same, with the checksum that it should have, so that what it says is looked at."""
    body = data[:-TAIL_NBYTES] if data[-TAIL_NBYTES:].startswith(b',"crc32c":"') else data.rstrip()[:-1]
    return body + b',"crc32c":"%08x"}' % crc32c(body)


def resealed_tree(tree):
    """The bytes of a manifest that says ``tree``."""
    tree = {name: value for name, value in tree.items() if name != "crc32c"} if isinstance(tree, dict) else tree
    return resealed(msgspec.json.encode(tree))


def check(data):
    """Reads ``data`` as a manifest, as it is and with the checksum that it should have."""
    for manifest in (data, resealed(data)):
        _check(manifest)


def _check(data):
    for parsing, some in ((parse, data), (parse_summary, data), (parse_summary, data[:SUMMARY_NBYTES])):
        try:
            parsing(some, "here")
        except CheckpointError:
            continue
    try:
        manifest = parse(data, "here")
    except CheckpointError:
        return
    overlap_problems(manifest)
    for entry in manifest.entries.values():
        entry_problems(entry, manifest.shards)
    found = read(objects() | {"manifest.json": data})
    if data == objects()["manifest.json"]:
        assert np.array_equal(found["a"], STATE["a"])
        assert np.array_equal(found["z/b"], STATE["z/b"])
