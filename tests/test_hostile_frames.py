"""Stored frames and streams that lie are refused, or restored to the bytes that there should be."""

import io
import random
import tracemalloc

import pytest
from hypothesis import given

from cloudckpt.errors import IntegrityError
from cloudckpt.extensions import ZStandard
from cloudckpt.extensions.chain import Chain
from cloudckpt.extensions.streams import StreamCodec, read_at_most
from fuzz import fuzz_frames
from fuzz.mutations import HOSTILE, altered_bytes


@HOSTILE
@given(altered_bytes(fuzz_frames.seeds()))
def test_a_frame_or_stream_of_altered_bytes_is_refused_or_restored(data):
    fuzz_frames.check(data)


@pytest.mark.parametrize("data", fuzz_frames.seeds(), ids=lambda data: str(data[0]))
def test_what_is_altered_can_be_restored(data):
    fuzz_frames.check(data)


def bomb(blocks, size=None):
    """A frame of Zstandard whose blocks restore to 128 KiB each, of four bytes; it says what that makes, or not."""
    block = (((128 << 10) << 3) | (1 << 1)).to_bytes(3, "little") + b"\0"
    last = (((128 << 10) << 3) | (1 << 1) | 1).to_bytes(3, "little") + b"\0"
    header = b"\x00\x58" if size is None else b"\xa0" + size.to_bytes(4, "little")
    return b"\x28\xb5\x2f\xfd" + header + block * (blocks - 1) + last


BOMB = bomb(16_000)
"""64 KB that restore to 2 GB."""


def held(restore):
    """The most memory that it took while it was refused."""
    tracemalloc.start()
    try:
        with pytest.raises((IntegrityError, ValueError)):
            restore()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_stream_that_restores_to_gigabytes_is_refused_before_it_has():
    assert len(read_at_most(ZStandard().transform_from(io.BytesIO(bomb(2))), 1 << 20)) == 256 << 10
    assert held(lambda: read_at_most(ZStandard().transform_from(io.BytesIO(BOMB)), 1 << 20)) < 256 << 20


def test_a_stream_in_frames_that_restores_to_gigabytes_is_refused_before_it_has():
    codec = StreamCodec(ZStandard())
    assert held(lambda: codec.restore(memoryview(BOMB), fuzz_frames.context(), limit=1 << 20)) < 256 << 20


@pytest.mark.parametrize("size", [None, 1 << 31], ids=["in all", "as it says"])
def test_a_frame_that_restores_to_gigabytes_is_refused_before_it_has(size):
    shard = Chain((ZStandard(),)).start_shard()
    stored = memoryview(bomb(16_000, size))
    assert held(lambda: shard.restore(stored, fuzz_frames.context(), 1 << 20)) < 16 << 20


def test_pieces_of_a_stream_are_as_long_as_they_like():
    data = random.Random(3).randbytes(200_000) + bytes(200_000)
    stored = fuzz_frames.streamed(ZStandard(), data) + fuzz_frames.streamed(ZStandard(), b"") * 3
    stream = ZStandard().transform_from(io.BytesIO(stored + fuzz_frames.streamed(ZStandard(), data)))
    assert read_at_most(stream, 1 << 21) == data + data
