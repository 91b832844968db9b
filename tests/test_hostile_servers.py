"""Servers that lie: each call ends with an error of ours or with what was asked for, and writes nowhere else."""

import asyncio
import pickle
import re
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.errors import ObjectNotFoundError, StoreError, StoreUnavailableError, ThrottledError, UsageError
from cloudckpt.store.addresses import shown
from cloudckpt.store.protocols import MAX_GET_NBYTES
from cloudckpt.store.s3 import S3Store
from cloudckpt.store.s3_errors import ForeignError
from cloudckpt.store.s3_http import OneAttemptSession
from fuzz import fuzz_http
from fuzz.mutations import HOSTILE, altered_bytes
from rude_server import RudeServer, chunked, head, refuse, saying
from s3_over_http import BOUND_S, CALLS, opened, over, s3_store

pytestmark = pytest.mark.usefixtures("nothing_from_outside")


@settings(HOSTILE, max_examples=250)
@given(altered_bytes(fuzz_http.seeds()))
def test_a_reply_of_altered_bytes_ends_a_call_in_an_error_of_ours_or_well(data):
    fuzz_http.check(data)


@settings(HOSTILE, max_examples=60)
@given(st.integers(0, len(fuzz_http.CALLS) - 1), st.sampled_from(fuzz_http.seeds()))
def test_a_reply_to_another_call_ends_a_call_in_an_error_of_ours_or_well(call, reply):
    fuzz_http.check(bytes([call]) + reply[1:])


@pytest.mark.parametrize("reply", fuzz_http.seeds(), ids=lambda reply: f"{reply[0]} {reply[1:20]}")
def test_the_replies_that_are_altered_are_understood(reply):
    fuzz_http.check(reply)


# Replies without end.


def chunks_without_end(status):
    """An answer whose body goes on for as long as somebody reads it."""

    async def answer(e):
        await e.send(head(status, None, ETag='"e"', Transfer_Encoding="chunked"))
        while True:
            await e.send(b"10000\r\n" + bytes(1 << 16) + b"\r\n")

    return answer


WHOLE = {name: CALLS[name] for name in ("list_objects", "list_uploads", "complete_upload", "delete")}


@over(WHOLE)
async def test_a_reply_without_end_is_a_store_error(call):
    async with opened(chunks_without_end(200)) as (server, store):
        with pytest.raises(StoreError, match="more than 67108864 bytes") as e:
            await call(store)
        assert type(e.value) is StoreError
        assert len(server.requests) == 1


@over({name: CALLS[name] for name in ("get", "put", "list_objects")})
async def test_so_is_an_error_without_end(call):
    async with opened(chunks_without_end(503)) as (_, store):
        with pytest.raises(StoreError, match="more than 67108864 bytes"):
            await call(store)


@pytest.fixture
async def small():
    """A store that reads no more than a MiB whole, and the server that it is on."""
    options = s3_store("http://127.0.0.1:1")._options
    async with RudeServer() as server:
        where = replace(options, endpoint_url=server.url)
        async with S3Store("bucket", "p/", where, max_get_nbytes=1 << 20) as store, asyncio.timeout(BOUND_S):
            yield server, store


async def test_an_object_without_end_is_not_got(small):
    server, store = small
    server._script = [chunks_without_end(200)]
    with pytest.raises(StoreError, match=r"p/k has more than 1048576 bytes.*check who wrote it") as e:
        await store.get("k")
    assert type(e.value) is StoreError


async def test_an_object_is_got_up_to_the_bound_and_not_a_byte_further(small):
    server, store = small
    for more in (0, 1):
        for reply in (
            head(200, (1 << 20) + more, ETag='"e"'),
            head(200, None, ETag='"e"', Transfer_Encoding="chunked"),
        ):
            body = bytes((1 << 20) + more)
            server._script = [saying(reply + (chunked(body, 1 << 16) if b"chunked" in reply else body))]
            if more:
                with pytest.raises(StoreError, match="has more than"):
                    await store.get("k")
            else:
                assert (await store.get("k")).data == body


async def test_an_object_that_is_said_to_be_too_large_is_not_waited_for():
    async with opened(saying(head(200, MAX_GET_NBYTES + 1, ETag='"e"'))) as (_, store):  # and nothing comes
        with pytest.raises(StoreError, match=f"more than {MAX_GET_NBYTES} bytes") as e:
            await store.get("k")
        assert type(e.value) is StoreError


async def close_after_half(e):
    await e.send(head(200, 2000, ETag='"e"') + bytes(1000))
    await e.close()


async def test_an_object_that_ends_before_its_length_is_not_taken_for_whole():
    async with opened(close_after_half) as (_, store):
        with pytest.raises(StoreUnavailableError):
            await store.get("k")


# XML that is more than it looks like.

ENTITIES = b"".join(b'<!ENTITY %c "%s">' % (98 + i, (b"&%c;" % (97 + i)) * 10) for i in range(9))
BOMBS = {
    "a billion laughs": b'<!DOCTYPE x [<!ENTITY a "lol">%s]><ListBucketResult><Name>&j;</Name>' % ENTITIES,
    "a long one often": b'<!DOCTYPE x [<!ENTITY a "%s">]><ListBucketResult><Name>%s</Name>'
    % (b"x" * 100_000, b"&a;" * 10_000),
    "a file": b'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><ListBucketResult><Name>&a;</Name>',
    "another server's": b'<!DOCTYPE x SYSTEM "http://127.0.0.1:1/x.dtd"><ListBucketResult><Name>x</Name>',
}


