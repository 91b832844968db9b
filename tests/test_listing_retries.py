"""Listings that lose a page, uploads that were begun twice, and batches that a server does not know."""

import asyncio
from contextlib import asynccontextmanager
from secrets import token_hex
from xml.sax.saxutils import escape

import pytest
from awscrt.checksums import crc32c

from cloudckpt.errors import (
    CredentialsError,
    PermissionDeniedError,
    StaleCredentialsError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
)
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.store.retry import RetryingStore, RetryOptions
from cloudckpt.store.s3 import S3Store
from cloudckpt.store.s3_listing import Listing
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.traffic import Traffic, TrafficOptions
from cloudckpt.testing import FailingStore, RecordingStore
from rude_server import RudeServer, error_xml, head, refuse, saying, serve

pytestmark = pytest.mark.usefixtures("nothing_from_outside")
AT_ONCE = RetryOptions(retry_base_s=0, retry_cap_s=0)
DATA = b"hello"
CRC = crc32c(DATA)


def retrying(store, options=AT_ONCE):
    return RetryingStore(store, options, Traffic(TrafficOptions(), most=16))


async def lose(e):
    """The answer is lost with its connection."""
    await e.read_body()
    await e.reset()


# Pages of S3.


def page(kind, entries, more=""):
    more = more or "<IsTruncated>false</IsTruncated>"
    xml = f"<{kind}><Name>bucket</Name>{''.join(entries)}{more}</{kind}>".encode()
    return saying(head(200, len(xml), Content_Type="application/xml") + xml)


def truncated(*fields):
    return "<IsTruncated>true</IsTruncated>" + "".join(f"<{name}>{value}</{name}>" for name, value in fields)


def found_object(key, **other):
    fields = {"Key": f"p/{key}", "Size": 3, "ETag": '"e"', "LastModified": "2026-01-01T00:00:00.000Z"} | other
    inner = "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in fields.items() if value is not None)
    return f"<Contents>{inner}</Contents>"


def found_upload(key, number, **other):
    fields = {"Key": f"p/{key}", "UploadId": number} | other
    return f"<Upload>{''.join(f'<{n}>{v}</{n}>' for n, v in fields.items() if v is not None)}</Upload>"


def found_prefix(name):
    return f"<CommonPrefixes><Prefix>p/{name}/</Prefix></CommonPrefixes>"


def twice(name, entry):
    return entry.replace(f"<{name}>", f"<{name}>7</{name}><{name}>")


NEXT = truncated(("NextContinuationToken", "t"))
NEXT_UPLOADS = truncated(("NextKeyMarker", "p/b"), ("NextUploadIdMarker", "2"))
LISTINGS = {
    "list_objects": (
        page("ListBucketResult", map(found_object, "ab"), NEXT),
        page("ListBucketResult", map(found_object, "cd")),
        lambda found: found.key,
        list("abcd"),
    ),
    "list_names": (
        page("ListBucketResult", map(found_prefix, "ab"), NEXT),
        page("ListBucketResult", map(found_prefix, "cd")),
        lambda found: found,
        list("abcd"),
    ),
    "list_uploads": (
        page("ListMultipartUploadsResult", [found_upload("a", 1), found_upload("b", 2)], NEXT_UPLOADS),
        page("ListMultipartUploadsResult", [found_upload("b", 3), found_upload("c", 4)]),
        lambda found: (found.key, found.upload_id),
        [("a", "1"), ("b", "2"), ("b", "3"), ("c", "4")],
    ),
}
EVERY = pytest.mark.parametrize("listing", LISTINGS)


@asynccontextmanager
async def s3_on(*script, options=AT_ONCE, bucket="bucket"):
    async with RudeServer(script) as server:
        chosen = S3Options(
            endpoint_url=server.url,
            access_key_id="key",
            secret_access_key="secret",
            region="us-east-1",
            addressing_style="path",
        )
        async with S3Store(bucket, "p/", chosen) as store, asyncio.timeout(20):
            yield server, retrying(store, options)


