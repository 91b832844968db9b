"""A request's body sent by the socket straight from memory, to servers that take it and servers that do not."""

import asyncio
import contextlib
import gc
import os
import ssl

import aiohttp
import pytest
from aiohttp.payload import Payload

from cloudckpt.store import send as room
from cloudckpt.store.send import send
from rude_server import RudeServer, certificate, head, server_side

MIB = 1 << 20
BODY = os.urandom(3 * MIB)
MORE_THAN_A_SOCKET_TAKES = 32 * MIB
TOLD = (ConnectionError, TimeoutError, aiohttp.ClientError)
OK = head(200, 0)


class Body(Payload):
    """A body as the store gives it to aiohttp, which keeps the writer to be looked at."""

    def __init__(self, views, stall_s=30, then=lambda: None):
        super().__init__(views)
        self._size = sum(map(len, views))
        self._stall_s, self._then = stall_s, then
        self.writer = None

    def decode(self, encoding="utf-8", errors="strict"):
        raise TypeError

    async def write(self, writer):
        self.writer = writer
        await send(writer, self._value, stall_s=self._stall_s)
        self._then()

    async def write_with_length(self, writer, content_length):
        await self.write(writer)


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    certificate(file)
    return file


@pytest.fixture(params=["plain", "tls"])
def tls(request, pem):
    """The server's side and the client's."""
    return (server_side(pem), ssl.create_default_context(cafile=pem)) if request.param == "tls" else (None, True)


def session(tls=True):
    made = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls), timeout=aiohttp.ClientTimeout(sock_read=30))
    made._retry_connection = False  # as the store's: else aiohttp sends a PUT that failed once more
    return made


async def put(client, server, body):
    async with client.put(server.url, data=body) as response:
        return response.status


def pieces_of(body, size):
    view = memoryview(body)
    return [view[start : start + size] for start in range(0, len(view), size)]


def with_empty(views):
    empty = memoryview(b"")
    return [empty, *(each for view in views for each in (view, empty))]


async def read_all(e):
    await e.read_body()
    await e.send(OK)


async def take_a_little(e):
    await e.read(100_000)