@pytest.mark.parametrize("xml", BOMBS.values(), ids=BOMBS)
async def test_xml_that_declares_what_it_is_made_of_is_not_parsed(xml):
    body = xml + b"</ListBucketResult>"
    tracemalloc.start()
    try:
        async with opened(saying(head(200, len(body)) + body)) as (server, store):
            with pytest.raises(StoreError, match="declares a document type") as e:
                _ = [found async for found in store.list_objects()]
            assert type(e.value) is StoreError
            assert len(server.requests) == 1
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("status", "kind"), [(503, ThrottledError), (404, ObjectNotFoundError), (418, StoreError)])
async def test_a_page_of_html_is_told_by_its_status(status, kind):
    body = b"<!DOCTYPE html><html><body>Sorry</body></html>"
    async with opened(saying(head(status, len(body), Content_Type="text/html") + body)) as (_, store):
        with pytest.raises(kind) as e:
            await store.get("k")
        assert type(e.value) is kind


async def test_xml_nested_deeper_than_anybody_would_is_a_store_error():
    deep = b"<a>" * 100_000 + b"</a>" * 100_000
    for body in (deep, b"<ListBucketResult>" + deep + b"</ListBucketResult>", b"<Error>" + deep + b"</Error>"):
        for status in (200, 400):
            async with opened(saying(head(status, len(body)) + body)) as (_, store):
                with pytest.raises(StoreError):
                    _ = [found async for found in store.list_objects()]


# Numbers and dates.


@pytest.mark.parametrize("date", ["9" * 30, "Fri, 01 Jan 99999999999 00:00:00 GMT", "0000-00-00", "soon"])
async def test_an_absurd_date_is_a_store_error_or_no_date(date):
    async with opened(saying(head(200, 5, ETag='"e"', Last_Modified=date)), refuse(503, "x", Retry_After=date)) as (
        _,
        store,
    ):
        with pytest.raises(StoreError, match="makes no sense"):
            await store.head("k")
        with pytest.raises(ThrottledError) as e:
            await store.get("k")
        assert e.value.retry_after_s is None or e.value.retry_after_s >= 0


# What errors are made of.


async def close(e):
    await e.close()


async def hang(e):
    await e.hang()


ANSWERS = {
    "no answer": close,
    "silence": hang,
    "a refusal": refuse(403, "AccessDenied"),
    "a wrong key": refuse(403, "SignatureDoesNotMatch"),
    "something else": saying(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "nonsense": saying(head(200, 4, ETag='"e"') + b"<xml"),
    "a redirect": saying(head(302, 0, Location="https://elsewhere.invalid:8443/k?X-Amz-Signature=abcdef")),
    "no checksums": refuse(400, "InvalidRequest"),
}


@over({name: CALLS[name] for name in ("get_range", "head", "put", "list_objects")})
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_the_cause_of_an_error_holds_no_request_and_no_signature(answer, call):
    async with opened(answer, read_timeout_s=0.3, session_token="TOKEN-4711") as (server, store):
        with pytest.raises(StoreError) as e:
            await call(store)
    cause = e.value.__cause__
    while cause is not None and not isinstance(cause, ForeignError):
        assert isinstance(cause, StoreError)
        cause = cause.__cause__
    for made_of in filter(None, (e.value, cause)):
        shown = pickle.dumps(made_of) + repr(vars(made_of)).encode() + str(made_of).encode()
        for secret in (b"TOKEN-4711", b"Signature=", b"X-Amz-Signature", b"AWS4-HMAC-SHA256"):
            assert secret not in shown
    assert any("TOKEN-4711" in request.headers.get("x-amz-security-token", "") for request in server.requests)


REDIRECTS = {
    "https://elsewhere.invalid:8443/k?X-Amz-Signature=abcdef": "https://elsewhere.invalid:8443/k",
    "//someone:secret@elsewhere.invalid:8443/k": "//elsewhere.invalid:8443/k",
    "/k?X-Amz-Signature=abcdef": "/k",
}


@pytest.mark.parametrize(("location", "told"), REDIRECTS.items(), ids=REDIRECTS)
async def test_where_a_redirect_leads_is_told_with_its_port_and_without_its_query(location, told):
    async with opened(saying(head(302, 0, Location=location))) as (_, store):
        with pytest.raises(StoreError, match=re.escape(f"redirects to {told} (HTTP 302)")):
            await store.get("k")


@pytest.mark.parametrize("verify", [False, "", None])
async def test_a_session_that_would_verify_no_certificate_is_not_opened(verify):
    with pytest.raises(UsageError, match="always verified"):
        async with OneAttemptSession(verify=verify):
            pass


SHOWN = {
    "a password": ("cannot reach http://a:b@host:1/k now", "cannot reach http://host:1/k now"),
    "a password with everything in it": ('"http://a:b/c?d#e@f@host/k"', '"http://host/k"'),
    "a signature": ("at 'https://h/k?X-Amz-Signature=1' or https://h/#x.", "at 'https://h/k' or https://h/"),
    "without a scheme": ("//a:b@h/k?s", "//h/k"),
    "nothing": ("why? because, a@b #1", "why? because, a@b #1"),
    "an error": (ValueError("http://a:b@h"), "http://h"),
    "much": ("x" * 2000, "x" * 1000 + "..."),
}


@pytest.mark.parametrize(("text", "expected"), SHOWN.values(), ids=SHOWN)
def test_a_text_is_shown_without_what_its_urls_hold_beside_a_place(text, expected):
    assert shown(text) == expected
