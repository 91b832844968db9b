"""Transformed frames down: fetch, verify, restore, place.

Law: async; a frame is verified and restored whole before a byte of it is placed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from awscrt.checksums import crc32c

from cloudckpt.engine.budget import BufferPool
from cloudckpt.engine.fetching import frame_range
from cloudckpt.engine.frame_fetching import FramedRead, FramesFetch, WantedFrame, placements
from cloudckpt.engine.sinks import Sink, damaged
from cloudckpt.errors import IntegrityError
from cloudckpt.extensions.base import FrameContext
from cloudckpt.store.protocols import GetRange
from cloudckpt.threads import in_thread

_COPIES = 3
"""How often a chain may hold a frame while it restores it, the frame itself included."""


@dataclass(frozen=True, slots=True)
class WantedFrames:
    """A read of transformed frames and where it goes; ``name`` is for messages."""

    name: str
    framed: FramedRead
    sink: Sink


def fetch_nbytes(fetch: FramesFetch) -> int:
    """The memory that a fetch takes: what is stored, and one frame at a time as it is restored."""
    return len(fetch.at) + _COPIES * max(frame.nbytes for frame in fetch.frames)


async def fetch_frames(store: GetRange, fetch: FramesFetch, wanted: Sequence[WantedFrames], pool: BufferPool) -> None:
    """Fetches, restores and places.

    Raises:
        IntegrityError: a frame is not what was stored; nothing of it was placed.
    """
    buffer = pool.take(len(fetch.at))
    stored = buffer[: len(fetch.at)]
    await store.get_range(fetch.key, fetch.at, [stored] if len(stored) else [])
    await in_thread(_restore_all, fetch, stored, wanted)
    pool.give(buffer)


def _restore_all(fetch: FramesFetch, stored: memoryview, wanted: Sequence[WantedFrames]) -> None:
    for frame in fetch.frames:
        at = frame.at.shift(-fetch.at.start)
        users = [wanted[i] for i in frame.reads]
        plain = _restore(frame, stored[at.start : at.stop], users[0])
        for user in users:
            read = user.framed.read
            for region, within in placements(read, frame_range(read, frame.index)):
                user.sink.place(region, plain[within.start : within.stop])


def _restore(frame: WantedFrame, data: memoryview, wanted: WantedFrames) -> memoryview:
    read, stored = wanted.framed.read, wanted.framed.stored
    if read.checksums and crc32c(data) != read.checksums[frame.index]:
        raise damaged(wanted.name, read.key, frame.at)
    context = FrameContext(
        shard=stored.token,
        item=stored.item,
        number=stored.first + frame.index,
        index=frame.index,
        is_last=frame.index + 2 == len(stored.starts),
        width=stored.number_size,
    )
    try:
        return stored.chain.restore(data, context, frame.nbytes)
    except IntegrityError as e:
        msg = (
            f"{wanted.name}: frame {frame.index} at bytes {frame.at.start} to {frame.at.stop} of {read.key}: {e}. "
            "The stored shard is not what was written; load an earlier checkpoint"
        )
        raise IntegrityError(msg) from e
