"""What is asked again, and what is not."""

import asyncio

import pytest
from awscrt.checksums import crc32c

from cloudckpt.errors import (
    BucketNotFoundError,
    ChecksumRefusedError,
    ChecksumsNotKnownError,
    CredentialsError,
    NotImplementedByStoreError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PreconditionFailedError,
    StaleCredentialsError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
)
from cloudckpt.ranges import Range
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.store.protocols import IfAbsent, IfMatch
from cloudckpt.store.retry import RetryingStore, RetryOptions
from cloudckpt.store.traffic import Traffic, TrafficOptions
from cloudckpt.testing import FailingStore, RecordingStore

AT_ONCE = RetryOptions(retry_base_s=0, retry_cap_s=0)
DATA = b"hello"
CRC = crc32c(DATA)


def retrying(store, options):
    return RetryingStore(store, options, Traffic(TrafficOptions(), most=16))


class FlakyStore(RecordingStore):
    """Fails its first requests to one method with the given errors; with ``is_reply_lost``, after doing them."""

    def __init__(self, store, method, errors, *, is_reply_lost=False):
        super().__init__(store)
        self.errors = list(errors)
        self.method = method
        self.is_reply_lost = is_reply_lost

    def asked(self):
        return [m for m, _ in self.requests].count(self.method)

    async def before(self, method, key):
        await super().before(method, key)
        self._fail(method, when_lost=False)

    async def after(self, method, key):
        self._fail(method, when_lost=True)

    def _fail(self, method, *, when_lost):
        if method == self.method and self.is_reply_lost == when_lost and self.errors:
            raise self.errors.pop(0)


def memory():
    return MemoryStore("tests", "run/", Bucket())


async def upload_of(store):
    """An upload under way with its one part sent."""
    upload = await store.create_upload("k")
    return upload, await store.put_part(upload, 1, 0, [memoryview(DATA)], crc32c=CRC)


async def call_get(store, _):
    assert (await store.get("there")).data == DATA


async def call_get_first(store, _):
    assert await store.get_first("there", 2) == DATA[:2]


async def call_get_range(store, _):
    into = bytearray(3)
    await store.get_range("there", Range(1, 4), [memoryview(into)[:1], memoryview(into)[1:]])
    assert into == b"ell"


async def call_head(store, _):
    assert (await store.head("there")).size == 5


async def call_put(store, _):
    await store.put("new", [memoryview(DATA)], crc32c=CRC)
    assert (await store.get("new")).data == DATA


async def call_delete(store, _):
    await store.delete(["there"])
    assert [o.key async for o in store.list_objects()] == []


async def call_create_upload(store, _):
    assert (await store.create_upload("k2")).key == "k2"


async def call_put_part(store, under_way):
    upload, part = under_way
    assert await store.put_part(upload, 1, 0, [memoryview(DATA)], crc32c=CRC) == part


async def call_complete_upload(store, under_way):
    upload, part = under_way
    etag = await store.complete_upload(upload, [part], crc32c=CRC)
    assert etag == (await store.head("k")).etag


async def call_abort_upload(store, under_way):
    await store.abort_upload(under_way[0])
    assert [u async for u in store.list_uploads()] == []


RETRIED = [
    StoreUnavailableError,
    ThrottledError,
    ChecksumRefusedError,
    StaleCredentialsError,
    ChecksumsNotKnownError,
]
CALLS = {
    "get": call_get,
    "get_first": call_get_first,
    "get_range": call_get_range,
    "head": call_head,
    "put": call_put,
    "delete": call_delete,
    "create_upload": call_create_upload,
    "put_part": call_put_part,
    "complete_upload": call_complete_upload,
    "abort_upload": call_abort_upload,
}
EVERY = pytest.mark.parametrize("method", CALLS)


async def prepared(method, errors, *, is_reply_lost=False):
    store = memory()
    await store.put("there", [memoryview(DATA)])
    under_way = await upload_of(store) if method in {"put_part", "complete_upload", "abort_upload"} else None
    return FlakyStore(store, method, errors, is_reply_lost=is_reply_lost), under_way


