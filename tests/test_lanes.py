"""Bytes that move over several event loops."""

import subprocess
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.engine.lanes import other_lanes
from cloudckpt.engine.session import Session
from cloudckpt.errors import ObjectNotFoundError
from cloudckpt.ranges import Range
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.store.retry import RetryingStore, RetryOptions
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.traffic import Traffic, TrafficOptions
from cloudckpt.store.url import StoreOptions
from cloudckpt.testing import RecordingStore

MIB = 1 << 20


def test_a_checkpoint_goes_up_and_comes_down_over_all_of_them(server, s3, root):
    state = {f"layers.{i}": torch.randn(MIB) for i in range(12)}
    dcp.save(state, storage_writer=ObjectStoreWriter(root, lanes=3, **s3), no_dist=True)
    found = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    dcp.load(found, storage_reader=ObjectStoreReader(root, lanes=3, **s3), no_dist=True)
    assert all(torch.equal(found[key], state[key]) for key in state)
    assert len(loop.threads(1)) >= 3


def session_of(s3, root, lanes=2):
    once = RetryOptions(retry_deadline_s=0)
    return Session(root, StoreOptions(s3=S3Options(**s3), retry=once, traffic=TrafficOptions(lanes=lanes)))


async def test_there_is_a_way_for_each_loop_beside_the_first():
    s3, files = "s3://bucket/run", "file:///tmp/run"
    for url, lanes, expected in ((s3, 1, 0), (s3, 2, 1), (s3, 4, 3), (files, 4, 0)):
        async with other_lanes(url, StoreOptions(traffic=TrafficOptions(lanes=lanes))) as ways:
            assert len(ways) == expected


async def test_ways_to_a_store_take_turns():
    memory = MemoryStore("tests", "", Bucket())
    await memory.put("k", [memoryview(bytes(4 * MIB))])
    ways = [RecordingStore(memory) for _ in range(3)]
    store = RetryingStore(ways[0], RetryOptions(), Traffic(TrafficOptions(), most=8), ways[1:])
    for _ in range(6):
        await store.get_range("k", Range(0, 4 * MIB), [memoryview(bytearray(4 * MIB))])
    assert [len(way.requests) for way in ways] == [2, 2, 2]


async def test_few_bytes_stay_on_the_first():
    memory = MemoryStore("tests", "", Bucket())
    await memory.put("k", [memoryview(b"hello")])
    ways = [RecordingStore(memory) for _ in range(3)]
    store = RetryingStore(ways[0], RetryOptions(), Traffic(TrafficOptions(), most=8), ways[1:])
    for _ in range(3):
        await store.get_range("k", Range(0, 5), [memoryview(bytearray(5))])
    assert [len(way.requests) for way in ways] == [3, 0, 0]


def test_an_error_from_another_loop_is_the_one_that_it_would_be_here(server, s3, root):
    async def action(store):
        for _ in range(2):  # one of them is the other's
            with pytest.raises(ObjectNotFoundError):
                await store.get_range("nothing", Range(0, 4 * MIB), [memoryview(bytearray(4 * MIB))])

    with session_of(s3, root) as session:
        session.run(action)


def test_nothing_is_left_open_at_the_end_of_a_script(server, s3, root):
    script = f"""
import torch, torch.distributed.checkpoint as dcp
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
state = {{f"l.{{i}}": torch.randn(1 << 20) for i in range(12)}}
dcp.save(state, storage_writer=ObjectStoreWriter({root!r}, lanes=3, **{s3!r}), no_dist=True)
dcp.load(state, storage_reader=ObjectStoreReader({root!r}, lanes=3, **{s3!r}), no_dist=True)
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", script], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0
    assert "Unclosed" not in ended.stderr
    assert "ResourceWarning" not in ended.stderr


def test_all_requests_of_a_call_go_to_one_server_whatever_the_environment_becomes(server, s3, root, monkeypatch):
    data = bytes(4 * MIB)
    named = {key: value for key, value in s3.items() if key != "endpoint_url"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3["endpoint_url"])

    async def action(store):
        await store.put("k", [memoryview(data)])
        outs = [memoryview(bytearray(len(data))) for _ in range(4)]
        for n, out in enumerate(outs):
            if n == 2:  # both ways were used by then
                monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            await store.get_range("k", Range(0, len(data)), [out])
        return outs

    with session_of(named, root) as session:
        assert all(out == data for out in session.run(action))
