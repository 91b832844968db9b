"""Traces of saves and loads: what they hold, where they lie, and that nothing fails for them."""

import json
import logging
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import cloudckpt
from cloudckpt.dcp import Checkpointer, ObjectStoreReader, ObjectStoreWriter
from cloudckpt.dcp.hooks import WriterHook
from cloudckpt.engine import loop
from cloudckpt.engine.framing import MIN_PART_SIZE
from cloudckpt.engine.traces import check_place
from cloudckpt.engine.tracing import FETCH, PLACE, UPLOAD, Event, Outcome, Recorder, encode
from cloudckpt.engine.write import ShardWriter, WriteOptions
from cloudckpt.errors import UsageError
from cloudckpt.extensions import BytePlane, ZStandard
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.store.url import open_store
from cloudckpt.testing import RecordingStore, remove_all
from test_write import CopiedSource, plans_of

ZSTD = {"w": [BytePlane(), ZStandard()], "*": []}
KINDS = {"plain": {}, "frames": {"extensions": ZSTD}}


@pytest.fixture
def root():
    return f"memory://{token_hex(6)}"


def state(value=1.0):
    return {"w": torch.full((3 << 20,), value), "b": torch.arange(5), "lr": 0.1}


def trace_at(url):
    async def get():
        place, _, key = url.rpartition("/")
        async with open_store(place) as store:
            return json.loads((await store.get(key)).data)

    return loop.run(get)


def keys_below(url):
    async def find():
        async with open_store(url) as store:
            return [found.key async for found in store.list_objects("")]

    return loop.run(find)


def events_of(trace, what=None):
    return [e for e in trace["traceEvents"] if e["ph"] == "X" and what in (None, e["name"])]


def nbytes_of(trace, what):
    return sum(e["args"]["nbytes"] for e in events_of(trace, what))


def lanes_overlap(trace):
    ends = {}
    for event in sorted(events_of(trace), key=lambda e: e["ts"]):
        if event["ts"] < ends.get(event["tid"], 0):
            return True
        ends[event["tid"]] = event["ts"] + event["dur"]
    return False


