"""Uploads in this process and in one of their own: what gets there, and what is left when they fail."""

import gc
import logging
import math
import os
import select
import signal
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, spawn
from pathlib import Path
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt import errors
from cloudckpt.dcp import Checkpointer, ObjectStoreReader, ObjectStoreWriter
from cloudckpt.dcp.staging import Stager
from cloudckpt.dcp.tensors import TensorSource
from cloudckpt.dcp.upload_process import ProcessUploader
from cloudckpt.dcp.uploading import HereUploader, UploadJob
from cloudckpt.engine import loop
from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.engine.deadline import Deadline
from cloudckpt.engine.framing import MIN_PART_SIZE, Item, plan_shards
from cloudckpt.engine.session import Session
from cloudckpt.engine.write import WriteOptions
from cloudckpt.extensions import AesGcm, BytePlane, ZStandard
from cloudckpt.layout import shard_key
from cloudckpt.safetensors_header import HeaderItem
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions, open_store
from cloudckpt.testing import fault_proxy, faults
from test_dcp import all_sorts, blank, equal

MIB = 1 << 20
KEYS = {"2026": bytes(range(32))}
OPTIONS = WriteOptions(part_size=MIN_PART_SIZE, max_inflight_nbytes=4 * MIN_PART_SIZE)
KINDS = ["here", "process"]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.fixture(scope="module")
def server(one_server):
    return one_server


@pytest.fixture(scope="module")
def stager():
    with Stager(share=True) as stager:
        yield stager


@pytest.fixture(scope="module")
def shared_uploader(stager):
    with ProcessUploader(stager) as uploader:
        yield uploader


@pytest.fixture(params=KINDS)
def uploader(request, shared_uploader):
    return HereUploader() if request.param == "here" else shared_uploader


@pytest.fixture
def process():
    with ProcessUploader() as uploader:
        yield uploader


