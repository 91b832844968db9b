"""Torch's own `dcp.async_save` through our storage, by its thread and by its process, on ranks under torchrun.

The cases of ranks are in `async_ranks.py`.
"""

import json
import os
import pickle
import subprocess
import sys
from base64 import b64encode
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import async_ranks
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.dcp.hooks import WriterHook
from cloudckpt.dcp.upload_process import ProcessUploader
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.write import WriteOptions
from cloudckpt.extensions import AesGcm, BytePlane, ZStandard
from cloudckpt.extensions.keys import KeysFromEnvironment, KeysFromFile, LocalKeys
from cloudckpt.store.s3_options import Credentials
from conftest import s3_of
from test_ranks import breaking_url  # noqa: F401 - a fixture

CASES = [
    "a_thread_commits_what_was_staged",
    "a_process_commits_what_was_staged",
    "one_writer_saves_again_and_again",
    "stagers_of_torch_are_taken",
    "extensions_and_keys_go_to_torchs_process",
    "an_upload_process_works_under_both",
    "a_failure_is_told_by_the_future_as_ours",
    "an_upload_that_is_refused_leaves_nothing",
]
KEY = bytes(range(32))


def run_ranks(count, folder, config):
    """Runs all cases on ``count`` ranks; returns what became of each, and what was printed."""
    out = folder / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [async_ranks.__file__, str(out), json.dumps(config), *CASES]
    quick = os.environ | {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1"}  # torch looks up the name of each peer
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=quick)
    return json.loads(out.read_text()) if out.exists() else {}, ended.stderr[-5000:]


@pytest.fixture(scope="module")
def server(one_server):
    return one_server


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def told(request, server, breaking_url, tmp_path_factory):  # noqa: F811
    config = {"url": f"s3://checkpoints/async-{token_hex(4)}", "s3": s3_of(server), "breaking_url": breaking_url}
    return run_ranks(request.param, tmp_path_factory.mktemp("ranks"), config)


@pytest.mark.parametrize("case", CASES)
def test_ranks(told, case):
    outcomes, printed = told
    assert outcomes.get(case, printed) is None, outcomes.get(case, printed)


# What goes to another process.


class Noting(WriterHook):
    """Does nothing, in any process."""


@dataclass(frozen=True)
class Given:
    """Gives credentials, in any process."""

    access_key_id: str
    secret_access_key: str

    def __call__(self):
        return Credentials(access_key_id=self.access_key_id, secret_access_key=self.secret_access_key)


def renamed(key):
    return key


@pytest.fixture(scope="module")
def spawned():
    """Calls a function in a process in which nothing of this one is known."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(60)


def saved_there(writer, url, state):
    dcp.save(state, storage_writer=writer, checkpoint_id=url, no_dist=True)


def loaded_there(reader, url, state):
    dcp.load(state, storage_reader=reader, checkpoint_id=url, no_dist=True)
    return state


KEYS = {
    "a mapping": {"2026": KEY},
    "a file": lambda folder: KeysFromFile(folder / "keys.json"),
    "a provider": lambda folder: LocalKeys(KeysFromFile(folder / "keys.json")),
}
WRITERS = {
    "plain": {},
    "options": {"options": WriteOptions(part_size=6 << 20, deadline_s=60), "checksum": None},
    "extensions": {"extensions": [BytePlane(), ZStandard()]},
    "patterns": {"extensions": {"w": [ZStandard(level=3)], "*": []}},
    "hooks": {"hooks": [Noting()]},
    "what is told": {"metadata": {"a": [1]}, "metrics": {"loss": 0.5}, "step": 3, "inline_values": True},
    "an upload process": {"uploader": ProcessUploader(niceness=1)},
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_writer_works_in_another_process_before_and_after_it_was_used(spawned, root, s3, kind):
    state = {"w": torch.randn(50, 7), "step": 3}
    writer = ObjectStoreWriter(root, **WRITERS[kind], **s3)
    spawned(saved_there, writer, f"{root}/before", state)
    dcp.save(state, storage_writer=writer)
    spawned(saved_there, writer, f"{root}/after", state)
    for url in (root, f"{root}/before", f"{root}/after"):
        loaded = {"w": torch.zeros(50, 7), "step": 0}
        dcp.load(loaded, storage_reader=ObjectStoreReader(url, **s3))
        assert torch.equal(loaded["w"], state["w"])
        assert loaded["step"] == 3


@pytest.mark.parametrize("kind", KEYS)
def test_keys_work_in_another_process_before_and_after_they_were_used(spawned, root, s3, tmp_path, kind):
    (tmp_path / "keys.json").write_text(json.dumps({"2026": b64encode(KEY).decode()}))
    keys = KEYS[kind](tmp_path) if callable(KEYS[kind]) else KEYS[kind]
    state = {"w": torch.randn(50, 7), "step": 3}
    writer = ObjectStoreWriter(extensions=[AesGcm("2026", keys=keys)], **s3)
    reader = ObjectStoreReader(keys=keys, rename=renamed, **s3)
    for use in ("before", "after"):
        spawned(saved_there, writer, f"{root}/{use}", state)
        blank = {"w": torch.zeros(50, 7), "step": 0}
        loaded = spawned(loaded_there, reader, f"{root}/{use}", blank)
        assert torch.equal(loaded["w"], state["w"])
        dcp.save(state, storage_writer=writer, checkpoint_id=f"{root}/{use}-here")
        dcp.load(blank, storage_reader=reader, checkpoint_id=f"{root}/{use}-here")


def test_what_gives_credentials_works_in_another_process(spawned, root, s3):
    options = {name: s3[name] for name in ("endpoint_url", "region", "addressing_style")}
    options["credentials"] = Given(s3["access_key_id"], s3["secret_access_key"])
    spawned(saved_there, ObjectStoreWriter(**options), root, {"step": 3})
    assert spawned(loaded_there, ObjectStoreReader(**options), root, {"step": 0}) == {"step": 3}


def test_a_reader_that_failed_works_in_another_process(spawned, root, s3):
    reader = ObjectStoreReader(options=ReadOptions(verify="before"), **s3)
    with pytest.raises(CheckpointException, match="no checkpoint"):
        dcp.load({"step": 0}, storage_reader=reader, checkpoint_id=root)
    dcp.save({"step": 3}, storage_writer=ObjectStoreWriter(root, **s3))
    assert spawned(loaded_there, reader, root, {"step": 0}) == {"step": 3}


def test_keys_from_the_environment_take_no_key_along(monkeypatch):
    monkeypatch.setenv("CLOUDCKPT_KEY_2026", b64encode(KEY).decode())
    extension = AesGcm("2026", keys=KeysFromEnvironment())
    extension.start_shard()
    again = pickle.dumps(extension)
    assert KEY not in again
    assert b64encode(KEY) not in again
    assert pickle.loads(again).start_shard().params["key_id"] == "2026"
