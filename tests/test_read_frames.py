"""Slices of what was transformed: the frames they need, proven whole, and every element in its place."""

import json
import os
from itertools import accumulate, pairwise, product
from math import prod

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from awscrt.checksums import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

import cloudckpt
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.engine.fetching import RegionRead, StoredFrames, frame_range
from cloudckpt.engine.frame_fetching import FramedRead, frames_of, placements, plan_frame_fetches
from cloudckpt.engine.read import ReadOptions, Stats, Wanted, read_regions
from cloudckpt.engine.regions import Locator
from cloudckpt.errors import (
    EncryptionKeyError,
    IntegrityError,
    ManifestError,
    MissingLibraryError,
    UnknownExtensionError,
)
from cloudckpt.extensions import AesGcm, BytePlane, ExtensionRegistry, ZStandard
from cloudckpt.manifest import TensorEntry, encode, pack, parse, unpack
from cloudckpt.ranges import Range, Region, rectangles, strides_of
from cloudckpt.store.url import open_store
from cloudckpt.testing import RecordingStore, Rot13

KEYS = {"k": bytes(range(32))}
KIB = 1 << 10


# Plans, against brute force.

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


@st.composite
def regions_of(draw, shape):
    offsets, sizes = [], []
    for n in shape:
        offset = draw(st.integers(0, n))
        offsets.append(offset)
        sizes.append(draw(st.integers(0, n - offset)))
    return Region(tuple(offsets), tuple(sizes))


@st.composite
def reads(draw):
    shape = draw(SHAPES)
    itemsize = draw(st.sampled_from([1, 2, 4, 8, 16]))
    frame_size = 16 * draw(st.integers(1, 20))
    region = draw(regions_of(shape))
    return read_of(shape, itemsize, region, frame_size)


