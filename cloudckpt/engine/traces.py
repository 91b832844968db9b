"""Leaving traces where a save or a load was told to.

Law: never below the checkpoint itself, whose prefix holds what its manifest names; and never a reason to fail.
"""

import asyncio
import logging
import socket
from importlib.metadata import version
from os.path import normpath
from urllib.parse import unquote, urlsplit

from cloudckpt.engine.session import Session
from cloudckpt.engine.tracing import Outcome, Recorder, checkpoint_name, encode, trace_key
from cloudckpt.errors import UsageError
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions

log = logging.getLogger(__name__)

_MOST_S = 30
"""That a save or a load is held up by a place that does not answer."""


def check_place(place: str | None, url: str) -> None:
    """Refuses a place of which the traces of a checkpoint would lie below the checkpoint.

    Raises:
        UsageError: they would.
    """
    if place is None:
        return
    checkpoint = _spelled_out(url)
    traces = _spelled_out(f"{place.rstrip('/')}/{checkpoint_name(url)}")
    if traces[: len(checkpoint)] == checkpoint:
        msg = (
            f"trace={place!r} would leave traces below {url}, where nothing may lie but the checkpoint; give a place "
            "beside the checkpoints, such as a prefix of its own"
        )
        raise UsageError(msg)


def leave_trace(place: str, recorder: Recorder, outcome: Outcome, store: StoreOptions) -> None:
    """Puts the trace of a save or a load; what keeps it from that is told in the log.

    Args:
        place: URL that traces lie below.
        recorder: of the save or load, which is over.
        outcome: what became of it.
        store: how to reach the checkpoint's store, and so the place's.
    """
    key = trace_key(outcome)
    try:
        data = encode(
            outcome, recorder.events(), host=socket.gethostname(), writer=f"cloudckpt {version('cloudckpt')}"
        )

        async def put(there: Store) -> None:
            async with asyncio.timeout(_MOST_S):
                await there.put(key, [memoryview(data)])

        with Session(place, store) as session:
            session.run(put)
    except Exception as e:
        log.warning(
            "the trace of the %s of %s could not be left at %s/%s: %s: %s",
            outcome.kind,
            outcome.url,
            place,
            key,
            type(e).__name__,
            e,
        )


def _spelled_out(url: str) -> list[str]:
    """Scheme, bucket and segments, in one spelling for each place."""
    parts = urlsplit(url)
    path = normpath(unquote(parts.path)) if parts.scheme == "file" else parts.path
    path = path.strip("/")
    return [parts.scheme, parts.netloc, *(path.split("/") if path else ())]
