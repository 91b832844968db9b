"""Reads that hand out nothing unverified: what strict ones fetch and find, and what they leave behind."""

import asyncio
import io
import logging
from secrets import token_hex

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from awscrt.checksums import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch.distributed.checkpoint import FileSystemWriter

import cloudckpt
from cloudckpt.array import ArrayTarget
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.engine.fetching import frame_range
from cloudckpt.engine.frame_fetching import by_frames
from cloudckpt.engine.read import ReadOptions, Stats, read_regions
from cloudckpt.errors import IntegrityError, StoreError, UsageError
from cloudckpt.extensions import AesGcm, BytePlane, ZStandard
from cloudckpt.ranges import Region, span_of
from cloudckpt.store.url import open_store
from cloudckpt.testing import FailingStore, RecordingStore, WrappedStore
from rude_server import RudeServer, serve
from test_read import FRAME, KEY, ONE, Shard, numbers, read, shards, slices

WHOLE = pytest.mark.parametrize("verify", ["strict", "before"])
ALL = pytest.mark.parametrize("verify", ["frames", "strict", "before"])
NOTHING = -7
"""What destinations are filled with; no array has it."""


class Flipping(WrappedStore):
    """Flips a bit of the object on its way, in the first so many answers that carry its byte."""

    def __init__(self, inner, at, *, times):
        super().__init__(inner)
        self.at, self.times = at, times
        self.ranges = []

    async def get_range(self, key, at, into):
        await super().get_range(key, at, into)
        self.ranges.append((at.start, at.stop))
        if self.times and at.start <= self.at < at.stop:
            self.times -= 1
            position = at.start
            for view in into:
                if position <= self.at < position + len(view):
                    view[self.at - position] ^= 16
                position += len(view)


def fresh(shard, n, region=None, *, is_direct=True):
    wanted = shard.want(n, region, is_direct=is_direct)
    wanted.sink.target[...] = NOTHING
    return wanted


def is_truth_or_nothing(wanted, array):
    found, truth = wanted.sink.target, array[slices(wanted.read.region)]
    return ((found == truth) | (found == NOTHING)).all()


def touched(read):
    """Bytes of the object, from the first to the last of the frames that hold something wanted, if all is one run."""
    span = span_of(read.region, read.shape, read.itemsize)
    first, last = span.start // read.frame_size, (span.stop - 1) // read.frame_size
    return range(read.start + first * read.frame_size, read.start + frame_range(read, last).stop)


# What arrives.


@WHOLE
@settings(deadline=None)
@given(
    shards(),
    st.fixed_dictionaries(
        {
            "max_request_size": st.integers(1, 2000),
            "max_gap": st.integers(0, 300),
            "concurrency": st.integers(1, 4),
            "max_inflight_nbytes": st.integers(1, 3000),
        }
    ),
)
def test_every_region_arrives_in_its_place(verify, sharded, options):
    shard, regions = sharded
    wanted = [shard.want(n, region, is_direct=is_direct) for n, region, is_direct in regions]
    stats = read(shard.store(), wanted, verify=verify, **options)
    for (n, region, _), w in zip(regions, wanted, strict=True):
        np.testing.assert_array_equal(w.sink.target, shard.arrays[n][slices(region)])
    assert stats.bytes_needed == sum(w.sink.target.nbytes for w in wanted)


@st.composite
def rows(draw):
    """A run of rows of an array whose frames may begin within its elements."""
    dtype = draw(st.sampled_from([np.int8, np.int16, np.int32, np.int64]))
    shard = Shard([numbers(30, 7, dtype=dtype)], draw(st.integers(1, 300)))
    start = draw(st.integers(0, 29))
    return shard, Region((start, 0), (draw(st.integers(1, 30 - start)), 7))