def writer_of_a_rank(writer, *, is_coordinator):
    """Has the writer upload, as DCP does on a rank."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state(), writer.storage_meta(), is_coordinator)
    writer.set_up_storage_writer(is_coordinator)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    (plan,), _ = planner.create_global_plan([plan])
    writer.write_data(planner.finish_plan(plan), planner).wait()


TIMES = st.tuples(st.sampled_from([UPLOAD, FETCH, PLACE]), st.integers(0, 50), st.integers(0, 20))


@given(st.lists(TIMES, max_size=30))
def test_events_of_one_lane_do_not_overlap_and_all_are_there(given_events):
    events = [Event(what, 1e9 + began, seconds, began, "") for what, began, seconds in given_events]
    trace = json.loads(encode(Outcome(kind="load", url="s3://b/c", rank=3), events, host="h", writer="w"))
    assert not lanes_overlap(trace)
    shown = [(e["name"], e["ts"], e["dur"], e["args"]["nbytes"]) for e in events_of(trace)]
    assert sorted(shown) == sorted((e.what, e.began * 1e6, e.seconds * 1e6, e.nbytes) for e in events)
    assert {e["pid"] for e in trace["traceEvents"]} == {3}
    kinds = {(e["tid"], e["name"]) for e in events_of(trace)}
    assert len({tid for tid, _ in kinds}) == len(kinds)  # no lane is shared by two kinds


@pytest.mark.parametrize("kind", KINDS)
def test_a_save_leaves_a_trace_of_all_that_it_uploaded(root, kind):
    writer = ObjectStoreWriter(f"{root}/step-7", trace=f"{root}/traces", part_size=MIN_PART_SIZE, **KINDS[kind])
    dcp.save(state(), storage_writer=writer)
    trace = trace_at(f"{root}/traces/step-7/save-0.json")
    with cloudckpt.open(f"{root}/step-7") as saved:
        summary = saved.summary
    assert nbytes_of(trace, "upload") == summary.stored_nbytes == writer.stats.stored_nbytes
    assert len(events_of(trace, "upload")) == writer.stats.requests
    worked = {"plain": ("stage", summary.stored_nbytes), "frames": ("transform", 12 << 20)}[kind]
    assert nbytes_of(trace, worked[0]) == worked[1]
    assert {e["name"] for e in events_of(trace)} >= {"plan", "stage", "upload", "commit"}
    assert not lanes_overlap(trace)
    told = trace["otherData"]
    assert told["save_id"] == summary.save_id
    assert (told["kind"], told["url"], told["rank"], told["world_size"]) == ("save", f"{root}/step-7", 0, 1)
    assert (told["nbytes"], told["stored_nbytes"]) == (summary.nbytes, summary.stored_nbytes)
    assert told["writer"].startswith("cloudckpt ")
    assert sorted(keys_below(f"{root}/step-7")) == sorted(
        ["manifest.json", *{e["args"]["key"] for e in events_of(trace, "upload")}]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_leaves_a_trace_of_all_that_it_fetched(root, kind):
    dcp.save(state(), storage_writer=ObjectStoreWriter(f"{root}/step-7", **KINDS[kind]))
    reader, found = ObjectStoreReader(f"{root}/step-7", trace=f"{root}/traces"), state(0.0)
    dcp.load(found, storage_reader=reader)
    assert torch.equal(found["w"], state()["w"])
    trace = trace_at(f"{root}/traces/step-7/load-0.json")
    stats = reader.stats
    assert (len(events_of(trace, "fetch")), nbytes_of(trace, "fetch")) == (stats.requests, stats.bytes_fetched)
    assert nbytes_of(trace, "restore") + nbytes_of(trace, "place") == stats.bytes_fetched
    assert bool(nbytes_of(trace, "restore")) == (kind == "frames")
    assert trace["otherData"]["nbytes"] == stats.bytes_needed
    assert len(events_of(trace, "plan")) == 2
    assert not lanes_overlap(trace)
    spent = {what: sum(e["dur"] for e in events_of(trace, what)) for what in ("fetch", "restore", "place")}
    told = {"fetch": stats.fetch_s, "restore": stats.restore_s, "place": stats.place_s}
    assert all(abs(spent[what] / 1e6 - told[what]) < 1e-4 for what in spent)


def test_events_of_an_upload_process_come_home(tmp_path):
    with Checkpointer(f"file://{tmp_path}/run", uploads="process", trace=f"file://{tmp_path}/traces") as checkpointer:
        saved = checkpointer.async_save(3, state()).result()
    trace = trace_at(f"file://{tmp_path}/traces/step-3/save-0.json")
    assert nbytes_of(trace, "upload") == saved.stored_nbytes == saved.stats.stored_nbytes
    assert len(events_of(trace, "upload")) == saved.stats.requests
    staging = max(e["dur"] for e in events_of(trace, "stage"))
    assert sum(e["dur"] for e in events_of(trace, "stage") if "key" not in e["args"]) <= staging * 1.001
    began = {what: min(e["ts"] for e in events_of(trace, what)) for what in ("stage", "upload", "commit")}
    assert began["stage"] < began["upload"] < began["commit"]


def test_a_rank_that_does_not_commit_leaves_its_own_when_its_upload_is_over(root):
    writer = ObjectStoreWriter(f"{root}/step-7", trace=f"{root}/traces")
    writer_of_a_rank(writer, is_coordinator=False)
    told = trace_at(f"{root}/traces/step-7/save-0.json")["otherData"]
    assert "save_id" not in told
    assert told["stored_nbytes"] == writer.stats.stored_nbytes > 0


def test_what_is_opened_leaves_one_trace_of_all_reads_when_it_is_closed(root):
    dcp.save(state(), storage_writer=ObjectStoreWriter(f"{root}/step-7"))
    with cloudckpt.open(f"{root}/step-7", trace=f"{root}/traces"):
        pass
    assert keys_below(f"{root}/traces") == []
    with cloudckpt.open(f"{root}/step-7", trace=f"{root}/traces") as opened:
        assert opened["w"][5:7].tolist() == [1.0, 1.0]
        assert opened["b"][1:3].tolist() == [1, 2]
        opened.close()
        trace = trace_at(f"{root}/traces/step-7/load-0.json")
        remove_all(f"{root}/traces")
    assert keys_below(f"{root}/traces") == []  # closed again, it tells nothing again
    assert [e["args"]["nbytes"] for e in events_of(trace, "fetch")] == [8, 16]


def test_the_trace_of_a_save_that_failed_says_so(root):
    class Refusing(WriterHook):
        def pre_commit(self, info):
            msg = "the loss is nan"
            raise ValueError(msg)

    writer = ObjectStoreWriter(f"{root}/step-7", trace=f"{root}/traces", hooks=[Refusing()])
    with pytest.raises(CheckpointException, match="nan"):
        dcp.save(state(), storage_writer=writer)
    trace = trace_at(f"{root}/traces/step-7/save-0.json")
    assert trace["otherData"]["error"] == "SaveFailedError"
    assert nbytes_of(trace, "upload") > 0


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("s3://b/run", "s3://b/run/step-7"),
        ("s3://b/run/", "s3://b/run/step-7"),
        ("s3://b/run/step-7", "s3://b/run/step-7"),
        ("s3://b/run/step-7/traces", "s3://b/run/step-7"),
        ("s3://b", "s3://b"),
        ("s3://b/t", "s3://b"),
        ("file:///a//c", "file:///a/c/step-7"),
        ("file:///a/%63", "file:///a/c/step-7"),
    ],
)
def test_traces_below_the_checkpoint_are_refused(place, url):
    with pytest.raises(UsageError, match="beside the checkpoints"):
        check_place(place, url)


@pytest.mark.parametrize(
    "place", [None, "s3://b", "s3://c/run", "s3://b/run/traces", "s3://b/run/step", "file:///run"]
)
def test_traces_elsewhere_are_not(place):
    check_place(place, "s3://b/run/step-7")


def test_such_a_save_and_load_are_refused_before_anything_is_written_or_read(root):
    with pytest.raises(CheckpointException, match="beside the checkpoints"):
        dcp.save(state(), storage_writer=ObjectStoreWriter(f"{root}/step-7", trace=root))
    assert keys_below(root) == []
    dcp.save(state(), storage_writer=ObjectStoreWriter(f"{root}/step-7"))
    with pytest.raises(UsageError, match="beside the checkpoints"):
        cloudckpt.open(f"{root}/step-7", trace=root)
    with pytest.raises(UsageError, match="no store serves"):
        WriteOptions(trace="gopher://elsewhere")


def test_a_place_that_takes_nothing_costs_a_warning_and_no_more(root, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    place = f"file://{tmp_path}/file"
    dcp.save(state(), storage_writer=ObjectStoreWriter(f"{root}/step-7", trace=place))
    found = state(0.0)
    dcp.load(found, storage_reader=ObjectStoreReader(f"{root}/step-7", trace=place))
    assert torch.equal(found["w"], state()["w"])
    warned = [r.message for r in caplog.records if r.levelno == logging.WARNING and "trace of the" in r.message]
    assert [message.split(" could not")[0] for message in warned] == [
        f"the trace of the save of {root}/step-7",
        f"the trace of the load of {root}/step-7",
    ]


def test_every_request_of_an_upload_in_parts_is_counted_and_no_event_is_kept_unless_asked():
    store = RecordingStore(MemoryStore("tests", "", Bucket()))
    data = bytes(3 * MIN_PART_SIZE + 5)
    (plan,) = plans_of([len(data)])
    recorder = Recorder()
    options = WriteOptions(part_size=MIN_PART_SIZE, max_inflight_nbytes=4 * MIN_PART_SIZE)

    loop.run(lambda: ShardWriter(store, options, recorder).write([plan], [], [CopiedSource(data)]))
    assert recorder.tally(UPLOAD).count == len(store.requests) > 3
    assert recorder.tally(UPLOAD).nbytes == plan.size
    assert recorder.events() == []
