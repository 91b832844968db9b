"""Checksums on the way up: servers that verify them, ignore them, or refuse them."""

import asyncio
import base64
import os
import re
from contextlib import asynccontextmanager
from dataclasses import replace
from secrets import token_hex
from urllib.parse import parse_qs, urlsplit

import pytest
from awscrt.checksums import crc32c

from cloudckpt.errors import (
    ChecksumRefusedError,
    ChecksumsNotKnownError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
    UsageError,
)
from cloudckpt.store.protocols import IfAbsent
from cloudckpt.store.retry import RetryingStore, RetryOptions
from cloudckpt.store.s3 import S3Store
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.traffic import Traffic, TrafficOptions
from rude_server import RudeServer, etag, head, refuse

pytestmark = pytest.mark.usefixtures("nothing_from_outside")
MIB = 1 << 20
AT_ONCE = RetryOptions(retry_base_s=0, retry_cap_s=0)
BODY = os.urandom(1000)
CRC = crc32c(BODY)
OPERATIONS = {
    ("PUT", False): "put",
    ("POST", "uploads"): "create",
    ("PUT", "partNumber"): "part",
    ("POST", "uploadId"): "complete",
    ("DELETE", "uploadId"): "abort",
}


def operation(request):
    query = parse_qs(urlsplit(request.target).query, keep_blank_values=True)
    flag = next((name for name in ("uploads", "partNumber", "uploadId") if name in query), False)
    return OPERATIONS.get((request.method, flag), request.method.lower())


class Gateway(RudeServer):
    """Objects and uploads as a small S3, and a refusal of checksums in some operations.

    ``refuses`` maps operations to what is answered to a request of theirs that carries a checksum; with ``echoes``
    the others are answered with the checksum found.
    """

    def __init__(self, refuses=(), *, echoes=False, refuses_anyway=()):
        super().__init__()
        self.refuses = dict(refuses)
        self.refuses_anyway = dict(refuses_anyway)
        self.echoes = echoes
        self.found = crc32c
        self.uploads = {}

    def sent(self, name):
        """Of each request of that operation, whether it carried a checksum."""
        return [has_checksum(request) for request in self.requests if operation(request) == name]

    async def _answer(self, reader, writer, connection):
        self._script = [self._serve_one]
        await super()._answer(reader, writer, connection)

    async def _serve_one(self, e):
        body = await e.read_body()
        name = operation(e.request)
        refusal = self.refuses_anyway.get(name) or (has_checksum(e.request) and self.refuses.get(name))
        if refusal:
            await refuse(*refusal, reads=False)(e)
            return
        path = e.request.target.partition("?")[0]
        query = parse_qs(urlsplit(e.request.target).query)
        echo = {}
        if self.echoes and has_checksum(e.request):
            echo = {"x-amz-checksum-crc32c": base64.b64encode(self.found(body).to_bytes(4, "big")).decode()}
        xml = b""
        if name == "put":
            self.objects[path] = body
        elif name == "create":
            self.uploads["u"] = {}
            xml = b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
        elif name == "part":
            self.uploads["u"][int(query["partNumber"][0])] = body
        elif name == "complete":
            named = [int(number) for number in re.findall(rb"<PartNumber>(\d+)", body)]
            self.objects[path] = b"".join(self.uploads["u"][number] for number in named)
            xml = b'<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>'
        elif path not in self.objects:
            await refuse(404, "NoSuchKey", reads=False)(e)
            return
        await e.send(head(200, len(xml), ETag=etag(body), **echo) + xml)


def has_checksum(request):
    named = any("checksum" in name for name in request.headers)
    return named or b"Checksum" in (request.body or b"")


@asynccontextmanager
async def opened(*refusals, checksum="when_supported", bucket=None, **how):
    """A gateway, and a store on a bucket that this process has not asked before."""
    async with Gateway(*refusals, **how) as server:
        chosen = S3Options(
            endpoint_url=server.url,
            access_key_id="key",
            secret_access_key="secret",
            region="us-east-1",
            addressing_style="path",
            checksum=checksum,
        )
        async with S3Store(bucket or token_hex(6), "p/", chosen) as store:
            async with asyncio.timeout(20):
                yield server, RetryingStore(store, AT_ONCE, Traffic(TrafficOptions(), most=16))


