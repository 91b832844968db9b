"""S3 over HTTP, over connections that end, are not to be had, or lead through proxies and TLS.

Whatever it does, a request is sent once, its failure is a `StoreError` in bounded time, and the store goes on to
serve.
"""

import asyncio
import contextlib
import socket

import aiohttp.abc
import pytest
from botocore.awsrequest import AWSRequest

from cloudckpt.errors import (
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
)
from cloudckpt.store.s3_http import OneAttemptSession, ViewsBody
from rude_server import (
    RudeServer,
    certificate,
    etag,
    head,
    refuse,
    saying,
    serve,
    server_side,
)
from s3_over_http import (
    BODY,
    BOUND_S,
    CALLS,
    EARLY,
    HOST,
    LARGE,
    LONG_S,
    opened,
    over,
    s3_store,
    serves,
)

pytestmark = pytest.mark.usefixtures("nothing_from_outside")


# Connections that end.


async def close_at_once(e):
    await e.close()


async def reset_at_once(e):
    await e.reset()


async def close_after_the_body(e):
    await e.read_body()
    await e.close()


async def reset_after_the_body(e):
    await e.read_body()
    await e.reset()


async def half_close_after_the_body(e):
    await e.read_body()
    await e.half_close()
    await e.hang()


async def close_in_the_head(e):
    await e.read_body()
    await e.send(b"HTTP/1.1 200 OK\r\nContent-Le")
    await e.close()


async def half_close_in_the_head(e):
    await e.read_body()
    await e.send(b"HTTP/1.1 200 OK\r\nContent-Le")
    await e.half_close()
    await e.hang()


async def answer_in_no_known_language(e):
    await e.read_body()
    await e.send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    await e.close()


async def answer_with_a_broken_head(e):
    await e.read_body()
    await e.send(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n")
    await e.close()


ENDS = (
    close_at_once,
    reset_at_once,
    close_after_the_body,
    reset_after_the_body,
    half_close_after_the_body,
    close_in_the_head,
    half_close_in_the_head,
    answer_in_no_known_language,
    answer_with_a_broken_head,
)


@pytest.mark.parametrize("end", ENDS)
@over(CALLS)
async def test_a_connection_that_ends_without_an_answer_is_unavailable_and_not_asked_again(call, end):
    async with opened(end, read_timeout_s=LONG_S) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await call(store)
        assert len(server.requests) == 1
        await serves(store)


@pytest.mark.parametrize("end", ENDS)
@over(CALLS)
async def test_so_is_a_kept_connection(call, end):
    async with opened(serve, end, read_timeout_s=LONG_S) as (server, store):
        await store.put("before", [memoryview(b"x")])
        with pytest.raises(StoreUnavailableError):
            await call(store)
        assert [request.connection for request in server.requests] == [1, 1]
        await serves(store)


@over({name: CALLS[name] for name in ("get", "get_range", "head", "put", "complete_upload", "list_objects")})
async def test_a_server_that_falls_silent_before_its_answer_is_unavailable_after_the_timeout(call):
    async def fall_silent(e):
        await e.read_body()
        await e.hang()

    async with opened(fall_silent, read_timeout_s=0.5) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await call(store)
        assert len(server.requests) == 1
        await serves(store)


async def test_a_server_that_stops_reading_is_unavailable_after_the_timeout():
    async def read_a_little(e):
        await e.read(1000)
        await e.hang()

    async with opened(read_a_little, read_timeout_s=0.5) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await store.put("k", [memoryview(LARGE)])
        assert len(server.requests) == 1
        await serves(store)


# Connections that end idle.


@pytest.mark.parametrize("end", ["close", "reset", "half_close"])
@over(CALLS)
async def test_an_idle_connection_that_was_closed_is_never_a_request_sent_twice(call, end):
    async def answer_and_end(e):
        await serve(e)
        await getattr(e, end)()
        await e.hang()

    async with opened(answer_and_end, read_timeout_s=LONG_S) as (server, store):
        await store.put("before", [memoryview(b"x")])
        with contextlib.suppress(StoreError):  # by who was faster
            await call(store)
        assert len(server.requests) <= 2
        await serves(store)


async def test_an_idle_connection_that_is_known_to_be_closed_is_not_used():
    async def answer_and_close(e):
        await serve(e)
        await e.close()

    async with opened(answer_and_close) as (server, store):
        await store.put("k", [memoryview(BODY)])
        await asyncio.sleep(0.2)  # the server's farewell has arrived
        assert (await store.get("k")).data == BODY
        assert [request.connection for request in server.requests] == [1, 2]


@pytest.mark.parametrize("more", ["HTTP/1.1 200 OK\r\nConnection: close", "HTTP/1.0 200 OK"])
async def test_a_connection_that_is_not_to_be_kept_is_not_used_again(more):
    async def answer(e):
        e.server.objects[e.request.target] = await e.read_body()
        await e.send(f"{more}\r\nETag: x\r\nContent-Length: 0\r\n\r\n".encode())
        await e.hang()

    async with opened(answer) as (server, store):
        await store.put("k", [memoryview(BODY)])
        assert (await store.get("k")).data == BODY
        assert [request.connection for request in server.requests] == [1, 2]


async def test_a_connection_is_kept_over_requests_of_every_kind():
    async with opened() as (server, store):
        for _ in range(3):
            await serves(store)
            with pytest.raises(ObjectNotFoundError):
                await store.get("none")
            with pytest.raises(ObjectNotFoundError):
                await store.head("none")
        assert server.connections == 1


# Connecting.


async def test_a_server_that_is_not_there_is_unavailable():
    async with opened() as (server, store):
        for listening in server._servers:
            listening.close()
        for call in CALLS.values():
            with pytest.raises(StoreUnavailableError):
                await call(store)
        assert not server.requests


async def test_a_host_that_has_no_address_is_unavailable():
    async with s3_store("http://nowhere.invalid:9") as store, asyncio.timeout(BOUND_S):
        with pytest.raises(StoreUnavailableError):
            await store.get("k")


async def test_a_server_that_accepts_nothing_is_unavailable_after_the_connect_timeout():
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_server((HOST, 0), backlog=1))
        port = sock.getsockname()[1]
        for _ in range(8):  # which fill its backlog
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((HOST, port))
        options = {"connect_timeout_s": 0.5, "read_timeout_s": LONG_S}
        async with s3_store(f"http://{HOST}:{port}", **options) as store, asyncio.timeout(BOUND_S):
            with pytest.raises(StoreUnavailableError, match="ConnectTimeout"):
                await store.get("k")