@pytest.mark.parametrize("lost", [0, 1])
@EVERY
async def test_a_listing_that_loses_a_page_is_asked_again_and_yields_nothing_twice(listing, lost):
    first, second, told, expected = LISTINGS[listing]
    script = [*[first, second][:lost], lose, first, second]
    async with s3_on(*script) as (server, store):
        assert [told(found) async for found in getattr(store, listing)()] == expected
        assert len(server.requests) == len(script)


@EVERY
async def test_a_listing_whose_next_page_never_comes_ends_with_the_deadline(listing):
    first, _, told, expected = LISTINGS[listing]
    seen = []
    how = RetryOptions(retry_base_s=0, retry_cap_s=0, retry_deadline_s=0)
    async with s3_on(first, lose, options=how) as (server, store):
        with pytest.raises(StoreUnavailableError) as e:
            async for found in getattr(store, listing)():
                seen.append(told(found))  # noqa: PERF401 - what it yielded before it raised
        assert e.value.__notes__ == ["gave up after 1 attempt(s) in 0 s"]
        assert seen == expected[:2]
        assert len(server.requests) == 2


@EVERY
async def test_a_listing_that_is_refused_is_asked_once(listing):
    async with s3_on(refuse(403, "AccessDenied")) as (server, store):
        with pytest.raises(PermissionDeniedError):
            _ = [found async for found in getattr(store, listing)()]
        assert len(server.requests) == 1


async def test_what_was_deleted_between_two_attempts_is_not_missed_nor_what_was_added():
    first, _, _, _ = LISTINGS["list_objects"]
    other = page("ListBucketResult", map(found_object, "bcx"))
    async with s3_on(first, lose, other) as (_, store):
        assert [found.key async for found in store.list_objects()] == ["a", "b", "c", "x"]


BROKEN = {
    "an object without a key": ("list_objects", "ListBucketResult", found_object("a", Key=None), ""),
    "an object without a size": ("list_objects", "ListBucketResult", found_object("a", Size=None), ""),
    "an object without a time": ("list_objects", "ListBucketResult", found_object("a", LastModified=None), ""),
    "an object without an ETag": ("list_objects", "ListBucketResult", found_object("a", ETag=None), ""),
    "an object of no size": ("list_objects", "ListBucketResult", found_object("a", Size="many"), ""),
    "an object of no time": ("list_objects", "ListBucketResult", found_object("a", LastModified="once"), ""),
    "an object of less than no bytes": ("list_objects", "ListBucketResult", found_object("a", Size=-1), ""),
    "an object of two names": ("list_objects", "ListBucketResult", twice("Key", found_object("a")), ""),
    "an object of two ETags": ("list_objects", "ListBucketResult", twice("ETag", found_object("a")), ""),
    "an object of two sizes": ("list_objects", "ListBucketResult", twice("Size", found_object("a")), ""),
    "an id of two": ("list_uploads", "ListMultipartUploadsResult", twice("UploadId", found_upload("a", 1)), ""),
    "two tokens": ("list_objects", "ListBucketResult", "", truncated(*[("NextContinuationToken", "t")] * 2)),
    "an object of an absurd time": ("list_objects", "ListBucketResult", found_object("a", LastModified="9" * 30), ""),
    "an object of year 0": ("list_objects", "ListBucketResult", found_object("a", LastModified="0000-01-01"), ""),
    "an object beside the prefix": ("list_objects", "ListBucketResult", found_object("a", Key="other/a"), ""),
    "an object above the prefix": ("list_objects", "ListBucketResult", found_object("a", Key="a"), ""),
    "an object with an absolute key": ("list_objects", "ListBucketResult", found_object("a", Key="/etc/passwd"), ""),
    "an object that climbs": ("list_objects", "ListBucketResult", found_object("../../a"), ""),
    "a name beside the prefix": ("list_names", "ListBucketResult", found_prefix("a").replace("p/", "q/"), ""),
    "a name that climbs": ("list_names", "ListBucketResult", found_prefix(".."), ""),
    "a name of two": ("list_names", "ListBucketResult", found_prefix("a/b"), ""),
    "a name without an end": ("list_names", "ListBucketResult", found_prefix("a").replace("a/", "a"), ""),
    "an upload above the prefix": ("list_uploads", "ListMultipartUploadsResult", found_upload("a", 1, Key="a"), ""),
    "an upload that climbs": ("list_uploads", "ListMultipartUploadsResult", found_upload("../a", 1), ""),
    "an upload of an absurd time": (
        "list_uploads", "ListMultipartUploadsResult", found_upload("a", 1, Initiated="9" * 30), "",
    ),
    "more without a token": ("list_objects", "ListBucketResult", "", truncated()),
    "more names without a token": ("list_names", "ListBucketResult", "", truncated()),
    "a prefix without a name": ("list_names", "ListBucketResult", "<CommonPrefixes></CommonPrefixes>", ""),
    "an upload without a key": ("list_uploads", "ListMultipartUploadsResult", found_upload("a", 1, Key=None), ""),
    "an upload without an id": ("list_uploads", "ListMultipartUploadsResult", found_upload("a", None), ""),
    "more uploads without a marker": ("list_uploads", "ListMultipartUploadsResult", "", truncated()),
}  # fmt: skip