def read_of(shape, itemsize, region, frame_size, starts=None):
    count = -(-prod(shape) * itemsize // frame_size)
    stored = StoredFrames(chain=None, token="t", item="x", number_size=1, first=0, starts=starts or range(count + 1))
    return RegionRead(
        key="shards/ab/x.frames",
        start=0,
        itemsize=itemsize,
        shape=shape,
        region=region,
        frame_size=frame_size,
        checksums=[0] * count,
        is_direct=False,
        stored=stored,
    )


def elements(region):
    """Row-major indices of a region's elements."""
    return product(*(range(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True)))


def bytes_of(read):
    strides = strides_of(read.shape, read.itemsize)
    for index in elements(read.region):
        start = sum(i * s for i, s in zip(index, strides, strict=True))
        yield index, start


@settings(max_examples=400, deadline=None)
@given(reads())
def test_every_frame_that_holds_something_wanted_is_asked_for_once(read):
    needed = {start // read.frame_size for _, start in bytes_of(read)}
    found = list(frames_of(read, read.region))
    assert found == sorted(set(found))
    assert needed <= set(found)
    for frame in set(found) - needed:  # only where asking around it would spare less than a frame
        assert min(needed) < frame < max(needed)
        assert {frame - 1, frame + 1} & needed


@settings(max_examples=400, deadline=None)
@given(reads())
def test_every_element_is_placed_once_from_where_it_lies(read):
    placed = {}
    strides = strides_of(read.shape, read.itemsize)
    for frame in frames_of(read, read.region):
        at = frame_range(read, frame)
        for region, within in placements(read, at):
            assert 0 <= within.start <= within.stop <= len(at)
            first = sum(o * s for o, s in zip(region.offsets, strides, strict=True))
            assert at.start + within.start == first
            for index in elements(region):
                assert index not in placed
                placed[index] = sum(i * s for i, s in zip(index, strides, strict=True))
                assert at.start <= placed[index] < at.stop
    assert placed == dict(bytes_of(read))


@settings(max_examples=300, deadline=None)
@given(SHAPES, st.data())
def test_rectangles_make_up_a_run_in_order(shape, data):
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    strides = strides_of(shape, 1)
    found = [
        sum(i * s for i, s in zip(index, strides, strict=True))
        for region in rectangles(Range(start, stop), shape)
        for index in elements(region)
    ]
    assert found == list(range(start, stop))
    assert len(list(rectangles(Range(start, stop), shape))) <= max(1, 2 * len(shape) - 1)


def framed(*reads_):
    return [FramedRead(read, read.stored) for read in reads_]


def test_a_frame_that_several_want_is_fetched_once():
    rows = [read_of((64,), 1, Region((start,), (20,)), 16, starts=[0, 5, 12, 20, 31]) for start in (0, 10, 40)]
    (fetch,) = plan_frame_fetches(framed(*rows), max_request_size=100, max_gap=0)
    assert fetch.at == Range(0, 31)
    assert [(f.index, f.at, f.nbytes, f.reads) for f in fetch.frames] == [
        (0, Range(0, 5), 16, (0, 1)),
        (1, Range(5, 12), 16, (0, 1)),
        (2, Range(12, 20), 16, (2,)),
        (3, Range(20, 31), 16, (2,)),
    ]


@pytest.mark.parametrize(
    ("max_request_size", "max_gap", "wanted"),
    [
        (1000, 0, [(0, 10), (20, 40)]),
        (1000, 10, [(0, 10), (20, 40)]),  # as long as the gap: requests of their own
        (1000, 11, [(0, 40)]),
        (20, 0, [(0, 10), (20, 30), (30, 40)]),  # 16 plain bytes each: one in 20
        (32, 0, [(0, 10), (20, 40)]),
        (1, 0, [(0, 10), (20, 30), (30, 40)]),
    ],
)
def test_near_frames_are_one_request_up_to_its_limits(max_request_size, max_gap, wanted):
    starts = [0, 10, 20, 30, 40]
    both = [read_of((64,), 1, Region((at,), (n,)), 16, starts=starts) for at, n in ((0, 16), (32, 32))]
    found = plan_frame_fetches(framed(*both), max_request_size=max_request_size, max_gap=max_gap)
    assert [(f.at.start, f.at.stop) for f in found] == wanted


# Reads.

DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex64, torch.complex128]
CHAINS = {
    "zstd": [ZStandard()],
    "planes": [BytePlane()],
    "aesgcm": [AesGcm("k", KEYS)],
    "planes, zstd": [BytePlane(), ZStandard()],
    "all": [BytePlane(), ZStandard(), AesGcm("k", KEYS)],
    "rot13, zstd, aesgcm": [Rot13(), ZStandard(3), AesGcm("k", KEYS)],
}


def registry():
    made = ExtensionRegistry()
    made.register(Rot13)
    return made


def tensor_of(shape, dtype, seed=0):
    nbytes = prod(shape) * dtype.itemsize
    data = np.random.default_rng(seed).integers(0, 6, nbytes, np.uint8)
    return (
        torch.frombuffer(bytearray(data.tobytes()), dtype=dtype).reshape(shape)
        if nbytes
        else torch.zeros(shape, dtype=dtype)
    )


def save(url, state, chain, **options):
    dcp.save(state, storage_writer=ObjectStoreWriter(url, extensions=chain, **options))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(CHAINS)), dtype=st.sampled_from(DTYPES))
