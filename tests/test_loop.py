"""Sync above, async below: interrupts, forks and groups of errors on the way up."""

import asyncio
import subprocess
import sys
import threading
from textwrap import dedent

import pytest

from cloudckpt.engine import loop
from cloudckpt.engine.loop import LoopThread, shielded
from cloudckpt.errors import ObjectNotFoundError, StoreError


def python(script, timeout_s=20):
    """What a fresh interpreter prints, which must end well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


async def give(value):
    await asyncio.sleep(0)
    return value


# Running.


def test_the_result_comes_back():
    assert loop.run(lambda: give(7)) == 7


def test_all_calls_share_one_loop_of_another_thread():
    async def where():
        return asyncio.get_running_loop(), threading.current_thread()

    first, second = loop.run(where), loop.run(where)
    assert first == second
    assert first[1] is not threading.current_thread()
    assert first[1].daemon


def test_calls_from_several_threads_run_side_by_side():
    both = threading.Barrier(2)

    async def meet():
        await asyncio.to_thread(both.wait, 10)

    threads = [threading.Thread(target=loop.run, args=(meet,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(t.is_alive() for t in threads)
    assert not both.broken


def test_it_can_be_called_where_another_loop_runs():
    async def main():
        return loop.run(lambda: give(8))

    assert asyncio.run(main()) == 8


def test_a_call_from_its_own_loop_is_refused_before_anything_runs():
    made = []

    def main():
        made.append(1)
        return give(1)

    async def nested():
        return loop.run(main)

    with pytest.raises(RuntimeError, match="its own event loop"):
        loop.run(nested)
    assert made == []


def test_a_thread_of_its_own_has_a_loop_of_its_own():
    async def where():
        return asyncio.get_running_loop()

    assert LoopThread(1).run(where) is not loop.run(where)


# Errors.


async def fail(error):
    raise error


def test_an_error_comes_up_as_it_was_raised():
    error = StoreError("no")
    with pytest.raises(StoreError) as caught:
        loop.run(lambda: fail(error))
    assert caught.value is error


def test_a_group_comes_up_as_its_first_error_with_the_others_in_its_notes():
    async def main():
        async with asyncio.TaskGroup() as group:
            group.create_task(fail(ObjectNotFoundError("one")))
            group.create_task(fail(ValueError("two")))

    with pytest.raises(ObjectNotFoundError, match="one") as caught:
        loop.run(main)
    assert caught.value.__notes__ == ["meanwhile also: ValueError: two"]


def test_an_error_from_a_group_keeps_its_cause():
    async def translate():
        try:
            await fail(OSError("refused"))
        except OSError as e:
            raise StoreError("no") from e

    async def main():
        async with asyncio.TaskGroup() as group:
            group.create_task(translate())

    with pytest.raises(StoreError) as caught:
        loop.run(main)
    assert isinstance(caught.value.__cause__, OSError)


# Forks.

FORK = """
    import asyncio, os
    from cloudckpt.engine import loop

    async def main():
        await asyncio.sleep(0)
        return os.getpid()

    {before}
    child = os.fork()
    if child == 0:
        assert loop.run(main) == os.getpid()
        assert loop.run(main) == os.getpid()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert loop.run(main) == os.getpid()
    print("ok")
