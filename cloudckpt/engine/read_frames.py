"""Whole frames down: fetch, verify, restore, place.

Law: async; a frame is verified and restored whole before a byte of it is placed. One that does not match its checksum
is asked for once more before it is called damaged.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from awscrt.checksums import crc32c

from cloudckpt.engine.budget import BufferPool
from cloudckpt.engine.fetching import frame_range
from cloudckpt.engine.frame_fetching import FramedRead, FramesFetch, WantedFrame, placements, wanted_frame
from cloudckpt.engine.sinks import Sink, damaged
from cloudckpt.engine.tracing import RESTORE, Recorder
from cloudckpt.errors import IntegrityError
from cloudckpt.extensions.base import FrameContext
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import GetRange
from cloudckpt.threads import in_thread

log = logging.getLogger(__name__)

_COPIES = 3
"""How often a chain may hold a frame while it restores it, the frame itself included."""


@dataclass(frozen=True, slots=True)
class WantedFrames:
    """A read by whole frames and where it goes; ``name`` is for messages."""

    name: str
    framed: FramedRead
    sink: Sink


def fetch_nbytes(fetch: FramesFetch, wanted: Sequence[WantedFrames]) -> int:
    """The memory that a fetch takes: what is stored, and one frame at a time as it is restored, if it has to be."""
    if wanted[fetch.frames[0].reads[0]].framed.read.stored is None:
        return len(fetch.at)
    return len(fetch.at) + _COPIES * max(frame.nbytes for frame in fetch.frames)


async def fetch_frames(
    store: GetRange, fetch: FramesFetch, wanted: Sequence[WantedFrames], pool: BufferPool, recorder: Recorder
) -> None:
    """Fetches, verifies, restores and places.

    Raises:
        IntegrityError: a frame is not what was stored; nothing of it was placed.
    """
    buffer = pool.take(len(fetch.at))
    stored = buffer[: len(fetch.at)]
    await store.get_range(fetch.key, fetch.at, [stored] if len(stored) else [])
    timed = recorder.timed
    unsound = await in_thread(
        timed, RESTORE, len(fetch.at), fetch.key, _place_sound, fetch, fetch.frames, stored, wanted
    )
    if unsound:
        for frame in unsound:
            user, inside = wanted[frame.reads[0]], frame.at.shift(-fetch.at.start)
            await _fetch_again(store, user, frame.index, frame.at, stored[inside.start : inside.stop])
        await in_thread(_place_sound, fetch, unsound, stored, wanted)
    recorder.advance(len(fetch.at))
    pool.give(buffer)


async def read_again(store: GetRange, wanted: WantedFrames, index: int, pool: BufferPool) -> None:
    """Fetches one frame that did not match its checksum when it came in several pieces, and places it.

    Raises:
        IntegrityError: it is damaged; nothing of it was placed.
    """
    frame = wanted_frame(wanted.framed, index, (0,))
    fetch = FramesFetch(wanted.framed.read.key, frame.at, (frame,))
    buffer = pool.take(len(frame.at))
    stored = buffer[: len(frame.at)]
    await _fetch_again(store, wanted, index, frame.at, stored)
    await in_thread(_place_sound, fetch, fetch.frames, stored, [wanted])
    pool.give(buffer)


async def _fetch_again(store: GetRange, wanted: WantedFrames, index: int, at: Range, into: memoryview) -> None:
    read, number = wanted.framed.read, index * wanted.framed.joined
    await fetch_again(
        store, into, name=wanted.name, key=read.key, frame=number, at=at, checksum=read.checksums[index]
    )


async def fetch_again(
    store: GetRange, into: memoryview, *, name: str, key: str, frame: int, at: Range, checksum: int
) -> None:
    """Fetches a frame that did not match its checksum once more: what was damaged on its way heals by that.

    Args:
        store: has it.
        into: receives it; nothing else may write there any more.
        name: of its item, for messages.
        key: of its shard.
        frame: its number in the item, for messages.
        at: its bytes in the shard.
        checksum: its CRC32C.

    Raises:
        IntegrityError: it does not match again.
    """
    msg = "%s: frame %d, bytes %d to %d of %s, does not match its checksum; asking for it once more"
    log.warning(msg, name, frame, at.start, at.stop, key)
    await store.get_range(key, at, [into])
    if await in_thread(crc32c, into) != checksum:
        raise damaged(name, key, frame, at)


def _place_sound(
    fetch: FramesFetch, frames: Sequence[WantedFrame], stored: memoryview, wanted: Sequence[WantedFrames]
) -> list[WantedFrame]:
    """Restores and places those of ``frames`` that match their checksum, and returns the others."""
    unsound = []
    for frame in frames:
        at = frame.at.shift(-fetch.at.start)
        users = [wanted[i] for i in frame.reads]
        data = stored[at.start : at.stop]
        checksums = users[0].framed.read.checksums
        if checksums and crc32c(data) != checksums[frame.index]:
            unsound.append(frame)
            continue
        plain = _restore(frame, data, users[0])
        for user in users:
            read = user.framed.read
            for region, within in placements(read, frame_range(read, frame.index)):
                user.sink.place(region, plain[within.start : within.stop])
    return unsound


def _restore(frame: WantedFrame, data: memoryview, wanted: WantedFrames) -> memoryview:
    read, stored = wanted.framed.read, wanted.framed.stored
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
