"""The benchmark's null server: serves what was put, at the pace it was told."""

import os
import subprocess
import sys
import urllib.request

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cloudckpt.cli.bench import workloads
from cloudckpt.cli.bench.contenders import Prepares, all_contenders
from cloudckpt.cli.bench.null_objects import PERIOD, NullObjects
from cloudckpt.cli.bench.null_process import KINDS, serving
from cloudckpt.cli.bench.null_server import Pace
from cloudckpt.cli.bench.workloads import Workload
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions

SCHEMES = ("null", "null-tls")


@pytest.fixture(scope="module", params=SCHEMES)
def address(request):
    with serving(KINDS[request.param]) as address, pytest.MonkeyPatch.context() as patch:
        for name, value in address.environ.items():
            patch.setenv(name, value)
        yield address


@pytest.fixture
def store(address):
    return StoreOptions(s3=S3Options(ca_bundle=address.ca_file))


def periodic(nbytes, tensors=1):
    return Workload(name="w", nbytes=nbytes, tensors=tensors, period=PERIOD, rounds=1, contenders=())


@pytest.mark.parametrize(("nbytes", "tensors"), [(8 << 10, 2), (96 << 20, 3)], ids=["small", "large"])
def test_a_state_dict_that_repeats_itself_comes_back_whole(store, tmp_path, nbytes, tensors):
    state = workloads.make_state(periodic(nbytes, tensors))
    saved = workloads.fingerprint(state)
    url = f"s3://bench/{tmp_path.name}"
    dcp.save(state, storage_writer=ObjectStoreWriter(url, store=store), no_dist=True)
    workloads.clear(state)
    dcp.load(state, storage_reader=ObjectStoreReader(url, store=store), no_dist=True)
    assert workloads.fingerprint(state) == saved


@pytest.mark.parametrize("name", workloads.RAW)
def test_each_raw_reference_gets_back_the_bytes_that_it_put(address, tmp_path, name):
    contender = all_contenders("path", folder=str(tmp_path))[name]
    assert isinstance(contender, Prepares)
    state = workloads.make_state(periodic(80 << 20), is_flat=True)
    put = workloads.fingerprint(state)
    url = f"s3://bench/{tmp_path.name}"
    try:
        contender.prepare("save", state, url)
        contender.save(state, url)
        workloads.clear(state)
        contender.prepare("load", state, url)
        contender.load(state, url)
    finally:
        contender.close()
    assert workloads.fingerprint(state) == put


def test_the_server_ends_with_its_context():
    with serving(KINDS["null"]) as address:
        url = address.url
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url)


def test_the_server_ends_with_a_process_that_was_killed():
    script = (
        "import os, signal\nfrom cloudckpt.cli.bench.null_process import KINDS, serving\n"
        "if __name__ == '__main__':\n"
        "    with serving(KINDS['null']) as address:\n"
        "        print(address.url, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    # the server holds the pipes that run() waits for: it is gone by now
    assert ended.returncode == -9
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(ended.stdout.strip())


def test_what_is_not_kept_repeats_the_last_period_that_is():
    objects = NullObjects()
    objects.put("/b/k", 8 << 20, os.urandom(objects.most_kept - PERIOD) + bytes(range(256)) * 4)
    found = objects.find("/b/k")
    at = objects.most_kept + 3 * PERIOD + 7
    offset = found.offset_in_rest(at)
    assert found.rest[offset] == 7
    assert found.rest[offset + PERIOD] == 7


def test_a_paced_connection_waits_for_as_long_as_its_bytes_take():
    pace = Pace(100.0)
    pace.begin(10.0)
    assert pace.spend(50, 10.0) == pytest.approx(0.5)
    assert pace.spend(50, 10.5) == pytest.approx(0.5)


def test_what_a_paced_connection_overslept_is_made_up_for_but_not_what_it_was_idle():
    pace = Pace(100.0)
    pace.begin(0.0)
    pace.spend(10, 0.0)
    assert pace.spend(10, 0.12) == pytest.approx(0.08)  # 20 ms late
    assert pace.spend(10, 5.0) == pytest.approx(0.05)  # 4.8 s late, of which 50 ms count
    pace.begin(9.0)
    assert pace.spend(10, 9.0) == pytest.approx(0.1)


def test_a_connection_without_a_rate_never_waits():
    pace = Pace(None)
    pace.begin(0.0)
    assert pace.spend(1 << 30, 0.0) == 0


def test_a_state_dict_that_cannot_repeat_itself_is_refused():
    workload = Workload(name="w", kind="adam", nbytes=1 << 20, period=PERIOD, rounds=1, contenders=())
    with pytest.raises(ValueError, match="not a multiple"):
        workloads.make_state(workload)


@pytest.mark.parametrize("kind", ["uniform", "adam", "lora"])
def test_a_flat_state_dict_has_as_many_bytes_as_the_one_it_stands_for(kind):
    workload = Workload(name="w", kind=kind, nbytes=24 << 20, tensors=3, rounds=1, contenders=())
    full, flat = workloads.make_state(workload), workloads.make_state(workload, is_flat=True)
    nbytes = sum(tensor.nbytes for tensor in workloads.all_tensors(full))
    assert [tensor.nbytes for tensor in workloads.all_tensors(flat)] == [nbytes]
    assert all(torch.isfinite(tensor).all() for tensor in workloads.all_tensors(full))