async def read_slowly(e):
    read = [await e.read(e.request.nbytes % MIB)]
    for _ in range(e.request.nbytes // MIB):
        read.append(await e.read(MIB))
        await asyncio.sleep(0.05)  # the server's pace
    e.request.body = b"".join(read)
    await e.send(OK)


def close_after_a_little(how):
    async def answer(e):
        await take_a_little(e)
        await getattr(e, how)()
        await e.hang()

    return answer


LIMITS = [room._LEAST_NBYTES, room._SLICE, room._SMALL]


@pytest.mark.parametrize("nbytes", [0, 1, *(limit + d for limit in LIMITS for d in (-1, 0, 1)), MIB, len(BODY)])
async def test_bodies_of_any_size_arrive(tls, nbytes):
    async with RudeServer([read_all], tls=tls[0]) as server, session(tls[1]) as client:
        assert await put(client, server, Body([memoryview(BODY)[:nbytes]])) == 200
        assert server.requests[0].body == BODY[:nbytes]


VIEWS = {
    "thousands of 4 KiB": pieces_of(BODY * 4, 4096),
    "as many as one system call takes": pieces_of(BODY, len(BODY) // room._MOST_VIEWS),
    "one more than that": [memoryview(b"x"), *pieces_of(BODY, len(BODY) // room._MOST_VIEWS)],
    "thousands, every other empty": with_empty(pieces_of(BODY, 1000)),
    "odd": pieces_of(BODY, 65_537),
    "just small": pieces_of(BODY, room._SMALL - 1),
    "just not small": pieces_of(BODY, room._SMALL),
    "small after large": [memoryview(BODY), memoryview(b"end"), memoryview(b"")],
    "large after small": [memoryview(b""), memoryview(b"begin"), memoryview(BODY)],
    "all empty": [memoryview(b"")] * 2000,
}


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
async def test_bodies_in_views_of_any_size_arrive(tls, views):
    async with RudeServer([read_all], tls=tls[0]) as server, session(tls[1]) as client:
        assert await put(client, server, Body(views)) == 200
        assert server.requests[0].body == b"".join(views)


async def test_a_connection_is_used_again_after_a_body(tls):
    async with RudeServer([read_all] * 5, tls=tls[0]) as server, session(tls[1]) as client:
        for n in range(5):
            assert await put(client, server, Body(pieces_of(BODY[n:], 100_000))) == 200
            assert server.requests[n].body == BODY[n:]
        assert server.connections == 1


async def test_many_bodies_are_sent_at_once(tls):
    async with RudeServer([read_all] * 16, tls=tls[0]) as server, session(tls[1]) as client:
        await asyncio.gather(*(put(client, server, Body(pieces_of(BODY[n:], 77_777))) for n in range(16)))
        assert {len(request.body) for request in server.requests} == {len(BODY) - n for n in range(16)}
        assert all(request.body == BODY[-len(request.body) :] for request in server.requests)


async def test_nothing_of_a_large_body_passes_through_aiohttp():
    async with RudeServer([read_all]) as server, session() as client:
        body = Body(pieces_of(BODY, 4096))
        await put(client, server, body)
        assert 0 < body.writer.output_size < 4096  # the headers


async def test_a_body_is_waited_for_as_long_as_the_server_takes_some(tls):
    views = pieces_of(BODY * 4, 4096)
    async with RudeServer([read_slowly], tls=tls[0]) as server, session(tls[1]) as client:
        assert await put(client, server, Body(views, stall_s=0.5)) == 200
        assert server.requests[0].body == BODY * 4


async def test_a_server_that_takes_nothing_more_is_told_and_its_connection_not_used_again(tls):
    large = [memoryview(bytes(MORE_THAN_A_SOCKET_TAKES))]
    async with RudeServer([take_a_little], tls=tls[0]) as server, session(tls[1]) as client:
        async with asyncio.timeout(10):
            with pytest.raises(TOLD):
                await put(client, server, Body(large, stall_s=0.2))
            assert await put(client, server, Body([memoryview(BODY)])) == 200
        assert [request.connection for request in server.requests] == [1, 2]
        assert server.requests[1].body == BODY


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_connection_lost_in_mid_body_is_told_and_not_used_again(tls, how):
    large = [memoryview(bytes(MORE_THAN_A_SOCKET_TAKES))]
    async with RudeServer([close_after_a_little(how)], tls=tls[0]) as server, session(tls[1]) as client:
        async with asyncio.timeout(10):
            with pytest.raises(TOLD):
                await put(client, server, Body(large))
            assert await put(client, server, Body([memoryview(BODY)])) == 200
        assert [request.connection for request in server.requests] == [1, 2]
        assert server.requests[1].body == BODY


async def test_a_server_that_half_closes_and_reads_no_more_is_told_before_the_stall_time():
    large = [memoryview(bytes(MORE_THAN_A_SOCKET_TAKES))]
    async with RudeServer([close_after_a_little("half_close")]) as server, session() as client:
        async with asyncio.timeout(10):
            with pytest.raises(TOLD):
                await put(client, server, Body(large, stall_s=30))
            assert await put(client, server, Body([memoryview(BODY)])) == 200
        assert [request.connection for request in server.requests] == [1, 2]


async def test_a_cancelled_body_closes_its_connection(tls):
    begun = asyncio.Event()

    async def begin(e):
        await take_a_little(e)
        begun.set()
        with contextlib.suppress(asyncio.IncompleteReadError):
            await e.read_body()
        begun.clear()
        await e.close()

    large = [memoryview(bytes(MORE_THAN_A_SOCKET_TAKES))]
    async with RudeServer([begin], tls=tls[0]) as server, session(tls[1]) as client:
        body = Body(large)
        task = asyncio.create_task(put(client, server, body))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await put(client, server, Body([memoryview(BODY)])) == 200
        assert server.requests[0].body is None
        assert server.requests[1].body == BODY
        assert server.connections == 2


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


ENDS = {
    "whole": read_all,
    "closed": close_after_a_little("close"),
    "reset": close_after_a_little("reset"),
    "half-closed": close_after_a_little("half_close"),
    "stalled": take_a_little,
}


@pytest.mark.parametrize("answer", ENDS.values(), ids=ENDS)
async def test_no_descriptor_is_held_after_the_end(tls, answer):
    before = open_descriptors()
    async with RudeServer([answer], tls=tls[0]) as server, session(tls[1]) as client:
        with contextlib.suppress(*TOLD):
            await put(client, server, Body([memoryview(bytes(MORE_THAN_A_SOCKET_TAKES))], stall_s=0.5))
    await closed_down(before)
    assert open_descriptors() == before


async def test_no_buffer_is_held_after_the_end():
    async def read_slowly_and_close(e):
        for _ in range(8):
            await e.read(MIB)
            await asyncio.sleep(0.1)  # the server's pace: the client's clock goes off once, and is wound up again
        await e.close()

    async with RudeServer([read_slowly_and_close]) as server, session() as client:
        memory = bytearray(MORE_THAN_A_SOCKET_TAKES)
        with contextlib.suppress(*TOLD):
            await put(client, server, Body([memoryview(memory)], stall_s=0.7))
        for _ in range(10):
            await asyncio.sleep(0)  # aiohttp lets go of the connection
        gc.collect()  # the error, with its frames
        memory.clear()  # refused with BufferError while a view of it exists


async def closed_down(before):
    for _ in range(1000):
        if open_descriptors() <= before:
            return
        await asyncio.sleep(0.001)


async def test_no_descriptor_is_held_after_a_cancellation(tls):
    begun = asyncio.Event()

    async def begin(e):
        await take_a_little(e)
        begun.set()
        await e.hang()

    before = open_descriptors()
    async with RudeServer([begin], tls=tls[0]) as server, session(tls[1]) as client:
        task = asyncio.create_task(put(client, server, Body([memoryview(bytes(MORE_THAN_A_SOCKET_TAKES))])))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await closed_down(before)
    assert open_descriptors() == before


@pytest.mark.parametrize("nbytes", [100, room._LEAST_NBYTES, len(BODY)])
async def test_memory_that_changes_after_it_was_sent_does_not_change_the_body(tls, nbytes):
    memory = bytearray(BODY[:nbytes])

    def change():
        memory[:] = bytes(nbytes)

    async with RudeServer([read_slowly], tls=tls[0]) as server, session(tls[1]) as client:
        await put(client, server, Body(pieces_of(memory, 50_000), then=change))
        assert server.requests[0].body == BODY[:nbytes]
