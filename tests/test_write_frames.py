"""A shard of transformed frames is whole or it is gone, and takes no more than its budget."""

import asyncio
import os
import random
import threading
from itertools import accumulate, count

import pytest
from awscrt.checksums import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.engine import loop
from cloudckpt.engine.framing import MIN_PART_SIZE, Item, plan_frames, plan_shards, planned_frames
from cloudckpt.engine.sources import BytesSource
from cloudckpt.engine.write import ShardWriter, WriteOptions
from cloudckpt.engine.write_frames import _jobs
from cloudckpt.errors import EncryptionKeyError, StoreUnavailableError, UsageError
from cloudckpt.extensions import AesGcm, BytePlane, ExtensionRegistry, ZStandard
from cloudckpt.extensions.chain import Chain, open_shard
from cloudckpt.layout import shard_key
from cloudckpt.manifest import unpack
from cloudckpt.safetensors_header import HeaderItem
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.testing import FailingStore, RecordingStore, Rot13, SlowStore, WrappedStore

KIB, MIB = 1 << 10, 1 << 20
KEYS = {"k": bytes(range(32))}
CHAINS = {
    "zstd": Chain((ZStandard(),)),
    "planes and zstd": Chain((BytePlane(), ZStandard())),
    "planes": Chain((BytePlane(),)),
    "aesgcm": Chain((AesGcm("k", KEYS),)),
    "all": Chain((BytePlane(), ZStandard(), AesGcm("k", KEYS))),
    "rot13": Chain((Rot13(),)),
}
ALL = CHAINS["all"]
OPTIONS = WriteOptions(
    part_size=MIN_PART_SIZE, frame_size=256 * KIB, max_inflight_nbytes=16 * MIB, extensions=[Rot13()]
)


def items_of(data, number_size=2):
    return [
        Item(
            header=HeaderItem(name=f"x{i}", dtype="U8", shape=(len(d),), nbytes=len(d)),
            notes={},
            number_size=number_size,
        )
        for i, d in enumerate(data)
    ]


def plans_of(items, chain=ALL, chosen=None, *, frame_size=256 * KIB, max_size=1 << 40, tokens=None):
    tokens = tokens or count()
    chosen = range(len(items)) if chosen is None else chosen
    return plan_frames(
        items,
        chosen,
        chain,
        frame_size=frame_size,
        new_key=lambda: shard_key(f"{next(tokens):032x}", "frames"),
        max_size=max_size,
    )


def plain_plans_of(items, chosen, tokens):
    return plan_shards(
        items,
        chosen,
        rank=0,
        frame_size=MIB,
        new_token=lambda: f"{next(tokens):032x}",
        key_of=lambda token: shard_key(token, "safetensors"),
    )


class CopiedSource(BytesSource):
    """An item that must be copied into scratch, as one on a device."""

    def scratch_nbytes(self, at):
        return len(at)

    def stage(self, at, scratch):
        assert len(scratch) == len(at)
        scratch[:] = super().stage(at, scratch)
        return scratch


def write(store, plans, items, sources, options=OPTIONS):
    return loop.run(lambda: ShardWriter(store, options).write(plans, items, sources))


def write_all(data, chain=ALL, *, source=BytesSource, store=None, bucket=None, **planning):
    bucket = bucket or Bucket()
    items = items_of(data)
    plans = plans_of(items, chain, **planning)
    written = write(store or MemoryStore("tests", "", bucket), plans, items, [source(d) for d in data])
    return bucket, items, plans, written


def assert_written(bucket, items, plans, written, data):
    """Each shard's frames lie one behind the other, have their checksums, and restore to the items."""
    registry = ExtensionRegistry().with_keys(KEYS)
    registry.register(Rot13)
    for plan, w in zip(plans, written, strict=True):
        shard, body = w.shard, bucket.objects[plan.key].data
        assert (shard.key, shard.size, shard.crc32c) == (plan.key, len(body), crc32c(body))
        chain = open_shard(registry.from_descriptor_list(shard.extensions), shard.extensions, shard.extension_params)
        starts = [0, *accumulate(unpack(shard.frame_sizes))]
        assert starts[-1] == len(body)
        assert w.starts == tuple(starts[f] for f in plan.frames)
        found = dict.fromkeys(plan.items, b"")
        for frame, checksum in zip(planned_frames(plan, items), unpack(shard.frame_checksums), strict=True):
            number = frame.context.number
            stored = body[starts[number] : starts[number + 1]]
            assert crc32c(stored) == checksum
            found[frame.item] += bytes(chain.restore(memoryview(stored), frame.context, len(frame.at)))
        assert found == {i: data[i] for i in plan.items}
    assert bucket.uploads == {}