async def test_never_more_connections_than_allowed_and_all_requests_served():
    async def take_time(e):
        await asyncio.sleep(0.02)  # the server's pace
        await serve(e)

    async with opened(*[take_time] * 60, max_connections=3) as (server, store):
        await asyncio.gather(*(store.put(f"{n}", [memoryview(BODY[n:])]) for n in range(30)))
        found = await asyncio.gather(*(store.get(f"{n}") for n in range(30)))
        assert [len(blob.data) for blob in found] == [len(BODY) - n for n in range(30)]
        assert server.most_connections == server.connections == 3
        assert len(server.requests) == 60


async def test_a_failure_frees_its_connection_for_who_waits():
    script = [close_at_once, reset_after_the_body, refuse(503, "SlowDown", reads=False), close_in_the_head]
    async with opened(*script, max_connections=1, read_timeout_s=LONG_S) as (server, store):
        puts = (store.put(f"{n}", [memoryview(LARGE)]) for n in range(6))
        results = await asyncio.gather(*puts, return_exceptions=True)
        assert [isinstance(result, StoreUnavailableError) for result in results] == [True] * 4 + [False] * 2
        assert results[4:] == [etag(LARGE)] * 2
        assert len(server.requests) == 6


async def test_a_cancelled_request_frees_its_connection_for_who_waits():
    begun = asyncio.Event()

    async def begin(e):
        await e.read(1000)
        begun.set()
        await e.hang()

    async with opened(begin, max_connections=1) as (_server, store):
        task = asyncio.create_task(store.put("k", [memoryview(LARGE)]))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await serves(store)


class Resolver(aiohttp.abc.AbstractResolver):
    """Knows one name, by all the addresses."""

    def __init__(self, addresses):
        self._addresses = addresses

    async def resolve(self, host, port=0, family=socket.AF_INET):
        made = {"hostname": host, "port": port, "family": socket.AF_INET, "proto": 0, "flags": socket.AI_NUMERICHOST}
        return [made | {"host": address} for address in self._addresses]

    async def close(self):
        pass


ADDRESSES = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")


def asking(session, server, n):
    url = f"http://many.invalid:{server.port}/bucket/p/{n}"
    request = AWSRequest(
        method="PUT", url=url, data=ViewsBody([memoryview(BODY)]), headers={"Expect": "100-continue"}
    ).prepare()
    request.headers["Content-Length"] = str(len(BODY))
    request.stream_output = False
    request.context = {}
    return session.send(request)


@pytest.mark.parametrize("alive", [ADDRESSES, ADDRESSES[1:]], ids=["all", "all but the first"])
async def test_connections_spread_over_the_addresses_of_a_name(alive):
    all_begun = asyncio.Barrier(16)

    async def wait_for_all(e):
        await all_begun.wait()
        await serve(e)

    # The session itself, for a store has no option that leads to a resolver.
    session = OneAttemptSession(
        timeout=(2, 5), max_pool_connections=16, connector_args={"resolver": Resolver(ADDRESSES)}
    )
    async with RudeServer([wait_for_all] * 16, hosts=alive) as server, session, asyncio.timeout(BOUND_S):
        replies = await asyncio.gather(*(asking(session, server, n) for n in range(16)))
        assert {reply.status_code for reply in replies} == {200}
        assert len(server.requests) == 16
        assert {request.host for request in server.requests} == set(alive)
        assert all(body == BODY for body in server.objects.values())


# Proxies.


@pytest.fixture
def proxied(monkeypatch):
    def by(server, scheme="http"):
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", server.url)

    return by


