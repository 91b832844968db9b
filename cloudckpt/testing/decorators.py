"""Decorators for tests: a fresh place to save to, and a look at the log.

Law: a test leaves nothing behind, on any rank.
"""

import functools
import logging
import sys
from collections.abc import Callable
from secrets import token_hex
from typing import Any

from cloudckpt.engine import loop
from cloudckpt.store.url import StoreOptions, open_store


def with_temp_prefix(
    root: str, store: StoreOptions | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a test with a fresh prefix under ``root``, given to it as ``prefix=``.

    Where torch.distributed is initialized, all ranks get the one that the first made, and must all run the
    test. Everything under it is removed when the test ends on all ranks, however it ends.
    """

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> Any:
            prefix = _from_first_rank(f"{root.rstrip('/')}/{token_hex(8)}")
            try:
                return test(*args, prefix=prefix, **kwargs)
            finally:
                if _is_last_to_leave():
                    remove_all(prefix, store)

        return run

    return decorate


def with_checkpoint_logging(
    test: Callable[..., Any] | None = None, *, level: int = logging.DEBUG
) -> Callable[..., Any]:
    """Decorates a test so that cloudckpt's log records go to stderr while it runs."""
    if test is None:
        return functools.partial(with_checkpoint_logging, level=level)

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        logger, handler = logging.getLogger("cloudckpt"), logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(level)
        try:
            return test(*args, **kwargs)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)

    return run


def remove_all(prefix: str, store: StoreOptions | None = None) -> None:
    """Removes every object and every upload under way under a URL. For tests: it asks nobody."""

    async def remove() -> None:
        async with open_store(prefix, store) as opened:
            for upload in [u async for u in opened.list_uploads()]:
                await opened.abort_upload(upload)
            await opened.delete([found.key async for found in opened.list_objects()])

    loop.run(remove)


def _group() -> Any:
    """torch.distributed where it is in use, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _from_first_rank(text: str) -> str:
    dist = _group()
    if dist is None:
        return text
    shared = [text]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _is_last_to_leave() -> bool:
    dist = _group()
    if dist is None:
        return True
    dist.barrier()
    return bool(dist.get_rank() == 0)