@pytest.fixture
def proxy(server):
    with fault_proxy(server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def through(proxy, s3):
    """Options that lead to the server through the proxy."""
    return StoreOptions(s3=S3Options(**s3 | {"endpoint_url": proxy.url}))


def job_of(url, store, *, nbytes=12 * MIB, options=OPTIONS, cancellation=None, deadline_s=math.inf):
    """The upload of one tensor of bytes, in parts if it is large."""
    items = [Item(header=HeaderItem(name="w", dtype="U8", shape=(nbytes,), nbytes=nbytes), notes={})]
    plans = plan_shards(
        items,
        rank=0,
        frame_size=MIB,
        new_token=lambda: token_hex(16),
        key_of=lambda token: shard_key(token, "safetensors"),
    )
    return UploadJob(
        session=Session(url, store),
        options=options,
        deadline=Deadline(deadline_s),
        cancellation=cancellation or Cancellation(),
        plans=plans,
        items=items,
        sources=[TensorSource(torch.arange(nbytes, dtype=torch.uint8))],
    )


def keys_at(url, store):
    async def find():
        async with open_store(url, store) as there:
            return [o.key async for o in there.list_objects()], [u.key async for u in there.list_uploads()]

    return loop.run(find)


@contextmanager
def held(proxy, operation="UploadPart"):
    """Holds every request of a kind; yields an event that is set when the first has come."""
    arrived, opened = threading.Event(), threading.Event()

    def hold():
        arrived.set()
        assert opened.wait(60)

    proxy.when(lambda request: request.operation == operation, faults.call(hold, is_carried_out=False), times=1000)
    try:
        yield arrived
    finally:
        opened.set()


@contextmanager
def uploading(uploader, job, proxy):
    """Runs an upload beside, which is held; yields its future when it is under way."""
    with ThreadPoolExecutor(1) as beside, held(proxy) as arrived:
        future = beside.submit(uploader.upload, job)
        assert arrived.wait(60)
        yield future


@contextmanager
def fails_with(kind, match=""):
    with pytest.raises(CheckpointException) as e:
        yield
    ((failure, _),) = e.value.failures.values()
    assert type(failure) is kind, repr(failure)
    assert match in str(failure)


def has_ended(pid, timeout_s=60):
    """Whether a process that is no child of this one ends."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid):
    (line,) = [each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmRSS")]
    return int(line.split()[1]) << 10


def mapped(pid):
    """Bytes of each piece of torch's shared memory that a process maps."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "/torch_" in line:
            start, stop = line.split()[0].split("-")
            found.append(int(stop, 16) - int(start, 16))
    return found


def memory_files(pid):
    """Descriptors of torch's shared memory that a process holds: `mmap` keeps one for each."""
    return sum("/torch_" in os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd"))


def save(state, url, uploader, **more):
    dcp.save(state, storage_writer=ObjectStoreWriter(url, uploader=uploader, **more))


def loads_equal(state, url, **more):
    loaded = blank(state)
    dcp.load(loaded, storage_reader=ObjectStoreReader(url, **more))
    return equal(state, loaded)


# What gets there.


@pytest.mark.parametrize("is_staged", [False, True], ids=["as it is", "staged"])
@pytest.mark.parametrize(
    "extensions",
    [(), (BytePlane(), ZStandard(), AesGcm("2026", keys=KEYS))],
    ids=["plain", "with extensions"],
)
def test_what_is_uploaded_loads_equal(uploader, stager, root, s3, *, is_staged, extensions):
    state = all_sorts(3) | {"large": torch.randn(3_000_000)}
    keys = KEYS if extensions else None
    if is_staged:
        with stager.stage(state) as staged:
            save(staged.state_dict, root, uploader, part_size=MIN_PART_SIZE, extensions=extensions, **s3)
    else:
        save(state, root, uploader, part_size=MIN_PART_SIZE, extensions=extensions, **s3)
    assert loads_equal(state, root, keys=keys, **s3)


def test_one_that_has_nothing_to_upload_writes_nothing(uploader, tmp_path):
    job = job_of(f"file://{tmp_path}", StoreOptions())
    job = UploadJob(
        session=job.session,
        options=OPTIONS,
        deadline=job.deadline,
        cancellation=job.cancellation,
        plans=[],
        items=[],
        sources=[],
    )
    assert uploader.upload(job) == []
    assert os.listdir(tmp_path) == []


def test_saves_of_several_threads_are_uploaded_in_turn(uploader, root, store_options):
    with ThreadPoolExecutor(4) as beside:
        jobs = [job_of(f"{root}/{i}", store_options, nbytes=1000 + i) for i in range(8)]
        sizes = [written[0].shard.size for written in beside.map(uploader.upload, jobs)]
    assert [size - sizes[0] for size in sizes] == list(range(8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpointer_saves_behind_training(root, s3, kind):
    uploads = "thread" if kind == "here" else "process"
    given = {"w": torch.ones(1000), "step": 1}
    with Checkpointer(root, uploads=uploads, **s3) as checkpointer:
        for step in (1, 2):
            handle = checkpointer.async_save(step, given)
            given["w"] += 1
            assert handle.result().nbytes == 4000
        loaded = {"w": torch.zeros(1000), "step": 0}
        assert checkpointer.load(loaded) == 2
    assert torch.equal(loaded["w"], torch.full((1000,), 2.0))


def test_staged_tensors_are_sent_from_where_they_lie_and_all_others_are_copied(stager, tmp_path):
    large = {"large": torch.randn(4 * MIB), "note": "x"}
    with ProcessUploader(stager) as uploader, stager.stage(large) as staged:
        save(staged.state_dict, f"file://{tmp_path}/1", uploader)
        assert sum(mapped(uploader.pid)) < staged.nbytes + MIB
        save(large, f"file://{tmp_path}/2", uploader)
        assert sum(mapped(uploader.pid)) > 2 * staged.nbytes


def test_memory_that_is_gone_here_is_unmapped_there_before_more_is_taken(tmp_path):
    with Stager(share=True) as stager, ProcessUploader(stager) as uploader:
        for i, size in enumerate((1000, 8 * MIB)):
            with stager.stage({"w": torch.ones(size)}) as staged:
                before = mapped(uploader.pid) if i else []
                save(staged.state_dict, f"file://{tmp_path}/{i}", uploader)
                del staged
        stager.close()
        gc.collect()
        save({"w": torch.ones(10)}, f"file://{tmp_path}/2", uploader)
        assert len(before) <= 1
        assert sum(mapped(uploader.pid)) < MIB
        assert memory_files(uploader.pid) <= len(mapped(uploader.pid))


def test_where_torch_shares_by_name_everything_is_copied_and_nothing_moves(tmp_path):
    script = f"""
import torch, torch.distributed.checkpoint as dcp
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.dcp.staging import Stager
from cloudckpt.dcp.upload_process import ProcessUploader
torch.multiprocessing.set_sharing_strategy("file_system")
with Stager(share=True) as stager, ProcessUploader(stager) as uploader:
    with stager.stage({{"w": torch.arange(1000)}}) as staged:
        address = staged.state_dict["w"].data_ptr()
        for i in range(2):
            url = f"file://{tmp_path}/{{i}}"
            dcp.save(staged.state_dict, storage_writer=ObjectStoreWriter(url, uploader=uploader))
            loaded = {{"w": torch.zeros(1000, dtype=torch.int64)}}
            dcp.load(loaded, storage_reader=ObjectStoreReader(url))
            assert torch.equal(loaded["w"], torch.arange(1000))
        assert torch.equal(staged.state_dict["w"], torch.arange(1000))
        print(staged.state_dict["w"].data_ptr() == address)
"""
    assert python(script).stdout.split() == ["True"]


def python(script, **more):
    command = [sys.executable, "-W", "ignore", "-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, **more)


def test_log_records_of_the_process_come_out_here(process, proxy, through, root, caplog):
    proxy.when(lambda request: request.operation == "PutObject", faults.slow_down())
    with caplog.at_level(logging.WARNING, "cloudckpt"):
        process.upload(job_of(root, through, nbytes=1000))
    assert any("SlowDown" in record.getMessage() for record in caplog.records)
    assert not [record for record in caplog.records if record.levelno < logging.WARNING]


def test_the_process_runs_nothing_of_the_script_and_is_nice(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(f"""
import os, torch, torch.distributed.checkpoint as dcp
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.dcp.upload_process import ProcessUploader
print("script", flush=True)
uploader = ProcessUploader(niceness=7)
dcp.save({{"w": torch.ones(3)}}, storage_writer=ObjectStoreWriter("file://{tmp_path}/1", uploader=uploader))
print(os.getpriority(os.PRIO_PROCESS, uploader.pid) - os.getpriority(os.PRIO_PROCESS, 0), uploader.pid)
""")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    first, niceness, pid = ended.stdout.split()
    assert (first, niceness) == ("script", "7")
    assert has_ended(int(pid))
    assert loads_equal({"w": torch.ones(3)}, f"file://{tmp_path}/1")


# What fails.


def test_a_bucket_that_is_not_there_is_the_same_error_from_both(uploader, store_options):
    with pytest.raises(errors.BucketNotFoundError, match="nowhere"):
        uploader.upload(job_of("s3://nowhere/run", store_options))


def test_what_takes_too_long_is_broken_off_and_leaves_nothing(uploader, proxy, through, root, store_options):
    with ThreadPoolExecutor(1) as beside, held(proxy):
        future = beside.submit(uploader.upload, job_of(root, through, deadline_s=1.5))
        with pytest.raises(errors.DeadlineError, match=r"deadline_s=1\.5"):
            future.result()
        assert keys_at(root, store_options) == ([], [])


def test_one_cancelled_before_it_begins_asks_the_store_for_nothing(uploader, proxy, through, root):
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(errors.SaveCancelledError):
        uploader.upload(job_of(root, through, cancellation=cancellation))
    assert proxy.requests == []


def test_one_cancelled_on_its_way_leaves_nothing(uploader, proxy, through, root, store_options):
    cancellation = Cancellation()
    with uploading(uploader, job_of(root, through, cancellation=cancellation), proxy) as future:
        cancellation.cancel()
        with pytest.raises(errors.SaveCancelledError):
            future.result()
        assert keys_at(root, store_options) == ([], [])
    proxy.clear()
    assert len(uploader.upload(job_of(root, through))) == 1


def test_an_interrupt_of_the_caller_waits_for_the_clean_up(uploader, proxy, through, root, store_options):
    pid = getattr(uploader, "pid", None)
    with held(proxy) as arrived:

        def interrupt():
            assert arrived.wait(60)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            uploader.upload(job_of(root, through))
        thread.join()
        assert keys_at(root, store_options) == ([], [])
    proxy.clear()
    assert len(uploader.upload(job_of(root, through))) == 1
    assert getattr(uploader, "pid", None) == pid


def test_a_process_that_is_killed_fails_the_upload_at_once_and_is_replaced(
    process, proxy, through, root, store_options
):
    with uploading(process, job_of(root, through), proxy) as future:
        killed = process.pid
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(errors.SaveFailedError, match=rf"pid {killed}\) was killed by SIGKILL .*out of memory"):
            future.result()
        assert keys_at(root, store_options) == ([], [])
    proxy.clear()
    assert len(process.upload(job_of(root, through))) == 1
    assert process.pid != killed


def test_a_process_that_died_between_uploads_is_replaced(process, tmp_path):
    process.upload(job_of(f"file://{tmp_path}/1", StoreOptions()))
    killed = process.pid
    os.kill(killed, signal.SIGKILL)
    assert has_ended(killed)
    assert len(process.upload(job_of(f"file://{tmp_path}/2", StoreOptions()))) == 1
    assert process.pid != killed


def test_signals_that_end_training_are_left_to_training(process, proxy, through, root):
    with uploading(process, job_of(root, through), proxy) as future:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.pid, number)
    assert len(future.result()) == 1


def test_when_training_is_killed_the_process_cleans_up_and_ends(proxy, through, root, s3, store_options):
    script = f"""
import torch, torch.distributed.checkpoint as dcp
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.dcp.upload_process import ProcessUploader
uploader = ProcessUploader()
uploader.start()
print(uploader.pid, flush=True)
s3 = {s3 | {"endpoint_url": proxy.url}}
writer = ObjectStoreWriter({root!r}, uploader=uploader, part_size={MIN_PART_SIZE}, **s3)
dcp.save({{"w": torch.ones(3 << 20)}}, storage_writer=writer)
"""
    with held(proxy) as arrived:
        training = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, text=True)
        pid = int(training.stdout.readline())
        assert arrived.wait(60)
        assert keys_at(root, store_options)[1] != []
        training.kill()
        training.communicate()
        assert has_ended(pid)
        assert keys_at(root, store_options) == ([], [])


@pytest.fixture
def interpreter(tmp_path):
    """Has processes started as a shell script that is given."""
    before = spawn.get_executable()

    def start_as(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        spawn.set_executable(str(path))

    yield start_as
    spawn.set_executable(before)


def test_a_process_that_cannot_start_says_how_it_ended(process, interpreter, tmp_path):
    interpreter("exit 7")
    with pytest.raises(errors.SaveFailedError, match="ended with exit code 7"):
        process.upload(job_of(f"file://{tmp_path}/1", StoreOptions()))


def test_a_process_that_hangs_as_it_starts_is_killed(interpreter, tmp_path):
    interpreter("exec sleep 600")
    with ProcessUploader(start_timeout_s=0.5) as process:
        process.start()
        pid = process.pid
        with pytest.raises(errors.SaveFailedError, match=r"did not start within 0\.5 s"):
            process.upload(job_of(f"file://{tmp_path}/1", StoreOptions()))
    assert has_ended(pid)


def test_memory_urls_are_refused_by_a_process(process):
    with pytest.raises(errors.UsageError, match="memory of this process"):
        process.upload(job_of(f"memory://{token_hex(6)}/run", StoreOptions()))


def test_one_that_was_closed_refuses_to_upload(process, tmp_path):
    process.upload(job_of(f"file://{tmp_path}/1", StoreOptions()))
    pid = process.pid
    process.close()
    process.close()
    assert has_ended(pid)
    with pytest.raises(errors.UsageError, match="closed"):
        process.upload(job_of(f"file://{tmp_path}/2", StoreOptions()))


def test_options_that_do_not_pickle_are_refused_here(process, root):
    store = StoreOptions(s3=S3Options(credentials=lambda: None))
    with pytest.raises(errors.UsageError, match=r"cannot be sent to its process.*lambda"):
        process.upload(job_of(root, store))


def test_options_that_cannot_be_imported_there_are_refused_by_name(process, root):
    module = types.ModuleType("known_here_only")
    exec("def credentials():\n    pass", module.__dict__)
    sys.modules[module.__name__] = module
    try:
        store = StoreOptions(s3=S3Options(credentials=module.credentials))
        with pytest.raises(errors.UsageError, match=r"known_here_only.*module that can be imported"):
            process.upload(job_of(root, store))
    finally:
        del sys.modules[module.__name__]


class UnreadableError(Exception):
    """Pickles, and cannot be unpickled."""

    def __init__(self, first, second):
        super().__init__(first)


class Failing(ZStandard):
    """Fails where it transforms."""

    def start_shard(self):
        raise UnreadableError("no good", 2)


def test_an_error_that_cannot_be_sent_is_told_by_name_with_its_trace(process, root, s3):
    writer = ObjectStoreWriter(root, uploader=process, extensions=[Failing()], **s3)
    with pytest.raises(CheckpointException) as e:
        dcp.save({"w": torch.ones(1000)}, storage_writer=writer)
    failure, _ = e.value.failures[0]
    assert type(failure) is errors.SaveFailedError
    assert "UnreadableError: no good" in str(failure)
    assert any("start_shard" in note for note in failure.__notes__)


# What stays.


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_uploads_grow_no_memory_and_no_descriptors(kind, tmp_path):
    state = {"w": torch.randn(1000, 50), "b": torch.randn(77).t(), "step": 3}

    def held_by(pid):
        gc.collect()
        return resident(pid), descriptors(pid)

    with Stager(share=True) as stager, ProcessUploader(stager) as process:
        uploader = HereUploader() if kind == "here" else process
        for i in range(130):
            with stager.stage(state) as staged:
                save(staged.state_dict, f"file://{tmp_path}", uploader, overwrite=True)
            if i == 29:
                pids = [os.getpid(), *([process.pid] if process.pid else [])]
                before = [held_by(pid) for pid in pids]
        after = [held_by(pid) for pid in pids]
    for (nbytes, files), (nbytes_then, files_then) in zip(after, before, strict=True):
        assert files <= files_then
        assert nbytes < nbytes_then + 4 * MIB


def in_a_fork(uploader, url, parents):
    with uploader:
        save({"w": torch.ones(5)}, url, uploader)
        assert uploader.pid != parents


def test_a_fork_starts_a_process_of_its_own(process, tmp_path):
    save({"w": torch.ones(3)}, f"file://{tmp_path}/1", process)
    pid = process.pid
    fork = get_context("fork").Process(target=in_a_fork, args=(process, f"file://{tmp_path}/2", pid))
    fork.start()
    fork.join()
    assert fork.exitcode == 0
    save({"w": torch.ones(3)}, f"file://{tmp_path}/3", process)
    assert process.pid == pid
    assert loads_equal({"w": torch.ones(5)}, f"file://{tmp_path}/2")


def test_one_that_is_let_go_ends_its_process(tmp_path):
    uploader = ProcessUploader()
    uploader.upload(job_of(f"file://{tmp_path}/1", StoreOptions()))
    pid = uploader.pid
    del uploader
    gc.collect()
    assert has_ended(pid)
