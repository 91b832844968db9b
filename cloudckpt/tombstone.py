"""What `sweep` puts where no manifest is, so that the attempt it sweeps can no longer commit.

Law: pure. A tombstone names the shards that are about to be deleted, and an attempt that has none of them is free to
replace it.
"""

from collections.abc import Iterable
from datetime import datetime
from secrets import token_hex

import msgspec

from cloudckpt.errors import ManifestError
from cloudckpt.layout import is_shard_key
from cloudckpt.manifest import FORMAT, VERSION, Manifest, Summary, encode, parse


class _Said(msgspec.Struct, frozen=True):
    swept: frozenset[str]


def encode_tombstone(swept: Iterable[str], *, created: datetime, writer: str) -> bytes:
    """The bytes of a tombstone.

    Args:
        swept: keys of the shards that are about to be deleted.
        created: now.
        writer: the program that sweeps.
    """
    summary = Summary(
        format=FORMAT, version=VERSION, save_id=token_hex(16), created=created, writer=writer, is_tombstone=True
    )
    said = {"swept": sorted(swept)}
    return encode(Manifest(summary=summary, metadata=said, planner_paths=None, shards=(), entries={}))


def swept_keys(data: bytes, where: str) -> frozenset[str]:
    """The keys of the shards that a tombstone condemns.

    Raises:
        ManifestError: it does not say so.
    """
    try:
        said = msgspec.convert(parse(data, where).metadata, _Said)
    except msgspec.ValidationError as e:
        msg = f"{where} is a tombstone that does not say what was swept: {e}"
        raise ManifestError(msg) from e
    if not all(map(is_shard_key, said.swept)):
        msg = f"{where} is a tombstone that names keys which are not of shards"
        raise ManifestError(msg)
    return said.swept
