"""Zstandard: what was compressed comes back, and nothing else makes it do anything."""

import io
import os
import pickle
import subprocess
import sys
import textwrap
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import _extension

from cloudckpt.errors import IntegrityError, MissingLibraryError, UnknownExtensionError, UsageError
from cloudckpt.extensions import FrameContext, ZStandard
from cloudckpt.extensions.chain import Chain, open_shard
from cloudckpt.extensions.zstd import ZstdCodec
from cloudckpt.extensions.zstd_libraries import Pyzstd, Zstandard

FRAME = FrameContext(shard="0" * 32, item="x", number=0, index=0, is_last=True, width=1)
LIBRARIES = {"zstandard": Zstandard, "pyzstd": Pyzstd}
MAGIC = b"\x28\xb5\x2f\xfd"


def codec(library=Zstandard, level=1):
    return ZstdCodec(level, library())


def restored(stored, limit, library=Zstandard):
    return bytes(codec(library).restore(memoryview(stored), FRAME, limit=limit))


def compressed(data, library=Zstandard):
    return b"".join(codec(library).transform([memoryview(data)], FRAME))


def frame(blocks, *, size=None, window=None):
    """A frame by hand. With a size and no window it is a single segment; blocks are (kind, size, bytes)."""
    if window is None:
        header = bytes([0xA0 | 0x40]) + size.to_bytes(8, "little") if size is not None else bytes([0x00, 0x58])
    else:
        header = bytes([0x00, window])
    body = b""
    for i, (kind, nbytes, data) in enumerate(blocks):
        is_last = i + 1 == len(blocks)
        body += (is_last | kind << 1 | nbytes << 3).to_bytes(3, "little") + data
    return MAGIC + header + body


RAW, RLE = 0, 1


