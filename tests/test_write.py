"""A shard is whole or it is gone."""

import asyncio
import threading
from itertools import count

import numpy as np
import pytest
from awscrt.checksums import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.engine import loop
from cloudckpt.engine.framing import MIN_PART_SIZE, Item, plan_shards
from cloudckpt.engine.sources import BytesSource
from cloudckpt.engine.write import ShardWriter, WriteOptions
from cloudckpt.errors import CredentialsError, StoreError, StoreUnavailableError, UsageError
from cloudckpt.layout import is_shard_key, shard_key
from cloudckpt.manifest import unpack
from cloudckpt.safetensors_header import HeaderItem
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.testing import FailingStore, RecordingStore, WrappedStore

MIB = 1 << 20
SMALL = [5000, 0, 12_345, 1]
LARGE = [7 * MIB + 3, 4 * MIB, 3 * MIB + 1]
OPTIONS = WriteOptions(part_size=MIN_PART_SIZE, frame_size=MIB, max_inflight_nbytes=4 * MIN_PART_SIZE)


def data_of(sizes, seed=0):
    random = np.random.default_rng(seed)
    return [random.bytes(n) for n in sizes]


def plans_of(sizes, *, frame_size=MIB, tokens=None, **limits):
    items = [
        Item(header=HeaderItem(name=f"x{i}", dtype="U8", shape=(n,), nbytes=n), notes={}) for i, n in enumerate(sizes)
    ]
    tokens = tokens or count()
    return plan_shards(
        items,
        rank=0,
        frame_size=frame_size,
        new_token=lambda: f"{next(tokens):032x}",
        key_of=lambda token: shard_key(token, "safetensors"),
        **limits,
    )


class CopiedSource:
    """An item that must be copied into scratch to be sent, as one on a device."""

    def __init__(self, data):
        self.data = data

    def scratch_nbytes(self, at):
        return len(at)

    def stage(self, at, scratch):
        assert len(scratch) == len(at)
        scratch[:] = self.data[at.start : at.stop]
        return scratch


def write(store, plans, sources, options=OPTIONS):
    """Writes as a save does: on the process's loop."""
    return [w.shard for w in loop.run(lambda: ShardWriter(store, options).write(plans, [], sources))]


def expected_of(plan, data):
    return plan.header + b"".join(data[i] for i in plan.items)


def frames_of(plan, data):
    return [
        crc32c(data[i][start : start + plan.frame_size])
        for i in plan.items
        for start in range(0, len(data[i]), plan.frame_size)
    ]


def assert_written(bucket, plans, shards, data):
    assert sorted(bucket.objects) == sorted(p.key for p in plans)
    for plan, shard in zip(plans, shards, strict=True):
        body = expected_of(plan, data)
        assert bucket.objects[plan.key].data == body
        assert is_shard_key(shard.key)
        assert (shard.key, shard.size, shard.crc32c) == (plan.key, len(body), crc32c(body))
        assert shard.frame_size == plan.frame_size
        assert list(unpack(shard.frame_checksums)) == frames_of(plan, data)
        assert shard.extensions == ()
    assert bucket.uploads == {}


# What arrives.


@pytest.mark.parametrize("source", [BytesSource, CopiedSource])
@pytest.mark.parametrize("sizes", [[1], SMALL, LARGE, [0], [5 * MIB]], ids=str)
def test_a_shard_arrives_with_the_checksums_of_its_bytes(sizes, source):
    bucket, data = Bucket(), data_of(sizes)
    plans = plans_of(sizes)
    shards = write(MemoryStore("tests", "", bucket), plans, [source(d) for d in data])
    assert_written(bucket, plans, shards, data)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=6), st.integers(4096, 9000), st.booleans())
def test_frames_have_the_checksums_of_their_bytes(sizes, frame_size, is_copied):
    bucket, data = Bucket(), data_of(sizes)
    plans = plans_of(sizes, frame_size=frame_size)
    sources = [(CopiedSource if is_copied else BytesSource)(d) for d in data]
    shards = write(MemoryStore("tests", "", bucket), plans, sources)
    assert_written(bucket, plans, shards, data)


def test_frames_that_cross_a_border_of_parts_have_the_checksum_of_the_whole_frame():
    bucket, data = Bucket(), data_of(LARGE)
    plans = plans_of(LARGE, frame_size=3 * MIB)
    shards = write(MemoryStore("tests", "", bucket), plans, [CopiedSource(d) for d in data])
    assert_written(bucket, plans, shards, data)


def test_several_shards_are_written_side_by_side():
    sizes = [6 * MIB, 6 * MIB, 1000, 2000]
    bucket, data = Bucket(), data_of(sizes)
    plans = plans_of(sizes, max_size=6 * MIB + 3000)
    assert len(plans) == 3
    shards = write(MemoryStore("tests", "", bucket), plans, [CopiedSource(d) for d in data])
    assert_written(bucket, plans, shards, data)


