"""Late requests are sent again, within bounds, and memory has one writer."""

import asyncio
import math

import pytest
from awscrt.checksums import crc32c

from cloudckpt.errors import StoreError, StoreUnavailableError, UsageError
from cloudckpt.ranges import Range
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.store.tails import Tails
from cloudckpt.store.traffic import Traffic, TrafficOptions
from cloudckpt.testing import WrappedStore

DATA = bytes(range(256)) * 16
SOON = TrafficOptions(late_least_s=0.02, late_factor=1.5)


# When a request is late.


def tails_of(*seconds, nbytes=0, **options):
    tails = Tails(**{"factor": 4, "least_s": 1, "share": 0.05} | options)
    for s in seconds:
        tails.answered(nbytes, s)
    return tails


def test_a_request_is_late_that_takes_far_longer_than_its_peers():
    assert not tails_of(*[2] * 8).repeats(0, 7.9)
    assert tails_of(*[2] * 8).repeats(0, 8.1)


def test_none_is_late_before_the_least_time():
    assert not tails_of(*[0.01] * 8).repeats(0, 0.9)
    assert tails_of(*[0.01] * 8).repeats(0, 1.1)


def test_none_is_late_as_long_as_little_is_known():
    assert not tails_of(*[0.01] * 7).repeats(0, 1000)


def test_one_slow_peer_changes_little():
    assert tails_of(*[2] * 15, 1000).repeats(0, 8.1)


def test_where_peers_differ_much_none_is_late_before_twice_what_nine_of_ten_take():
    seconds = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 4
    assert not tails_of(*seconds, factor=1).repeats(0, 19.9)
    assert tails_of(*seconds, factor=1).repeats(0, 20.1)


def test_a_larger_request_may_take_longer():
    tails = tails_of(*[1] * 8, nbytes=8 << 20)
    assert not tails.repeats(56 << 20, 15.9)
    assert tails.repeats(56 << 20, 16.1)


def test_what_took_long_ago_is_forgotten():
    assert tails_of(*[100] * 64, *[1] * 64).repeats(0, 4.1)


def test_no_more_are_sent_again_than_the_share_and_two():
    tails = tails_of(*[0.1] * 60)
    assert [tails.repeats(0, 2) for _ in range(6)] == [True] * 5 + [False]


# What becomes of one that is late.


class Slow(WrappedStore):
    """The first request for a range, or with a part, never ends by itself; later ones go on when they may."""

    def __init__(self, store, *, behaviour=lambda _: asyncio.sleep(0)):
        super().__init__(store)
        self.behaviour = behaviour
        self.calls = 0
        self.cancelled = []
        self.buffers = []

    async def _held_up(self):
        number = self.calls
        self.calls += 1
        try:
            await self.behaviour(number)
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise

    async def get_range(self, key, at, into):
        self.buffers.append(into)
        await self._held_up()
        await super().get_range(key, at, into)

    async def put_part(self, upload, number, offset, body, *, crc32c):
        await self._held_up()
        return await super().put_part(upload, number, offset, body, crc32c=crc32c)


def first_hangs(errors=()):
    async def behave(number):
        if number == 0:
            await asyncio.Event().wait()
        if number <= len(errors):
            raise errors[number - 1]

    return behave


async def known(traffic, store):
    """A traffic that has seen enough to tell who is late."""
    await store.put("k", [memoryview(DATA)])
    for _ in range(8):
        await traffic.get_range(store, "k", Range(0, 10), [memoryview(bytearray(10))])
        await traffic.send("x", 10, lambda: asyncio.sleep(0))
    return traffic


async def test_a_late_range_is_asked_for_again_and_the_faster_answer_counts():
    memory = MemoryStore("tests", "", Bucket())
    traffic = await known(Traffic(SOON, most=8), memory)
    slow = Slow(memory, behaviour=first_hangs())
    out = memoryview(bytearray(len(DATA)))
    await traffic.get_range(slow, "k", Range(0, len(DATA)), [out[:1000], out[1000:]])
    assert out == DATA
    assert slow.calls == 2
    assert slow.cancelled == [0]


async def test_the_second_answer_comes_into_memory_of_its_own():
    memory = MemoryStore("tests", "", Bucket())
    traffic = await known(Traffic(SOON, most=8), memory)
    slow = Slow(memory, behaviour=first_hangs())
    out = memoryview(bytearray(100))
    await traffic.get_range(slow, "k", Range(0, 100), [out])
    assert slow.buffers[0] == [out]
    assert slow.buffers[1][0].obj is not out.obj


async def test_when_the_first_answer_comes_after_all_the_second_request_is_broken_off():
    memory = MemoryStore("tests", "", Bucket())
    traffic = await known(Traffic(SOON, most=8), memory)
    second_began = asyncio.Event()

    async def behave(number):
        if number == 0:
            await second_began.wait()
        else:
            second_began.set()
            await asyncio.Event().wait()

    slow = Slow(memory, behaviour=behave)
    out = memoryview(bytearray(100))
    await traffic.get_range(slow, "k", Range(0, 100), [out])
    assert out == DATA[:100]
    assert slow.cancelled == [1]


