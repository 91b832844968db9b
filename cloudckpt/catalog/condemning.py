"""Tombstones: put before shards are deleted, and taken away again.

Law: no tombstone takes the place of what was not looked at, and none but our own is taken away. A lost answer is
settled by reading back.
"""

from collections.abc import Iterable
from datetime import datetime
from importlib.metadata import version
from typing import Protocol

from awscrt.checksums import crc32c

from cloudckpt.errors import ObjectNotFoundError, PreconditionFailedError, StoreUnavailableError
from cloudckpt.store.protocols import Blob, Condition, Delete, Get, IfMatch, Put
from cloudckpt.tombstone import encode_tombstone

_TIMES = 3
"""A tombstone is put, or asked to go, where no answer comes."""


class Condemns(Get, Put, Delete, Protocol):
    """What tombstones ask of a store."""


async def condemn(
    store: Condemns, key: str, shards: Iterable[str], condition: Condition | None, *, now: datetime, by: str
) -> str | None:
    """Puts a tombstone.

    Args:
        store: that holds the place.
        key: of the place's manifest.
        shards: that are about to be deleted; keys relative to the place.
        condition: what must be there still; None only where the store knows no conditions.
        now: by the server's clock.
        by: the command at work.

    Returns:
        The tombstone's ETag, or None where the condition does not hold: nothing was changed.

    Raises:
        StoreUnavailableError: no answer came, and it is not there; but it may still arrive.
        StoreError: the store refused.
    """
    data = encode_tombstone(shards, created=now, writer=f"cloudckpt {version('cloudckpt')}, {by}")
    for remaining in reversed(range(_TIMES)):
        try:
            return await store.put(key, [memoryview(data)], condition=condition, crc32c=crc32c(data))
        except (PreconditionFailedError, ObjectNotFoundError, StoreUnavailableError) as e:
            there = await find_blob(store, key)
            if there is not None and there.data == data:
                return there.etag
            if not isinstance(e, StoreUnavailableError):
                return None
            if not remaining:
                raise
    raise AssertionError(key)


async def take_away(store: Condemns, key: str, etag: str, *, honours_deletes: bool) -> bool:
    """Deletes the object with that ETag, and says whether it is gone; False where another is there.

    Where the store deletes without conditions only, it is read just before: what replaces it in that moment goes.
    """
    if not honours_deletes:
        there = await find_blob(store, key)
        if there is not None and there.etag == etag:
            await store.delete([key])
            return True
        return there is None
    for remaining in reversed(range(_TIMES)):
        try:
            await store.delete_if(key, IfMatch(etag))
        except (PreconditionFailedError, ObjectNotFoundError):
            return await find_blob(store, key) is None
        except StoreUnavailableError:  # it may be gone nevertheless: asking again tells
            if not remaining:
                raise
        else:
            return True
    raise AssertionError(key)


async def find_blob(store: Get, key: str) -> Blob | None:
    """The object, or None where there is none."""
    try:
        return await store.get(key)
    except ObjectNotFoundError:
        return None