def test_one_writer_writes_again():
    bucket, data, tokens = Bucket(), data_of(LARGE), count()
    plans, more = plans_of(LARGE, tokens=tokens), plans_of(LARGE, tokens=tokens)

    async def twice():
        writer = ShardWriter(MemoryStore("tests", "", bucket), OPTIONS)
        sources = [CopiedSource(d) for d in data]
        written = [*await writer.write(plans, [], sources), *await writer.write(more, [], sources)]
        return [w.shard for w in written]

    assert_written(bucket, [*plans, *more], loop.run(twice), data)


def test_nothing_planned_is_nothing_written():
    recording = RecordingStore(MemoryStore("tests", "", Bucket()))
    assert write(recording, [], []) == []
    assert recording.requests == []


# What it costs.


@pytest.mark.parametrize("over", [0, 1])
def test_a_shard_of_at_most_one_part_is_one_put(over):
    head = len(plans_of([MIN_PART_SIZE - 400])[0].header)
    size = MIN_PART_SIZE - head + over
    (plan,) = plans_of([size])
    assert plan.size == MIN_PART_SIZE + over
    recording = RecordingStore(MemoryStore("tests", "", Bucket()))
    write(recording, [plan], [BytesSource(bytes(size))])
    methods = [m for m, _ in recording.requests]
    assert methods == (["create_upload", "put_part", "put_part", "complete_upload"] if over else ["put"])