@EVERY
async def test_an_answer_that_comes_at_once_is_asked_for_once(method):
    flaky, under_way = await prepared(method, [])
    await CALLS[method](retrying(flaky, AT_ONCE), under_way)
    assert flaky.asked() == 1


@pytest.mark.parametrize("kind", RETRIED)
@EVERY
async def test_what_may_pass_is_asked_again_until_it_does(method, kind):
    flaky, under_way = await prepared(method, [kind("one"), kind("two"), kind("three")])
    await CALLS[method](retrying(flaky, AT_ONCE), under_way)
    assert flaky.errors == []
    assert flaky.asked() == 4


@EVERY
async def test_a_request_whose_answer_was_lost_is_asked_again(method):
    flaky, under_way = await prepared(method, [StoreUnavailableError("lost")], is_reply_lost=True)
    await CALLS[method](retrying(flaky, AT_ONCE), under_way)
    assert flaky.errors == []
    assert flaky.asked() == 2


@pytest.mark.parametrize(
    "kind",
    [
        StoreError,
        ObjectNotFoundError,
        BucketNotFoundError,
        CredentialsError,
        PermissionDeniedError,
        PreconditionFailedError,
        NotImplementedByStoreError,
        ValueError,
    ],
)
@EVERY
async def test_what_will_not_pass_is_asked_once(method, kind):
    error = kind("no")
    flaky, under_way = await prepared(method, [error])
    with pytest.raises(kind) as caught:
        await CALLS[method](retrying(flaky, AT_ONCE), under_way)
    assert caught.value is error
    assert flaky.asked() == 1


@pytest.mark.parametrize("kind", [StoreUnavailableError, ChecksumRefusedError])
@pytest.mark.parametrize("is_reply_lost", [False, True])
@pytest.mark.parametrize("condition", [IfAbsent(), IfMatch('"etag"')], ids=["if absent", "if match"])
async def test_a_conditional_put_is_never_asked_again(condition, is_reply_lost, kind):
    bucket = Bucket()
    store = MemoryStore("tests", "", bucket)
    if isinstance(condition, IfMatch):
        condition = IfMatch(await store.put("new", [memoryview(b"old")]))
    flaky = FlakyStore(store, "put", [kind("lost")], is_reply_lost=is_reply_lost)
    with pytest.raises(kind):
        await retrying(flaky, AT_ONCE).put("new", [memoryview(DATA)], condition=condition, crc32c=CRC)
    assert flaky.requests == [("put", "new")]


@pytest.mark.parametrize("kind", [StaleCredentialsError, ChecksumsNotKnownError])
async def test_a_conditional_put_that_was_certainly_not_carried_out_is_asked_again(kind):
    flaky = FlakyStore(memory(), "put", [kind("no"), kind("still no")])
    await retrying(flaky, AT_ONCE).put("new", [memoryview(DATA)], condition=IfAbsent(), crc32c=CRC)
    assert flaky.asked() == 3
    with pytest.raises(PreconditionFailedError):
        await retrying(flaky, AT_ONCE).put("new", [memoryview(DATA)], condition=IfAbsent(), crc32c=CRC)


async def test_one_that_is_in_doubt_after_that_is_not():
    flaky = FlakyStore(memory(), "put", [StaleCredentialsError("expired"), StoreUnavailableError("lost")])
    with pytest.raises(StoreUnavailableError):
        await retrying(flaky, AT_ONCE).put("new", [memoryview(DATA)], condition=IfAbsent(), crc32c=CRC)
    assert flaky.asked() == 2


async def test_a_conditional_delete_that_was_certainly_not_carried_out_is_asked_again():
    store = memory()
    etag = await store.put("k", [memoryview(DATA)])
    flaky = FlakyStore(store, "delete_if", [StaleCredentialsError("expired")])
    await retrying(flaky, AT_ONCE).delete_if("k", IfMatch(etag))
    assert flaky.asked() == 2