def texts(*sizes):
    """Half of each compresses, half does not."""
    rng = random.Random(0)
    return [rng.randbytes(n // 2) + (b"abcdefgh" * (n // 8 + 1))[: n - n // 2] for n in sizes]


# Plans.


def test_frames_are_numbered_through_the_shard_and_counted_in_each_item():
    items = items_of([bytes(100), b"", bytes(32), bytes(33)])
    (plan,) = plans_of(items, frame_size=32)
    assert plan.frames == (0, 4, 4, 5, 7)
    found = [
        (f.item, f.at.start, f.at.stop, f.context.number, f.context.index, f.context.is_last)
        for f in planned_frames(plan, items)
    ]
    assert found == [
        (0, 0, 32, 0, 0, False),
        (0, 32, 64, 1, 1, False),
        (0, 64, 96, 2, 2, False),
        (0, 96, 100, 3, 3, True),
        (2, 0, 32, 4, 0, True),
        (3, 0, 32, 5, 0, False),
        (3, 32, 33, 6, 1, True),
    ]
    contexts = [f.context for f in planned_frames(plan, items)]
    assert {c.shard for c in contexts} == {"0" * 32}
    assert [c.item for c in contexts] == ["x0"] * 4 + ["x2"] + ["x3"] * 2
    assert {c.width for c in contexts} == {2}


@pytest.mark.parametrize(("asked", "made"), [(1, 16), (16, 16), (17, 32), (4096, 4096), (5000, 5008)])
def test_a_frame_is_made_a_multiple_of_the_widest_element(asked, made):
    (plan,) = plans_of(items_of([bytes(10)]), frame_size=asked)
    assert plan.frame_size == made


def test_shards_are_filled_up_to_their_limit():
    items = items_of([bytes(n) for n in (60, 40, 1, 99, 100)])
    plans = plans_of(items, chosen=[4, 0, 1, 2, 3], max_size=100)
    assert [p.items for p in plans] == [(4,), (0, 1), (2, 3)]
    assert len({p.key for p in plans}) == 3


def test_an_item_that_no_shard_can_hold_is_refused_by_name():
    with pytest.raises(UsageError, match=r"'x1'.*split it"):
        plans_of(items_of([b"a", bytes(101)]), max_size=100)


# What arrives.


@pytest.mark.parametrize("source", [BytesSource, CopiedSource])
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize(
    "sizes",
    [(1,), (0,), (5000, 0, 12_345, 1), (9 * MIB + 3, 4 * MIB, 7 * MIB + 1)],
    ids=["one", "empty", "small", "large"],
)
def test_a_shard_arrives_whole(sizes, chain, source):
    data = texts(*sizes)
    assert_written(*write_all(data, chain, source=source), data)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30_000), min_size=1, max_size=6),
    frame_size=st.integers(4096, 9000),
    name=st.sampled_from(sorted(CHAINS)),
    is_copied=st.booleans(),
)
def test_any_items_in_any_frames_arrive(sizes, frame_size, name, is_copied):
    data = texts(*sizes)
    source = CopiedSource if is_copied else BytesSource
    assert_written(*write_all(data, CHAINS[name], source=source, frame_size=frame_size), data)


def test_a_small_shard_is_one_request():
    store = RecordingStore(MemoryStore("tests", "", Bucket()))
    write_all(texts(100_000, 50), store=store)
    assert [method for method, _ in store.requests] == ["put"]


def test_a_large_shard_goes_up_in_equal_parts():
    class Sizes(WrappedStore):
        async def put_part(self, upload, number, offset, body, *, crc32c):
            sizes[number] = (offset, sum(map(len, body)))
            return await super().put_part(upload, number, offset, body, crc32c=crc32c)

    sizes, bucket = {}, Bucket()
    data = [os.urandom(13 * MIB)]
    found = write_all(data, store=Sizes(MemoryStore("tests", "", bucket)), bucket=bucket)
    assert_written(*found, data)
    total = found[3][0].shard.size
    whole = total // MIN_PART_SIZE
    assert sizes == {
        1 + i: (i * MIN_PART_SIZE, min(MIN_PART_SIZE, total - i * MIN_PART_SIZE)) for i in range(whole + 1)
    }


def test_a_shard_of_just_whole_parts_has_no_empty_one():
    data = [os.urandom(2 * MIN_PART_SIZE)]  # stored as it is
    store = RecordingStore(MemoryStore("tests", "", Bucket()))
    write_all(data, CHAINS["zstd"], store=store)
    assert [method for method, _ in store.requests] == ["create_upload", "put_part", "put_part", "complete_upload"]


