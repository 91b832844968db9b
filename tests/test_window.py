"""More requests at a time while that helps, fewer when the server asks for fewer."""

import asyncio
from contextlib import suppress

import pytest

from cloudckpt.errors import StoreUnavailableError, ThrottledError
from cloudckpt.store.window import Window


class Server:
    """Serves at most ``capacity`` bytes a second in all, and ``each`` to one request; its time is its own."""

    def __init__(self, *, each, capacity, refuses_above=1000):
        self.each, self.capacity, self.refuses_above = each, capacity, refuses_above
        self.now = 0.0
        self.waiting = []
        self.most = 0

    def clock(self):
        return self.now

    async def serve(self, nbytes):
        self.most = max(self.most, len(self.waiting) + 1)
        if len(self.waiting) >= self.refuses_above:
            msg = "SlowDown"
            raise ThrottledError(msg)
        entry = [nbytes, asyncio.get_running_loop().create_future()]
        self.waiting.append(entry)
        await entry[1]

    def step(self):
        """Lets time go on until the next request is done."""
        rate = min(self.each, self.capacity / len(self.waiting))
        least = min(left for left, _ in self.waiting)
        self.now += least / rate
        for entry in self.waiting:
            entry[0] -= least
        done = [entry for entry in self.waiting if entry[0] <= 0]
        self.waiting = [entry for entry in self.waiting if entry[0] > 0]
        for _, future in done:
            if not future.done():
                future.set_result(None)


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def move(server, window, requests, nbytes=100):
    """Sends so many requests, a refused one again and again."""

    async def one():
        while True:
            with suppress(ThrottledError):
                return await window.run(nbytes, lambda: server.serve(nbytes))

    tasks = [asyncio.ensure_future(one()) for _ in range(requests)]
    while not all(task.done() for task in tasks):
        await settle()
        if server.waiting:
            server.step()
    await asyncio.gather(*tasks)


def window_of(server, start=4, most=64):
    return Window(start=start, most=most, clock=server.clock)


async def test_it_grows_as_long_as_that_brings_more():
    server = Server(each=10, capacity=320)
    window = window_of(server)
    await move(server, window, 1000)
    assert 32 <= window.limit <= 64
    assert server.most <= 64


async def test_it_stays_where_more_brings_nothing():
    server = Server(each=100, capacity=100)
    window = window_of(server)
    await move(server, window, 30)
    assert window.limit == 4
    assert server.most == 8  # it was tried


async def test_what_did_not_help_is_tried_again_only_after_a_rest():
    server = Server(each=100, capacity=100)
    window = window_of(server)
    await move(server, window, 30)
    server.most = 0
    await move(server, window, 20)
    assert server.most == 4
    await move(server, window, 100)
    assert server.most == 8


async def test_it_never_has_more_than_it_may():
    server = Server(each=10, capacity=10000)
    window = window_of(server, most=20)
    await move(server, window, 1000)
    assert window.limit == server.most == 20


async def test_it_begins_with_no_more_than_it_may():
    assert window_of(Server(each=1, capacity=1), start=16, most=3).limit == 3


async def test_a_server_that_refuses_gets_half_as_many():
    server = Server(each=10, capacity=10000, refuses_above=15)
    window = window_of(server, start=16)
    await move(server, window, 16)
    assert window.limit == 8


async def test_requests_that_were_under_way_together_halve_it_once():
    server = Server(each=10, capacity=10000, refuses_above=0)
    window = window_of(server, start=16)

    async def refused():
        with pytest.raises(ThrottledError):
            await window.run(1, lambda: server.serve(1))

    async def late_refusal():
        async def wait():
            await settle()
            msg = "SlowDown"
            raise ThrottledError(msg)

        with pytest.raises(ThrottledError):
            await window.run(1, wait)

    await asyncio.gather(late_refusal(), late_refusal(), refused())
    assert window.limit == 8
    await refused()
    assert window.limit == 4


async def test_it_never_closes():
    server = Server(each=10, capacity=10000, refuses_above=0)
    window = window_of(server)
    for _ in range(10):
        with pytest.raises(ThrottledError):
            await window.run(1, lambda: server.serve(1))
    assert window.limit == 1
    server.refuses_above = 1000
    await move(server, window, 3)


async def test_after_a_refusal_it_grows_one_by_one():
    server = Server(each=10, capacity=10000, refuses_above=19)
    window = window_of(server, start=16)
    await move(server, window, 3000)
    assert 9 <= window.limit <= 20
    assert server.most <= 33  # one doubling, before the first refusal


async def test_another_failure_leaves_it_as_it_is():
    window = Window(start=4, most=8, clock=lambda: 0.0)

    async def fail():
        msg = "reset"
        raise StoreUnavailableError(msg)

    with pytest.raises(StoreUnavailableError):
        await window.run(1, fail)
    assert window.limit == 4


async def test_few_requests_at_a_time_say_nothing_of_how_many_are_best():
    server = Server(each=10, capacity=10000)
    window = window_of(server)
    for _ in range(50):
        await move(server, window, 3)
    assert window.limit == 4


async def test_one_that_is_cancelled_gives_its_place_to_the_next():
    server = Server(each=10, capacity=10000)
    window = window_of(server, start=1)
    first, second, third = (asyncio.ensure_future(window.run(10, lambda: server.serve(10))) for _ in range(3))
    await settle()
    second.cancel()
    first.cancel()
    await settle()
    while not third.done():
        server.step()
        await settle()
    await third
    assert first.cancelled()
    assert second.cancelled()


async def test_after_a_refusal_free_places_are_not_taken_either():
    server = Server(each=10, capacity=10000)
    window = window_of(server, start=16)

    async def refuse():
        msg = "SlowDown"
        raise ThrottledError(msg)

    for _ in range(3):
        with pytest.raises(ThrottledError):
            await window.run(1, refuse)
    assert window.limit == 2
    await move(server, window, 30)
    assert server.most <= 3