@pytest.mark.parametrize("writes", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize("reads", LIBRARIES.values(), ids=LIBRARIES)
@settings(max_examples=30, deadline=None)
@given(sections=st.lists(st.binary(max_size=3000) | st.binary(max_size=9).map(lambda b: b * 999), min_size=1))
def test_what_either_library_writes_both_read(writes, reads, sections):
    stored = b"".join(codec(writes).transform([memoryview(s) for s in sections], FRAME))
    plain = b"".join(sections)
    assert restored(stored, len(plain), reads) == plain


@pytest.mark.parametrize("level", [-7, -1, 1, 3, 19, 22])
def test_every_level_is_read_without_knowing_it(level):
    data = b"weights and " * 5000
    stored = b"".join(codec(level=level).transform([memoryview(data)], FRAME))
    assert len(stored) < len(data) // 20
    assert restored(stored, len(data)) == data


@pytest.mark.parametrize("level", [0, 23, -8, 100])
def test_a_level_there_is_not_is_refused(level):
    with pytest.raises(UsageError, match=str(level)):
        ZStandard(level)


def test_a_plane_that_does_not_shrink_is_kept_as_raw_blocks():
    noise, flat = os.urandom(300_000), bytes(300_000)
    kept, shrunk = codec().transform([memoryview(noise), memoryview(flat)], FRAME)
    assert len(kept) < len(noise) + 64
    assert noise[:1000] in bytes(kept)
    assert len(shrunk) < 100
    assert restored(bytes(kept) + bytes(shrunk), 600_000) == noise + flat


def test_exponents_are_compressed_by_entropy_alone():
    """Few values without a pattern: matches between them are chance."""
    import random

    exponents = bytes(random.Random(0).choices(range(118, 124), (1, 2, 4, 8, 8, 4), k=400_000))
    first, _ = codec().transform([memoryview(exponents), memoryview(exponents)], FRAME)
    assert len(first) < len(zstandard.ZstdCompressor(level=1).compress(exponents))
    assert restored(first, len(exponents)) == exponents


def test_a_plane_with_a_pattern_is_compressed_at_the_level():
    row = os.urandom(5000)
    pattern = row * 100
    first, _ = codec().transform([memoryview(pattern), memoryview(pattern)], FRAME)
    assert len(first) < len(pattern) // 20


DAMAGED = {
    "nothing": (b"abc", 3),
    "a bad magic": (b"\x28\xb5\x2f\xfe" + bytes(20), 3),
    "a skippable frame": (b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"data", 3),
    "a skippable frame behind": (compressed(b"abc") + b"\x50\x2a\x4d\x18" + bytes(4), 3),
    "one byte behind": (compressed(b"abc") + b"\0", 3),
    "a frame of too much behind": (compressed(b"abc") + compressed(b"d"), 3),
    "a reserved bit": (MAGIC + bytes([0x28, 3]) + bytes([25, 0, 0]) + b"abc", 3),
    "a dictionary": (MAGIC + bytes([0x21, 7, 3]) + bytes([25, 0, 0]) + b"abc", 3),
    "a block that cannot be": (MAGIC + bytes([0x20, 3]) + bytes([31, 0, 0]) + b"abc", 3),
    "a block that is too large": (frame([(RAW, 200_000, bytes(200_000))], size=200_000), 200_000),
    "1 TiB claimed": (frame([(RAW, 3, b"abc")], size=1 << 40), 3),
    "2 EiB claimed": (frame([(RAW, 3, b"abc")], size=1 << 61), 1 << 62),
    "more claimed than allowed": (frame([(RAW, 4, b"abcd")], size=4), 3),
    "more blocks than claimed": (frame([(RLE, 100_000, b"a")] * 50, size=100_000), 100_000),
    "fewer bytes than claimed": (frame([(RAW, 3, b"abc")], size=4), 4),
    "nothing claimed and much made": (frame([(RLE, 100_000, b"a")] * 50), 100_000),
    "a window of 2 GiB": (frame([(RAW, 3, b"abc")], window=21 << 3), 3),
}


@pytest.mark.parametrize("reads", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize(("stored", "limit"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_not_just_whole_frames_is_refused(stored, limit, reads):
    with pytest.raises(ValueError):
        restored(stored, limit, reads)


def test_the_frames_made_by_hand_above_would_be_read_if_they_were_sound():
    assert restored(frame([(RAW, 3, b"abc")], size=3), 3) == b"abc"
    assert restored(frame([(RLE, 50_000, b"a")] * 2, size=100_000), 100_000) == b"a" * 100_000
    assert restored(frame([(RLE, 50_000, b"a")] * 2), 100_000) == b"a" * 100_000
    assert restored(frame([(RAW, 3, b"abc")], window=10 << 3), 3) == b"abc"
    assert restored(MAGIC + bytes([0x20, 3]) + bytes([25, 0, 0]) + b"abc", 3) == b"abc"


@pytest.mark.parametrize("cut", range(60))
def test_a_frame_cut_anywhere_is_refused(cut):
    stored = compressed(b"some text, then some text again" * 3)
    if cut < len(stored):
        with pytest.raises(ValueError):
            restored(stored[:cut] if cut else stored[:-1], 93)


@pytest.mark.parametrize("reads", LIBRARIES.values(), ids=LIBRARIES)
@settings(max_examples=200, deadline=None)
@given(data=st.binary(min_size=1, max_size=500), flips=st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_a_flipped_bit_gives_an_error_or_as_many_bytes(data, flips, reads):
    """Zstandard has no checksum here: the floor above has one for each frame."""
    chain = open_shard([ZStandard()], ["stream.zstd/1"], [])
    stored = bytearray(compressed(data * 3))
    for flip in flips:
        stored[flip // 8 % len(stored)] ^= 1 << flip % 8
    with suppress(IntegrityError):
        assert len(chain.restore(memoryview(bytes(stored)), FRAME, len(data) * 3)) == len(data) * 3
    with suppress(ValueError):
        assert len(restored(stored, len(data) * 3, reads)) <= len(data) * 3


BOMB = """
    import resource
    from cloudckpt.extensions.zstd import ZstdCodec
    from cloudckpt.extensions.zstd_libraries import {library}
    from cloudckpt.extensions import FrameContext
    frame = FrameContext(shard="", item="", number=0, index=0, is_last=True, width=1)
    blocks = 20_000
    block = lambda is_last: (is_last | 1 << 1 | (128 << 10) << 3).to_bytes(3, "little") + b"a"
    body = block(False) * (blocks - 1) + block(True)
    declared = b"\\x28\\xb5\\x2f\\xfd" + bytes([0xE0]) + (blocks << 17).to_bytes(8, "little") + body
    small = b"\\x28\\xb5\\x2f\\xfd" + bytes([0xE0]) + (1 << 20).to_bytes(8, "little") + body
    silent = b"\\x28\\xb5\\x2f\\xfd" + bytes([0x00, 0x58]) + body
    codec = ZstdCodec(1, {library}())
    codec.restore(memoryview(b"".join(codec.transform([memoryview(bytes(1 << 20))], frame))), frame, limit=1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in (declared, small, silent):
        try:
            codec.restore(memoryview(bomb), frame, limit=1 << 20)
        except ValueError:
            continue
        raise SystemExit("not refused")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("library", ["Zstandard", "Pyzstd"])
def test_a_bomb_of_2_5_gib_takes_hardly_any_memory(library):
    code = textwrap.dedent(BOMB.format(library=library))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 << 10  # KiB


@pytest.mark.parametrize("writes", LIBRARIES.values(), ids=LIBRARIES)
def test_torch_reads_our_streams_and_we_read_its(writes, monkeypatch):
    monkeypatch.setattr("cloudckpt.extensions.zstd.library", writes)
    data = os.urandom(1000) * 900
    ours = io.BytesIO()
    kept = _Kept(ours)
    stream = ZStandard().transform_to(kept)
    for start in range(0, len(data), 70_001):
        assert stream.write(data[start : start + 70_001]) == len(data[start : start + 70_001])
    stream.close()
    assert kept.closed
    assert len(ours.getvalue()) < len(data) // 10
    theirs = io.BytesIO()
    stream = _extension.ZStandard().transform_to(_Kept(theirs))
    stream.write(data)
    stream.close()
    for stored in (ours.getvalue(), theirs.getvalue()):
        assert _extension.ZStandard().transform_from(io.BytesIO(stored)).read(-1) == data
        assert ZStandard().transform_from(io.BytesIO(stored)).read(-1) == data
        assert restored(stored, len(data)) == data
    assert ZStandard().transform_from(io.BytesIO(ours.getvalue() * 2)).read(-1) == data * 2
    assert not ZStandard().transform_from(io.BytesIO()).seekable()


class _Kept(io.RawIOBase):
    """Passes on, and can be closed without what is behind it."""

    def __init__(self, behind):
        self._behind = behind

    def writable(self):
        return True

    def write(self, data):
        return self._behind.write(data)


@pytest.mark.parametrize("reads", LIBRARIES.values(), ids=LIBRARIES)
def test_a_stream_that_is_cut_off_or_damaged_is_an_error(reads, monkeypatch):
    monkeypatch.setattr("cloudckpt.extensions.zstd.library", reads)
    stored = compressed(os.urandom(5000))
    for cut in (1, 5, 100, len(stored) - 1):
        with pytest.raises(IntegrityError, match="cut off"):
            ZStandard().transform_from(io.BytesIO(stored[:cut])).read(-1)
    with pytest.raises(IntegrityError, match="damaged"):
        ZStandard().transform_from(io.BytesIO(b"no frame at all")).read(-1)
    assert ZStandard().transform_from(io.BytesIO(b"")).read(-1) == b""


def test_a_frame_that_would_grow_is_stored_as_it_is():
    chain = Chain((ZStandard(),)).start_shard()
    noise = os.urandom(4096)
    assert b"".join(chain.transform(memoryview(noise), FRAME)) == noise
    assert chain.restore(memoryview(noise), FRAME, 4096) == noise


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=400) | st.binary(max_size=20).map(lambda b: b * 20))
def test_no_compressed_frame_is_as_long_as_the_plain_one(data):
    stored = b"".join(Chain((ZStandard(),)).start_shard().transform(memoryview(data), FRAME))
    assert stored == data or len(stored) < len(data)


def test_versions_are_told_apart():
    assert ZStandard.from_descriptor("1.5") == ZStandard()
    assert ZStandard(7).get_descriptor() == "stream.zstd/1"
    for version in ("", "2", "10", "x"):
        with pytest.raises(UnknownExtensionError, match=f"stream.zstd/{version} is"):
            ZStandard.from_descriptor(version)


def test_it_can_be_pickled():
    assert pickle.loads(pickle.dumps(ZStandard(5))) == ZStandard(5)


def test_without_either_library_it_says_what_to_install():
    code = """
        import sys
        sys.modules["zstandard"] = sys.modules["pyzstd"] = None
        from cloudckpt.extensions import ZStandard
        from cloudckpt.errors import MissingLibraryError
        for make in (ZStandard, lambda: ZStandard.from_descriptor("1")):
            try:
                make()
            except MissingLibraryError as e:
                assert "pip install 'cloudckpt[zstd]'" in str(e), e
            else:
                raise SystemExit("made all the same")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    assert issubclass(MissingLibraryError, ImportError)


def test_with_pyzstd_alone_it_works():
    code = """
        import sys
        sys.modules["zstandard"] = None
        from cloudckpt.extensions import ZStandard
        from cloudckpt.extensions.zstd_libraries import Pyzstd, library
        assert isinstance(library(), Pyzstd)
        assert len(b"".join(ZStandard().start_shard().transform([memoryview(bytes(9999))], None))) < 99
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
