"""Clients that are shared, and kept for the next."""

import asyncio
import subprocess
import sys
from secrets import token_hex

import pytest

from cloudckpt.errors import UsageError
from cloudckpt.store.s3_clients import close_kept, s3_client
from cloudckpt.store.s3_options import S3Options

HERE = S3Options(endpoint_url="http://127.0.0.1:9", access_key_id="a", secret_access_key="b", region="us-east-1")
THERE = S3Options(endpoint_url="http://127.0.0.1:10", access_key_id="a", secret_access_key="b", region="us-east-1")


@pytest.fixture(autouse=True)
async def closing():
    yield
    await close_kept()


async def use(options=HERE, *, is_kept=True):
    async with s3_client(options, is_kept=is_kept) as client:
        return client


async def test_a_kept_client_serves_the_next_of_equal_options():
    first = await use()
    assert await use() is first
    assert await use(THERE) is not first
    assert await use(is_kept=False) is first


async def test_one_that_is_not_kept_is_not_there_for_the_next():
    assert await use(is_kept=False) is not await use(is_kept=False)


async def test_users_at_the_same_time_share_it():
    async def hold():
        async with s3_client(HERE, is_kept=True) as client:
            await asyncio.sleep(0)
            return client

    assert len({id(client) for client in await asyncio.gather(*(hold() for _ in range(5)))}) == 1


async def test_other_credentials_in_the_environment_or_in_aws_files_make_another(monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    first = await use()
    monkeypatch.setenv("AWS_SESSION_TOKEN", "new")
    second = await use()
    file.write_text("[default]\naws_access_key_id = x\naws_secret_access_key = y\n")
    third = await use()
    assert len({id(c) for c in (first, second, third)}) == 3


async def test_what_is_kept_is_closed_when_it_is_told_to_be_and_not_while_it_is_used():
    async with s3_client(HERE, is_kept=True) as client:
        await close_kept()
        assert await use() is client
    await close_kept()
    assert await use() is not client


async def test_no_more_are_kept_than_a_few():
    first = await use()
    for port in range(11, 25):
        await use(S3Options(endpoint_url=f"http://127.0.0.1:{port}", access_key_id="a", secret_access_key="b"))
    assert await use() is not first


FORK = """
import asyncio, os, select, sys
from awscrt.checksums import crc32c
from cloudckpt.engine.session import Session
from cloudckpt.store.s3_options import Credentials, S3Options
from cloudckpt.store.url import StoreOptions

asked = []

def give():
    asked.append(os.getpid())
    return Credentials(access_key_id={access_key!r}, secret_access_key={secret_key!r})

how = S3Options(endpoint_url={url!r}, region="us-east-1", addressing_style="path", credentials=give)
session = Session("s3://checkpoints/{prefix}", StoreOptions(s3=how))

async def work(store, whose, round):
    async def one(i):
        body = f"{{whose}} {{round}} {{i}}".encode() * 50_000
        key = f"{{whose}}/{{i}}"
        await store.put(key, [memoryview(body)], crc32c=crc32c(body))
        assert (await store.get(key)).data == body
    async with asyncio.TaskGroup() as group:
        for i in range(6):
            group.create_task(one(i))

def works(whose, round):
    session.run(lambda store: work(store, whose, round))

{before}
under_way, ended = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    works("child", 0)
    os.write(under_way[1], b"x")
    round = 1
    while not select.select([ended[0]], [], [], 0)[0]:
        works("child", round)
        round += 1
    assert asked[-1] == os.getpid()
    sys.exit(0)
os.read(under_way[0], 1)
for round in range(5):
    works("parent", round)
os.write(ended[1], b"x")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
works("parent", 6)
assert set(asked) == {{os.getpid()}}
"""


@pytest.mark.parametrize(
    "before", ["pass", "works('before', 0)"], ids=["before its first use", "after its first use"]
)
def test_a_parent_and_its_child_talk_to_a_server_at_the_same_time(before, server):
    script = FORK.format(
        url=server.endpoint_url,
        access_key=server.access_key,
        secret_key=server.secret_key,
        prefix=token_hex(6),
        before=before,
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("count", [0, -1])
def test_a_limit_that_lets_nothing_through_is_refused(count):
    with pytest.raises(UsageError, match="max_connections"):
        S3Options(max_connections=count)