async def test_a_proxy_of_the_environment_is_used(proxied):
    async with RudeServer() as proxy:
        proxied(proxy)
        async with s3_store("http://s3.invalid") as store, asyncio.timeout(BOUND_S):
            await serves(store)
        assert {request.target.partition("?")[0] for request in proxy.requests} == {
            "http://s3.invalid/bucket/p/after"
        }
        assert len(proxy.requests) == 4
        assert proxy.requests[0].body == BODY
        assert proxy.connections == 1


@pytest.mark.parametrize("end", ENDS)
async def test_a_proxy_that_ends_the_connection_is_unavailable_and_not_asked_again(proxied, end):
    async with RudeServer([serve, end]) as proxy:
        proxied(proxy)
        async with s3_store("http://s3.invalid") as store, asyncio.timeout(BOUND_S):
            await store.put("before", [memoryview(b"x")])
            with pytest.raises(StoreUnavailableError):
                await CALLS["put"](store)
            assert len(proxy.requests) == 2
            await serves(store)


async def test_a_proxy_that_is_not_there_is_unavailable(monkeypatch):
    with socket.create_server((HOST, 0)) as sock:
        monkeypatch.setenv("HTTP_PROXY", f"http://{HOST}:{sock.getsockname()[1]}")
    async with s3_store("http://s3.invalid") as store, asyncio.timeout(BOUND_S):
        with pytest.raises(StoreUnavailableError):
            await store.get("k")


# TLS.


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    certificate(file)
    return file


async def test_an_authority_of_ones_own_is_trusted_when_named(pem):
    async with opened(tls=server_side(pem), ca_bundle=str(pem)) as (server, store):
        await serves(store)
        assert server.connections == 1


async def test_an_unknown_authority_is_told_with_what_to_do_about_it(pem):
    async with opened(tls=server_side(pem)) as (server, store):
        for call in CALLS.values():
            with pytest.raises(StoreError, match="ca_bundle") as e:
                await call(store)
            assert not isinstance(e.value, StoreUnavailableError)
        assert not server.requests


@pytest.mark.parametrize("end", [end for end in ENDS if "half" not in end.__name__])  # TLS has no halves
@over({name: CALLS[name] for name in ("get_range", "put", "complete_upload")})
async def test_a_tls_connection_that_ends_without_an_answer_is_unavailable(pem, call, end):
    options = {"ca_bundle": str(pem), "read_timeout_s": LONG_S}
    async with opened(serve, end, tls=server_side(pem), **options) as (server, store):
        await store.put("before", [memoryview(b"x")])
        with pytest.raises(StoreUnavailableError):
            await call(store)
        assert len(server.requests) == 2
        await serves(store)


@pytest.mark.parametrize(("status", "code", "kind"), EARLY)
async def test_a_refusal_over_tls_before_the_body_was_read_is_told_at_once(pem, status, code, kind):
    script = [refuse(status, code, reads=False)]
    options = {"ca_bundle": str(pem), "read_timeout_s": LONG_S}
    async with opened(*script, tls=server_side(pem), **options) as (server, store):
        with pytest.raises(kind):
            await store.put("k", [memoryview(LARGE)])
        assert len(server.requests) == 1
        await serves(store)


async def test_a_server_that_stops_reading_over_tls_is_unavailable_after_the_timeout(pem):
    async def read_a_little(e):
        await e.read(1000)
        await e.hang()

    async with opened(read_a_little, tls=server_side(pem), ca_bundle=str(pem), read_timeout_s=0.5) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await store.put("k", [memoryview(LARGE)])
        assert len(server.requests) == 1
        await serves(store)


async def test_plain_http_where_tls_is_spoken_and_the_other_way_round_is_a_store_error(pem):
    async with RudeServer(tls=server_side(pem)) as secure, RudeServer() as plain, asyncio.timeout(BOUND_S):
        for url in (secure.url.replace("https", "http"), plain.url.replace("http", "https")):
            async with s3_store(url) as store:
                with pytest.raises(StoreError):
                    await store.get("k")


async def test_a_tunnel_through_a_proxy_leads_to_the_server(pem, proxied):
    async def tunnel(e):
        await e.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await e.start_tls(server_side(pem))

    async with RudeServer([tunnel]) as proxy:
        proxied(proxy, "https")
        async with s3_store("https://s3.invalid", ca_bundle=str(pem)) as store, asyncio.timeout(BOUND_S):
            await serves(store)
        first, *others = proxy.requests
        assert (first.method, first.target) == ("CONNECT", "s3.invalid:443")
        assert [request.method for request in others] == ["PUT", "GET", "GET", "HEAD"]
        assert others[0].body == BODY
        assert proxy.connections == 1


@pytest.mark.parametrize("status", [403, 407, 502])
async def test_a_proxy_that_refuses_a_tunnel_is_a_store_error(pem, proxied, status):
    async with RudeServer([saying(head(status, 0))]) as proxy:
        proxied(proxy, "https")
        async with s3_store("https://s3.invalid", ca_bundle=str(pem)) as store, asyncio.timeout(BOUND_S):
            with pytest.raises(StoreError):
                await store.put("k", [memoryview(BODY)])
        assert proxy.asked("s3.invalid") == ["CONNECT"]