def test_a_large_shard_is_one_request_for_each_part_and_two_more():
    (plan,) = plans_of(LARGE)
    recording = RecordingStore(MemoryStore("tests", "", Bucket()))
    write(recording, [plan], [BytesSource(d) for d in data_of(LARGE)])
    methods = [m for m, _ in recording.requests]
    assert methods[0] == "create_upload"
    assert methods[-1] == "complete_upload"
    assert methods[1:-1] == ["put_part"] * -(-plan.size // MIN_PART_SIZE)


def test_bytes_that_lie_in_memory_are_sent_from_where_they_lie():
    class Looking(WrappedStore):
        async def put(self, key, body, *, condition=None, crc32c=None):
            bodies.append(body)
            return await super().put(key, body, condition=condition, crc32c=crc32c)

    bodies, data = [], data_of([5000])
    write(Looking(MemoryStore("tests", "", Bucket())), plans_of([5000], frame_size=4096), [BytesSource(data[0])])
    (body,) = bodies
    assert [len(v) for v in body[1:]] == [4096, 904]
    assert all(v.obj is data[0] for v in body[1:])


def test_parts_are_sent_with_their_numbers_offsets_and_checksums():
    class Looking(WrappedStore):
        async def put_part(self, upload, number, offset, body, *, crc32c):
            parts[number] = offset, b"".join(body), crc32c
            return await super().put_part(upload, number, offset, body, crc32c=crc32c)

    parts, data = {}, data_of(LARGE)
    (plan,) = plans_of(LARGE)
    write(Looking(MemoryStore("tests", "", Bucket())), [plan], [BytesSource(d) for d in data])
    whole = expected_of(plan, data)
    assert sorted(parts) == [1, 2, 3]
    for number, (offset, body, crc) in parts.items():
        assert offset == (number - 1) * MIN_PART_SIZE
        assert body == whole[offset : offset + MIN_PART_SIZE]
        assert crc == crc32c(body)


# How much is in flight.


class Gauge:
    """Bytes staged and not yet sent."""

    def __init__(self):
        self.lock = threading.Lock()
        self.now = self.most = self.requests = self.most_requests = 0

    def add(self, nbytes, requests=0):
        with self.lock:
            self.now += nbytes
            self.requests += requests
            self.most = max(self.most, self.now)
            self.most_requests = max(self.most_requests, self.requests)


class GaugedSource(CopiedSource):
    def __init__(self, data, gauge):
        super().__init__(data)
        self.gauge = gauge

    def stage(self, at, scratch):
        self.gauge.add(len(at))
        return super().stage(at, scratch)


class GaugedStore(WrappedStore):
    def __init__(self, store, gauge):
        super().__init__(store)
        self.gauge = gauge

    async def _sent(self, body, sending):
        self.gauge.add(0, 1)
        for _ in range(20):
            await asyncio.sleep(0)
        reply = await sending
        self.gauge.add(-sum(map(len, body)), -1)
        return reply

    async def put(self, key, body, *, condition=None, crc32c=None):
        return await self._sent(body, super().put(key, body, condition=condition, crc32c=crc32c))

    async def put_part(self, upload, number, offset, body, *, crc32c):
        return await self._sent(body, super().put_part(upload, number, offset, body, crc32c=crc32c))


@pytest.mark.parametrize(("parts", "concurrency"), [(1, 16), (2, 16), (4, 16), (4, 2)])
def test_bytes_and_requests_in_flight_keep_to_their_limits(parts, concurrency):
    sizes = [9 * MIB, 8 * MIB, 7 * MIB, 1 * MIB]
    options = WriteOptions(
        part_size=MIN_PART_SIZE,
        frame_size=MIB,
        max_inflight_nbytes=parts * MIN_PART_SIZE,
        concurrency=concurrency,
    )
    gauge, bucket, data = Gauge(), Bucket(), data_of(sizes)
    plans = plans_of(sizes, max_size=9 * MIB + 4096)
    shards = write(
        GaugedStore(MemoryStore("tests", "", bucket), gauge), plans, [GaugedSource(d, gauge) for d in data], options
    )
    assert_written(bucket, plans, shards, data)
    assert gauge.most <= options.max_inflight_nbytes
    assert 1 <= gauge.most_requests <= concurrency
    if min(parts, concurrency) > 1:
        assert gauge.most > MIN_PART_SIZE


def test_shards_of_one_put_share_the_budget_too():
    sizes = [4 * MIB] * 5
    options = WriteOptions(part_size=MIN_PART_SIZE, frame_size=MIB, max_inflight_nbytes=2 * MIN_PART_SIZE)
    gauge, bucket, data = Gauge(), Bucket(), data_of(sizes)
    plans = plans_of(sizes, max_size=4 * MIB + 2000)
    assert len(plans) == 5
    shards = write(
        GaugedStore(MemoryStore("tests", "", bucket), gauge), plans, [GaugedSource(d, gauge) for d in data], options
    )
    assert_written(bucket, plans, shards, data)
    assert 4 * MIB < gauge.most <= options.max_inflight_nbytes


@pytest.mark.parametrize(
    "options",
    [
        {"part_size": MIN_PART_SIZE - 1},
        {"frame_size": 4095},
        {"frame_size": (1 << 30) + 1},
        {"max_inflight_nbytes": MIN_PART_SIZE - 1},
        {"concurrency": 0},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused_by_name(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        WriteOptions(**options)


# Failures.

MIXED = [7 * MIB, 900, 6 * MIB, 300]
"""Two shards in parts and a small one."""


def mixed_plans():
    plans = plans_of(MIXED, max_size=7 * MIB + 2000)
    assert [p.size > MIN_PART_SIZE for p in plans] == [True, True]
    return plans


def requests_of(sizes):
    recording = RecordingStore(MemoryStore("tests", "", Bucket()))
    write(recording, sizes, [CopiedSource(d) for d in data_of(MIXED)])
    return len(recording.requests)


@pytest.mark.parametrize("is_reply_lost", [False, True], ids=["refused", "reply lost"])
@pytest.mark.parametrize("k", range(8))
def test_after_a_failed_request_no_object_and_no_upload_is_left(k, is_reply_lost):
    assert requests_of(mixed_plans()) == 8
    bucket, error = Bucket(), StoreUnavailableError(f"request {k}")
    failing = FailingStore(MemoryStore("tests", "", bucket), k, error, is_reply_lost=is_reply_lost)
    with pytest.raises(StoreError) as caught:
        write(failing, mixed_plans(), [CopiedSource(d) for d in data_of(MIXED)])
    assert caught.value is error
    assert bucket.objects == {}
    assert bucket.uploads == {}


@pytest.mark.parametrize("is_reply_lost", [False, True], ids=["refused", "reply lost"])
@pytest.mark.parametrize("k", range(3))
def test_after_a_failed_put_none_of_its_fellows_is_left(k, is_reply_lost):
    plans = plans_of([3000, 3000, 3000], max_size=4100)
    assert len(plans) == 3
    bucket, error = Bucket(), CredentialsError("no")
    failing = FailingStore(MemoryStore("tests", "", bucket), k, error, is_reply_lost=is_reply_lost)
    with pytest.raises(CredentialsError):
        write(failing, plans, [BytesSource(d) for d in data_of([3000] * 3)])
    assert bucket.objects == {}


def test_what_others_wrote_is_not_removed():
    bucket = Bucket()
    store = MemoryStore("tests", "", bucket)
    tokens = count()
    write(store, plans_of([100], tokens=tokens), [BytesSource(bytes(100))])
    before = dict(bucket.objects)
    failing = FailingStore(store, 0, StoreError("no"))
    with pytest.raises(StoreError):
        write(failing, plans_of([100], tokens=tokens), [BytesSource(bytes(100))])
    assert bucket.objects == before


def test_the_first_failure_is_raised_and_the_others_are_its_notes():
    class Refusing(WrappedStore):
        async def put_part(self, upload, number, offset, body, *, crc32c):
            arrived.append(number)
            await everyone.wait() if len(arrived) < 3 else everyone.set()
            raise failures.pop(0)

    async def main():
        nonlocal everyone
        everyone = asyncio.Event()
        store = Refusing(MemoryStore("tests", "", bucket))
        await ShardWriter(store, OPTIONS).write(plans_of(LARGE), [], [BytesSource(d) for d in data_of(LARGE)])

    everyone, arrived, bucket = None, [], Bucket()
    failures = [StoreError("one"), StoreError("two"), StoreError("three")]
    with pytest.raises(StoreError) as caught:
        loop.run(main)
    assert str(caught.value) == "one"
    assert all("meanwhile also: StoreError" in note for note in getattr(caught.value, "__notes__", []))
    assert bucket.uploads == {}


def test_an_item_that_cannot_be_staged_leaves_nothing():
    class Broken(CopiedSource):
        def stage(self, at, scratch):
            if at.start >= 3 * MIB:
                msg = "device lost"
                raise RuntimeError(msg)
            return super().stage(at, scratch)

    bucket = Bucket()
    with pytest.raises(RuntimeError, match="device lost"):
        write(MemoryStore("tests", "", bucket), plans_of(LARGE), [Broken(d) for d in data_of(LARGE)])
    assert bucket.objects == {}
    assert bucket.uploads == {}


def test_bytes_that_change_while_they_are_sent_are_refused_and_leave_nothing():
    class Changing(WrappedStore):
        async def put(self, key, body, *, condition=None, crc32c=None):
            item[0] ^= 1
            return await super().put(key, body, condition=condition, crc32c=crc32c)

    item, bucket = bytearray(5000), Bucket()
    with pytest.raises(StoreError, match="CRC32C"):
        write(Changing(MemoryStore("tests", "", bucket)), plans_of([5000]), [BytesSource(memoryview(item))])
    assert bucket.objects == {}


def test_a_clean_up_that_fails_too_is_a_warning_and_does_not_hide_the_first_failure(caplog):
    class Refusing(WrappedStore):
        async def before(self, method, key):
            if method in {"complete_upload", "abort_upload", "delete"}:
                raise StoreError(method)

    with pytest.raises(StoreError, match="complete_upload"):
        write(Refusing(MemoryStore("tests", "", Bucket())), plans_of(LARGE), [BytesSource(d) for d in data_of(LARGE)])
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 3
    assert all("swept" in text for text in warned)


async def test_a_write_that_is_cancelled_leaves_nothing():
    class Stuck(WrappedStore):
        async def before(self, method, key):
            if method == "put_part":
                stuck.set()
                await asyncio.Event().wait()

    stuck, bucket = asyncio.Event(), Bucket()
    writer = ShardWriter(Stuck(MemoryStore("tests", "", bucket)), OPTIONS)
    plans = plans_of([7 * MIB, 900], max_size=7 * MIB + 1100)
    assert len(plans) == 2
    task = asyncio.ensure_future(writer.write(plans, [], [BytesSource(d) for d in data_of([7 * MIB, 900])]))
    await stuck.wait()
    assert len(bucket.uploads) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bucket.objects == {}
    assert bucket.uploads == {}


async def test_a_writer_that_failed_has_its_whole_budget_again():
    bucket, data = Bucket(), data_of(LARGE)
    failing = FailingStore(MemoryStore("tests", "", bucket), 2, StoreError("no"))
    tight = WriteOptions(part_size=MIN_PART_SIZE, frame_size=MIB, max_inflight_nbytes=MIN_PART_SIZE)
    writer, tokens = ShardWriter(failing, tight), count()
    sources = [CopiedSource(d) for d in data]
    with pytest.raises(ExceptionGroup):
        await writer.write(plans_of(LARGE, tokens=tokens), [], sources)
    plans = plans_of(LARGE, tokens=tokens)
    async with asyncio.timeout(30):
        shards = [w.shard for w in await writer.write(plans, [], sources)]
    assert_written(bucket, plans, shards, data)


def test_shards_are_removed_although_uploads_cannot_be_listed():
    """A role without s3:ListBucketMultipartUploads."""

    class NoListing(WrappedStore):
        async def before(self, method, key):
            if method == "list_uploads" or (method == "put" and self.failing == key):
                raise StoreError(method)

    bucket = Bucket()
    plans = [*plans_of(SMALL), *plans_of(SMALL)]
    store = NoListing(MemoryStore("tests", "", bucket))
    store.failing = plans[1].key
    with pytest.raises(StoreError, match="put"):
        write(store, plans, [BytesSource(d) for d in data_of(SMALL)])
    assert bucket.objects == {}
