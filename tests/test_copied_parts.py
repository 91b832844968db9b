"""Parts that a server makes of what lies there already."""

from contextlib import asynccontextmanager
from dataclasses import replace
from secrets import token_hex

import pytest
from awscrt.checksums import crc32c

from cloudckpt.errors import ChecksumRefusedError, ObjectNotFoundError, StoreError
from cloudckpt.ranges import Range
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.store.url import open_store

MIB = 1 << 20
DATA = bytes(range(256)) * (6 * MIB // 256) + b"end"
HEAD = b"#" * (5 * MIB)


async def copied(target, source, at, expected):
    upload = await target.create_upload("k")
    try:
        first = await target.put_part(upload, 1, 0, [memoryview(HEAD)], crc32c=crc32c(HEAD))
        second = await target.put_part_copy(upload, 2, source, "o@0,1 %", at, crc32c=expected)
    except BaseException:
        await target.abort_upload(upload)
        raise
    return upload, [first, second]


class Copying:
    """What every store promises that copies. Subclasses give `both`: opens two stores of one server."""

    @pytest.fixture
    def both(self):
        raise NotImplementedError

    @pytest.mark.parametrize("is_known", [True, False], ids=["checksum known", "checksum not known"])
    async def test_an_object_is_made_of_a_part_that_was_sent_and_one_that_was_copied(self, both, is_known):
        at = Range(1, len(DATA))
        part = DATA[at.start : at.stop]
        async with both() as (source, target):
            assert target.copies_from(source)
            await source.put("o@0,1 %", [memoryview(DATA)])
            upload, parts = await copied(target, source, at, crc32c(part) if is_known else None)
            assert parts[1].crc32c in {crc32c(part), None}
            await target.complete_upload(upload, parts, crc32c=crc32c(HEAD + part) if is_known else None)
            into = memoryview(bytearray(len(HEAD) + len(part)))
            await target.get_range("k", Range(0, len(into)), [into])
            assert bytes(into) == HEAD + part

    async def test_what_is_not_there_cannot_be_copied(self, both):
        async with both() as (source, target):
            with pytest.raises(ObjectNotFoundError):
                await copied(target, source, Range(0, 10), None)
            with pytest.raises(ObjectNotFoundError):
                await target.head("k")

    async def test_bytes_that_are_not_what_was_expected_are_refused_at_once_by_a_server_that_tells(self, both):
        async with both() as (source, target):
            await source.put("o@0,1 %", [memoryview(DATA)])
            try:
                upload, parts = await copied(target, source, Range(0, len(DATA)), crc32c(b"others"))
            except ChecksumRefusedError:
                return
            try:  # one that tells nothing may still look at the whole
                await target.complete_upload(upload, parts, crc32c=crc32c(b"others"))
            except StoreError:
                await target.abort_upload(upload)
            else:
                assert parts[1].crc32c == crc32c(b"others")


class TestInMemory(Copying):
    @pytest.fixture
    def both(self):
        @asynccontextmanager
        async def opened():
            bucket = Bucket()
            yield MemoryStore("x", "a/", bucket), MemoryStore("x", "b/", bucket)

        return opened


class TestOnS3(Copying):
    @pytest.fixture
    def both(self, store_options):
        root = f"s3://checkpoints/{token_hex(6)}"

        @asynccontextmanager
        async def opened():
            async with (
                open_store(f"{root}/a b/é", store_options) as source,
                open_store(root, store_options) as target,
            ):
                yield source, target

        return opened


async def test_stores_of_other_servers_are_not_copied_from(store_options):
    other = replace(store_options, s3=replace(store_options.s3, endpoint_url="http://127.0.0.1:9"))
    async with (
        open_store("s3://checkpoints/a", store_options) as store,
        open_store("s3://checkpoints/a", other) as far,
    ):
        assert not store.copies_from(far)
        assert not store.copies_from(MemoryStore("x"))
    async with open_store("file:///tmp/none") as local:
        assert not local.copies_from(local)
