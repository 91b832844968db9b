"""The fault proxy: each fault as a client and as the server see it, and a save that runs into it."""

import asyncio
import http.client
import socket
from contextlib import contextmanager
from secrets import token_hex
from urllib.parse import urlsplit

import boto3
import pytest
import torch
import torch.distributed.checkpoint as dcp
from botocore.config import Config
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.testing import faults
from cloudckpt.testing.proxy import fault_proxy
from conftest import BUCKET
from rude_server import RudeServer

BODY = bytes(range(256)) * 400


@pytest.fixture
def proxy(server):
    with fault_proxy(server.endpoint_url) as proxy:
        yield proxy


def client_of(url, server):
    return boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, read_timeout=2),
    )


@pytest.fixture
def broken(proxy, server):
    """A client of the proxy, which asks once."""
    return client_of(proxy.url, server)


def there(client, key):
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=key).get("Contents", [])
    return client.get_object(Bucket=BUCKET, Key=key)["Body"].read() if found else None


def test_what_is_not_broken_passes_unchanged_and_once(broken, proxy, client):
    key = token_hex(6)
    broken.put_object(Bucket=BUCKET, Key=key, Body=BODY)
    assert broken.get_object(Bucket=BUCKET, Key=key, Range="bytes=7-1000")["Body"].read() == BODY[7:1001]
    assert broken.head_object(Bucket=BUCKET, Key=key)["ContentLength"] == len(BODY)
    broken.delete_object(Bucket=BUCKET, Key=key)
    assert there(client, key) is None
    seen = [(r.operation, r.key, r.status) for r in proxy.requests]
    assert seen == [
        ("PutObject", key, 200),
        ("GetObject", key, 206),
        ("HeadObject", key, 200),
        ("DeleteObject", key, 204),
    ]


PUTS = {
    "drop": (faults.drop(), None),
    "reset in the request": (faults.reset_request(), None),
    "lost reply": (faults.lose_reply(), BODY),
    "stall": (faults.stall(), BODY),
    "SlowDown": (faults.slow_down(), None),
    "500 after the act": (faults.answer(500, "InternalError", is_carried_out=True), BODY),
    "expired": (faults.expired(), None),
    "conflict": (faults.conflict(), None),
}


@pytest.mark.parametrize(("fault", "after"), PUTS.values(), ids=PUTS)
def test_a_put_that_is_broken_fails_and_was_carried_out_or_not(broken, proxy, client, fault, after):
    key = token_hex(6)
    proxy.at(0, fault)
    with pytest.raises(Exception, match=r"onnection|Timeout|timeout|SlowDown|Internal|Expired|Conflict|closed"):
        broken.put_object(Bucket=BUCKET, Key=key, Body=BODY)
    assert there(client, key) == after
    assert [r.fault for r in proxy.requests] == [fault]
    broken.put_object(Bucket=BUCKET, Key=key, Body=BODY[::-1])  # the next one passes
    assert there(client, key) == BODY[::-1]


@pytest.mark.parametrize("fault", [faults.reset_reply(), faults.truncate(), faults.stall_reply()], ids=str)
def test_a_reply_that_is_cut_ends_after_its_first_half(broken, proxy, client, fault):
    key = token_hex(6)
    client.put_object(Bucket=BUCKET, Key=key, Body=BODY)
    proxy.at(0, fault)
    body = broken.get_object(Bucket=BUCKET, Key=key)["Body"]
    assert body.read(1000) == BODY[:1000]
    with pytest.raises(Exception, match=r"onnection|imeout|timed out|IncompleteRead"):
        body.read()


