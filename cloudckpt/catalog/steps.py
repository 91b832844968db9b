"""Which steps are committed under a root, and which is the newest.

Law: sync; a step exists when its manifest does, and nothing else decides.
"""

from cloudckpt.catalog.committed import Known, committed_in, steps_among
from cloudckpt.engine import loop
from cloudckpt.engine.commit import read_manifest_blob
from cloudckpt.engine.session import Session
from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.layout import step_name
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, check_url, open_store


def step_url(root: str, step: int) -> str:
    """The URL of a step's checkpoint under a root."""
    return f"{check_url(root)}/{step_name(step)}"


def newest_step(root: str, store: StoreOptions | None = None) -> int | None:
    """The newest committed step under a root, or None where there is none.

    One listing, then one GET per step from the newest on, until one is committed.

    Raises:
        StoreError: the store refused.
    """
    root = check_url(root)

    async def find() -> int | None:
        async with open_store(root, store) as opened:
            steps = await _listed(opened)
        for step in steps:
            async with open_store(step_url(root, step), store) as opened:
                if await _is_committed(opened):
                    return step
        return None

    return loop.run(find)


def committed_steps(root: str, store: StoreOptions | None = None) -> list[int]:
    """The committed steps under a root, oldest first.

    One listing, and two requests for each step. One whose manifest cannot be read is none of them.

    Raises:
        StoreError: the store refused.
    """

    async def find(opened: Store) -> list[int]:
        seen = await committed_in(opened, opened.url, await _listed(opened), Known(), {})
        return [one.found.step for one in reversed(seen)]

    with Session(check_url(root), store or StoreOptions()) as session:
        return session.run(find)


def listed_steps(root: str, store: StoreOptions | None = None) -> list[int]:
    """The steps under a root, newest first, of which some may not be committed: one listing.

    Raises:
        StoreError: the store refused.
    """
    with Session(check_url(root), store or StoreOptions()) as session:
        return session.run(_listed)


async def _listed(store: Store) -> list[int]:
    return sorted(steps_among([name async for name in store.list_names()]), reverse=True)


async def _is_committed(store: Store) -> bool:
    try:
        await read_manifest_blob(store)
    except CheckpointNotFoundError:
        return False
    return True