async def test_when_the_second_request_fails_the_first_is_waited_for():
    memory = MemoryStore("tests", "", Bucket())
    traffic = await known(Traffic(SOON, most=8), memory)
    failed = asyncio.Event()

    async def behave(number):
        if number == 0:
            await failed.wait()
        else:
            failed.set()
            msg = "reset"
            raise StoreUnavailableError(msg)

    slow = Slow(memory, behaviour=behave)
    out = memoryview(bytearray(100))
    await traffic.get_range(slow, "k", Range(0, 100), [out])
    assert out == DATA[:100]
    assert slow.cancelled == []


async def test_when_the_first_fails_while_the_second_is_under_way_the_second_counts():
    memory = MemoryStore("tests", "", Bucket())
    traffic = await known(Traffic(SOON, most=8), memory)
    began, failed = asyncio.Event(), asyncio.Event()

    async def behave(number):
        if number == 0:
            await began.wait()
            failed.set()
            msg = "reset"
            raise StoreUnavailableError(msg)
        began.set()
        await failed.wait()

    out = memoryview(bytearray(100))
    await traffic.get_range(Slow(memory, behaviour=behave), "k", Range(0, 100), [out])
    assert out == DATA[:100]


async def test_when_both_fail_it_is_told():
    memory = MemoryStore("tests", "", Bucket())
    traffic = await known(Traffic(SOON, most=8), memory)
    began = asyncio.Event()

    async def behave(number):
        await began.wait() if number == 0 else began.set()
        msg = f"reset {number}"
        raise StoreUnavailableError(msg)

    with pytest.raises(StoreUnavailableError, match="reset"):
        await traffic.get_range(Slow(memory, behaviour=behave), "k", Range(0, 9), [memoryview(bytearray(9))])


async def test_one_that_is_cancelled_breaks_off_both():
    memory = MemoryStore("tests", "", Bucket())
    traffic = await known(Traffic(SOON, most=8), memory)
    both = asyncio.Event()

    async def behave(number):
        if number == 1:
            both.set()
        await asyncio.Event().wait()

    slow = Slow(memory, behaviour=behave)
    task = asyncio.ensure_future(traffic.get_range(slow, "k", Range(0, 9), [memoryview(bytearray(9))]))
    await both.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(slow.cancelled) == [0, 1]


async def test_a_late_part_is_broken_off_and_sent_again():
    memory = MemoryStore("tests", "", Bucket())
    traffic = await known(Traffic(SOON, most=8), memory)
    slow = Slow(memory, behaviour=first_hangs())
    upload = await memory.create_upload("big")
    body = [memoryview(DATA)]

    part = await traffic.send("part 1", len(DATA), lambda: slow.put_part(upload, 1, 0, body, crc32c=crc32c(DATA)))
    assert part.number == 1
    assert slow.calls == 2
    assert slow.cancelled == [0]


async def test_a_part_is_sent_again_once_only():
    traffic = await known(Traffic(SOON, most=8), MemoryStore("tests", "", Bucket()))
    calls = []

    async def send():
        calls.append(1)
        if len(calls) == 1:
            await asyncio.Event().wait()
        msg = "reset"
        raise StoreUnavailableError(msg)

    with pytest.raises(StoreUnavailableError):
        await traffic.send("part 1", 1, send)
    assert len(calls) == 2


async def test_spares_take_no_more_memory_at_a_time_than_their_limit():
    nbytes = 40 << 20
    memory = MemoryStore("tests", "", Bucket())
    traffic = await known(Traffic(SOON, most=8), memory)
    for _ in range(200):
        traffic._gets.answered(nbytes, 0.001)
    release, out = asyncio.Event(), memoryview(bytearray(nbytes))
    begun = 0

    class Stalled(WrappedStore):
        async def get_range(self, key, at, into):
            nonlocal begun
            begun += 1
            await release.wait()

    gets = [asyncio.ensure_future(traffic.get_range(Stalled(memory), "k", Range(0, nbytes), [out])) for _ in range(8)]
    await asyncio.sleep(0.3)  # long enough for all to be late
    assert begun == 8 + (128 << 20) // nbytes
    release.set()
    await asyncio.gather(*gets)
    assert traffic._spare_nbytes == 0


async def test_without_lateness_nothing_is_sent_twice():
    memory = MemoryStore("tests", "", Bucket())
    never = TrafficOptions(late_least_s=0.001, late_factor=math.inf)
    traffic = await known(Traffic(never, most=8), memory)

    async def behave(_):
        await asyncio.sleep(0.05)  # far longer than its peers took

    slow = Slow(memory, behaviour=behave)
    await traffic.get_range(slow, "k", Range(0, 9), [memoryview(bytearray(9))])
    assert slow.calls == 1


@pytest.mark.parametrize("error", [StoreError("no"), ValueError("a bug")], ids=["ours", "another"])
async def test_a_request_that_fails_raises_its_own_error(error):
    async def fail(_):
        raise error

    store = Slow(MemoryStore("tests", "", Bucket()), behaviour=fail)
    with pytest.raises(type(error)) as caught:
        await Traffic(TrafficOptions(), most=8).get_range(store, "k", Range(0, 9), [memoryview(bytearray(9))])
    assert caught.value is error


@pytest.mark.parametrize(
    "options",
    [{"first_concurrency": 0}, {"late_factor": 0.5}, {"late_least_s": 0}, {"late_share": -0.1}],
    ids=str,
)
def test_options_that_cannot_work_are_refused_by_name(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        TrafficOptions(**options)
