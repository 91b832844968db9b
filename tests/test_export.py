"""A checkpoint in another format, object to object: whole, or not there."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from secrets import token_hex

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
import sharded_save
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.errors import (
    CheckpointChangedError,
    CheckpointExistsError,
    StoreError,
    UnstorableError,
    UsageError,
)
from cloudckpt.extensions import BytePlane, ZStandard
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions, open_store
from cloudckpt.testing import fault_proxy, faults
from cloudckpt.transfer.copy import copy
from cloudckpt.transfer.export import ExportPlan, export
from conftest import client_of, s3_of
from test_cli import COMMAND

WHOLE = {key: value for key, (value, _) in sharded_save.state().items()}
MIB = 1 << 20


def equal(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def names_below(url):
    async def look():
        async with open_store(url) as store:
            return [found.key async for found in store.list_objects()]

    return loop.run(look)


def as_arrays(url):
    return cloudckpt.open(url).to_torch()


@pytest.mark.parametrize("extensions", [(), (BytePlane(), ZStandard())], ids=["plain", "compressed"])
def test_a_sharded_checkpoint_is_one_file_of_safetensors(saved, tmp_path, extensions):
    source = saved
    if extensions:
        source = f"file://{tmp_path}/compressed"
        state = {key: torch.zeros_like(value) for key, value in WHOLE.items()}
        dcp.load(state, storage_reader=ObjectStoreReader(saved))
        dcp.save(state, storage_writer=ObjectStoreWriter(source, extensions=extensions))
    done = export(source, f"file://{tmp_path}/model.safetensors", to="safetensors", tensors_only=True)
    equal(safetensors.torch.load_file(tmp_path / "model.safetensors"), WHOLE)
    assert done.files == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}
    assert done.entry_count == len(WHOLE)
    assert (done.copied_nbytes, done.sent_nbytes) == (0, done.files["model.safetensors"])


def test_a_large_model_is_sharded_as_hugging_face_lays_it_out(saved, tmp_path):
    done = export(saved, f"file://{tmp_path}/hf", to="safetensors", tensors_only=True, max_file_nbytes=21 * MIB)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert list(done.files)[-1] == "model.safetensors.index.json"
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in WHOLE.values())
    found = {}
    for name in set(index["weight_map"].values()):
        tensors = safetensors.torch.load_file(tmp_path / "hf" / name)
        assert {index["weight_map"][key] for key in tensors} == {name}
        found |= tensors
    assert min(done.files) == f"model-00001-of-{len(done.files) - 1:05}.safetensors"
    equal(found, WHOLE)
    equal(as_arrays(f"file://{tmp_path}/hf"), WHOLE)


def test_each_format_is_exported_to_each(saved, tmp_path):
    targets = {"safetensors": "hf/model.safetensors", "torch": "model.pt", "dcp": "stock"}
    for to, name in targets.items():
        export(saved, f"file://{tmp_path}/{name}", to=to, tensors_only=to == "safetensors")
    for of, source in targets.items():
        for to, name in targets.items():
            target = f"file://{tmp_path}/of-{of}/{name}"
            export(f"file://{tmp_path}/{source}", target, to=to, tensors_only=True)
            equal(as_arrays(target), WHOLE)
    loaded = torch.load(tmp_path / "of-dcp" / "model.pt", weights_only=True)
    equal(loaded, WHOLE)
    into = {key: torch.zeros_like(value) for key, value in WHOLE.items()}
    dcp.load(into, checkpoint_id=str(tmp_path / "of-torch" / "stock"))
    equal(into, WHOLE)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["step"] == 3


def test_what_is_pickled_and_no_plain_value_is_not_put_into_a_file_of_torch_save(tmp_path):
    state = {"w": torch.zeros(3), "betas": (0.9, 0.99), "odd": {"deep": {1, 2}}}
    dcp.save(state, storage_writer=ObjectStoreWriter(f"file://{tmp_path}/source"))
    with pytest.raises(UnstorableError, match=r"'odd.deep': pickled by whoever saved it"):
        export(f"file://{tmp_path}/source", f"file://{tmp_path}/m.pt", to="torch")
    export(f"file://{tmp_path}/source", f"file://{tmp_path}/m.pt", to="torch", patterns=["w", "betas"])
    assert torch.load(tmp_path / "m.pt", weights_only=True)["betas"] == (0.9, 0.99)


def test_the_server_copies_what_lies_in_long_runs(saved, root, client, store_options, tmp_path):
    copy(saved, f"{root}/source", to_store=store_options)
    with fault_proxy(store_options.s3.endpoint_url) as proxy:
        options = store_options_to(store_options, proxy.url)
        done = export(f"{root}/source", f"{root}/out/m.safetensors", to="safetensors", patterns="rows", store=options)
        sent = sum(r.nbytes for r in proxy.requests if r.operation in {"UploadPart", "PutObject"})
    equal(as_loaded(client, f"{root}/out/m.safetensors", tmp_path), {"rows": WHOLE["rows"]})
    assert (
        done.copied_nbytes == 10 * MIB
    )  # of two runs of 10 MiB; of the first, 5 go with the header, and 5 are too few
    assert done.copied_nbytes + done.sent_nbytes == sum(done.files.values())
    assert done.sent_nbytes <= sent < done.sent_nbytes + 100_000


def test_without_the_server_all_bytes_pass_through_here(saved, one_server, tmp_path):
    options = StoreOptions(s3=S3Options(**s3_of(one_server)))
    root = f"s3://checkpoints/{token_hex(6)}"
    copy(saved, f"{root}/source", to_store=options)
    done = export(
        f"{root}/source",
        f"{root}/m.safetensors",
        to="safetensors",
        patterns="rows",
        store=options,
        server_side=False,
    )
    assert (done.copied_nbytes, done.sent_nbytes) == (0, sum(done.files.values()))
    equal(as_loaded(client_of(one_server), f"{root}/m.safetensors", tmp_path), {"rows": WHOLE["rows"]})


def store_options_to(options, url):
    return replace(options, s3=replace(options.s3, endpoint_url=url))


def as_loaded(client, url, tmp_path):
    bucket, _, key = url.removeprefix("s3://").partition("/")
    path = tmp_path / token_hex(4)
    with path.open("wb") as f:
        size = client.head_object(Bucket=bucket, Key=key)["ContentLength"]
        for start in range(0, size, 16 * MIB):  # moto's checksums of what it copied are others than its bytes'
            stop = min(size, start + 16 * MIB) - 1
            f.write(client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop}")["Body"].read())
    return safetensors.torch.load_file(path)


def test_whichever_request_fails_the_export_is_whole_or_nothing_is_left(saved, one_server, tmp_path):
    options = StoreOptions(s3=S3Options(**s3_of(one_server)))
    client, prefix = client_of(one_server), token_hex(6)
    with fault_proxy(one_server.endpoint_url) as proxy:
        broken = store_options_to(options, proxy.url)
        for k in range(200):
            proxy.clear()
            proxy.at(k, faults.answer(400, "InvalidRequest"))
            where = f"{prefix}/{k}"
            try:
                export(
                    saved,
                    f"s3://checkpoints/{where}",
                    to="safetensors",
                    patterns=["rows", "scalar"],
                    max_file_nbytes=1,
                    to_store=broken,
                )
            except StoreError:
                assert client.list_objects_v2(Bucket="checkpoints", Prefix=f"{where}/")["KeyCount"] == 0, k
                assert not client.list_multipart_uploads(Bucket="checkpoints", Prefix=f"{where}/").get("Uploads"), k
            else:
                found = client.list_objects_v2(Bucket="checkpoints", Prefix=f"{where}/")["Contents"]
                assert f"{where}/model.safetensors.index.json" in {o["Key"] for o in found}
                if k >= len(proxy.requests):
                    break
        assert 10 < k < 200


def test_what_is_there_is_neither_mixed_with_nor_replaced_unasked(saved, tmp_path):
    target = f"file://{tmp_path}/m.safetensors"
    export(saved, target, to="safetensors", patterns="rows")
    before = (tmp_path / "m.safetensors").read_bytes()
    with pytest.raises(CheckpointExistsError, match="is there already"):
        export(saved, target, to="safetensors", patterns="columns")
    assert (tmp_path / "m.safetensors").read_bytes() == before
    export(saved, target, to="safetensors", patterns="columns", overwrite=True)
    assert set(as_arrays(target)) == {"columns"}
    export(saved, f"file://{tmp_path}/hf", to="safetensors", patterns="rows")
    with pytest.raises(CheckpointExistsError, match="another checkpoint"):
        export(saved, f"file://{tmp_path}/hf", to="dcp", overwrite=True)
    assert names_below(f"file://{tmp_path}/hf") == ["model.safetensors"]


def test_a_file_that_was_to_be_replaced_is_as_it_was_if_that_fails(saved, tmp_path):
    target = f"file://{tmp_path}/m.safetensors"
    export(saved, target, to="safetensors", patterns="columns")
    before = (tmp_path / "m.safetensors").read_bytes()

    def fail(_):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        export(saved, target, to="safetensors", patterns="rows", overwrite=True, advance=fail)
    assert (tmp_path / "m.safetensors").read_bytes() == before


def test_a_server_that_does_not_copy_is_sent_the_bytes(saved, one_server, tmp_path):
    options = StoreOptions(s3=S3Options(**s3_of(one_server)))
    root = f"s3://checkpoints/{token_hex(6)}"
    copy(saved, f"{root}/source", to_store=options)
    done = []
    with fault_proxy(one_server.endpoint_url) as proxy:
        proxy.each(lambda r: faults.answer(501, "NotImplemented") if "x-amz-copy-source" in r.headers else None)
        found = export(
            f"{root}/source",
            f"{root}/m.safetensors",
            to="safetensors",
            patterns="rows",
            store=store_options_to(options, proxy.url),
            advance=done.append,
        )
    assert (found.copied_nbytes, found.sent_nbytes) == (0, sum(found.files.values()))
    assert sum(done) == found.sent_nbytes
    client = client_of(one_server)
    assert not client.list_multipart_uploads(Bucket="checkpoints", Prefix=root.rpartition("/")[2]).get("Uploads")
    equal(as_loaded(client, f"{root}/m.safetensors", tmp_path), {"rows": WHOLE["rows"]})


def test_what_cannot_be_written_is_refused_before_anything_is(saved, tmp_path):
    target = f"file://{tmp_path}/out"
    with pytest.raises(UnstorableError, match=r"'step': safetensors holds tensors only; leave .* --tensors-only"):
        export(saved, target, to="safetensors")
    with pytest.raises(UsageError, match="none is asked for"):
        export(saved, target, to="dcp", patterns="nothing.*")
    with pytest.raises(UsageError, match=r"let it end with one of .pt"):
        export(saved, target, to="torch")
    with pytest.raises(UsageError, match="lie in one another"):
        export(saved, f"{saved}/out", to="dcp")
    with pytest.raises(UsageError, match="must be one of 'safetensors'"):
        export(saved, target, to="zip")
    assert names_below(f"file://{tmp_path}") == []


@pytest.mark.parametrize("of", ["cloudckpt", "safetensors"])
def test_a_source_that_changes_underneath_is_told_and_nothing_is_left(tmp_path, of):
    source = f"file://{tmp_path}/source"
    state = {"w": torch.randn(5_000_000)}
    dcp.save(state, storage_writer=ObjectStoreWriter(source))
    if of == "safetensors":
        export(source, f"file://{tmp_path}/source.safetensors", to="safetensors")
        source += ".safetensors"
    changed = []

    def change(_):
        if not changed:
            changed.append(True)
            if of == "safetensors":
                os.replace(tmp_path / "source.safetensors", tmp_path / "gone")
                (tmp_path / "source.safetensors").write_bytes((tmp_path / "gone").read_bytes())
            else:
                os.replace(tmp_path / "source" / "manifest.json", tmp_path / "gone")
                (tmp_path / "source" / "manifest.json").write_bytes((tmp_path / "gone").read_bytes())

    with pytest.raises(CheckpointChangedError, match="was changed while it was read"):
        export(source, f"file://{tmp_path}/out/m.safetensors", to="safetensors", advance=change)
    assert changed
    assert names_below(f"file://{tmp_path}/out") == []


def run(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


def test_a_disk_that_is_full_is_told_and_nothing_is_left(saved, tmp_path):
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from cloudckpt.cli.main import main\n"
        "sys.argv[1:1] = ['export']\n"
        "main()\n"
    )
    ended = run(script, saved, f"file://{tmp_path}/m.safetensors", "--to", "safetensors", "--tensors-only")
    assert ended.returncode == 1
    assert "File too large" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing_and_the_status_says_so(saved, one_server):
    prefix = token_hex(6)
    with fault_proxy(one_server.endpoint_url) as proxy:
        started = []
        interrupt = faults.call(lambda: os.kill(started[0].pid, 2), is_carried_out=True)
        proxy.when(lambda r: r.operation == "UploadPart", interrupt)
        environ = os.environ | {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": one_server.access_key,
            "AWS_SECRET_ACCESS_KEY": one_server.secret_key,
            "AWS_REGION": "us-east-1",
        }
        command = [COMMAND, "export", saved, f"s3://checkpoints/{prefix}/m.safetensors", "--to", "safetensors"]
        started.append(subprocess.Popen([*command, "--tensors-only"], env=environ, stderr=subprocess.PIPE, text=True))
        _, told = started[0].communicate(timeout=60)
    assert started[0].returncode == 130
    assert "Traceback" not in told
    client = client_of(one_server)
    assert client.list_objects_v2(Bucket="checkpoints", Prefix=prefix)["KeyCount"] == 0
    assert not client.list_multipart_uploads(Bucket="checkpoints", Prefix=prefix).get("Uploads")


def test_the_command_shows_the_plan_and_then_what_was_done(saved, tmp_path):
    target = f"file://{tmp_path}/m.safetensors"
    command = [COMMAND, "export", saved, target, "--to", "safetensors", "--only", "rows", "--json"]
    plan = json.loads(subprocess.run([*command, "--dry-run"], check=True, capture_output=True).stdout)
    assert list(tmp_path.iterdir()) == []
    done = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert plan["files"] == done["files"] == {"m.safetensors": (tmp_path / "m.safetensors").stat().st_size}
    assert plan["left_out"] == sorted({*WHOLE, "step"} - {"rows"})
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith("cloudckpt: ")


def test_planning_opens_the_source_and_writes_nothing(saved, tmp_path):
    with ExportPlan(saved, f"file://{tmp_path}/m.safetensors", to="safetensors", tensors_only=True) as plan:
        assert plan.nbytes > sum(v.nbytes for v in WHOLE.values())
        assert plan.left_out == ["step"]
    assert list(tmp_path.iterdir()) == []


def test_tensors_lie_in_the_file_as_wide_elements_first(saved, tmp_path):
    export(saved, f"file://{tmp_path}/m.safetensors", to="safetensors", tensors_only=True)
    with (tmp_path / "m.safetensors").open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    assert header.pop("__metadata__") == {"format": "pt", "run": "x", "n": "1"}
    order = sorted(header, key=lambda key: header[key]["data_offsets"])
    widths = [WHOLE[key].itemsize for key in order if WHOLE[key].numel()]
    assert widths == sorted(widths, reverse=True)
    assert np.all([header[key]["data_offsets"][0] % WHOLE[key].itemsize == 0 for key in order])
