"""Spells every key of a checkpoint and every name in a shard; no other file does.

Law: pure. Keys are relative to the checkpoint's URL, segments joined by ``/``.
"""

import re
from hashlib import blake2b
from typing import Literal

from cloudckpt.errors import ReservedNameError

MANIFEST = "manifest.json"
"""The object whose presence is the checkpoint."""

SHARDS = "shards/"
"""Where the data objects of all attempts lie."""

PINS = "pins/"
"""Where the pins of a run's steps lie, under its root."""

ShardExt = Literal["safetensors", "frames"]

SAFETENSORS: ShardExt = "safetensors"
FRAMES: ShardExt = "frames"

_METADATA = "__metadata__"
_SHARD_KEY = re.compile(r"shards/[0-9a-f]{2}/[0-9a-f]{32}\.(safetensors|frames)")
_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")


def shard_key(token: str, ext: ShardExt) -> str:
    """The key of the shard with that token (32 hex digits, random, new for each shard written).

    The hash in front of it spreads the shards of many ranks over key prefixes; S3 partitions its request
    limits by prefix (docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html).
    """
    return f"{SHARDS}{_hash_of(token)}/{token}.{ext}"


def is_shard_key(key: str) -> bool:
    """Whether ``key`` is one that `shard_key` makes: it cannot climb out of the checkpoint."""
    return _SHARD_KEY.fullmatch(key) is not None


def is_own_shard_key(key: str) -> bool:
    """Whether `shard_key` made ``key``, and not just a program that spells keys alike: the hash is the token's."""
    return is_shard_key(key) and key.split("/")[1] == _hash_of(token_of(key))


def prefix_of_shard(key: str) -> str | None:
    """What stands before the shard's own key in ``key``: a checkpoint's place under a root.

    Returns:
        Empty, or ending in ``/``; None where ``key`` is not that of a shard (see `is_own_shard_key`).
    """
    own = "/".join(key.rsplit("/", 3)[-3:])
    return key.removesuffix(own) if is_own_shard_key(own) else None


def prefix_of_manifest(key: str) -> str | None:
    """As `prefix_of_shard`, of a manifest's key."""
    prefix = key.removesuffix(MANIFEST)
    return prefix if prefix != key and (not prefix or prefix.endswith("/")) else None


def token_of(key: str) -> str:
    """The token in a shard's key."""
    return key[key.rindex("/") + 1 : key.rindex(".")]


def step_name(step: int) -> str:
    """The name of a step's checkpoint under its root."""
    return f"step-{step}"


def step_of(name: str) -> int | None:
    """The step whose checkpoint has that name, or None where it is no step's."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def pin_key(step: int) -> str:
    """The key of a step's pin, relative to the root."""
    return f"{PINS}{step_name(step)}"


def step_of_pin(key: str) -> int | None:
    """The step that a pin of that key keeps, or None where it is no pin."""
    return step_of(key.removeprefix(PINS)) if key.startswith(PINS) else None


def item_name(key: str, offsets: tuple[int, ...] | None) -> str:
    """The name of an item in its shard: the escaped key, with ``@`` and the offsets unless it is whole.

    Args:
        key: the state-dict key, any text UTF-8 can spell.
        offsets: where the chunk lies in its tensor, or None where the chunk is the whole tensor.

    Raises:
        ReservedNameError: the key holds a lone surrogate.
    """
    try:
        key.encode()
    except UnicodeEncodeError as e:
        msg = f"the state-dict key {key!r} is not valid Unicode; rename it before saving"
        raise ReservedNameError(msg) from e
    escaped = key.replace("%", "%25").replace("@", "%40")
    if escaped == _METADATA:
        escaped = escaped.replace("_", "%5F")
    return escaped if offsets is None else f"{escaped}@{','.join(map(str, offsets))}"


def key_of_item(name: str) -> tuple[str, tuple[int, ...] | None]:
    """The inverse of `item_name`."""
    escaped, at, offsets = name.partition("@")
    key = escaped.replace("%5F", "_").replace("%40", "@").replace("%25", "%")
    return key, tuple(int(o) for o in offsets.split(",") if o) if at else None


def _hash_of(token: str) -> str:
    return blake2b(token.encode(), digest_size=1).hexdigest()
