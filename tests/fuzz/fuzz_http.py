"""Servers that lie: a call ends with an error of ours or with what was asked for, and writes nowhere else."""

import asyncio
import atexit
import os
from datetime import datetime
from functools import cache
from typing import ClassVar

from awscrt.checksums import crc32c

from cloudckpt.errors import CheckpointError
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import IfAbsent, Part, Upload
from rude_server import RudeServer, chunked, error_xml, etag, head
from s3_over_http import s3_store

BODY = bytes(range(256)) * 4
GUARD = 64
UPLOAD = Upload(key="k", upload_id="u")
BOUND_S = 10
LISTING = b"""<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name><Prefix>p/</Prefix>
<KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated><Contents><Key>p/k</Key>
<LastModified>2026-11-24T01:02:03.000Z</LastModified><ETag>"e"</ETag><Size>7</Size></Contents>
<CommonPrefixes><Prefix>p/a/</Prefix></CommonPrefixes></ListBucketResult>"""
UPLOADS = b"""<ListMultipartUploadsResult><Bucket>bucket</Bucket><IsTruncated>false</IsTruncated><Upload>
<Key>p/k</Key><UploadId>u</UploadId><Initiated>2026-11-24T01:02:03.000Z</Initiated></Upload></ListMultipartUploadsResult>"""
CREATED = b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
COMPLETED = b'<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>'
ENDLESS = LISTING.replace(
    b"<IsTruncated>false</IsTruncated>",
    b"<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>",
)
DELETED = b"<DeleteResult><Error><Key>p/k</Key><Code>AccessDenied</Code></Error></DeleteResult>"


class Session:
    """A server, a store on it, and their loop, for all checks of a process."""

    made: ClassVar[list["Session"]] = []

    def __init__(self):
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            os.environ.pop(name, None)
        self.runner = asyncio.Runner()
        self.server = RudeServer()
        self.runner.run(self.server.__aenter__())
        self.store = s3_store(self.server.url)
        self.runner.run(self.store.__aenter__())

    def close(self):
        self.runner.run(self.store.__aexit__(None, None, None))
        self.runner.run(self.server.__aexit__())
        self.runner.close()


@cache
def session():
    """The one."""
    made = Session()
    atexit.register(made.close)
    return made


async def get_range(store):
    around = bytearray(b"\xa5" * (len(BODY) + 2 * GUARD))
    inside = memoryview(around)[GUARD:-GUARD]
    try:
        await store.get_range("k", Range(0, len(BODY)), [inside[:100], inside[100:]])
        return bytes(inside)
    finally:
        assert around[:GUARD] == around[-GUARD:] == b"\xa5" * GUARD


async def listed(store):
    async for found in store.list_objects():
        assert (type(found.key), type(found.etag), type(found.modified)) == (str, str, datetime)
        assert found.size >= 0
        assert ".." not in found.key.split("/")


async def named(store):
    async for name in store.list_names():
        assert "/" not in name
        assert name != ".."


async def under_way(store):
    async for upload in store.list_uploads():
        assert (type(upload.key), type(upload.upload_id)) == (str, str)
        assert isinstance(upload.started, datetime | None)


CALLS = [
    lambda store: store.get("k"),
    get_range,
    lambda store: store.head("k"),
    lambda store: store.put("k", [memoryview(BODY)], crc32c=crc32c(BODY), condition=IfAbsent()),
    lambda store: store.create_upload("k"),
    lambda store: store.put_part(UPLOAD, 1, 0, [memoryview(BODY)], crc32c=crc32c(BODY)),
    lambda store: store.complete_upload(UPLOAD, [Part(number=1, etag="e", crc32c=7)], crc32c=7),
    lambda store: store.abort_upload(UPLOAD),
    listed,
    named,
    under_way,
    lambda store: store.delete(["k"]),
]


def seeds():
    """Valid inputs: the number of a call, and the server's reply, to each request that the call makes."""
    when = {"Last_Modified": "Tue, 24 Nov 2026 01:02:03 GMT"}
    replies = {
        0: [head(200, len(BODY), ETag=etag(BODY), **when) + BODY,
            head(200, None, ETag="e", Transfer_Encoding="chunked") + chunked(BODY, 100)],
        1: [head(206, len(BODY), ETag=etag(BODY), **when) + BODY],
        2: [head(200, 1 << 40, ETag='"e"', **when)],
        3: [head(200, 0, ETag='"e"'), head(412, 70) + error_xml("PreconditionFailed")],
        4: [head(200, len(CREATED)) + CREATED],
        5: [head(200, 0, ETag='"e"')],
        6: [head(200, len(COMPLETED)) + COMPLETED, head(200, 100) + error_xml("InternalError")],
        7: [head(204, 0), head(404, 100) + error_xml("NoSuchUpload")],
        8: [head(200, len(LISTING)) + LISTING, head(200, len(ENDLESS)) + ENDLESS],
        9: [head(200, len(LISTING)) + LISTING],
        10: [head(200, len(UPLOADS)) + UPLOADS],
        11: [head(200, len(DELETED)) + DELETED],
    }  # fmt: skip
    return [bytes([number]) + reply for number, some in replies.items() for reply in some]


def check(data):
    """Makes the call of the first byte's number, to which the server says what follows that byte."""
    if data:
        session().runner.run(_check(CALLS[data[0] % len(CALLS)], data[1:]))


async def _check(call, reply):
    async def answer(e):
        await e.read_body()
        await e.send(reply)
        await e.close()

    server = session().server
    server._script = [answer] * 20
    del server.requests[:]
    async with asyncio.timeout(BOUND_S):
        try:
            await call(session().store)
        except CheckpointError:
            return