async def test_a_conditional_put_keeps_its_condition():
    store = retrying(memory(), AT_ONCE)
    await store.put("k", [memoryview(DATA)], condition=IfAbsent())
    with pytest.raises(PreconditionFailedError):
        await store.put("k", [memoryview(b"other")], condition=IfAbsent())


async def test_a_conditional_delete_is_never_asked_again():
    store = memory()
    etag = await store.put("k", [memoryview(DATA)])
    flaky = FlakyStore(store, "delete_if", [StoreUnavailableError("lost")])
    with pytest.raises(StoreUnavailableError):
        await retrying(flaky, AT_ONCE).delete_if("k", IfMatch(etag))
    assert flaky.asked() == 1


async def test_a_put_keeps_its_checksum_when_it_is_asked_again():
    flaky = FlakyStore(memory(), "put", [StoreUnavailableError("lost")])
    impatient = retrying(flaky, RetryOptions(retry_base_s=0, retry_cap_s=0, retry_deadline_s=0))
    with pytest.raises(StoreUnavailableError):
        await impatient.put("k", [memoryview(DATA)], crc32c=CRC)
    with pytest.raises(ChecksumRefusedError):
        await impatient.put("k", [memoryview(DATA)], crc32c=CRC ^ 1)


@EVERY
async def test_the_deadline_ends_it_with_the_last_error_and_a_note(method):
    error = StoreUnavailableError("no answer")
    flaky, under_way = await prepared(method, [error])
    options = RetryOptions(retry_base_s=0, retry_cap_s=0, retry_deadline_s=0)
    with pytest.raises(StoreUnavailableError) as caught:
        await CALLS[method](retrying(flaky, options), under_way)
    assert caught.value is error
    assert caught.value.__notes__ == ["gave up after 1 attempt(s) in 0 s"]
    assert flaky.asked() == 1


async def test_the_note_counts_the_attempts_that_were_made():
    errors = [StoreUnavailableError(str(i)) for i in range(10_000)]
    flaky = FlakyStore(memory(), "get", errors)
    options = RetryOptions(retry_base_s=0.001, retry_cap_s=0.001, retry_deadline_s=0.05)
    with pytest.raises(StoreUnavailableError) as caught:
        await retrying(flaky, options).get("k")
    assert flaky.asked() > 1
    assert str(caught.value) == str(flaky.asked() - 1)
    assert caught.value.__notes__ == [f"gave up after {flaky.asked()} attempt(s) in 0.05 s"]


async def test_each_retry_is_a_warning(caplog):
    flaky = FlakyStore(memory(), "delete", [StoreUnavailableError("busy"), StoreUnavailableError("busier")])
    await retrying(flaky, AT_ONCE).delete(["k"])
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == 2
    assert "attempt 1 failed" in warned[0]
    assert "busier" in warned[1]


def busy(retry_after_s):
    error = ThrottledError("busy")
    error.retry_after_s = retry_after_s
    return error


def waits(caplog):
    return [r.getMessage().split("next in ")[1].split(" s")[0] for r in caplog.records]


async def test_what_the_server_asks_for_is_waited_and_never_more_than_the_cap(caplog):
    flaky = FlakyStore(memory(), "delete", [busy(0.01), busy(1e9), busy(None)])
    how = RetryOptions(retry_base_s=0, retry_cap_s=0.02)
    await retrying(flaky, how).delete(["k"])
    assert waits(caplog) == ["0.01", "0.02", "0.00"]


async def test_what_the_server_asks_for_takes_nothing_from_the_jitter(caplog):
    flaky = FlakyStore(memory(), "delete", [busy(0) for _ in range(20)])
    await retrying(flaky, RetryOptions(retry_base_s=0.03, retry_cap_s=0.03)).delete(["k"])
    assert len(set(waits(caplog))) > 1