def test_any_slice_through_any_chain_is_equal(tmp_path_factory, data, name, dtype):
    shape = data.draw(st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple))
    frame_size = data.draw(st.integers(4096, 9000))
    url = f"file://{tmp_path_factory.mktemp('any')}/ckpt"
    tensor = tensor_of(shape, dtype)
    save(url, {"t": tensor, "other": torch.zeros(3)}, CHAINS[name], frame_size=frame_size)
    array = cloudckpt.open(url, keys=KEYS, registry=registry())["t"]
    region = data.draw(regions_of(shape))
    index = tuple(slice(o, o + s) for o, s in zip(region.offsets, region.sizes, strict=True))
    plain = tensor[index].contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    assert array[index].tobytes() == plain.numpy().tobytes()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """64 MiB of bf16 in rows of 8 KiB, in frames of 1 MiB: 128 rows each."""
    url = f"file://{tmp_path_factory.mktemp('rows')}/ckpt"
    tensor = torch.randn(8192, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    save(url, {"t": tensor}, CHAINS["all"], frame_size=1 << 20)
    return url, tensor


@pytest.mark.parametrize(
    ("index", "frames", "requests"),
    [
        (np.s_[1000:1010], 1, 1),
        (np.s_[1019:1029], 2, 1),
        (np.s_[0:1], 1, 1),
        (np.s_[8191], 1, 1),
        (np.s_[5:6, 7:9], 1, 1),
        (np.s_[100:101], 1, 1),
        (np.s_[0:0], 0, 0),
    ],
    ids=str,
)
def test_a_slice_costs_the_frames_it_lies_in(rows, index, frames, requests):
    url, tensor = rows
    ckpt = cloudckpt.open(url, keys=KEYS)
    sizes = unpack(ckpt._access.contents._manifest.shards[0].frame_sizes)
    found = ckpt["t"][index]
    assert found.tobytes() == tensor[index].contiguous().view(torch.uint8).numpy().tobytes()
    assert ckpt.stats.bytes_fetched <= frames * max(sizes)
    assert ckpt.stats.requests == requests
    if frames == 1:
        assert ckpt.stats.bytes_fetched in sizes


def test_ten_rows_of_a_compressed_and_encrypted_tensor_cost_at_most_three_frames(rows):
    url, tensor = rows

    async def read():
        async with open_store(url) as opened:
            store = RecordingStore(opened)
            await read_regions(store, wanted, ReadOptions(), stats)
            return store.requests

    ckpt = cloudckpt.open(url, keys=KEYS)
    out, stats = np.zeros((10, 4096), np.uint16), Stats()
    entry = ckpt._access.contents._manifest.entries["t"]
    read_ = ckpt._access.contents.read_chunk(
        "t", entry, entry.chunks[0], Region((1020, 0), (10, 4096)), is_direct=True
    )
    wanted = [Wanted("'t'", read_, ArraySink(out, (1020, 0)))]
    requests = loop.run(read)
    assert [method for method, _ in requests] == ["get_range"]
    assert stats.bytes_fetched <= 3 * max(unpack(ckpt._access.contents._manifest.shards[0].frame_sizes))
    assert out.tobytes() == tensor[1020:1030].view(torch.uint8).numpy().tobytes()


class ArraySink:
    """Rows of a chunk of 4,096 bf16 into an array."""

    memory = None

    def __init__(self, out, origin):
        self.out, self.origin, self.placed = out, origin, []

    def place(self, region, data):
        inside = region.relative_to(self.origin)
        at = tuple(slice(o, o + s) for o, s in zip(inside.offsets, inside.sizes, strict=True))
        self.out[at] = np.ndarray(region.sizes, self.out.dtype, data, strides=(8192, 2))
        self.placed.append(region)


# What is damaged.


class Broken:
    """A checkpoint of one tensor whose stored bytes and manifest can be changed, checksums included."""

    FRAME = 4096

    def __init__(self, path, chain, data=None):
        self.path, self.url = path / "ckpt", f"file://{path}/ckpt"
        self.data = np.random.default_rng(1).integers(0, 5, 10 * self.FRAME, np.uint8) if data is None else data
        save(self.url, {"t": torch.from_numpy(self.data)}, chain, frame_size=self.FRAME)
        self.manifest = parse((self.path / "manifest.json").read_bytes(), "here")
        (self.shard,) = self.manifest.shards
        body = (self.path / self.shard.key).read_bytes()
        starts = [0, *accumulate(unpack(self.shard.frame_sizes))]
        self.frames = [body[a:b] for a, b in pairwise(starts)]

    def write(self, *, with_checksums, **changes):
        """Puts the frames and the manifest that go with them."""
        body = b"".join(self.frames)
        (self.path / self.shard.key).write_bytes(body)
        shard = self.shard
        if with_checksums:
            shard = replace(
                shard,
                size=len(body),
                crc32c=crc32c(body),
                frame_sizes=pack(map(len, self.frames)),
                frame_checksums=pack(map(crc32c, self.frames)),
            )
        shard = replace(shard, **changes)
        entry: TensorEntry = self.manifest.entries["t"]
        (chunk,) = entry.chunks
        entry = replace(entry, chunks=(replace(chunk, stop=shard.size),))
        changed = replace(self.manifest, shards=(shard,), entries={"t": entry})
        (self.path / "manifest.json").write_bytes(encode(changed))

    def read(self, **options):
        """Reads all into memory with a pattern in it, and returns what there is after a failure."""
        manifest = parse((self.path / "manifest.json").read_bytes(), "here")
        locator = Locator(manifest, ReadOptions(keys=KEYS, **options))
        entry = manifest.entries["t"]
        out = np.full(len(self.data), 0xEE, np.uint8)
        read = locator.read_chunk("t", entry, entry.chunks[0], Region((0,), (len(out),)), is_direct=True)

        class Sink:
            memory = None

            def place(self, region, data):
                out[region.offsets[0] : region.offsets[0] + region.sizes[0]] = np.frombuffer(data, np.uint8)

        async def run():
            async with open_store(self.url) as opened:
                store = RecordingStore(opened)
                requests.append(store.requests)
                await read_regions(store, [Wanted("'t'", read, Sink())], ReadOptions(), Stats())

        requests, error = [], None
        try:
            loop.run(run)
        except IntegrityError as e:
            error = e
        return out, error


def place_of(broken, frame):
    start = sum(map(len, broken.frames[:frame]))
    return f"bytes {start} to {start + len(broken.frames[frame])} of {broken.shard.key}"


def assert_refused(broken, frame, **options):
    out, error = broken.read(**options)
    assert isinstance(error, IntegrityError)
    assert "'t'" in str(error)
    assert place_of(broken, frame) in str(error)
    size = broken.FRAME
    assert (out[frame * size : (frame + 1) * size] == 0xEE).all()
    for other in set(range(10)) - {frame}:  # elsewhere is the truth, or nothing
        part = slice(other * size, (other + 1) * size)
        assert (out[part] == broken.data[part]).all() or (out[part] == 0xEE).all()


BOTH = pytest.mark.parametrize("name", ["zstd", "all"])


@BOTH
def test_sound_it_is_read(tmp_path, name):
    broken = Broken(tmp_path, CHAINS[name])
    broken.write(with_checksums=True)
    out, error = broken.read()
    assert error is None
    assert (out == broken.data).all()


@BOTH
@pytest.mark.parametrize("frame", [0, 4, 9])
@pytest.mark.parametrize("at", [0, 5, -1])
def test_a_flipped_bit_is_found_by_the_frames_checksum(tmp_path, name, frame, at):
    broken = Broken(tmp_path, CHAINS[name])
    damaged = bytearray(broken.frames[frame])
    damaged[at] ^= 4
    broken.frames[frame] = bytes(damaged)
    broken.write(with_checksums=False)
    assert_refused(broken, frame)


@pytest.mark.parametrize("at", [0, 5, -1])
def test_a_flipped_bit_under_a_right_checksum_is_found_by_encryption(tmp_path, at):
    broken = Broken(tmp_path, CHAINS["all"])
    damaged = bytearray(broken.frames[3])
    damaged[at] ^= 4
    broken.frames[3] = bytes(damaged)
    broken.write(with_checksums=True)
    assert_refused(broken, 3)


@BOTH
def test_a_frame_cut_off_under_a_right_checksum_is_refused(tmp_path, name):
    broken = Broken(tmp_path, CHAINS[name])
    broken.frames[3] = broken.frames[3][:-1]
    broken.write(with_checksums=True)
    assert_refused(broken, 3)


@BOTH
def test_bytes_behind_a_frame_under_a_right_checksum_are_damage(tmp_path, name):
    broken = Broken(tmp_path, CHAINS[name])
    broken.frames[3] += b"more"
    broken.write(with_checksums=True)
    assert_refused(broken, 3)


def test_encrypted_frames_that_were_swapped_with_their_checksums_are_refused(tmp_path):
    broken = Broken(tmp_path, CHAINS["all"])
    broken.frames[3], broken.frames[7] = broken.frames[7], broken.frames[3]
    broken.write(with_checksums=True)
    out, error = broken.read()
    assert "not authentic" in str(error)
    for frame in (3, 7):
        assert (out[frame * broken.FRAME : (frame + 1) * broken.FRAME] == 0xEE).all()


@BOTH
def test_frames_that_were_swapped_alone_are_refused(tmp_path, name):
    broken = Broken(tmp_path, CHAINS[name])
    broken.frames[3], broken.frames[4] = broken.frames[4], broken.frames[3]
    broken.write(with_checksums=False)
    out, error = broken.read()
    assert isinstance(error, IntegrityError)
    assert (out[3 * broken.FRAME : 5 * broken.FRAME] == 0xEE).all()


def test_a_bomb_is_refused_and_named(tmp_path):
    broken = Broken(tmp_path, CHAINS["zstd"])
    blocks = b"".join(((i == 999) | 1 << 1 | (128 * KIB) << 3).to_bytes(3, "little") + b"a" for i in range(1000))
    for header in (bytes([0xE0]) + (128_000 * KIB).to_bytes(8, "little"), bytes([0x00, 0x58])):
        broken.frames[3] = b"\x28\xb5\x2f\xfd" + header + blocks
        broken.write(with_checksums=True)
        assert_refused(broken, 3)


def test_a_truncated_shard_is_an_error(tmp_path):
    broken = Broken(tmp_path, CHAINS["all"])
    (broken.path / broken.shard.key).write_bytes(b"".join(broken.frames)[:-1])
    with pytest.raises(cloudckpt.errors.StoreError, match="frames"):
        cloudckpt.open(broken.url, keys=KEYS)["t"][:]


LIES = {
    "a size more": lambda b: {"frame_sizes": pack([*map(len, b.frames), 1])},
    "a size less": lambda b: {"frame_sizes": pack(map(len, b.frames[:-1]))},
    "another sum": lambda b: {"frame_sizes": pack([len(b.frames[0]) + 1, *map(len, b.frames[1:])])},
    "no sizes": lambda b: {"frame_sizes": ""},
    "a frame size that is no multiple": lambda b: {"frame_size": 4095},
    "a frame size beyond all memory": lambda b: {"frame_size": 1 << 40},
    "larger frames": lambda b: {"frame_size": 8192},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_frames_that_cannot_be_are_refused_before_a_request(tmp_path, lie):
    broken = Broken(tmp_path, CHAINS["zstd"])
    broken.write(with_checksums=True, **lie(broken))
    ckpt = cloudckpt.open(broken.url)
    with pytest.raises(ManifestError, match=f"{broken.shard.key}|entry 't' is not sound"):
        ckpt["t"][:]
    assert ckpt.stats.requests == 0


@BOTH
def test_a_frames_length_that_was_changed_at_the_cost_of_the_next_is_found(tmp_path, name):
    broken = Broken(tmp_path, CHAINS[name])
    sizes = list(map(len, broken.frames))
    sizes[3] += 1
    sizes[4] -= 1
    broken.write(with_checksums=True, frame_sizes=pack(sizes))
    out, error = broken.read()
    assert isinstance(error, IntegrityError)
    assert broken.shard.key in str(error)
    assert (out[3 * broken.FRAME : 5 * broken.FRAME] == 0xEE).all()


def test_a_chunk_that_begins_between_frames_is_refused(tmp_path):
    broken = Broken(tmp_path, CHAINS["zstd"])
    data = json.loads((broken.path / "manifest.json").read_bytes())
    data["entries"]["t"][3][0][3] += 1
    body = json.dumps(data).encode().rpartition(b', "crc32c"')[0]
    (broken.path / "manifest.json").write_bytes(body + b',"crc32c":"%08x"}' % crc32c(body))
    with pytest.raises(cloudckpt.errors.ManifestError):
        cloudckpt.open(broken.url)["t"][:]


def test_what_is_missing_is_told_before_a_request(tmp_path, monkeypatch):
    def refuse():
        raise MissingLibraryError("pip install 'cloudckpt[zstd]'")

    broken = Broken(tmp_path, CHAINS["rot13, zstd, aesgcm"])
    for options, error, says in (
        ({"keys": KEYS}, UnknownExtensionError, "stream.rot13@cloudckpt"),
        ({"registry": registry()}, EncryptionKeyError, "'k'"),
    ):
        ckpt = cloudckpt.open(broken.url, **options)
        with pytest.raises(error, match=says) as caught:
            ckpt["t"][0:1]
        assert ckpt.stats.requests == 0
        assert any(broken.shard.key in note for note in caught.value.__notes__)
    monkeypatch.setattr("cloudckpt.extensions.zstd.library", refuse)
    ckpt = cloudckpt.open(broken.url, keys=KEYS, registry=registry())
    with pytest.raises(MissingLibraryError, match="pip install"):
        ckpt["t"][0:1]
    assert ckpt.stats.requests == 0


def test_a_wrong_key_is_told_when_the_checkpoint_is_opened(tmp_path):
    broken = Broken(tmp_path, CHAINS["all"])
    with pytest.raises(EncryptionKeyError, match="'k'"):
        cloudckpt.open(broken.url, keys={"k": os.urandom(32)})