@pytest.mark.parametrize(("listing", "kind", "entry", "more"), BROKEN.values(), ids=BROKEN)
async def test_a_page_that_lacks_what_it_must_say_is_a_store_error(listing, kind, entry, more):
    async with s3_on(page(kind, [entry], more)) as (server, store):
        with pytest.raises(StoreError) as e:
            _ = [found async for found in getattr(store, listing)()]
        assert type(e.value) is StoreError
        assert len(server.requests) == 1


# Listings that do not end.


@EVERY
async def test_a_page_that_names_itself_as_the_next_is_a_store_error(listing):
    first, _, told, expected = LISTINGS[listing]
    seen = []
    async with s3_on(*[first] * 9) as (server, store):
        with pytest.raises(StoreError, match="does not end"):
            async for found in getattr(store, listing)():
                seen.append(told(found))  # noqa: PERF401 - what it yielded before it raised
        assert seen == expected[:2]
        assert len(server.requests) == 2


ENDLESS = {
    "objects, without any": ("list_objects", "ListBucketResult", ""),
    "objects, always the same": ("list_objects", "ListBucketResult", found_object("a")),
    "names, without any": ("list_names", "ListBucketResult", ""),
    "uploads, always the same": ("list_uploads", "ListMultipartUploadsResult", found_upload("a", 1)),
}


def pages_without_end(kind, entry):
    """An answer that goes on with another name for the next page each time."""

    async def answer(e):
        number = len(e.server.requests)
        marks = ("NextContinuationToken", number), ("NextKeyMarker", number), ("NextUploadIdMarker", number)
        await page(kind, [entry], truncated(*marks))(e)

    return answer


@pytest.mark.parametrize(("listing", "kind", "entry"), ENDLESS.values(), ids=ENDLESS)
async def test_pages_without_end_that_tell_nothing_new_are_a_store_error(listing, kind, entry):
    async with s3_on(*[pages_without_end(kind, entry)] * 1100) as (server, store):
        with pytest.raises(StoreError, match="1000 pages in a row told nothing new") as e:
            _ = [found async for found in getattr(store, listing)()]
        assert type(e.value) is StoreError
        assert len(server.requests) == 1000 + bool(entry)


async def test_a_listing_may_have_empty_pages_and_pages_of_what_was_not_asked_for():
    empty = [pages_without_end("ListBucketResult", "")] * 60
    last = page("ListBucketResult", [found_object("z")])
    async with s3_on(*empty, last) as (_, store):
        assert [found.key async for found in store.list_objects()] == ["z"]
    beside = [
        page("ListBucketResult", [found_object(f"{i:03}")], truncated(("NextContinuationToken", i)))
        for i in range(60)
    ]
    async with s3_on(*beside, page("ListBucketResult", [found_prefix("z")])) as (_, store):
        assert [name async for name in store.list_names()] == ["z"]


def test_new_names_begin_the_count_of_pages_anew():
    listing = Listing("p/", "", "here")
    for i in range(5000):
        listing.next_asks({"t": str(i)}, {"t": str(i + 1)}, [(f"{i // 900:09}",), ("",)])
    with pytest.raises(StoreError):
        for i in range(1000):
            listing.next_asks({"t": str(i)}, {"t": str(i + 1)}, [(f"{i % 5:09}",)])


