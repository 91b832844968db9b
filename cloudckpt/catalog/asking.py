"""What only trying tells of a server: its clock, and whether it honours conditions.

Law: nothing of anybody's is at stake. What is put for it is an empty shard of no attempt, which is removed again; one
that an interruption leaves is a leftover like others.
"""

from dataclasses import dataclass
from datetime import datetime
from secrets import token_hex

from cloudckpt.engine.loop import shielded
from cloudckpt.errors import NotImplementedByStoreError, ObjectNotFoundError, PreconditionFailedError
from cloudckpt.layout import FRAMES, shard_key
from cloudckpt.store.protocols import Condition, IfAbsent, IfMatch, Store

_NOBODYS_ETAG = '"00000000000000000000000000000000"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What was learnt.

    Attributes:
        now: a moment ago, by its clock and as its listings tell time.
        honours_puts: whether ``If-None-Match`` keeps an object from being replaced.
        honours_replacements: whether ``If-Match`` keeps another object from being replaced. Stores knew the former
            earlier than this (S3: by three months), and some know it alone.
        honours_deletes: whether ``If-Match`` keeps another object from being deleted.
    """

    now: datetime
    honours_puts: bool
    honours_replacements: bool
    honours_deletes: bool

    def honours(self, condition: Condition) -> bool:
        """Whether a put on that condition is one."""
        return self.honours_replacements if isinstance(condition, IfMatch) else self.honours_puts


async def ask_server(store: Store, key: str | None = None) -> Server:
    """Puts an object, and tries to replace and to delete it under conditions that do not hold.

    Args:
        store: the server's.
        key: of the object; None takes that of a shard, which `sweep` removes should an interruption leave it.

    Raises:
        StoreError: the store refused, or did not answer: what was to be learnt is not known.
    """
    key = key or shard_key(token_hex(16), FRAMES)
    try:
        await store.put(key, [memoryview(b"?")])
        now = await _modified(store, key)
        honours_puts = await _is_put_refused(store, key, IfAbsent())
        honours_replacements = await _is_put_refused(store, key, IfMatch(_NOBODYS_ETAG))
        honours_deletes = await _is_delete_refused(store, key)
    finally:
        await shielded(lambda: store.delete([key]))
    return Server(
        now=now,
        honours_puts=honours_puts,
        honours_replacements=honours_replacements,
        honours_deletes=honours_deletes,
    )


async def _modified(store: Store, key: str) -> datetime:
    async for found in store.list_objects(key):  # in the same words as those that it is compared with
        return found.modified
    msg = (
        f"{store.url}/{key} was put and is not listed; something else deletes below this URL, or listings lag behind"
    )
    raise ObjectNotFoundError(msg)


async def _is_put_refused(store: Store, key: str, condition: Condition) -> bool:
    try:
        await store.put(key, [memoryview(b"?")], condition=condition)
    except PreconditionFailedError:
        return True
    except (NotImplementedByStoreError, ObjectNotFoundError):
        return False
    return False


async def _is_delete_refused(store: Store, key: str) -> bool:
    try:
        await store.delete_if(key, IfMatch(_NOBODYS_ETAG))
    except PreconditionFailedError:
        return True
    except (NotImplementedByStoreError, ObjectNotFoundError):
        return False
    return False
