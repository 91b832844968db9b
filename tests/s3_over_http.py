"""A store on a rude server, for the tests of S3 over HTTP."""

import asyncio
import os
from contextlib import asynccontextmanager

import pytest
from awscrt.checksums import crc32c

from cloudckpt.errors import CredentialsError, PermissionDeniedError, StoreUnavailableError
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import IfAbsent, IfMatch, Part, Upload
from cloudckpt.store.s3 import S3Store
from cloudckpt.store.s3_options import S3Options
from rude_server import (
    HOST,
    RudeServer,
    etag,
)

BODY = os.urandom(700_000)
PIECE = 400_000
LARGE = bytes(32 << 20)
"""More than lies between a client and a server that does not read."""
BOUND_S = 15
"""Far above the timeouts of a store under test, and below those that are not to be waited for."""
LONG_S = 40
"""A timeout that a test must not run into."""


def s3_store(url, **more):
    options = {"connect_timeout_s": 2, "read_timeout_s": 2} | more
    return S3Store(
        "bucket",
        "p/",
        S3Options(
            endpoint_url=url,
            access_key_id="key",
            secret_access_key="secret",
            region="us-east-1",
            addressing_style="path",
            **options,
        ),
    )


@asynccontextmanager
async def opened(*script, tls=None, hosts=(HOST,), **options):
    """A server with that script, a store on it, and a clock over both."""
    async with RudeServer(script, tls=tls, hosts=hosts) as server, s3_store(server.url, **options) as store:
        async with asyncio.timeout(BOUND_S):
            yield server, store


async def serves(store):
    """Asserts that it does, as if nothing had happened."""
    assert await store.put("after", [memoryview(BODY)]) == etag(BODY)
    assert (await store.get("after")).data == BODY
    into = memoryview(bytearray(PIECE))
    await store.get_range("after", Range(5, 5 + PIECE), [into[:7], into[7:]])
    assert into == BODY[5 : 5 + PIECE]
    assert (await store.head("after")).size == len(BODY)


UPLOAD = Upload(key="k", upload_id="u")


async def listed(store):
    return [found.key async for found in store.list_objects()]


async def named(store):
    return [name async for name in store.list_names()]


async def under_way(store):
    return [upload.key async for upload in store.list_uploads()]


CALLS = {
    "get": lambda store: store.get("k"),
    "get_range": lambda store: store.get_range("k", Range(0, PIECE), [memoryview(bytearray(PIECE))]),
    "head": lambda store: store.head("k"),
    "put": lambda store: store.put("k", [memoryview(BODY)], crc32c=crc32c(BODY)),
    "put small": lambda store: store.put("k", [memoryview(b"small")], condition=IfAbsent()),
    "put_part": lambda store: store.put_part(UPLOAD, 1, 0, [memoryview(BODY)], crc32c=crc32c(BODY)),
    "create_upload": lambda store: store.create_upload("k"),
    "complete_upload": lambda store: store.complete_upload(
        UPLOAD, [Part(number=1, etag=etag(BODY), crc32c=crc32c(BODY))], crc32c=crc32c(BODY)
    ),
    "abort_upload": lambda store: store.abort_upload(UPLOAD),
    "list_objects": listed,
    "list_names": named,
    "list_uploads": under_way,
    "delete": lambda store: store.delete(["k"]),
    "delete_if": lambda store: store.delete_if("k", IfMatch(etag(BODY))),
}
UPLOADS = {name: CALLS[name] for name in ("put", "put_part")}


def over(calls):
    return pytest.mark.parametrize("call", calls.values(), ids=calls)


EARLY = [
    (503, "SlowDown", StoreUnavailableError),
    (400, "RequestTimeout", StoreUnavailableError),
    (500, "InternalError", StoreUnavailableError),
    (403, "AccessDenied", PermissionDeniedError),
    (400, "ExpiredToken", CredentialsError),
]
