"""Whether a checkpoint is still the one that was opened.

Law: writes nothing. What was read of a checkpoint that was replaced meanwhile is never told as if it were of one.
"""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cloudckpt.checkpoint import Checkpoint
from cloudckpt.convert.items import ForeignContents
from cloudckpt.engine.commit import find_manifest_blob
from cloudckpt.errors import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    ObjectNotFoundError,
    StoreError,
)
from cloudckpt.layout import MANIFEST
from cloudckpt.manifest import parse_summary
from cloudckpt.store.protocols import Get, Store

_CONCURRENCY = 16
"""Objects that are asked about at a time."""


@contextmanager
def witnessed(*checkpoints: Checkpoint) -> Iterator[None]:
    """Around reading from checkpoints: tells it if one of them is replaced or removed meanwhile.

    The shards of ours are never written twice: what could be read of them is what was saved, and only if something
    could not is the manifest looked at again. Others are overwritten in place: their objects are asked for their
    ETags, before and after.

    Raises:
        CheckpointChangedError: another save replaced it.
        CheckpointNotFoundError: it was removed.
    """
    before = [_etags(checkpoint) for checkpoint in checkpoints]
    try:
        yield
    except CheckpointError as e:
        if isinstance(e, StoreError) and not (isinstance(e, ObjectNotFoundError) or type(e) is StoreError):
            raise  # which nothing that lies there is the reason of
        for checkpoint, etags in zip(checkpoints, before, strict=True):
            _refuse_other(checkpoint, etags)
        raise
    for checkpoint, etags in zip(checkpoints, before, strict=True):
        if etags:
            _refuse_other(checkpoint, etags)


def _refuse_other(checkpoint: Checkpoint, etags: Mapping[str, str | None]) -> None:
    summary = checkpoint.summary
    if summary is None:
        is_same = _etags(checkpoint) == etags
    else:
        blob = checkpoint._access._session.run(find_manifest_blob)
        if blob is None:
            msg = f"{checkpoint.url} was removed while it was read"
            raise CheckpointNotFoundError(msg)
        is_same = parse_summary(blob.data, f"{checkpoint.url}/{MANIFEST}").save_id == summary.save_id
    if not is_same:
        msg = f"{checkpoint.url} was replaced by another save while it was read; look again"
        raise CheckpointChangedError(msg)


def _etags(checkpoint: Checkpoint) -> dict[str, str | None]:
    """Of the objects of a checkpoint of others, None of those that are not there; nothing of ours."""
    contents = checkpoint._access.contents
    if not isinstance(contents, ForeignContents):
        return {}
    keys = dict.fromkeys(item.key for item in contents.items)

    async def ask(store: Store) -> dict[str, str | None]:
        slots = asyncio.Semaphore(_CONCURRENCY)

        async def one(key: str) -> str | None:
            async with slots:
                return await _etag(store, key)

        async with asyncio.TaskGroup() as group:
            tasks = {key: group.create_task(one(key)) for key in keys}
        return {key: task.result() for key, task in tasks.items()}

    return checkpoint._access._session.run(ask)


async def _etag(store: Get, key: str) -> str | None:
    try:
        return (await store.head(key)).etag
    except ObjectNotFoundError:
        return None