def test_many_small_items_travel_in_few_requests_and_few_jobs():
    data = [os.urandom(400) for _ in range(10_000)]
    jobs = list(_jobs(planned_frames(plans_of(items_of(data))[0], items_of(data)), 256 * KIB))
    assert len(jobs) == -(-10_000 // (256 * KIB // 400))
    store = RecordingStore(MemoryStore("tests", "", Bucket()))
    write_all(data, CHAINS["zstd"], store=store)
    assert len(store.requests) == 1


def test_chains_and_plain_shards_are_written_side_by_side():
    data, bucket, tokens = texts(6 * MIB, 7 * MIB, 8 * MIB, 9 * MIB), Bucket(), count()
    items = items_of(data)
    plans = [
        plan
        for i, name in enumerate(("zstd", "all", "planes"))
        for plan in plans_of(items, CHAINS[name], [i], tokens=tokens)
    ]
    plain = plain_plans_of(items, [3], tokens)
    sources = [CopiedSource(d) for d in data]
    written = write(MemoryStore("tests", "", bucket), [plans[0], *plain, *plans[1:]], items, sources)
    assert_written(bucket, items, plans, [written[0], *written[2:]], data)
    assert bucket.objects[plain[0].key].data == plain[0].header + data[3]


# What fails.


def requests_of(data):
    store = RecordingStore(MemoryStore("tests", "", Bucket()))
    write_all(data, store=store)
    return len(store.requests)


@pytest.mark.parametrize("is_reply_lost", [False, True])
@pytest.mark.parametrize("sizes", [(1000, 2000), (6 * MIB, 6 * MIB)], ids=["one request", "many"])
def test_whatever_request_fails_nothing_is_left_and_the_budget_is_whole(sizes, is_reply_lost):
    data = [os.urandom(n) for n in sizes]
    items, sources = items_of(data), [BytesSource(d) for d in data]
    total = requests_of(data)
    assert total > 4 or sizes[0] == 1000
    for k in range(total):
        bucket = Bucket()
        store = FailingStore(
            MemoryStore("tests", "", bucket), k, StoreUnavailableError("no"), is_reply_lost=is_reply_lost
        )

        async def main(store=store):
            writer = ShardWriter(store, OPTIONS)
            with pytest.raises(ExceptionGroup) as caught:
                await writer.write(plans_of(items), items, sources)
            assert caught.group_contains(StoreUnavailableError)
            return writer._means.budget.is_whole

        assert loop.run(main)
        assert bucket.objects == {}
        assert bucket.uploads == {}


class Broken(Rot13):
    """Fails at one frame."""

    def transform_to(self, output):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the transform broke")
        return super().transform_to(output)


@pytest.mark.parametrize("at", [0, 1, 7, 30])
def test_a_transform_that_fails_leaves_nothing_and_is_told_once(at):
    extension, bucket = Broken(), Bucket()
    extension.left = at
    with pytest.raises(RuntimeError, match="the transform broke") as caught:
        write_all([os.urandom(9 * MIB)], Chain((extension,)), bucket=bucket)
    assert len(getattr(caught.value, "__notes__", [])) <= OPTIONS.transform_threads
    assert bucket.objects == {}
    assert bucket.uploads == {}


def test_a_missing_key_is_told_before_anything_is_sent():
    data, tokens = texts(100, 100), count()
    items = items_of(data)
    missing = Chain((AesGcm("gone", KEYS),))
    plans = [*plans_of(items, ALL, [0], tokens=tokens), *plans_of(items, missing, [1], tokens=tokens)]
    store = RecordingStore(MemoryStore("tests", "", Bucket()))
    with pytest.raises(EncryptionKeyError, match="'gone'"):
        write(store, plans, items, [BytesSource(d) for d in data])
    assert store.requests == []


async def test_a_cancelled_write_leaves_nothing():
    class Stuck(WrappedStore):
        async def before(self, method, key):
            if method == "put_part":
                stuck.set()
                await asyncio.Event().wait()

    stuck, bucket, data = asyncio.Event(), Bucket(), [os.urandom(20 * MIB)]
    items = items_of(data)
    writer = ShardWriter(Stuck(MemoryStore("tests", "", bucket)), OPTIONS)
    task = asyncio.ensure_future(writer.write(plans_of(items), items, [BytesSource(d) for d in data]))
    await stuck.wait()
    assert len(bucket.uploads) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (bucket.objects, bucket.uploads) == ({}, {})
    assert writer._means.budget.is_whole


# The budget.

TIGHT = WriteOptions(
    part_size=MIN_PART_SIZE,
    frame_size=256 * KIB,
    max_inflight_nbytes=2 * MIN_PART_SIZE + 12 * (256 * KIB + 32 * KIB),
    extensions=[Rot13()],
)


@pytest.mark.parametrize("kind", ["zeros", "noise", "text"])
@pytest.mark.parametrize("source", [BytesSource, CopiedSource])
async def test_the_smallest_budget_is_enough(kind, source):
    sizes = (11 * MIB, 12 * MIB, 6 * MIB, 9 * MIB)
    data = {"zeros": map(bytes, sizes), "noise": map(os.urandom, sizes), "text": texts(*sizes)}[kind]
    data, tokens, bucket = list(data), count(), Bucket()
    items = items_of(data)
    plans = [
        plan
        for i, name in enumerate(("zstd", "all", "rot13"))
        for plan in plans_of(items, CHAINS[name], [i], tokens=tokens)
    ]
    plain = plain_plans_of(items, [3], tokens)
    writer = ShardWriter(SlowStore(MemoryStore("tests", "", bucket), 0.001), TIGHT)
    async with asyncio.timeout(60):
        written = await writer.write([*plain, *plans], items, [source(d) for d in data])
    assert_written(bucket, items, plans, written[1:], data)
    assert writer._means.budget.is_whole


def test_a_budget_that_could_be_used_up_by_waiting_is_refused():
    with pytest.raises(UsageError, match=f"max_inflight_nbytes={12 * MIB}.*part_size={MIN_PART_SIZE}.*frame_size"):
        WriteOptions(part_size=MIN_PART_SIZE, frame_size=MIB, max_inflight_nbytes=12 * MIB, extensions=[ZStandard()])
    WriteOptions(part_size=MIN_PART_SIZE, frame_size=MIB, max_inflight_nbytes=12 * MIB, extensions={"*": []})


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_frames_are_transformed_at_a_time_than_there_are_threads(threads):
    class Counted(Rot13):
        def transform_to(self, output):
            now.append(1)
            seen.append(len(now))
            reached.wait(0.01)
            now.pop()
            return super().transform_to(output)

    now, seen, reached = [], [], threading.Event()
    options = WriteOptions(frame_size=64 * KIB, transform_threads=threads, extensions=[Rot13()])
    data = [bytes(2 * MIB)]
    items = items_of(data)
    plans = plans_of(items, Chain((Counted(),)), frame_size=64 * KIB)
    write(MemoryStore("tests", "", Bucket()), plans, items, [BytesSource(data[0])], options)
    assert max(seen) <= threads
    assert len(seen) == 32


def test_frames_are_not_transformed_further_ahead_than_the_budget_allows():
    """With the store stuck, what was transformed and not sent stays within the budget."""

    class Stuck(WrappedStore):
        async def before(self, method, key):
            if method == "put_part":
                await asyncio.wait_for(asyncio.Event().wait(), 1)

    class Counting(BytesSource):
        def stage(self, at, scratch):
            staged.append(len(at))
            return super().stage(at, scratch)

    staged, data = [], [os.urandom(80 * MIB)]
    with pytest.raises(TimeoutError):
        write_all(data, CHAINS["zstd"], source=Counting, store=Stuck(MemoryStore("tests", "", Bucket())))
    assert 2 * MIN_PART_SIZE < sum(staged) <= OPTIONS.max_inflight_nbytes


@pytest.mark.parametrize("limit", [80 * MIB, 128 * MIB])
def test_plain_parts_that_take_memory_and_frames_that_wait_do_not_hold_each_other_up(limit):
    class Copied(BytesSource):
        def scratch_nbytes(self, at):
            return len(at)

        def stage(self, at, scratch):
            scratch[: len(at)] = super().stage(at, scratch)
            return scratch[: len(at)]

    options = WriteOptions(
        part_size=256 * MIB,
        frame_size=MIB,
        max_inflight_nbytes=limit,
        concurrency=1,
        extensions={"a*": [Rot13()], "*": []},
    )
    data = [bytes(40 * MIB), bytes(2 * limit)]
    items, tokens = items_of(data), count()
    plans = [
        *plain_plans_of(items, [1], tokens),
        *plans_of(items, CHAINS["rot13"], [0], tokens=tokens, frame_size=MIB),
    ]
    shards = write(MemoryStore("tests", "", Bucket()), plans, items, [Copied(d) for d in data], options)
    assert [w.shard.size > 30 * MIB for w in shards] == [True, True]