async def test_what_the_caller_raises_while_it_is_told_stays_what_it_is():
    async with s3_on(page("ListBucketResult", [found_object("a")])) as (_, store):
        with pytest.raises(KeyError, match="mine"):
            async for found in store.list_objects():
                raise KeyError("mine", found)


# Any store's listings.


class Losing(RecordingStore):
    """Loses its listings after so many results, each time one further on."""

    def __init__(self, store, errors):
        super().__init__(store)
        self.errors = list(errors)
        self.asked = 0

    async def list_objects(self, prefix=""):
        self.asked += 1
        count = 0
        async for found in self._store.list_objects(prefix):
            if count == self.asked and self.errors:
                raise self.errors.pop(0)
            count += 1
            yield found


async def filled(count):
    store = MemoryStore("tests", "run/", Bucket())
    for i in range(count):
        await store.put(f"{i:03}", [memoryview(DATA)])
    return store


async def test_a_listing_that_goes_on_is_patient_again():
    losing = Losing(await filled(30), [StoreUnavailableError("lost") for _ in range(20)])
    how = RetryOptions(retry_base_s=1e-9, retry_cap_s=1e-9, retry_deadline_s=60)
    with_deadline = retrying(losing, how)
    assert [found.key async for found in with_deadline.list_objects()] == [f"{i:03}" for i in range(30)]
    assert losing.asked == 21


async def test_each_new_result_begins_the_count_of_attempts_anew(caplog):
    losing = Losing(await filled(5), [StoreUnavailableError("lost"), StaleCredentialsError("expired")])
    assert len([found async for found in retrying(losing).list_objects()]) == 5
    assert [r.getMessage().split(",")[0] for r in caplog.records] == ["attempt 1 failed"] * 2


async def test_a_listing_that_is_left_early_asks_for_no_more():
    losing = Losing(await filled(5), [StoreUnavailableError("lost")] * 3)
    async for found in retrying(losing).list_objects():
        assert found.key == "000"
        break
    assert losing.asked == 1


# Uploads that were begun twice.


async def begin_and_complete(store):
    upload = await store.create_upload("k")
    part = await store.put_part(upload, 1, 0, [memoryview(DATA)], crc32c=CRC)
    await store.complete_upload(upload, [part], crc32c=CRC)


async def test_an_upload_that_was_begun_twice_leaves_none_behind():
    within = MemoryStore("tests", "run/", Bucket())
    beside = await within.create_upload("k2")
    failing = FailingStore(within, 0, StoreUnavailableError("lost"), is_reply_lost=True)
    await begin_and_complete(retrying(failing))
    assert [upload async for upload in within.list_uploads()] == [beside]
    assert (await within.get("k")).data == DATA


async def test_one_that_was_aborted_leaves_none_behind_either():
    within = MemoryStore("tests", "run/", Bucket())
    store = retrying(FailingStore(within, 0, StoreUnavailableError("lost"), is_reply_lost=True))
    await store.abort_upload(await store.create_upload("k"))
    assert [upload async for upload in within.list_uploads()] == []


@pytest.mark.parametrize("error", [None, ThrottledError("busy"), StaleCredentialsError("expired")], ids=str)
async def test_uploads_are_looked_for_only_where_one_may_be_left(error):
    recording = FailingStore(MemoryStore("tests", "run/", Bucket()), 0 if error else -1, error)
    await begin_and_complete(retrying(recording))
    looked = [method for method, _ in recording.requests if method == "list_uploads"]
    assert len(looked) == isinstance(error, StoreUnavailableError)


async def test_not_to_be_allowed_to_look_only_warns(caplog):
    class Forbidding(FailingStore):
        async def list_uploads(self, prefix=""):
            raise PermissionDeniedError("no")
            yield

    within = MemoryStore("tests", "run/", Bucket())
    await begin_and_complete(retrying(Forbidding(within, 0, StoreUnavailableError("lost"), is_reply_lost=True)))
    assert (await within.get("k")).data == DATA
    assert "may have been left" in caplog.text


