"""Which steps are committed under a root, and which is the newest.

Law: sync; a step exists when its manifest does, and nothing else decides.
"""

from cloudckpt.engine import loop
from cloudckpt.engine.commit import read_manifest_blob
from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.layout import step_name, step_of
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
            steps = [s async for name in opened.list_names() if (s := step_of(name)) is not None]
        for step in sorted(steps, reverse=True):
            async with open_store(step_url(root, step), store) as opened:
                if await _is_committed(opened):
                    return step
        return None

    return loop.run(find)


async def _is_committed(store: Store) -> bool:
    try:
        await read_manifest_blob(store)
    except CheckpointNotFoundError:
        return False
    return True