def test_a_flip_changes_one_bit_of_a_reply(broken, proxy, client):
    key = token_hex(6)
    client.put_object(Bucket=BUCKET, Key=key, Body=BODY)
    proxy.at(0, faults.flip())
    data = broken.get_object(Bucket=BUCKET, Key=key)["Body"]._raw_stream.read()
    changed = [i for i, (a, b) in enumerate(zip(data, BODY, strict=True)) if a != b]
    assert changed == [len(BODY) // 2]
    assert (data[changed[0]] ^ BODY[changed[0]]).bit_count() == 1


@contextmanager
def connection_to(url):
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    yield connection
    connection.close()


async def test_a_flip_changes_one_bit_of_a_request():
    async with RudeServer() as rude:
        with fault_proxy(rude.url) as proxy:
            proxy.at(0, faults.flip())
            reader_to = urlsplit(proxy.url)
            await _put(reader_to, b"0" * 100)
    assert rude.requests[0].body == b"0" * 50 + b"1" + b"0" * 49


async def test_a_throttle_and_a_delay_pass_everything():
    async with RudeServer() as rude:
        with fault_proxy(rude.url) as proxy:
            proxy.at(0, faults.throttle(2_000_000))
            proxy.at(1, faults.delay(0.01))
            await _put(urlsplit(proxy.url), BODY)
            await _put(urlsplit(proxy.url), BODY)
    assert [r.body for r in rude.requests] == [BODY, BODY]


async def _put(at, body):
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    writer.write(b"PUT /bucket/key HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert b" 200 " in await reader.readline()
    writer.close()


def test_an_error_can_come_in_the_body_of_a_success(proxy):
    proxy.at(0, faults.answer(200, "InternalError"))
    with connection_to(proxy.url) as connection:
        connection.request("POST", "/bucket/key?uploadId=1", body=b"<x/>")
        reply = connection.getresponse()
        assert reply.status == 200
        assert b"<Error><Code>InternalError</Code>" in reply.read()
    assert proxy.requests[0].operation == "CompleteMultipartUpload"
    assert proxy.requests[0].status is None


def test_something_else_can_happen_before_the_server_gets_a_request_and_when_it_has_answered(broken, proxy, client):
    key, seen = token_hex(6), []
    proxy.when(
        lambda r: r.operation == "PutObject",
        faults.call(lambda: seen.append(there(client, key)), is_carried_out=False),
    )
    broken.put_object(Bucket=BUCKET, Key=key, Body=BODY)
    proxy.when(
        lambda r: r.operation == "PutObject",
        faults.call(lambda: seen.append(there(client, key)), is_carried_out=True),
    )
    broken.put_object(Bucket=BUCKET, Key=key, Body=b"other")
    assert seen == [None, b"other"]


def test_requests_are_broken_so_many_times_and_others_are_asked_for_each(broken, proxy):
    key = token_hex(6)
    proxy.when(lambda r: r.key == key, faults.slow_down(), times=2)
    proxy.each(lambda r: faults.expired() if r.method == "DELETE" else None)
    for _ in range(2):
        with pytest.raises(Exception, match="SlowDown"):
            broken.put_object(Bucket=BUCKET, Key=key, Body=BODY)
    broken.put_object(Bucket=BUCKET, Key=key, Body=BODY)
    with pytest.raises(Exception, match="Expired"):
        broken.delete_object(Bucket=BUCKET, Key=key)
    proxy.clear()
    broken.delete_object(Bucket=BUCKET, Key=key)


def test_a_proxy_that_has_ended_serves_nobody(server):
    with fault_proxy(server.endpoint_url) as proxy:
        at = urlsplit(proxy.url)
        socket.create_connection((at.hostname, at.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((at.hostname, at.port))


# A training loop that meets them.


def save(url, s3, proxy, **more):
    writer = ObjectStoreWriter(url, **(s3 | {"endpoint_url": proxy.url, "retry_base_s": 0.001} | more))
    dcp.save({"weight": torch.arange(1000.0)}, storage_writer=writer, no_dist=True)


def loaded(url, s3):
    state = {"weight": torch.zeros(1000)}
    dcp.load(state, storage_reader=ObjectStoreReader(url, **s3), no_dist=True)
    return state["weight"]


def test_a_save_whose_commit_loses_its_reply_stands(proxy, root, s3):
    proxy.when(lambda r: r.key.endswith("manifest.json") and r.method == "PUT", faults.lose_reply())
    save(root, s3, proxy)
    assert torch.equal(loaded(root, s3), torch.arange(1000.0))


def test_a_save_that_is_not_done_in_time_is_broken_off_and_leaves_nothing(proxy, root, s3, client):
    proxy.each(lambda r: faults.slow_down() if r.method == "PUT" else None)
    with pytest.raises(CheckpointException, match=r"DeadlineError.*deadline_s=0\.5"):
        save(root, s3, proxy, deadline_s=0.5)
    assert client.list_objects_v2(Bucket=BUCKET, Prefix=root.removeprefix(f"s3://{BUCKET}/"))["KeyCount"] == 0
    proxy.clear()
    save(root, s3, proxy, deadline_s=60)


def test_the_shards_are_looked_at_within_the_deadline_too(proxy, root, s3, client):
    proxy.each(lambda r: faults.slow_down() if r.operation == "ListObjects" else None)
    with pytest.raises(CheckpointException, match=r"DeadlineError|SlowDown"):
        save(root, s3, proxy, deadline_s=0.5)
    keys = client.list_objects_v2(Bucket=BUCKET, Prefix=root.removeprefix(f"s3://{BUCKET}/")).get("Contents", [])
    assert not [found for found in keys if found["Key"].endswith("manifest.json")]


def test_a_shard_that_vanishes_before_the_commit_fails_the_save(proxy, root, s3, client):
    def vanish():
        for found in client.list_objects_v2(Bucket=BUCKET, Prefix=root.removeprefix(f"s3://{BUCKET}/"))["Contents"]:
            client.delete_object(Bucket=BUCKET, Key=found["Key"])

    proxy.when(lambda r: r.operation == "ListObjects", faults.call(vanish, is_carried_out=False))
    with pytest.raises(CheckpointException, match=r"not committed: .* was uploaded and is gone"):
        save(root, s3, proxy)