async def test_an_upload_that_was_begun_twice_on_a_server_leaves_none_behind(server, s3):
    async with S3Store("checkpoints", f"{token_hex(6)}/", S3Options(**s3)) as within:
        beside = await within.create_upload("k2")
        await begin_and_complete(retrying(FailingStore(within, 0, StoreUnavailableError("lost"), is_reply_lost=True)))
        assert [u.upload_id async for u in within.list_uploads("k")] == [beside.upload_id]
        assert (await within.get("k")).data == DATA
        await within.abort_upload(beside)


# Batches that a server does not know.


async def deletes(e):
    await e.read_body()
    e.server.objects.pop(e.request.target.partition("?")[0], None)
    await e.send(head(204, None))


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "MissingContentMD5"),
        (400, "InvalidRequest"),
        (501, "NotImplemented"),
        (405, "MethodNotAllowed"),
        (501, "Unheard"),
        (405, ""),
    ],
)
async def test_keys_are_deleted_one_by_one_where_batches_are_refused(status, code):
    script = [serve, serve, serve, refuse(status, code), deletes, deletes, deletes]
    async with s3_on(*script, bucket=token_hex(6)) as (server, store):
        for key in "abc":
            await store.put(key, [memoryview(DATA)])
        await store.delete(["a", "never"])
        await store.delete(["c"])
        assert [path[-1] for path in server.objects] == ["b"]
        assert [request.method for request in server.requests[3:]] == ["POST", "DELETE", "DELETE", "DELETE"]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [(403, "AccessDenied", PermissionDeniedError), (400, "ExpiredToken", CredentialsError)],
)
async def test_a_batch_that_is_refused_for_another_reason_is_not_tried_one_by_one(status, code, kind):
    async with s3_on(refuse(status, code), bucket=token_hex(6)) as (server, store):
        with pytest.raises(kind):
            await store.delete(["a"])
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [("AccessDenied", PermissionDeniedError), ("SlowDown", ThrottledError), ("Unheard", StoreError)],
)
async def test_what_a_batch_could_not_delete_is_told_by_its_class(code, kind):
    xml = f"<DeleteResult><Error><Key>p/a</Key><Code>{code}</Code></Error></DeleteResult>".encode()
    how = RetryOptions(retry_deadline_s=0)
    async with s3_on(saying(head(200, len(xml)) + xml), options=how) as (_, store):
        with pytest.raises(kind, match="could not delete p/a"):
            await store.delete(["a", "b"])


async def test_what_was_not_there_to_be_deleted_is_no_error():
    xml = b"<DeleteResult><Error><Key>p/a</Key><Code>NoSuchKey</Code></Error></DeleteResult>"
    async with s3_on(saying(head(200, len(xml)) + xml)) as (_, store):
        await store.delete(["a"])


# How long the server asks to be left alone.


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("2", 2), ("0.5", 0.5), ("Fri, 01 Jan 2100 00:00:00 GMT", 1e9), ("0", 0), ("soon", None), (None, None)],
)
@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError")])
async def test_what_the_server_asks_for_is_told_with_the_error(status, code, asked, expected):
    headers = {} if asked is None else {"Retry_After": asked}
    async with s3_on(refuse(status, code, **headers)) as (_, store):
        with pytest.raises(StoreUnavailableError) as e:
            await store._store.get("k")
        if expected == 1e9:
            assert e.value.retry_after_s > expected
        else:
            assert e.value.retry_after_s == expected


async def test_an_error_in_a_reply_of_200_is_asked_again_until_the_object_is_there():
    xml = error_xml("InternalError")
    done = b'<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>'
    begun = b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
    script = [saying(head(200, len(x)) + x) for x in (begun, xml, xml, done)]
    async with s3_on(script[0], serve, *script[1:]) as (server, store):
        upload = await store.create_upload("k")
        part = await store.put_part(upload, 1, 0, [memoryview(DATA)], crc32c=CRC)
        assert await store.complete_upload(upload, [part], crc32c=CRC) == '"e"'
        assert [r.method for r in server.requests] == ["POST", "PUT", "POST", "POST", "POST"]
