"""A body received by the socket straight into memory, from servers that behave and servers that do not."""

import asyncio
import contextlib
import datetime as dt
import os
import socket
import ssl
import struct

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloudckpt.store.receive import receive

BODY = os.urandom(3 << 20)


class Server:
    """Speaks HTTP/1.1 on a free port; ``answer(writer, n)`` sends the n-th reply of all."""

    def __init__(self, answer, tls=None):
        self._answer, self._tls = answer, tls
        self.connections = self.requests = 0

    async def __aenter__(self):
        self._tasks = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        scheme = "https" if self._tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        self.connections += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    await reader.readuntil(b"\r\n\r\n")
                    self.requests += 1
                    await self._answer(writer, self.requests - 1)
        finally:
            writer.close()


def head(nbytes, more=""):
    return f"HTTP/1.1 206 Partial Content\r\nContent-Length: {nbytes}\r\n{more}\r\n".encode()


def sending(body, *, pieces=1, more=""):
    async def answer(writer, _):
        writer.write(head(len(body), more) + (body if pieces == 1 else b""))
        if pieces > 1:
            size = -(-len(body) // pieces)
            for start in range(0, len(body), size):
                writer.write(body[start : start + size])
                await writer.drain()
        await writer.drain()

    return answer


def session(tls=None, timeout=30):
    connector = aiohttp.TCPConnector(ssl=tls or True)
    return aiohttp.ClientSession(
        connector=connector, auto_decompress=False, timeout=aiohttp.ClientTimeout(sock_read=timeout)
    )


def cut(nbytes, *sizes):
    """Memory of so many bytes as views of those sizes, the last as long as it takes."""
    memory = memoryview(bytearray(nbytes))
    views, start = [], 0
    for size in sizes:
        views.append(memory[start : start + size])
        start += size
    return memory, [*views, memory[start:]]


async def get_into(client, url, views):
    async with client.get(url) as response:
        await receive(response, views)


SIZES = [0, 1, (128 << 10) - 1, (128 << 10) + 1, 1 << 20, 3 << 20]


@pytest.mark.parametrize("pieces", [1, 50])
@pytest.mark.parametrize("nbytes", SIZES)
async def test_bodies_of_any_size_arrive(nbytes, pieces):
    async with Server(sending(BODY[:nbytes], pieces=pieces)) as server, session() as client:
        memory, views = cut(nbytes)
        await get_into(client, server.url, views)
        assert memory == BODY[:nbytes]


async def test_most_of_a_large_body_never_passes_through_aiohttp():
    async with Server(sending(BODY, pieces=10)) as server, session() as client:
        _, views = cut(len(BODY))
        async with client.get(server.url) as response:
            await receive(response, views)
            assert response.content.total_bytes < len(BODY) // 2


async def test_a_slow_body_is_waited_for_as_long_as_something_comes():
    async def answer(writer, _):
        writer.write(head(len(BODY)))
        for start in range(0, len(BODY), 1 << 19):
            writer.write(BODY[start : start + (1 << 19)])
            await writer.drain()
            await asyncio.sleep(0.1)  # the server's pace: half of what the client puts up with

    async with Server(answer) as server, session(timeout=0.2) as client:
        for _ in range(2):
            memory, views = cut(len(BODY))
            await get_into(client, server.url, views)
            assert memory == BODY
        assert server.connections == 1


async def test_a_body_is_spread_over_buffers_of_all_sizes():
    async with Server(sending(BODY, pieces=7)) as server, session() as client:
        memory, views = cut(len(BODY), 0, 1, 70000, 0, 3, 1 << 20, 0, 17)
        await get_into(client, server.url, views)
        assert memory == BODY


async def test_a_connection_is_used_again():
    async with Server(sending(BODY)) as server, session() as client:
        for _ in range(5):
            memory, views = cut(len(BODY), 1000)
            await get_into(client, server.url, views)
            assert memory == BODY
            async with client.get(server.url) as response:  # and for what aiohttp reads by itself
                assert await response.read() == BODY
        assert (server.connections, server.requests) == (1, 10)


async def test_many_bodies_arrive_at_once():
    async with Server(sending(BODY, pieces=20)) as server, session() as client:
        outs = [cut(len(BODY)) for _ in range(16)]
        await asyncio.gather(*(get_into(client, server.url, views) for _, views in outs))
        assert all(memory == BODY for memory, _ in outs)


async def test_a_connection_that_is_to_be_closed_is_closed():
    async with Server(sending(BODY, more="Connection: close\r\n")) as server, session() as client:
        for _ in range(2):
            memory, views = cut(len(BODY))
            await get_into(client, server.url, views)
            assert memory == BODY
        assert server.connections == 2


async def half_and_close(writer, n):
    writer.write(head(len(BODY)) + BODY[: len(BODY) // 2])
    await writer.drain()
    if n == 0:
        writer.close()
        raise ConnectionError
    writer.write(BODY[len(BODY) // 2 :])


async def half_and_reset(writer, n):
    if n == 0:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    await half_and_close(writer, n)


@pytest.mark.parametrize("answer", [half_and_close, half_and_reset])
async def test_a_connection_lost_in_mid_body_is_told_and_not_used_again(answer):
    async with Server(answer) as server, session() as client:
        _, views = cut(len(BODY))
        with pytest.raises((ConnectionError, aiohttp.ClientError)):
            await get_into(client, server.url, views)
        memory, views = cut(len(BODY))
        await get_into(client, server.url, views)
        assert memory == BODY
        assert server.connections == 2


async def test_a_server_that_falls_silent_in_mid_body_is_told():
    async def answer(writer, n):
        writer.write(head(len(BODY)) + BODY[: 1 << 20])
        await writer.drain()
        if n == 0:
            await asyncio.Event().wait()
        writer.write(BODY[1 << 20 :])

    async with Server(answer) as server, session(timeout=0.2) as client:
        _, views = cut(len(BODY))
        with pytest.raises((TimeoutError, aiohttp.ClientError)):
            await get_into(client, server.url, views)
        memory, views = cut(len(BODY))
        await get_into(client, server.url, views)
        assert memory == BODY


async def test_nothing_is_written_after_a_cancellation():
    go_on, sent = asyncio.Event(), asyncio.Event()

    async def answer(writer, _):
        writer.write(head(len(BODY)) + BODY[: 1 << 20])
        await writer.drain()
        await go_on.wait()
        writer.write(BODY[1 << 20 :])
        sent.set()
        await writer.drain()

    async with Server(answer) as server, session() as client:
        memory, views = cut(len(BODY))
        task = asyncio.create_task(get_into(client, server.url, views))
        while memory[1000] != BODY[1000]:  # noqa: ASYNC110 - memory has no event
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        memory[:] = bytes(len(memory))
        go_on.set()
        await sent.wait()
        for _ in range(100):
            await asyncio.sleep(0)
        assert memory == bytes(len(memory))
        memory, views = cut(len(BODY))
        await get_into(client, server.url, views)
        assert memory == BODY
        assert server.connections == 2


async def test_bytes_after_the_body_never_pass_for_another():
    async def answer(writer, n):
        writer.write(head(len(BODY)) + BODY + (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad" if n == 0 else b""))
        await writer.drain()

    async with Server(answer) as server, session() as client:
        memory, views = cut(len(BODY))
        await get_into(client, server.url, views)
        assert memory == BODY
        for _ in range(100):
            await asyncio.sleep(0)
        memory, views = cut(len(BODY))
        try:
            await get_into(client, server.url, views)
        except (aiohttp.ClientError, ConnectionError):
            await get_into(client, server.url, views)
        assert memory == BODY


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.mark.parametrize("pieces", [1, 30])
async def test_over_tls_it_is_the_same(certificate, pieces):
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(certificate)
    client_side = ssl.create_default_context(cafile=certificate)
    client_side.check_hostname = False
    async with Server(sending(BODY, pieces=pieces), server_side) as server, session(client_side) as client:
        for _ in range(3):
            memory, views = cut(len(BODY), 5, 100000)
            await get_into(client, server.url, views)
            assert memory == BODY
        assert server.connections == 1
