"""Bytes taken are bytes given back, first come, first served."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.engine import loop
from cloudckpt.engine.budget import Budget, BufferPool


async def settle():
    """Lets every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


def taker(budget, nbytes):
    return asyncio.ensure_future(budget.take(nbytes))


async def test_what_is_free_is_taken_at_once():
    budget = Budget(100, concurrency=10)
    assert await budget.take(60) == 60
    assert not budget.is_whole
    budget.give(60)
    assert budget.is_whole


async def test_a_small_request_takes_its_share_of_the_concurrency():
    budget = Budget(100, concurrency=4)
    assert [await budget.take(n) for n in (0, 1, 25, 25)] == [25] * 4
    waiting = taker(budget, 1)
    await settle()
    assert not waiting.done()
    budget.give(25)
    assert await waiting == 25


async def test_who_came_first_is_served_first_although_a_later_one_would_fit():
    budget = Budget(100, concurrency=100)
    held = await budget.take(80)
    large, small = taker(budget, 50), taker(budget, 5)
    await settle()
    assert not large.done()
    assert not small.done()
    budget.give(held)
    assert await large == 50
    assert await small == 5


async def test_one_who_comes_while_others_wait_waits_behind_them():
    budget = Budget(100, concurrency=100)
    await budget.take(80)
    large = taker(budget, 50)
    await settle()
    late = taker(budget, 10)
    await settle()
    assert not late.done()
    budget.give(80)
    await settle()
    assert large.done()
    assert late.done()


async def test_a_request_of_more_than_the_limit_gets_the_limit_and_runs_alone():
    budget = Budget(100, concurrency=10)
    held = await budget.take(10)
    huge = taker(budget, 1000)
    await settle()
    assert not huge.done()
    budget.give(held)
    assert await huge == 100
    other = taker(budget, 1)
    await settle()
    assert not other.done()
    budget.give(100)
    assert await other == 10
    budget.give(10)
    assert budget.is_whole


async def test_a_waiter_that_is_cancelled_takes_nothing():
    budget = Budget(100, concurrency=100)
    held = await budget.take(80)
    waiting = taker(budget, 50)
    await settle()
    waiting.cancel()
    await settle()
    budget.give(held)
    assert budget.is_whole
    assert await budget.take(100) == 100


async def test_a_waiter_that_is_cancelled_when_its_turn_has_come_loses_no_bytes():
    budget = Budget(100, concurrency=100)
    held = await budget.take(100)
    waiting = taker(budget, 60)
    behind = taker(budget, 30)
    await settle()
    budget.give(held)
    waiting.cancel()
    await settle()
    assert waiting.cancelled()
    assert await behind == 30
    budget.give(30)
    assert budget.is_whole


async def test_a_waiter_that_is_cancelled_lets_those_behind_it_go():
    budget = Budget(100, concurrency=100)
    await budget.take(80)
    large = taker(budget, 50)
    small = taker(budget, 5)
    await settle()
    large.cancel()
    await settle()
    assert small.done()


async def test_a_task_that_ends_gives_back_what_it_was_given():
    budget = Budget(100, concurrency=10)
    task = asyncio.ensure_future(asyncio.sleep(0))
    budget.give_when_done(task, await budget.take(40))
    await task
    await settle()
    assert budget.is_whole


async def test_a_task_that_fails_gives_back_what_it_was_given():
    async def fail():
        raise ValueError

    budget = Budget(100, concurrency=10)
    task = asyncio.ensure_future(fail())
    budget.give_when_done(task, await budget.take(40))
    with pytest.raises(ValueError):
        await task
    await settle()
    assert budget.is_whole


async def test_a_task_cancelled_before_its_first_step_gives_back_what_it_was_given():
    began = False

    async def work():
        nonlocal began
        began = True

    budget = Budget(100, concurrency=10)
    granted = await budget.take(40)
    task = asyncio.ensure_future(work())
    budget.give_when_done(task, granted)
    task.cancel()
    await settle()
    assert task.cancelled()
    assert not began
    assert budget.is_whole


@settings(deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 250), st.integers(0, 5), st.booleans()), max_size=15),
)
def test_never_more_is_out_than_the_limit_and_all_comes_back(limit, concurrency, takers):
    budget = Budget(limit, concurrency=concurrency)
    out, order = [], []

    async def work(i, nbytes, steps):
        granted = await budget.take(nbytes)
        order.append(i)
        out.append(granted)
        try:
            assert sum(out) <= limit
            for _ in range(steps):
                await asyncio.sleep(0)
        finally:
            out.remove(granted)
            budget.give(granted)

    async def main():
        tasks = [asyncio.ensure_future(work(i, nbytes, steps)) for i, (nbytes, steps, _) in enumerate(takers)]
        await asyncio.sleep(0)
        for task, (_, _, is_cancelled) in zip(tasks, takers, strict=True):
            if is_cancelled:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [t for t in tasks if not t.cancelled() and t.exception()] == []

    loop.run(main)
    assert budget.is_whole
    assert order == sorted(order)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 30))
def test_no_more_takers_are_let_in_than_the_concurrency(limit, concurrency):
    budget = Budget(limit, concurrency=concurrency)

    async def main():
        takers = [taker(budget, 1) for _ in range(concurrency + 5)]
        await settle()
        let_in = sum(t.done() for t in takers)
        for task in takers:
            task.cancel()
        await asyncio.gather(*takers, return_exceptions=True)
        return let_in

    assert 1 <= loop.run(main) <= concurrency


KIB = 1 << 10


def test_a_buffer_given_back_is_used_again():
    pool = BufferPool(1000 * KIB)
    first = pool.take(100 * KIB)
    pool.give(first)
    assert pool.take(60 * KIB) is first
    assert pool.take(60 * KIB) is not first


def test_a_buffer_is_at_least_as_large_as_was_asked_for():
    pool = BufferPool(1000 * KIB)
    pool.give(pool.take(100 * KIB))
    for nbytes in (1, 100 * KIB, 101 * KIB, 500 * KIB):
        assert len(pool.take(nbytes)) >= nbytes


def test_a_buffer_holds_less_than_twice_what_was_asked_for():
    pool = BufferPool(1000 * KIB)
    large = pool.take(200 * KIB)
    pool.give(large)
    assert len(pool.take(100 * KIB)) == 100 * KIB
    assert pool.take(101 * KIB) is large


def test_no_bytes_need_no_buffer():
    pool = BufferPool(1000 * KIB)
    empty = pool.take(0)
    assert len(empty) == 0
    pool.give(empty)
    assert len(pool.take(60 * KIB)) == 60 * KIB


def test_small_buffers_are_left_to_the_allocator():
    pool = BufferPool(1000 * KIB)
    small = pool.take(63 * KIB)
    pool.give(small)
    assert pool.take(63 * KIB) is not small


def test_a_pool_keeps_no_more_than_its_limit():
    pool = BufferPool(250 * KIB)
    buffers = [pool.take(100 * KIB) for _ in range(4)]
    for buffer in buffers:
        pool.give(buffer)
    again = [pool.take(100 * KIB) for _ in range(4)]
    assert sum(any(a is b for b in buffers) for a in again) == 2


def test_what_is_kept_and_what_is_out_never_exceed_the_limit():
    pool = BufferPool(400 * KIB)
    small = [pool.take(100 * KIB) for _ in range(4)]
    for buffer in small:
        pool.give(buffer)
    large = pool.take(300 * KIB)
    assert len(large) == 300 * KIB
    again = [pool.take(100 * KIB) for _ in range(2)]
    assert sum(any(a is b for b in small) for a in again) == 1  # the others had to make room
