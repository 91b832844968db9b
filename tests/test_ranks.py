"""DCP's save and load through our storage, on real ranks under torchrun. The cases are in `ranks.py`."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from secrets import token_hex
from urllib.parse import urlsplit

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ranks
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from conftest import s3_of

TWO = [
    "fsdp2_model_and_optimizer_resume_bit_for_bit",
    "tensor_parallel_and_replicated_tensors",
    "a_load_fetches_the_rows_that_each_rank_keeps",
    "plan_cache_on_saves_what_is_there_each_time",
    "one_rank_of_many_loads_alone",
    "a_subgroup_loads",
    "one_rank_reads_the_manifest_for_its_group",
    "an_async_save_commits_what_was_staged",
    "a_foreign_exception_of_one_rank_reaches_all_with_its_rank_and_host",
    "a_rank_that_fails_in_mid_upload_leaves_nothing_of_its_own",
    "a_save_onto_a_checkpoint_is_refused_on_all_ranks",
    "use_collectives_false_is_refused",
    "nothing_there_is_told_to_all_ranks",
    "a_temporary_prefix_is_shared_by_all_ranks_and_removed_after",
    "saved_by_two_for_others_to_load",
    "extensions_by_pattern_on_every_rank",
    "a_key_that_one_rank_lacks_fails_all_before_anything_is_committed",
]


def run_ranks(count, tmp_path, config, *cases):
    """Runs cases on ``count`` ranks; returns what became of each."""
    out = tmp_path / f"{token_hex(4)}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [str(Path(ranks.__file__)), str(out), json.dumps(config), *cases]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert out.exists(), f"ranks ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr[-5000:]}"
    return json.loads(out.read_text())


class Breaking(BaseHTTPRequestHandler):
    """Passes requests on to an S3 server, but refuses the completion of any upload."""

    protocol_version = "HTTP/1.0"

    def _pass_on(self):
        import http.client

        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.command == "POST" and "uploadId=" in self.path:
            self.send_response(403)
            self.end_headers()
            self.wfile.write(b"<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>")
            return
        at = urlsplit(self.server.to)
        upstream = http.client.HTTPConnection(at.hostname, at.port)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"expect", "connection"}:
                upstream.putheader(name, value)
        upstream.endheaders(body)
        reply = upstream.getresponse()
        data = reply.read()
        self.send_response(reply.status)
        for name, value in reply.getheaders():
            if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        upstream.close()

    do_GET = do_PUT = do_POST = do_DELETE = _pass_on

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def breaking_url(server):
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    proxy.to = server.endpoint_url
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{proxy.server_address[1]}"
    proxy.shutdown()
    proxy.server_close()
    thread.join()


@pytest.fixture(scope="module")
def config(server, breaking_url):
    return {"url": f"s3://checkpoints/ranks-{token_hex(4)}", "breaking_url": breaking_url, "s3": s3_of(server)}


@pytest.fixture(scope="module")
def first(one_server):
    """On the first server alone: eight ranks take long, and which server they save to is nothing to them."""
    return {"url": f"s3://checkpoints/ranks-{token_hex(4)}", "s3": s3_of(one_server)}


@pytest.fixture(scope="module")
def two_ranks(config, tmp_path_factory):
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), config, *TWO)


@pytest.mark.parametrize("case", TWO)
def test_two_ranks(two_ranks, case):
    assert two_ranks[case] is None, two_ranks[case]


def test_saved_by_two_ranks_loaded_by_one(two_ranks, config):
    state = {"rows": torch.zeros(7, 5), "columns": torch.zeros(6, 10), "step": None}
    url = f"{config['url']}/saved_by_two_for_others_to_load"
    dcp.load(state, storage_reader=ObjectStoreReader(url, **config["s3"]))
    assert torch.equal(state["rows"], ranks.whole(7, 5, seed=1))
    assert torch.equal(state["columns"], ranks.whole(6, 10, seed=2))
    assert state["step"] == 12


def test_saved_by_one_and_by_two_loaded_by_four(two_ranks, config, tmp_path):
    state = {"w": ranks.whole(50, 8, seed=1), "t": ranks.whole(16, 6, seed=2), "step": 9}
    url = f"{config['url']}/saved_by_one_loaded_by_four"
    dcp.save(state, storage_writer=ObjectStoreWriter(url, **config["s3"]))
    outcome = run_ranks(4, tmp_path, config, "saved_by_one_loaded_by_four")
    shared = {**config, "shared": "saved_by_two_for_others_to_load"}
    outcome |= run_ranks(4, tmp_path, shared, "saved_by_two_loaded_by_four")
    assert outcome == {"saved_by_one_loaded_by_four": None, "saved_by_two_loaded_by_four": None}, outcome


def test_saved_by_eight_ranks_loaded_by_two_and_by_three(first, tmp_path):
    outcome = run_ranks(8, tmp_path, first, "saved_by_eight_for_fewer")
    assert outcome == {"saved_by_eight_for_fewer": None}, outcome
    for count in (2, 3):
        outcome = run_ranks(count, tmp_path, first, "saved_by_eight_loaded_by_fewer")
        assert outcome == {"saved_by_eight_loaded_by_fewer": None}, outcome