"""


@pytest.mark.parametrize("before", ["pass", "loop.run(main)"], ids=["before its first use", "after its first use"])
def test_a_child_forked_has_a_loop_of_its_own(before):
    assert python(FORK.format(before=before)) == ["ok"]


def test_a_child_forked_while_another_thread_waits_for_the_loop_is_not_held_up():
    script = """
        import asyncio, os, threading
        from cloudckpt.engine import loop

        under_way, end = threading.Event(), threading.Event()

        async def wait():
            under_way.set()
            await asyncio.to_thread(end.wait)

        async def main():
            return 5

        waiting = threading.Thread(target=loop.run, args=(wait,))
        waiting.start()
        under_way.wait()
        child = os.fork()
        if child == 0:
            assert loop.run(main) == 5
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        end.set()
        waiting.join()
        print("ok")
    """
    assert python(script) == ["ok"]


# Interrupts.


def test_an_interrupt_cancels_and_returns_when_the_clean_up_has_ended():
    script = """
        import asyncio, os, signal
        from cloudckpt.engine import loop

        async def main():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                print("cancelled")
                raise
            finally:
                for _ in range(100):
                    await asyncio.sleep(0)
                await asyncio.to_thread(print, "cleaned", flush=True)

        async def after():
            return "again"

        try:
            loop.run(main)
        except KeyboardInterrupt:
            print("interrupted")
        print(loop.run(after))
    """
    assert python(script) == ["cancelled", "cleaned", "interrupted", "again"]


def test_an_interrupt_before_the_first_step_returns_as_soon_as_the_loop_is_free():
    script = """
        import asyncio, os, signal, threading, time
        from cloudckpt.engine import loop

        busy, free = threading.Event(), threading.Event()

        async def hold():
            busy.set()
            free.wait()

        async def main():
            await asyncio.Event().wait()

        holding = threading.Thread(target=loop.run, args=(hold,))
        holding.start()
        busy.wait()

        def on_interrupt(*_):
            threading.Timer(0.1, free.set).start()
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, on_interrupt)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        try:
            loop.run(main)
        except KeyboardInterrupt:
            print("interrupted", free.is_set(), time.monotonic() - began < 10)
        holding.join()
    """
    assert python(script) == ["interrupted", "True", "True"]


# Clean-up.


async def test_a_clean_up_runs_to_its_end_although_its_caller_is_cancelled():
    steps = []

    async def clean_up():
        steps.append("began")
        for _ in range(5):
            await asyncio.sleep(0)
        steps.append("ended")

    task = asyncio.ensure_future(shielded(clean_up))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert steps == ["began"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert steps == ["began", "ended"]


async def test_a_clean_up_runs_to_its_end_although_its_caller_is_cancelled_twice():
    ended = False

    async def clean_up():
        nonlocal ended
        for _ in range(10):
            await asyncio.sleep(0)
        ended = True

    task = asyncio.ensure_future(shielded(clean_up))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


async def test_what_a_clean_up_raises_comes_up():
    with pytest.raises(StoreError, match="no"):
        await shielded(lambda: fail(StoreError("no")))


# From one loop to another.


@pytest.fixture(scope="module")
def other():
    return LoopThread(1)


async def test_another_loop_runs_what_this_one_asks_for(other):
    async def where():
        return asyncio.get_running_loop()

    assert await other.run_from_loop(where) is not asyncio.get_running_loop()


async def test_an_error_comes_over_as_it_was_raised(other):
    error = StoreError("no")

    async def fail():
        raise error

    with pytest.raises(StoreError) as caught:
        await other.run_from_loop(fail)
    assert caught.value is error


async def test_one_that_is_cancelled_is_left_only_when_its_clean_up_has_ended(other):
    began, ended = threading.Event(), []

    async def work():
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(50):
                await asyncio.sleep(0)
            ended.append(True)

    task = asyncio.ensure_future(other.run_from_loop(work))
    await asyncio.to_thread(began.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


async def test_one_that_is_cancelled_before_it_began_ends_too(other):
    held, go_on = threading.Event(), threading.Event()

    async def hold():
        held.set()
        go_on.wait(10)

    holding = asyncio.ensure_future(other.run_from_loop(hold))
    await asyncio.to_thread(held.wait, 10)
    task = asyncio.ensure_future(other.run_from_loop(lambda: give(1)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await holding


def test_threads_are_started_when_they_are_asked_for_and_stay():
    first = loop.threads(1)
    more = loop.threads(len(first) + 2)
    assert len(more) == len(first) + 2
    assert loop.threads(1) == more
    assert more[: len(first)] == first


def test_each_thread_can_be_asked():
    seen = []

    async def look():
        seen.append(threading.current_thread())

    count = len(loop.threads(3))
    loop.run_on_each(look)
    assert len(set(seen)) == count