async def upload(store, parts=3):
    """An object of so many parts, sent at the same time."""
    begun = await store.create_upload("m")
    sent = await asyncio.gather(
        *(store.put_part(begun, n, 0, [memoryview(BODY)], crc32c=CRC) for n in range(1, parts + 1))
    )
    await store.complete_upload(begun, sent, crc32c=crc32c(BODY * parts))


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "cloudckpt.store.s3_abilities"]


REFUSALS = [
    (400, "InvalidArgument"),
    (400, "InvalidRequest"),
    (400, "MalformedXML"),
    (400, "XAmzContentSHA256Mismatch"),
    (501, "NotImplemented"),
    (501, "Unheard"),
    (400, ""),
]
refused_with = pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: f"{r[0]} {r[1]}")


# A server that refuses them.


@refused_with
async def test_a_put_goes_without_where_checksums_are_refused_and_so_do_the_next(refusal, caplog):
    async with opened({"put": refusal}) as (server, store):
        for key in ("a", "b", "c"):
            await store.put(key, [memoryview(BODY)], crc32c=CRC)
        assert server.sent("put") == [True, False, False, False]
        assert [path.rpartition("/")[2] for path in server.objects] == ["a", "b", "c"]
        (warning,) = warned(caplog)
        assert "refuses checksums" in warning


@refused_with
@pytest.mark.parametrize("name", ["create", "part", "complete"])
async def test_an_upload_goes_without_from_wherever_it_is_refused(name, refusal, caplog):
    async with opened({name: refusal}) as (server, store):
        await upload(store)
        await upload(store)
        assert all(body == BODY * 3 for body in server.objects.values())
        assert server.sent(name)[0]
        assert not server.sent(name)[-1]
        if name != "complete":
            assert not any(server.sent("complete"))  # a part's checksum that the server did not take is not named
        if name == "create":
            assert not any(server.sent("part"))
        assert len(warned(caplog)) == 1


async def test_a_conditional_put_goes_without_too():
    async with opened({"put": (400, "InvalidArgument")}) as (server, store):
        await store.put("k", [memoryview(BODY)], condition=IfAbsent(), crc32c=CRC)
        assert server.sent("put") == [True, False]


async def test_a_server_that_refuses_uploads_only_is_sent_whole_objects_with_them():
    # Cloudflare R2 knows CRC32C of whole objects, and of parts only as COMPOSITE.
    async with opened({"create": (501, "NotImplemented")}, echoes=True) as (server, store):
        await store.put("k", [memoryview(BODY)], crc32c=CRC)
        await upload(store)
        await store.put("k", [memoryview(BODY)], crc32c=CRC)
        assert server.sent("put") == [True, True]
        assert server.sent("create") == [True, False]


async def test_what_is_learnt_is_known_to_the_next_store_of_the_bucket_and_to_no_other():
    bucket = token_hex(6)
    async with opened({"put": (400, "InvalidArgument")}, bucket=bucket) as (server, store):
        await store.put("k", [memoryview(BODY)], crc32c=CRC)
        chosen = store._store._options
        for name, sent in ((bucket, [False]), (token_hex(6), [True, False])):
            before = len(server.requests)
            async with S3Store(name, "p/", chosen) as other:
                await RetryingStore(other, AT_ONCE, Traffic(TrafficOptions(), most=1)).put(
                    "k", [memoryview(BODY)], crc32c=CRC
                )
            assert [has_checksum(request) for request in server.requests[before:]] == sent


async def test_once_one_was_accepted_a_refusal_is_a_refusal():
    async with opened(echoes=True) as (server, store):
        await store.put("k", [memoryview(BODY)], crc32c=CRC)
        server.refuses = {"put": (400, "InvalidArgument")}
        with pytest.raises(StoreError) as e:
            await store.put("k", [memoryview(BODY)], crc32c=CRC)
        assert type(e.value) is StoreError
        assert server.sent("put") == [True, True]


async def test_a_refusal_for_another_reason_is_told_and_nothing_is_learnt_of_it(caplog):
    async with opened(refuses_anyway={"put": (400, "InvalidArgument")}, echoes=True) as (server, store):
        for _ in range(2):
            with pytest.raises(StoreError) as e:
                await store.put("k", [memoryview(BODY)], crc32c=CRC)
            assert type(e.value) is StoreError
        assert server.sent("put") == [True, False] * 2
        server.refuses_anyway = {}
        await store.put("k", [memoryview(BODY)], crc32c=CRC)
        assert server.sent("put")[-1]
        assert warned(caplog) == []


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (400, "BadDigest")])
async def test_what_is_no_refusal_teaches_nothing(status, code):
    async with opened(echoes=True) as (server, store):
        server.refuses = {"put": (status, code)}
        with pytest.raises((StoreUnavailableError, ChecksumRefusedError)):
            await store._store.put("k", [memoryview(BODY)], crc32c=CRC)
        server.refuses = {}
        await store.put("k", [memoryview(BODY)], crc32c=CRC)
        assert server.sent("put") == [True, True]


