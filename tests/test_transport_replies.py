"""S3 over HTTP, from servers that answer in every form, too early, or with somebody else's address.

Whatever it does, a request is sent once, its failure is a `StoreError` in bounded time, and the store goes on to
serve.
"""

import asyncio
import contextlib

import pytest
from awscrt.checksums import crc32c

from cloudckpt.errors import (
    ChecksumRefusedError,
    CredentialsError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PreconditionFailedError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
)
from rude_server import (
    RudeServer,
    chunked,
    error_xml,
    etag,
    head,
    refuse,
    saying,
    serve,
)
from s3_over_http import (
    BODY,
    CALLS,
    EARLY,
    LARGE,
    LONG_S,
    PIECE,
    UPLOADS,
    opened,
    over,
    serves,
)

pytestmark = pytest.mark.usefixtures("nothing_from_outside")


# Replies in all forms.


def get_reply(data, **headers):
    return head(200, len(data), ETag=etag(data), **headers) + data


REPLIES = {
    "with a length": get_reply(BODY),
    "in chunks": head(200, None, ETag=etag(BODY), Transfer_Encoding="chunked") + chunked(BODY, 5000),
    "in one chunk": head(200, None, ETag=etag(BODY), Transfer_Encoding="chunked") + chunked(BODY, len(BODY)),
    "after 100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n" + get_reply(BODY),
    "after early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n" + get_reply(BODY),
    "after three of them": b"HTTP/1.1 102 Processing\r\n\r\n" * 3 + get_reply(BODY),
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
async def test_a_reply_of_any_form_is_read(reply):
    async with opened(saying(reply)) as (server, store):
        assert (await store.get("k")).data == BODY
        await serves(store)
        assert server.connections == 1


async def test_a_body_that_ends_with_the_connection_is_read():
    async def answer(e):
        await e.send(head(200, None, ETag=etag(BODY), Connection="close") + BODY)
        await e.close()

    async with opened(answer) as (_server, store):
        assert (await store.get("k")).data == BODY
        await serves(store)


@pytest.mark.parametrize("first", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n"])
@over(UPLOADS)
async def test_an_informational_reply_before_the_body_is_no_answer(call, first):
    async def answer(e):
        await e.send(first)
        await serve(e)

    async with opened(answer) as (server, store):
        await call(store)
        assert server.requests[0].body == BODY
        await serves(store)
        assert server.connections == 1


async def test_no_body_waits_for_leave_to_be_sent():
    async with opened() as (server, store):
        await store.put("k", [memoryview(BODY)], crc32c=crc32c(BODY))
        assert "expect" not in server.requests[0].headers


async def test_an_empty_body_needs_no_leave_that_botocore_did_not_ask_for(monkeypatch):
    monkeypatch.setenv("BOTO_EXPERIMENTAL__NO_EMPTY_CONTINUE", "true")
    async with opened() as (_server, store):
        assert await store.put("k", []) == etag(b"")
        await serves(store)


@pytest.mark.parametrize("wrong", ["200", "longer", "shorter", "in chunks"])
async def test_a_range_that_is_not_the_one_asked_for_is_refused(wrong):
    piece = {"longer": BODY[: PIECE + 1], "shorter": BODY[: PIECE - 1]}.get(wrong, BODY[:PIECE])
    if wrong == "in chunks":
        reply = head(206, None, ETag=etag(BODY), Transfer_Encoding="chunked") + chunked(piece, 5000)
    else:
        reply = head(200 if wrong == "200" else 206, len(piece), ETag=etag(BODY)) + piece
    async with opened(saying(reply)) as (server, store):
        with pytest.raises(StoreError) as e:
            await CALLS["get_range"](store)
        assert not isinstance(e.value, StoreUnavailableError)
        assert len(server.requests) == 1
        await serves(store)


def half_a_body(status, how, form):
    async def answer(e):
        data = BODY[:PIECE]
        if form == "chunked":
            reply = head(status, None, ETag=etag(data), Transfer_Encoding="chunked") + chunked(data, 5000)
        else:
            reply = head(status, len(data), ETag=etag(data)) + data
        await e.send(reply[: len(reply) // 2])
        await getattr(e, how)()
        await e.hang()

    return answer


LOSSES = [
    ("get", 200, "length"),
    ("get", 200, "chunked"),
    ("get_range", 206, "length"),
    ("list_objects", 200, "length"),
    ("complete_upload", 200, "length"),
    ("get", 503, "length"),
    ("put", 503, "chunked"),
]


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
@pytest.mark.parametrize(("name", "status", "form"), LOSSES)
async def test_a_connection_that_ends_in_a_reply_is_unavailable(name, status, form, how):
    async with opened(half_a_body(status, how, form), read_timeout_s=LONG_S) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await CALLS[name](store)
        assert len(server.requests) == 1
        await serves(store)


@pytest.mark.parametrize(("name", "status", "form"), LOSSES)
async def test_a_server_that_falls_silent_in_a_reply_is_unavailable_after_the_timeout(name, status, form):
    async with opened(half_a_body(status, "hang", form), read_timeout_s=0.5) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await CALLS[name](store)
        assert len(server.requests) == 1
        await serves(store)


@pytest.mark.parametrize("name", ["get", "list_objects", "complete_upload"])
async def test_a_reply_in_broken_chunks_is_unavailable(name):
    reply = head(200, None, ETag='"x"', Transfer_Encoding="chunked") + b"5\r\nabcde\r\nno number\r\n"
    async with opened(saying(reply)) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await CALLS[name](store)
        assert len(server.requests) == 1
        await serves(store)


# Errors in all forms.


GARBAGE = b"<html><body><h1>502 Bad Gateway</h1><hr>nginx</body>"
ERRORS = {
    "xml": error_xml("SlowDown"),
    "nothing": b"",
    "html": GARBAGE,
    "half an xml": error_xml("SlowDown")[:60],
    "bytes": bytes(range(256)),
    "another xml": b"<?xml version='1.0'?><Other/>",
}


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("body", ERRORS.values(), ids=ERRORS)
@over({name: CALLS[name] for name in ("get", "get_range", "put", "complete_upload", "list_objects")})
async def test_a_server_error_of_any_form_is_unavailable(call, body, is_chunked):
    if is_chunked:
        reply = head(503, None, Transfer_Encoding="chunked") + chunked(body, 50)
    else:
        reply = head(503, len(body)) + body
    async with opened(saying(reply)) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await call(store)
        assert len(server.requests) == 1
        await serves(store)
        assert server.connections == 1


MEANINGS = [
    (403, PermissionDeniedError),
    (404, ObjectNotFoundError),
    (412, PreconditionFailedError),
    (429, StoreUnavailableError),
    (400, StoreError),
    (405, StoreError),
    (418, StoreError),
    (500, StoreUnavailableError),
    (502, StoreUnavailableError),
    (504, StoreUnavailableError),
]


@pytest.mark.parametrize(("status", "kind"), MEANINGS)
@pytest.mark.parametrize("body", [b"", GARBAGE], ids=["nothing", "html"])
@over({name: CALLS[name] for name in ("get", "put", "list_objects")})
async def test_a_refusal_without_a_code_is_told_by_its_status(call, body, status, kind):
    # One that insists on checksums takes no refusal for one of them.
    async with opened(saying(head(status, len(body)) + body), checksum="always") as (server, store):
        with pytest.raises(kind) as e:
            await call(store)
        assert type(e.value) is kind or kind is not StoreError
        assert len(server.requests) == 1
        await serves(store)


@pytest.mark.parametrize(("status", "kind"), MEANINGS)
async def test_a_head_is_told_by_its_status_and_no_body_is_waited_for(status, kind):
    async with opened(refuse(status, "Whatever"), read_timeout_s=LONG_S) as (server, store):
        with pytest.raises(kind) as e:
            await store.head("k")
        assert type(e.value) is kind or kind is not StoreError
        assert len(server.requests) == (2 if status == 400 else 1)  # botocore asks for the bucket's region
        await serves(store)
        assert server.connections == 1


@pytest.mark.parametrize("delay_s", [0, 0.05], ids=["at once", "later"])
async def test_a_body_after_the_reply_to_a_head_never_passes_for_an_answer(delay_s):
    async def answer(e):
        reply = head(200, 5, ETag='"x"', Last_Modified="Thu, 01 Jan 1970 00:00:00 GMT")
        await e.send(reply if delay_s else reply + b"hello")
        await asyncio.sleep(delay_s)  # the server's pace
        if delay_s:
            await e.send(b"hello")

    async with opened(answer) as (server, store):
        for _ in range(2):
            with contextlib.suppress(StoreUnavailableError):
                assert (await store.head("k")).size == 5
            await asyncio.sleep(2 * delay_s)  # all has arrived
            server.objects["/bucket/p/k"] = b"other"
        await serves(store)
        assert server.asked("/k").count("HEAD") <= 2


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("InternalError", StoreUnavailableError),
        ("SlowDown", ThrottledError),
        ("AccessDenied", PermissionDeniedError),
        ("ExpiredToken", CredentialsError),
        ("NoSuchUpload", ObjectNotFoundError),
        ("BadDigest", ChecksumRefusedError),
        ("Unheard", StoreUnavailableError),
    ],
)
@over({name: CALLS[name] for name in ("complete_upload", "create_upload", "list_objects", "list_uploads")})
async def test_an_error_after_200_is_that_error(call, code, kind):
    # docs.aws.amazon.com/AmazonS3/latest/API/API_CompleteMultipartUpload.html says that it may
    body = error_xml(code)
    async with opened(saying(head(200, len(body)) + body), checksum="always") as (server, store):
        with pytest.raises(kind):
            await call(store)
        assert len(server.requests) == 1
        await serves(store)


@pytest.mark.parametrize("body", [GARBAGE, error_xml("InternalError")], ids=["html", "error"])
@over(UPLOADS)
async def test_a_200_that_names_no_object_is_no_success_of_an_upload(call, body):
    async with opened(saying(head(200, len(body)) + body)) as (server, store):
        with pytest.raises(StoreError):
            await call(store)
        assert len(server.requests) == 1
        await serves(store)


@pytest.mark.parametrize("name", ["list_objects", "list_names", "list_uploads", "complete_upload", "create_upload"])
@pytest.mark.parametrize("body", [b"", GARBAGE, b"<?xml version='1.0'?><Lis"], ids=["nothing", "html", "half"])
async def test_an_answer_that_is_not_xml_is_a_store_error(name, body):
    async with opened(saying(head(200, len(body)) + body)) as (server, store):
        with pytest.raises(StoreError):
            await CALLS[name](store)
        assert len(server.requests) == 1
        await serves(store)


@pytest.mark.parametrize("name", ["get", "head", "put", "put_part"])
async def test_an_answer_without_its_headers_is_a_store_error(name):
    async with opened(saying(head(200, 0))) as (server, store):
        with pytest.raises(StoreError):
            await CALLS[name](store)
        assert len(server.requests) == 1
        await serves(store)


# Answers before the body was read.


@pytest.mark.parametrize(("status", "code", "kind"), EARLY)
async def test_a_refusal_before_the_body_was_read_is_told_at_once(status, code, kind):
    async with opened(refuse(status, code, reads=False), read_timeout_s=LONG_S) as (server, store):
        with pytest.raises(kind):
            await store.put("k", [memoryview(LARGE)])
        assert len(server.requests) == 1
        await serves(store)
        assert server.requests[1].connection == 2


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
@pytest.mark.parametrize("code", ["SlowDown", "RequestTimeout"])
async def test_so_is_one_that_ends_the_connection(code, how):
    async def answer(e):
        await e.read(1000)
        await refuse(503, code, reads=False, Connection="close")(e)
        await getattr(e, how)()
        await e.hang()

    async with opened(answer, read_timeout_s=LONG_S) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await store.put("k", [memoryview(LARGE)])
        assert len(server.requests) == 1
        await serves(store)


async def test_a_refusal_while_the_body_is_read_on_is_told():
    async def answer(e):
        await refuse(503, "SlowDown", reads=False)(e)
        await e.read_body()

    async with opened(answer, read_timeout_s=LONG_S) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await store.put("k", [memoryview(LARGE)])
        assert len(server.requests) == 1
        await serves(store)


async def test_success_before_the_body_was_read_is_none():
    async with opened(saying(head(200, 0, ETag='"x"'), reads=False), read_timeout_s=1) as (server, store):
        with pytest.raises(StoreUnavailableError):
            await store.put("k", [memoryview(LARGE)])
        assert len(server.requests) == 1
        await serves(store)


async def test_success_before_the_body_was_read_is_never_told_of_half_a_body():
    async def answer(e):
        await e.send(head(200, 0, ETag='"x"'))
        await e.read_body()

    async with opened(answer) as (server, store):
        with contextlib.suppress(StoreUnavailableError):
            assert await store.put("k", [memoryview(LARGE)])
            assert server.requests[0].body == LARGE
        assert len(server.requests) == 1
        await serves(store)


@pytest.mark.parametrize("reads", [True, False])
async def test_memory_may_change_once_a_refused_put_has_returned(reads):
    memory = bytearray(LARGE)
    seen = set()

    async def answer(e):
        await refuse(503, "SlowDown", reads=False)(e)
        with contextlib.suppress(asyncio.IncompleteReadError):
            while reads:
                seen.update(await e.read(1000))
        await e.hang()

    async with opened(answer, read_timeout_s=LONG_S) as (_server, store):
        with pytest.raises(StoreUnavailableError):
            await store.put("k", [memoryview(memory)])
        memory[:] = b"\xff" * len(memory)
        await serves(store)
        assert 0xFF not in seen


# Redirects.


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@over({name: CALLS[name] for name in ("get", "get_range", "head", "put", "complete_upload", "list_objects")})
async def test_a_redirect_to_another_server_takes_no_credentials_there(call, status):
    async with RudeServer() as other:

        async def redirect(e):
            await e.read_body()
            await e.send(head(status, 0, Location=f"{other.url}{e.request.target}"))

        # The token is as good as a key: https://docs.aws.amazon.com/IAM/latest/UserGuide/id_credentials_temp.html
        async with opened(*[redirect] * 10, session_token="token") as (server, store):
            with contextlib.suppress(StoreError):
                await call(store)
            assert len(server.requests) < 4
            assert len(other.requests) <= 1
            for request in other.requests:
                assert not {"authorization", "x-amz-security-token"} & request.headers.keys()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@over({name: CALLS[name] for name in ("get", "get_range", "head", "put", "complete_upload", "list_objects")})
async def test_a_redirect_without_end_is_a_store_error(call, status):
    async def redirect(e):
        await e.read_body()
        await e.send(head(status, 5, Location=e.request.target) + (b"" if e.request.method == "HEAD" else b"moved"))

    async with opened(*[redirect] * 20) as (server, store):
        with pytest.raises(StoreError):
            await call(store)
        assert len(server.requests) < 4
        server._script.clear()
        await serves(store)
        assert server.connections == 1


@over({name: CALLS[name] for name in ("get", "get_range", "put", "complete_upload", "list_objects")})
async def test_a_bucket_in_another_region_is_asked_there_once(call):
    wrong = refuse(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1")
    async with opened(*[wrong] * 10) as (server, store):
        with pytest.raises(StoreError):
            await call(store)
        signed_for = [request.headers["authorization"].split("/")[2] for request in server.requests]
        assert signed_for == ["us-east-1", "eu-west-1"]
        server._script.clear()
        await serves(store)


async def test_a_put_in_the_wrong_region_arrives_whole_in_the_right_one():
    async with opened(refuse(301, "PermanentRedirect", x_amz_bucket_region="eu-west-1")) as (server, store):
        await store.put("k", [memoryview(BODY)])
        assert server.objects["/bucket/p/k"] == BODY
        assert len(server.requests) == 2


MALFORMED = {
    "a chunk is longer than what comes": b"fff\r\n" + BODY[:100] + b"\r\n0\r\n\r\n",
    "a chunk's size is no number": b"`\r\n" + BODY[:100] + b"\r\n0\r\n\r\n",
    "a chunk is shorter than what comes": b"5\r\n" + BODY[:100] + b"\r\n0\r\n\r\n",
    "the size of a later chunk is no number": b"64\r\n" + BODY[:100] + b"\r\n`\r\n" + BODY[:100] + b"\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("is_at_once", [True, False], ids=["at once", "behind its head"])
@over({name: CALLS[name] for name in ("get", "get_range", "list_objects")})
async def test_a_body_in_malformed_chunks_ends_in_an_error_and_does_not_hang(call, is_at_once, body):
    async def answer(e):
        await e.read_body()
        start = head(200, None, ETag=etag(BODY), Transfer_Encoding="chunked")
        await e.send(start + body if is_at_once else start)
        if not is_at_once:
            await asyncio.sleep(0.05)  # so that they come apart
            await e.send(body)
        await e.hang()

    async with opened(answer, read_timeout_s=0.5) as (_, store):
        with pytest.raises(StoreError):
            await call(store)
        await serves(store)