@WHOLE
@settings(deadline=None, max_examples=200)
@given(rows(), st.booleans(), st.integers(1, 2000), st.data())
def test_a_bit_flipped_in_any_frame_that_is_touched_is_found(verify, some, is_direct, max_request_size, data):
    shard, region = some
    wanted = fresh(shard, 0, region, is_direct=is_direct)
    body = bytearray(shard.body)
    body[data.draw(st.sampled_from(touched(wanted.read)))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(IntegrityError, match=rf"'weight': bytes \d+ to \d+ of {KEY} do not match.*frame \d+ of"):
        read(shard.store(body), [wanted], verify=verify, max_request_size=max_request_size)
    if verify == "before":
        assert is_truth_or_nothing(wanted, shard.arrays[0])


def test_a_read_of_part_of_a_frame_proves_it_only_where_it_is_strict():
    body = bytearray(ONE.body)
    body[24 + 1] ^= 1
    region = Region((0, 0), (1, 5))
    read(ONE.store(body), [ONE.want(0, region)])
    for verify in ("strict", "before"):
        with pytest.raises(IntegrityError, match=f"bytes 24 to 88 of {KEY} .* frame 0 of the item"):
            read(ONE.store(body), [ONE.want(0, region)], verify=verify)


@WHOLE
@pytest.mark.parametrize("at", [40, 47, 48, 55])
def test_columns_that_begin_and_end_with_frames_are_verified_between(verify, at):
    shard = Shard([numbers(40, 10)], 16)  # of rows of 40 bytes, of which 0 to 16, 40 to 56 and 80 to 96 are wanted
    body = bytearray(shard.body)
    body[24 + at] ^= 1
    with pytest.raises(IntegrityError):
        read(shard.store(body), [shard.want(0, Region((0, 0), (3, 4)))], verify=verify, max_gap=0)


def test_frames_that_begin_within_an_element_are_taken_several_at_a_time():
    shard = Shard([numbers(40, dtype=np.int64)], 36)
    framed = by_frames(shard.want(0).read)
    data = shard.arrays[0].tobytes()
    assert (framed.joined, framed.read.frame_size) == (2, 72)
    assert list(framed.read.checksums) == [crc32c(data[i : i + 72]) for i in range(0, 320, 72)]
    assert list(framed.stored.starts) == [24, 96, 168, 240, 312, 344]
    body = bytearray(shard.body)
    body[24 + 200] ^= 1
    with pytest.raises(IntegrityError, match=f"bytes 168 to 240 of {KEY} .* frame 4 of the item"):
        read(shard.store(body), [shard.want(0)], verify="before")


# What it costs.


@pytest.mark.parametrize(
    ("verify", "region", "nbytes"),
    [
        ("frames", Region((7, 0), (3, 10)), 120),  # bytes 280 to 400, in the frames from 256 to 448
        ("strict", Region((7, 0), (3, 10)), 192),
        ("before", Region((7, 0), (3, 10)), 192),
        ("strict", Region((0, 0), (40, 10)), 1600),
        ("before", Region((0, 0), (40, 10)), 1600),
    ],
)
def test_what_is_verified_is_fetched_by_whole_frames(verify, region, nbytes):
    recording = RecordingStore(ONE.store())
    stats = read(recording, [ONE.want(0, region)], verify=verify)
    assert (stats.requests, stats.bytes_fetched, stats.bytes_needed) == (1, nbytes, region.numel * 4)
    assert recording.requests == [("get_range", KEY)]


@WHOLE
def test_a_frame_that_several_want_is_fetched_once(verify):
    wanted = [ONE.want(0, Region((n, 0), (1, 10))) for n in range(5)]  # bytes 0 to 200, in four frames
    stats = read(ONE.store(), wanted, verify=verify)
    assert (stats.requests, stats.bytes_fetched) == (1, 256)


def test_what_goes_through_memory_of_the_budget_is_asked_for_in_as_many_requests():
    shard = Shard([np.arange(4 << 20)], 1 << 20)  # 32 MiB
    found = {}
    for verify in ("frames", "strict", "before"):
        wanted = shard.want(0)
        found[verify] = read(shard.store(), [wanted], verify=verify).requests
        np.testing.assert_array_equal(wanted.sink.target, shard.arrays[0])
    assert found == {"frames": 4, "strict": 4, "before": 4}


class Looking(WrappedStore):
    def __init__(self, inner):
        super().__init__(inner)
        self.received = []

    async def get_range(self, key, at, into):
        self.received.extend(into)
        await super().get_range(key, at, into)


@pytest.mark.parametrize(
    ("verify", "region", "is_direct"),
    [
        ("strict", Region((0, 0), (40, 10)), True),
        ("strict", Region((8, 0), (16, 10)), True),  # bytes 320 to 960: borders of frames
        ("strict", Region((8, 0), (15, 10)), False),
        ("before", Region((0, 0), (40, 10)), False),
    ],
)
def test_memory_is_received_into_only_by_strict_reads_of_whole_frames(verify, region, is_direct):
    looking, wanted = Looking(ONE.store()), ONE.want(0, region)
    read(looking, [wanted], verify=verify)
    np.testing.assert_array_equal(wanted.sink.target, ONE.arrays[0][slices(region)])
    shared = [np.shares_memory(np.frombuffer(view, np.uint8), wanted.sink.target) for view in looking.received]
    assert shared == [is_direct]


@WHOLE
def test_requests_in_flight_keep_to_the_budget(verify):
    class Gauged(WrappedStore):
        now = most = 0

        async def get_range(self, key, at, into):
            self.now += len(at)
            self.most = max(self.most, self.now)
            for _ in range(20):
                await asyncio.sleep(0)
            await super().get_range(key, at, into)
            self.now -= len(at)

    shard = Shard([numbers(160, 10)])
    gauged, wanted = Gauged(shard.store()), shard.want(0, Region((1, 0), (159, 10)))
    read(gauged, [wanted], max_request_size=320, max_inflight_nbytes=1280, verify=verify)
    np.testing.assert_array_equal(wanted.sink.target, shard.arrays[0][1:])
    assert 320 < gauged.most <= 1280


# What a failure leaves behind.


@settings(deadline=None, max_examples=200)
@given(shards(), st.integers(1, 600), st.integers(0, 50), st.data())
def test_before_it_is_verified_nothing_is_placed(sharded, max_request_size, max_gap, data):
    shard, regions = sharded
    wanted = [fresh(shard, n, region, is_direct=is_direct) for n, region, is_direct in regions]
    body = bytearray(shard.body)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    body = body[: data.draw(st.integers(len(body) - 10, len(body)))]
    try:
        read(shard.store(body), wanted, max_request_size=max_request_size, max_gap=max_gap, verify="before")
    except (IntegrityError, StoreError):
        assert all(is_truth_or_nothing(w, shard.arrays[n]) for (n, _, _), w in zip(regions, wanted, strict=True))
    else:
        for (n, region, _), w in zip(regions, wanted, strict=True):
            np.testing.assert_array_equal(w.sink.target, shard.arrays[n][slices(region)])


@pytest.mark.parametrize("k", range(3))
def test_a_request_that_fails_leaves_no_part_of_a_frame(k):
    wanted = fresh(ONE, 0)
    with pytest.raises(StoreError):
        read(FailingStore(ONE.store(), k, StoreError("no")), [wanted], max_request_size=640, verify="before")
    assert is_truth_or_nothing(wanted, ONE.arrays[0])
    assert (wanted.sink.target == NOTHING).any()


# What was damaged on its way.

REGIONS = {
    "all of it": (Region((0, 0), (40, 10)), True),
    "all of it, placed": (Region((0, 0), (40, 10)), False),
    "rows": (Region((10, 0), (20, 10)), True),
    "columns": (Region((10, 2), (20, 5)), True),
}


@ALL
@pytest.mark.parametrize(("region", "is_direct"), REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("max_request_size", [32, 704, 4096])
def test_a_bit_flipped_on_its_way_heals_by_asking_again_for_the_frame(
    caplog, verify, region, is_direct, max_request_size
):
    at = 24 + 10 * FRAME + 3  # 643 of the item: in row 16, column 0; its frame holds some of columns 2 to 6
    flipping, wanted = Flipping(ONE.store(), at, times=1), fresh(ONE, 0, region, is_direct=is_direct)
    sound = read(ONE.store(), [fresh(ONE, 0, region, is_direct=is_direct)], verify=verify,
                 max_request_size=max_request_size)  # fmt: skip
    with caplog.at_level(logging.WARNING, "cloudckpt"):
        stats = read(flipping, [wanted], verify=verify, max_request_size=max_request_size)
    np.testing.assert_array_equal(wanted.sink.target, ONE.arrays[0][slices(region)])
    if verify == "frames" and region.sizes[1] == 5:  # of which no frame came whole
        return
    assert flipping.ranges[-1] == (664, 728)
    assert (stats.requests, stats.bytes_fetched) == (sound.requests + 1, sound.bytes_fetched + FRAME)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"'weight': frame 10, bytes 664 to 728 of {KEY}, does not match its checksum; asking for it once more"
    )


@ALL
@pytest.mark.parametrize("max_request_size", [32, 704, 4096])
@pytest.mark.parametrize("is_direct", [True, False])
def test_a_frame_that_is_wrong_twice_is_damaged(verify, max_request_size, is_direct):
    flipping, wanted = Flipping(ONE.store(), 24 + 643, times=2), fresh(ONE, 0, is_direct=is_direct)
    with pytest.raises(IntegrityError, match=f"'weight': bytes 664 to 728 of {KEY} .* frame 10 of the item"):
        read(flipping, [wanted], verify=verify, max_request_size=max_request_size)
    assert flipping.times == 0
    if verify == "before":
        assert is_truth_or_nothing(wanted, ONE.arrays[0])


def test_of_two_who_want_the_same_each_gets_it_verified():
    # the frame's halves come in two requests for each of them; the second's are damaged
    class SecondTime(Flipping):
        seen = 0

        async def get_range(self, key, at, into):
            self.seen += at.start <= self.at < at.stop
            self.times = int(self.seen == 2)
            await super().get_range(key, at, into)

    store, both = SecondTime(ONE.store(), 24 + 643, times=0), [fresh(ONE, 0), fresh(ONE, 0)]
    read(store, both, verify="strict", max_request_size=32)
    assert store.seen == 3
    for wanted in both:
        np.testing.assert_array_equal(wanted.sink.target, ONE.arrays[0])


@ALL
@pytest.mark.parametrize("times", [1, 2])
def test_a_frame_with_extensions_heals_once_and_is_damaged_twice(verify, times):
    url, saved = f"memory://{token_hex(6)}/ckpt", numbers(6000)
    chain = [BytePlane(), ZStandard(), AesGcm("k", {"k": bytes(32)})]
    dcp.save(
        {"w": torch.from_numpy(saved)},
        storage_writer=ObjectStoreWriter(url, frame_size=4096, extensions=chain),
        no_dist=True,
    )
    out = np.full_like(saved, NOTHING)

    async def run():
        async with open_store(url) as opened:
            store = Flipping(opened, starts[3] + 5, times=times)
            ranges.append(store.ranges)
            await read_regions(store, wanted, ReadOptions(verify=verify), Stats())

    with cloudckpt.open(url, keys={"k": bytes(32)}) as ckpt:
        array = ckpt["w"]
        wanted = array.wanted(ArrayTarget(out), ckpt._access.locate(array.asks()))
        starts, ranges = wanted[0].read.stored.starts, []
        if times == 1:
            loop.run(run)
            np.testing.assert_array_equal(out, saved)
        else:
            with pytest.raises(IntegrityError, match=f"bytes {starts[3]} to {starts[4]} of .*frame 3 of the item"):
                loop.run(run)
            assert ((out == saved) | (out == NOTHING)).all()
            assert (out[3072:4096] == NOTHING).all()
    assert ranges == [[(0, starts[-1]), (starts[3], starts[4])]]


# Through every door.

STATE = {"w": torch.arange(3000.0).reshape(300, 10), "step": b"x" * 5000}
"""In frames of 4096 bytes: 102 rows and a bit."""


def objects_at(url):
    async def get_all():
        async with open_store(url) as store:
            return {found.key: (await store.get(found.key)).data async for found in store.list_objects()}

    return loop.run(get_all)


def put_at(url, key, data):
    async def put():
        async with open_store(url) as store:
            await store.put(key, [memoryview(data)])

    loop.run(put)


@pytest.fixture(scope="module")
def saved():
    url = f"memory://{token_hex(6)}/ckpt"
    writer = ObjectStoreWriter(url, frame_size=4096)
    dcp.save({"w": STATE["w"], "step": io.BytesIO(STATE["step"])}, storage_writer=writer, no_dist=True)
    return objects_at(url)


@pytest.fixture
def damaged(saved):
    """The checkpoint with a bit flipped in the first row of its tensor, and in the first byte of its string."""
    url = f"memory://{token_hex(6)}/ckpt"
    for key, data in saved.items():
        altered = bytearray(data)
        if key != "manifest.json":
            nbytes = 8 + int.from_bytes(data[:8], "little")
            altered[nbytes + 1] ^= 1
            altered[nbytes + STATE["w"].nbytes] ^= 1
        put_at(url, key, altered)
    return url


DOORS = {
    "a slice": lambda ckpt: ckpt["w"][1:2],
    "a column": lambda ckpt: ckpt["w"][:, 3],
    "a file over a tensor": lambda ckpt: ckpt.open_file("w").read(10),
    "a file over bytes": lambda ckpt: ckpt.open_file("step").read(10),
    "a value": lambda ckpt: ckpt["step"],
    "a load": lambda ckpt: ckpt.load("w"),
    "a load of tensors": lambda ckpt: ckpt.to_torch("w"),
}


@WHOLE
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_every_way_to_read_obeys(damaged, verify, door):
    with cloudckpt.open(damaged, verify=verify) as ckpt, pytest.raises(IntegrityError):
        door(ckpt)


@WHOLE
def test_a_reader_view_that_touches_a_damaged_frame_is_stopped_and_goes_on_elsewhere(damaged, verify):
    with cloudckpt.open(damaged, options=ReadOptions(verify=verify)) as ckpt, ckpt.open_file("w") as file:
        file.seek(4095)
        with pytest.raises(IntegrityError):
            file.read(2)
        assert file.tell() == 4095
        file.seek(4096)
        assert file.read(8) == STATE["w"].numpy().tobytes()[4096:4104]


@ALL
def test_dcps_reader_obeys_and_says_what_is_left_of_the_tensors(damaged, verify):
    state = {"w": torch.full((300, 10), float(NOTHING))}
    with pytest.raises(dcp.api.CheckpointException) as caught:
        dcp.load(state, storage_reader=ObjectStoreReader(damaged, verify=verify), no_dist=True)
    (error, _), = caught.value.failures.values()  # fmt: skip
    assert isinstance(error, IntegrityError)
    is_undefined = any("undefined" in note for note in error.__notes__)
    assert is_undefined == (verify != "before")
    if verify == "before":
        assert ((state["w"] == STATE["w"]) | (state["w"] == NOTHING)).all()
        assert (state["w"].reshape(-1)[:1024] == NOTHING).all()


@pytest.mark.parametrize("wrong", ["loose", "", None, True])
def test_another_way_to_verify_is_refused_by_name(wrong):
    with pytest.raises(UsageError, match="'frames', 'strict', 'before'"):
        ReadOptions(verify=wrong)
    with pytest.raises(UsageError, match="verify="):
        cloudckpt.open("memory://x/y", verify=wrong)


@WHOLE
def test_a_region_without_checksums_is_refused_before_a_request(verify):
    recording, stats = RecordingStore(ONE.store()), Stats()
    wanted = ONE.want(0)
    bare = replace(wanted, read=replace(wanted.read, checksums=()))
    with pytest.raises(UsageError, match="'weight' was not written by cloudckpt and has no checksums"):
        read(recording, [ONE.want(0), bare], stats, verify=verify)
    assert recording.requests == []


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A checkpoint of each other format."""
    at = tmp_path_factory.mktemp("foreign")
    tensors = {"w": STATE["w"]}
    dcp.save(tensors, storage_writer=FileSystemWriter(at / "dcp", sync_files=False), no_dist=True)
    torch.save(tensors, at / "model.pt")
    safetensors.torch.save_file(tensors, at / "model.safetensors")
    return [f"file://{at}/{name}" for name in ("dcp", "model.pt", "model.safetensors")]


@WHOLE
@pytest.mark.filterwarnings("ignore")
def test_what_others_wrote_is_refused_before_a_byte_of_it_is_read(foreign, verify):
    for url in foreign:
        with cloudckpt.open(url, verify=verify) as ckpt:
            for door in (DOORS["a slice"], DOORS["a file over a tensor"], DOORS["a load"]):
                with pytest.raises(UsageError, match=f"{ckpt.format}.* has no checksums.*verify='{verify}'"):
                    door(ckpt)
            assert ckpt.stats.requests == 0
        with cloudckpt.open(url) as ckpt:
            assert ckpt["w"][3, 3] == 33


# Over HTTP.


def flipping_answers(at, times):
    """Answers that flip the bit at that byte of the object in the first so many ranged replies that carry it."""
    left = [times]

    async def answer(e):
        asked = e.request.headers.get("range")
        if asked and left[0]:
            start, stop = (int(part) for part in asked.removeprefix("bytes=").split("-"))
            if start <= at <= stop:
                left[0] -= 1
                path = e.request.target.partition("?")[0]
                sound = e.server.objects[path]
                altered = bytearray(sound)
                altered[at] ^= 2
                e.server.objects[path] = bytes(altered)
                await serve(e)
                e.server.objects[path] = sound
                return
        await serve(e)

    return [answer] * 50


@ALL
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.usefixtures("nothing_from_outside")
async def test_a_bit_flipped_in_a_body_heals_once_and_is_an_integrity_error_twice(saved, verify, times):
    (key,) = (key for key in saved if key != "manifest.json")
    header = 8 + int.from_bytes(saved[key][:8], "little")
    async with RudeServer(flipping_answers(header + 9000, times)) as server:
        server.objects.update({f"/b/ckpt/{key}": data for key, data in saved.items()})
        keys = {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1", "addressing_style": "path"}

        def load():
            state = {"w": torch.full((300, 10), float(NOTHING))}
            reader = ObjectStoreReader("s3://b/ckpt", verify=verify, endpoint_url=server.url, **keys)
            try:
                dcp.load(state, storage_reader=reader, no_dist=True)
            except dcp.api.CheckpointException as e:
                return state["w"], next(iter(e.failures.values()))[0]
            return state["w"], None

        found, error = await asyncio.to_thread(load)
    start = header + 8192
    if times == 1:
        assert error is None
        assert torch.equal(found, STATE["w"])
    else:
        assert isinstance(error, IntegrityError)
        assert f"bytes {start} to {header + 12000} of {key}" in str(error)
        assert "frame 2 of the item" in str(error)
        if verify == "before":
            assert ((found == STATE["w"]) | (found == NOTHING)).all()
    assert [r.headers["range"] for r in server.requests if "range" in r.headers][-1] == (
        f"bytes={start}-{header + 11999}"
    )