async def test_without_retries_the_error_says_what_it_may_be():
    async with opened({"put": (400, "InvalidArgument")}) as (_, store):
        with pytest.raises(ChecksumsNotKnownError, match="may refuse checksums"):
            await store._store.put("k", [memoryview(BODY)], crc32c=CRC)


# What was asked for.


@pytest.mark.parametrize("name", ["put", "create", "part", "complete"])
async def test_who_insists_is_refused(name):
    async with opened({name: (400, "InvalidArgument")}, checksum="always") as (server, store):
        with pytest.raises(StoreError) as e:
            await (store.put("k", [memoryview(BODY)], crc32c=CRC) if name == "put" else upload(store, parts=1))
        assert type(e.value) is StoreError
        assert server.sent(name) == [True]


async def test_who_wants_none_sends_none(caplog):
    async with opened(checksum=None) as (server, store):
        await store.put("k", [memoryview(BODY)], crc32c=CRC)
        await upload(store)
        assert not any(map(has_checksum, server.requests))
        assert warned(caplog) == []


def test_what_cannot_be_asked_for_is_refused():
    with pytest.raises(UsageError, match="when_supported"):
        S3Options(checksum="crc32c")


# A server that ignores them, or verifies them.


@pytest.mark.parametrize("sends", ["put", "upload"])
async def test_a_server_that_does_not_say_what_it_found_is_told_of_once(sends, caplog):
    async with opened() as (_, store):
        for _ in range(3):
            await (store.put("k", [memoryview(BODY)], crc32c=CRC) if sends == "put" else upload(store))
        (warning,) = warned(caplog)
        assert "ignores checksums" in warning


async def test_a_server_that_says_so_is_not(caplog):
    async with opened(echoes=True) as (server, store):
        await store.put("k", [memoryview(BODY)], crc32c=CRC)
        await upload(store)
        assert server.sent("put") + server.sent("part") == [True] * 4
        assert warned(caplog) == []


async def test_a_server_that_found_another_checksum_and_stored_it_all_the_same_is_asked_again():
    async with opened(echoes=True) as (server, store):
        server.found = lambda _: 7
        begun = await store.create_upload("m")
        for request in (
            store._store.put("k", [memoryview(BODY)], crc32c=CRC),
            store._store.put_part(begun, 1, 0, [memoryview(BODY)], crc32c=CRC),
        ):
            with pytest.raises(ChecksumRefusedError, match="found CRC32C"):
                await request


async def test_servers_that_verify_are_not_warned_of(server, s3, caplog):
    async with S3Store("checkpoints", f"{token_hex(6)}/", S3Options(**s3)) as store:
        await store.put("k", [memoryview(BODY)], crc32c=CRC)
        await upload(store, parts=1)
        assert warned(caplog) == []
        assert (await store.head("m")).size == len(BODY)


async def test_an_upload_that_was_begun_without_is_gone_on_with_without():
    async with opened(echoes=True) as (server, store):
        begun = replace(await store.create_upload("m"), has_checksums=False)
        part = await store.put_part(begun, 1, 0, [memoryview(BODY)], crc32c=CRC)
        await store.complete_upload(begun, [part], crc32c=CRC)
        assert server.sent("part") == server.sent("complete") == [False]


async def test_an_upload_without_checksums_is_one_on_real_servers_too(server, s3):
    async with S3Store("checkpoints", f"{token_hex(6)}/", S3Options(**s3, checksum=None)) as store:
        begun = await store.create_upload("m")
        assert not begun.has_checksums
    async with S3Store("checkpoints", store._prefix, S3Options(**s3)) as store:
        with pytest.raises(ObjectNotFoundError):
            await store.head("m")
        part = await store.put_part(begun, 1, 0, [memoryview(BODY)], crc32c=CRC)
        await store.complete_upload(begun, [part], crc32c=CRC)
        assert (await store.get("m")).data == BODY
