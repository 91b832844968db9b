"""One conformance suite, run by every store."""

from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from secrets import token_hex

import pytest
from awscrt.checksums import crc32c

from cloudckpt.errors import (
    BucketNotFoundError,
    ChecksumRefusedError,
    CredentialsError,
    NotImplementedByStoreError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PreconditionFailedError,
    StoreError,
    StoreUnavailableError,
    UnsupportedUrlError,
    UsageError,
)
from cloudckpt.ranges import Range
from cloudckpt.store.local import LocalStore
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.store.protocols import MAX_GET_NBYTES, IfAbsent, IfMatch
from cloudckpt.store.s3 import S3Store
from cloudckpt.store.s3_http import ViewsBody
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions, check_url, open_store

MIB = 1 << 20
NO_ETAG = '"00000000000000000000000000000000"'


class Conformance:
    """What every store promises. Subclasses give `opened`, a context manager that yields a fresh store."""

    checks_checksums = True
    deletes_conditionally = True
    lists_uploads = True
    hides_uploads = True

    @pytest.fixture
    def opened(self):
        raise NotImplementedError

    async def test_what_was_put_is_got_back_whole_and_by_range(self, opened):
        async with opened() as store:
            data = bytes(range(256)) * 8192
            view = memoryview(data)
            etag = await store.put("a/b", [view[:1], view[1:70_000], view[70_000:]], crc32c=crc32c(data))
            blob = await store.get("a/b")
            assert (blob.data, blob.etag) == (data, etag)
            into = memoryview(bytearray(1000))
            await store.get_range("a/b", Range(99_500, 100_500), [into[:1], into[1:400], into[400:]])
            assert into == data[99_500:100_500]
            info = await store.head("a/b")
            assert (info.key, info.size, info.etag) == ("a/b", len(data), etag)
            assert abs(datetime.now(UTC) - info.modified) < timedelta(minutes=5)

    async def test_the_first_bytes_are_got_as_many_as_there_are(self, opened):
        async with opened() as store:
            data = bytes(range(256)) * 8192
            for nbytes in (0, 1, 4095, 4096, 4097, len(data)):
                await store.put("k", [memoryview(data)[:nbytes]])
                assert await store.get_first("k", 4096) == data[: min(nbytes, 4096)]
                assert (await store.head("k")).size == nbytes  # which the connection is good for
            with pytest.raises(ObjectNotFoundError):
                await store.get_first("none", 4096)

    async def test_an_empty_object_is_an_object(self, opened):
        async with opened() as store:
            await store.put("empty", [])
            assert (await store.get("empty")).data == b""
            assert [u async for u in store.list_uploads()] == []

    async def test_putting_again_replaces(self, opened):
        async with opened() as store:
            first = await store.put("k", [memoryview(b"one")])
            second = await store.put("k", [memoryview(b"three")])
            assert first != second
            assert (await store.get("k")).data == b"three"

    async def test_a_name_that_objects_lie_under_is_no_object(self, opened):
        async with opened() as store:
            await store.put("folder/a", [memoryview(b"x")])
            for ask in (store.head, store.get):
                with pytest.raises(ObjectNotFoundError):
                    await ask("folder")

    async def test_a_missing_object_is_told_as_such(self, opened):
        async with opened() as store:
            for request in (
                store.get("none"),
                store.head("none"),
                store.get_range("none", Range(0, 1), [memoryview(bytearray(1))]),
            ):
                with pytest.raises(ObjectNotFoundError, match=r"none|no such object"):
                    await request

    async def test_a_range_beyond_the_end_is_an_error_and_no_short_read(self, opened):
        async with opened() as store:
            await store.put("k", [memoryview(b"0123456789")])
            for at in (Range(5, 15), Range(10, 12), Range(50, 60)):
                with pytest.raises(StoreError) as e:
                    await store.get_range("k", at, [memoryview(bytearray(len(at)))])
                assert not isinstance(e.value, StoreUnavailableError)

    async def test_only_the_first_put_if_absent_wins(self, opened):
        async with opened() as store:
            await store.put("k", [memoryview(b"first")], condition=IfAbsent())
            with pytest.raises(PreconditionFailedError):
                await store.put("k", [memoryview(b"second")], condition=IfAbsent())
            assert (await store.get("k")).data == b"first"

    async def test_put_if_match_replaces_only_what_it_saw(self, opened):
        async with opened() as store:
            etag = await store.put("k", [memoryview(b"first")])
            await store.put("k", [memoryview(b"other")], condition=IfMatch(etag))
            with pytest.raises(PreconditionFailedError):
                await store.put("k", [memoryview(b"lost update")], condition=IfMatch(etag))
            assert (await store.get("k")).data == b"other"

    async def test_put_if_match_on_nothing_puts_nothing(self, opened):
        async with opened() as store:
            with pytest.raises((PreconditionFailedError, ObjectNotFoundError)):
                await store.put("k", [memoryview(b"x")], condition=IfMatch(NO_ETAG))
            with pytest.raises(ObjectNotFoundError):
                await store.get("k")

    async def test_a_damaged_body_is_refused_and_changes_nothing(self, opened):
        if not self.checks_checksums:
            pytest.skip("this server ignores checksums")
        async with opened() as store:
            with pytest.raises(ChecksumRefusedError):
                await store.put("k", [memoryview(b"damaged")], crc32c=crc32c(b"whole"))
            with pytest.raises(ObjectNotFoundError):
                await store.get("k")
            upload = await store.create_upload("m")
            with pytest.raises(ChecksumRefusedError):
                await store.put_part(upload, 1, 0, [memoryview(b"damaged")], crc32c=crc32c(b"whole"))
            await store.abort_upload(upload)

    async def test_listing_is_in_order_and_relative_to_the_root(self, opened):
        async with opened() as store:
            for key in ("b", "a/2", "a/1", "a/x/deep"):
                await store.put(key, [memoryview(key.encode())])
            listed = [(o.key, o.size) async for o in store.list_objects()]
            assert listed == [("a/1", 3), ("a/2", 3), ("a/x/deep", 8), ("b", 1)]
            assert [o.key async for o in store.list_objects("a/")] == ["a/1", "a/2", "a/x/deep"]
            assert [o.key async for o in store.list_objects("a/x")] == ["a/x/deep"]
            assert [n async for n in store.list_names()] == ["a"]
            assert [n async for n in store.list_names("a/")] == ["x"]
            assert [o.key async for o in store.list_objects("none/")] == []

    async def test_deleting_removes_what_is_there_and_forgives_what_is_not(self, opened):
        async with opened() as store:
            for key in ("a", "b", "c"):
                await store.put(key, [memoryview(b"x")])
            await store.delete(["a", "c", "never"])
            assert [o.key async for o in store.list_objects()] == ["b"]

    async def test_delete_if_removes_only_what_it_saw(self, opened):
        async with opened() as store:
            etag = await store.put("k", [memoryview(b"x")])
            await store.put("k", [memoryview(b"newer")])
            if not self.deletes_conditionally:
                with pytest.raises(NotImplementedByStoreError):
                    await store.delete_if("k", IfMatch(etag))
                assert (await store.get("k")).data == b"newer"
                return
            with pytest.raises(PreconditionFailedError):
                await store.delete_if("k", IfMatch(etag))
            await store.delete_if("k", IfMatch((await store.head("k")).etag))
            with pytest.raises(ObjectNotFoundError):
                await store.get("k")

    async def test_parts_sent_in_any_order_become_one_object_when_completed(self, opened):
        async with opened() as store:
            data = bytes(range(256)) * (MIB // 256) * 12
            view = memoryview(data)
            upload = await store.create_upload("m")
            cut = [view[: 5 * MIB], view[5 * MIB : 10 * MIB], view[10 * MIB :]]
            parts = []
            for number in (3, 1, 2):
                body = cut[number - 1]
                offset = (number - 1) * 5 * MIB
                parts.append(await store.put_part(upload, number, offset, [body[:7], body[7:]], crc32c=crc32c(body)))
            if self.hides_uploads:
                with pytest.raises(ObjectNotFoundError):
                    await store.get("m")
            etag = await store.complete_upload(upload, parts, crc32c=crc32c(data))
            assert [o.etag async for o in store.list_objects("m")] == [etag]
            assert (await store.get("m")).data == data
            assert [u async for u in store.list_uploads()] == []

    async def test_an_aborted_upload_leaves_nothing_and_can_be_aborted_again(self, opened):
        async with opened() as store:
            upload = await store.create_upload("m")
            await store.put_part(upload, 1, 0, [memoryview(b"x")], crc32c=crc32c(b"x"))
            if self.lists_uploads:
                assert [u.key async for u in store.list_uploads()] == ["m"]
                assert [u.key async for u in store.list_uploads("m")] == ["m"]
                assert [u.key async for u in store.list_uploads("n")] == []
            await store.abort_upload(upload)
            await store.abort_upload(upload)
            assert [u async for u in store.list_uploads()] == []
            assert [o async for o in store.list_objects()] == []


class TestMemory(Conformance):
    @pytest.fixture
    def opened(self):
        @asynccontextmanager
        async def make():
            yield MemoryStore("tests", "some/prefix/", bucket=Bucket())

        return make


class TestLocal(Conformance):
    @pytest.fixture
    def opened(self, tmp_path):
        @asynccontextmanager
        async def make():
            yield LocalStore(str(tmp_path / "some" / "prefix"))

        return make


class TestS3(Conformance):
    @pytest.fixture
    def opened(self, server, s3):
        self.checks_checksums = server.name != "moto"
        self.deletes_conditionally = server.name != "localstack"

        @asynccontextmanager
        async def make():
            async with S3Store("checkpoints", f"{token_hex(6)}/", S3Options(**s3)) as store:
                yield store

        return make

    async def test_a_bucket_that_is_not_there_is_told_as_such(self, s3):
        async with S3Store("no-such-bucket-here", "", S3Options(**s3)) as store:
            for request in (store.get("k"), store.put("k", []), store.create_upload("k")):
                with pytest.raises(BucketNotFoundError, match="create it, or check the URL"):
                    await request

    async def test_wrong_credentials_are_told_as_such(self, server, s3):
        if server.name in {"moto", "localstack"}:
            pytest.skip("this server checks no credentials")
        for wrong in ({"secret_access_key": "wrong"}, {"access_key_id": "unknown"}):
            async with S3Store("checkpoints", "", S3Options(**{**s3, **wrong})) as store:
                with pytest.raises((CredentialsError, PermissionDeniedError)) as e:
                    await store.get("k")
                assert s3["secret_access_key"] not in str(e.value)

    async def test_listing_goes_on_after_a_full_page(self, opened, client):
        async with opened() as store:
            keys = [f"{i:04}" for i in range(1005)]
            for key in keys:
                client.put_object(Bucket="checkpoints", Key=store._prefix + key, Body=b"")
            assert [o.key async for o in store.list_objects()] == keys
            await store.delete(keys)
            assert [o async for o in store.list_objects()] == []


def no_credentials(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


async def test_missing_credentials_are_told_with_what_to_do(monkeypatch, tmp_path):
    no_credentials(monkeypatch, tmp_path)
    options = S3Options(endpoint_url="http://127.0.0.1:1", region="us-east-1")
    async with S3Store("b", "", options) as store:
        with pytest.raises(CredentialsError, match="AWS_ACCESS_KEY_ID"):
            await store.get("k")


async def test_a_profile_that_does_not_exist_is_told_as_such(monkeypatch, tmp_path):
    no_credentials(monkeypatch, tmp_path)
    with pytest.raises(CredentialsError, match="nobody"):
        async with S3Store("b", "", S3Options(profile="nobody")):
            pass


async def test_a_server_that_is_not_there_is_unavailable(unused_tcp_port):
    options = S3Options(
        endpoint_url=f"http://127.0.0.1:{unused_tcp_port}",
        access_key_id="a",
        secret_access_key="s",
        region="us-east-1",
    )
    async with S3Store("b", "", options) as store:
        with pytest.raises(StoreUnavailableError, match="no answer"):
            await store.get("k")


async def test_stores_on_servers_that_the_environment_names_are_told_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    (tmp_path / "config").write_text("[profile there]\nendpoint_url = http://127.0.0.1:3/\n")
    keys = {"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
    identities = []
    for name, value in (("AWS_ENDPOINT_URL", "http://127.0.0.1:1"), ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:2")):
        monkeypatch.setenv(name, value)
        async with S3Store("bucket", "", S3Options(**keys)) as store:
            identities.append(store.identity)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv("AWS_PROFILE", "there")
    async with open_store("s3://bucket/run", StoreOptions(s3=S3Options(**keys))) as store:
        identities.append(store.identity)
    monkeypatch.delenv("AWS_PROFILE")
    async with S3Store("bucket", "", S3Options(endpoint_url="http://127.0.0.1:4", **keys)) as store:
        identities.append(store.identity)
    assert identities == [f"http://127.0.0.1:{port}/bucket" for port in (1, 2, 3, 4)]
    async with S3Store("bucket", "", S3Options(**keys)) as store:
        assert "amazonaws.com/bucket" in store.identity


async def test_a_region_that_is_none_is_told_as_such():
    options = S3Options(
        endpoint_url="http://127.0.0.1:1", region="no region!", access_key_id="a", secret_access_key="b"
    )
    with pytest.raises(StoreError, match="no region!"):
        async with S3Store("bucket", "", options):
            pass


@pytest.mark.parametrize("content", [None, b"no certificate"])
async def test_a_file_of_authorities_that_is_none_is_told_as_such_at_once(tmp_path, content):
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_bytes(content)
    options = S3Options(
        endpoint_url="https://127.0.0.1:1", ca_bundle=str(file), access_key_id="a", secret_access_key="b"
    )
    with pytest.raises(UsageError, match=r"authorities cannot be read.*ca_bundle"):
        async with S3Store("bucket", "", options):
            pass


async def test_a_file_that_is_too_large_to_be_got_whole_is_not_read(tmp_path):
    store = LocalStore(str(tmp_path))
    with (tmp_path / "manifest.json").open("wb") as f:
        f.truncate(MAX_GET_NBYTES + 1)  # which takes no room
    with pytest.raises(StoreError, match=f"more than {MAX_GET_NBYTES} bytes"):
        await store.get("manifest.json")
    into = memoryview(bytearray(5))
    await store.get_range("manifest.json", Range(MAX_GET_NBYTES - 4, MAX_GET_NBYTES + 1), [into])


def test_options_never_show_a_secret():
    shown = repr(S3Options(access_key_id="AK", secret_access_key="hush", session_token="hush"))
    assert "hush" not in shown


def test_half_a_credential_is_refused():
    with pytest.raises(UsageError, match="both"):
        S3Options(access_key_id="AK")


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("gopher://b/k", "no store serves"),
        ("/a/path", "no store serves"),
        ("gcs://b/k", "spelled gs://"),
        ("abfss://b/k", "spelled az://"),
        ("az://", "names no bucket"),
        ("s3://", "names no bucket"),
        ("s3:///key", "names no bucket"),
        ("file:///", "names no directory"),
        ("s3://user:pass/word@bucket/run", "is no bucket"),
        ("s3://[bucket/run", "is no bucket"),
        ("memory://a:b/run", "is no bucket"),
        ("s3://b/k?versionId=1", "cannot have"),
        ("s3://b/a/../b", "segment"),
    ],
)
def test_urls_that_no_store_serves_are_refused(url, match):
    with pytest.raises(UnsupportedUrlError, match=match):
        check_url(url)


async def test_a_memory_url_names_the_same_objects_each_time():
    name = token_hex(6)
    async with open_store(f"memory://{name}/a") as store:
        await store.put("k", [memoryview(b"x")])
    async with open_store(f"memory://{name}") as store:
        assert [o.key async for o in store.list_objects()] == ["a/k"]


def test_a_views_body_reads_and_seeks_as_the_bytes_it_stands_for():
    data = bytes(range(200))
    body = ViewsBody([memoryview(data)[:3], memoryview(b""), memoryview(data)[3:150], memoryview(data)[150:]])
    assert body.read() == data
    assert body.seek(0, 2) == len(data)
    for start in (0, 2, 3, 149, 150, 199, 200, 250):
        body.seek(start)
        assert body.read(7) == data[start : start + 7]
        assert body.tell() == start + len(data[start : start + 7])
    assert body.seek(-5, 1) >= 0
