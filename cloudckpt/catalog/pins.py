"""Steps that no policy removes.

Law: a pin is one small object under the root, and its key says all: every process on every machine sees it. It is put
first, and its step is looked at then, so that no pin is promised of a step that was gone before.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version

from awscrt.checksums import crc32c

from cloudckpt.catalog.committed import manifest_key
from cloudckpt.catalog.summaries import read_summary
from cloudckpt.engine.loop import shielded
from cloudckpt.engine.session import Session
from cloudckpt.errors import CheckpointNotFoundError, ManifestError, ObjectNotFoundError, UsageError
from cloudckpt.layout import PINS, pin_key, step_name, step_of, step_of_pin
from cloudckpt.store.protocols import List, Store
from cloudckpt.store.url import StoreOptions, check_url


def pin(root: str, step: int, *, store: StoreOptions | None = None) -> None:
    """Keeps a committed step below ``root`` until `unpin`, whatever the policies of `prune` say. Twice is once.

    A pin keeps the step, not the save: it holds for another that replaces it. Only `prune` honours it; ``overwrite``
    and whoever deletes objects do not. A prune that is removing that very step in this very moment, with its
    last look for pins behind it, is not stopped.

    Args:
        root: of the run: its steps are ``step-N`` below it.
        step: to keep.
        store: how to reach the store.

    Raises:
        CheckpointNotFoundError: the step is not committed, or was removed; it is not pinned.
        ManifestError: its manifest cannot be read; it is not pinned.
        StoreError: the store refused, or gave no answer; it may be pinned.
    """
    with _opened(root, step, store) as session:
        session.run(lambda opened: pin_in(opened, step))


def unpin(root: str, step: int, *, store: StoreOptions | None = None) -> None:
    """Leaves a step to the policies again; one that is not pinned is no error.

    Raises:
        StoreError: the store refused.
    """
    with _opened(root, step, store) as session:
        session.run(lambda opened: opened.delete([pin_key(step)]))


def pins(root: str, *, store: StoreOptions | None = None) -> list[int]:
    """The steps that are pinned, oldest first: one listing. One that was removed by hand may still be pinned.

    Raises:
        StoreError: the store refused.
    """
    with Session(check_url(root), store or StoreOptions()) as session:
        return sorted(session.run(pinned_in))


async def pin_in(store: Store, step: int) -> None:
    """See `pin`; the store is rooted at the root."""
    key = pin_key(step)
    data = json.dumps(
        {
            "step": step,
            "created": datetime.now(UTC).isoformat(),
            "writer": f"cloudckpt {version('cloudckpt')}",
        }
    ).encode()
    await store.put(key, [memoryview(data)], crc32c=crc32c(data))
    try:
        await _check_committed(store, step)
    except (CheckpointNotFoundError, ManifestError):
        await shielded(lambda: store.delete([key]))
        raise


async def pinned_in(store: List) -> frozenset[int]:
    """The steps that are pinned; the store is rooted at the root."""
    return frozenset(
        [step async for found in store.list_objects(PINS) if (step := step_of_pin(found.key)) is not None]
    )


async def is_pinned(store: List, step: int) -> bool:
    """Whether a step is pinned now; the store is rooted at the root.

    By a listing: S3 answers a HEAD of what is not there with 403 to who may list a prefix only.
    """
    async for found in store.list_objects(pin_key(step)):
        if found.key == pin_key(step):
            return True
    return False


async def _check_committed(store: Store, step: int) -> None:
    key = manifest_key(step)
    where = f"{store.url}/{key}"
    try:
        summary = await read_summary(store, key, (await store.head(key)).size, where)
    except ObjectNotFoundError:
        is_committed = False
    else:
        is_committed = not summary.is_tombstone
    if not is_committed:
        msg = f"step {step} is not committed below {store.url}: it cannot be pinned"
        raise CheckpointNotFoundError(msg)


@contextmanager
def _opened(root: str, step: int, store: StoreOptions | None) -> Iterator[Session]:
    if isinstance(step, bool) or not isinstance(step, int) or step_of(step_name(step)) is None:
        msg = f"{step!r} is no step; give its number, from 0 on"
        raise UsageError(msg)
    with Session(check_url(root), store or StoreOptions()) as session:
        yield session