async def test_a_wait_beyond_the_deadline_is_not_begun():
    flaky = FlakyStore(memory(), "delete", [busy(100)])
    with pytest.raises(ThrottledError):
        await retrying(flaky, RetryOptions(retry_cap_s=50, retry_deadline_s=40)).delete(["k"])
    assert flaky.asked() == 1


async def test_no_number_of_attempts_is_too_large():
    flaky = FlakyStore(memory(), "delete", [StoreUnavailableError("busy") for _ in range(1200)])
    await retrying(flaky, RetryOptions(retry_base_s=1e-9, retry_cap_s=1e-9)).delete(["k"])
    assert flaky.asked() == 1201


# Completing an upload whose answer was lost.


async def test_an_upload_that_is_gone_when_it_is_completed_again_landed_if_its_key_is_there():
    store = memory()
    upload, part = await upload_of(store)
    failing = FailingStore(store, 0, StoreUnavailableError("lost"), is_reply_lost=True)
    etag = await retrying(failing, AT_ONCE).complete_upload(upload, [part], crc32c=CRC)
    assert etag == (await store.head("k")).etag
    assert (await store.get("k")).data == DATA
    assert [m for m, _ in failing.requests] == ["complete_upload", "complete_upload", "head"]


async def test_an_upload_that_is_gone_when_it_is_completed_again_is_lost_if_its_key_is_not_there():
    store = memory()
    upload, part = await upload_of(store)
    await store.abort_upload(upload)
    failing = FailingStore(store, 0, StoreUnavailableError("lost"))
    with pytest.raises(ObjectNotFoundError):
        await retrying(failing, AT_ONCE).complete_upload(upload, [part], crc32c=CRC)
    assert [m for m, _ in failing.requests] == ["complete_upload", "complete_upload", "head"]


async def test_an_upload_that_is_gone_at_the_first_completion_is_not_looked_for():
    store = memory()
    upload, part = await upload_of(store)
    await store.put("k", [memoryview(b"another's")])
    await store.abort_upload(upload)
    recording = RecordingStore(store)
    with pytest.raises(ObjectNotFoundError):
        await retrying(recording, AT_ONCE).complete_upload(upload, [part], crc32c=CRC)
    assert recording.requests == [("complete_upload", "k")]


async def test_the_look_at_the_key_is_asked_again_as_any_request():
    store = memory()
    upload, part = await upload_of(store)
    lost = FailingStore(store, 0, StoreUnavailableError("lost"), is_reply_lost=True)
    flaky = FlakyStore(lost, "head", [StoreUnavailableError("busy")])
    etag = await retrying(flaky, AT_ONCE).complete_upload(upload, [part], crc32c=CRC)
    assert etag == (await store.head("k")).etag


# As any store.


async def test_listings_and_names_are_those_of_the_store_within():
    within = memory()
    store = retrying(within, AT_ONCE)
    await store.put("a/b", [memoryview(DATA)])
    await store.create_upload("a/c")
    assert (store.url, store.identity) == (within.url, within.identity)
    assert [o.key async for o in store.list_objects("a/")] == ["a/b"]
    assert [n async for n in store.list_names()] == ["a"]
    assert [u.key async for u in store.list_uploads("a/")] == ["a/c"]


async def test_waiting_for_a_turn_takes_nothing_from_the_deadline():
    flaky, under_way = await prepared("put_part", [StoreUnavailableError("reset")])
    options = RetryOptions(retry_base_s=0, retry_cap_s=0, retry_deadline_s=0.2)
    traffic = Traffic(TrafficOptions(first_concurrency=1), most=1)
    store = RetryingStore(flaky, options, traffic)
    before = asyncio.ensure_future(traffic.send("another", 1, lambda: asyncio.sleep(0.4)))  # longer than the deadline
    await asyncio.sleep(0)
    await CALLS["put_part"](store, under_way)
    assert flaky.asked() == 2
    await before
