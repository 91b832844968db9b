"""A checkpoint to another place: the same there, or not committed; and what was broken off goes on."""

import json
import os
import subprocess
from dataclasses import replace
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
import sharded_save
from cloudckpt.catalog import sweep, verify
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.errors import (
    CheckpointChangedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    IntegrityError,
    StoreError,
    UsageError,
)
from cloudckpt.extensions import AesGcm
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions
from cloudckpt.testing import fault_proxy, faults
from cloudckpt.transfer.copy import copy
from cloudckpt.transfer.export import export
from conftest import client_of, s3_of
from test_cli import COMMAND
from test_export import names_below, store_options_to

WHOLE = {key: value for key, (value, _) in sharded_save.state().items()}
MIB = 1 << 20


def loads(url, **options):
    into = {key: torch.zeros_like(value) for key, value in WHOLE.items()}
    dcp.load(into, storage_reader=ObjectStoreReader(url, **options))
    return all(torch.equal(into[key], WHOLE[key]) for key in into)


def save(url, value, **options):
    dcp.save({"w": torch.full((100,), float(value))}, storage_writer=ObjectStoreWriter(url, **options))


@pytest.fixture
def options(one_server):
    return StoreOptions(s3=S3Options(**s3_of(one_server)))


def test_to_another_store_and_back_it_is_the_same_checkpoint(saved, root, store_options, s3, tmp_path):
    there = copy(saved, f"{root}/a/step-3", to_store=store_options)
    assert (there.there_nbytes, there.copied_nbytes) == (0, 0)
    assert loads(f"{root}/a/step-3", **s3)
    beside = copy(f"{root}/a/step-3", f"{root}/b", store=store_options)
    assert beside.copied_nbytes > 0.9 * beside.nbytes
    assert verify(f"{root}/b", deep=True, store=store_options).is_sound
    copy(f"{root}/b", f"file://{tmp_path}/back", store=store_options)
    assert loads(f"file://{tmp_path}/back")
    ids = {cloudckpt.open(url).summary.save_id for url in (saved, f"file://{tmp_path}/back")}
    assert len(ids) == 1


def test_a_copy_that_was_broken_off_goes_on_where_it_was(saved, options, one_server):
    prefix = token_hex(6)
    target = f"s3://checkpoints/{prefix}"
    with fault_proxy(one_server.endpoint_url) as proxy:
        broken = store_options_to(options, proxy.url)
        proxy.when(lambda r: r.operation == "PutObject" and "manifest" in r.key, faults.answer(403, "AccessDenied"))
        with pytest.raises(StoreError):
            copy(saved, target, to_store=broken)
        with pytest.raises(CheckpointNotFoundError):
            cloudckpt.open(target, store=options)
        proxy.clear()
        done = copy(saved, target, to_store=broken)
        assert done.there_nbytes == sum(shard.size for shard in shards_of(saved))
        assert done.sent_nbytes == 0
        assert not [r for r in proxy.requests if r.operation in {"CreateMultipartUpload", "UploadPart"}]
        again = copy(saved, target, to_store=broken)
        assert again.there_nbytes == again.nbytes
    assert loads(target, **s3_of(one_server))


def shards_of(url):
    with cloudckpt.open(url) as opened:
        return opened._access.contents.shards


def test_whichever_request_fails_the_copy_is_whole_or_not_committed(tmp_path, options, one_server):
    source = f"file://{tmp_path}/source"
    save(source, 1)
    with fault_proxy(one_server.endpoint_url) as proxy:
        broken = store_options_to(options, proxy.url)
        for k in range(60):
            proxy.clear()
            proxy.at(k, faults.answer(400, "InvalidRequest"))
            target = f"s3://checkpoints/{token_hex(6)}"
            try:
                copy(source, target, to_store=broken)
            except StoreError:
                with pytest.raises(CheckpointNotFoundError):
                    cloudckpt.open(target, store=options)
            else:
                assert verify(target, deep=True, store=options).is_sound
                if k >= len(proxy.requests):
                    break
        assert 2 < k < 60


def test_an_encrypted_checkpoint_is_copied_without_its_key(tmp_path):
    keys = {"k": bytes(32)}
    save(f"file://{tmp_path}/a", 1, extensions=[AesGcm("k", keys)], metadata={"secret": 1})
    copy(f"file://{tmp_path}/a", f"file://{tmp_path}/b")
    opened = cloudckpt.open(f"file://{tmp_path}/b", keys=keys)
    assert opened["w"][0] == 1
    assert opened.metadata == {"secret": 1}


def test_another_checkpoint_is_not_replaced_unasked_and_then_nothing_of_it_is_left(tmp_path):
    source, target = f"file://{tmp_path}/a", f"file://{tmp_path}/b"
    save(source, 1)
    save(target, 2)
    with pytest.raises(CheckpointExistsError):
        copy(source, target)
    assert cloudckpt.open(target)["w"][0] == 2
    copy(source, target, overwrite=True)
    assert cloudckpt.open(target)["w"][0] == 1
    assert len(names_below(target)) == len(names_below(source)) == 2


def test_a_swept_place_is_copied_to_again(tmp_path):
    source, target = f"file://{tmp_path}/a", f"file://{tmp_path}/run/b"
    save(source, 1)
    copy(source, target)
    os.unlink(tmp_path / "run" / "b" / "manifest.json")
    swept = sweep(f"file://{tmp_path}/run", grace_s=0, dry_run=False, include_whole=True)
    assert swept.removed
    copy(source, target)
    assert verify(target, deep=True).is_sound


def test_damage_at_the_source_is_not_copied(tmp_path):
    source, target = f"file://{tmp_path}/a", f"file://{tmp_path}/b"
    save(source, 1)
    shard = next((tmp_path / "a" / "shards").glob("*/*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match="was not made: its bytes have CRC32C"):
        copy(source, target)
    assert names_below(target) == []


def test_a_source_that_is_replaced_or_removed_underneath_is_told_and_nothing_is_committed(tmp_path):
    source = f"file://{tmp_path}/a"
    save(f"file://{tmp_path}/other", 2)
    manifest, other = (tmp_path / name / "manifest.json" for name in ("a", "other"))
    for change, error in (
        (lambda: os.replace(other, manifest), CheckpointChangedError),
        (lambda: os.unlink(manifest), CheckpointNotFoundError),
    ):
        save(source, 1, overwrite=True)
        target = f"file://{tmp_path}/{token_hex(4)}"
        changes = iter([change])
        with pytest.raises(error, match="while it was copied; nothing was committed"):
            copy(source, target, advance=lambda _, changes=changes: next(changes, int)())
        assert len(names_below(target)) == 1  # the shard, for a sweep


def test_checkpoints_of_others_are_copied_as_they_are(saved, tmp_path):
    for to, name in (("safetensors", "hf"), ("dcp", "stock"), ("torch", "m.pt")):
        source, target = f"file://{tmp_path}/{name}", f"file://{tmp_path}/copy/{name}"
        export(saved, source, to=to, patterns=["rows", "scalar"], max_file_nbytes=1)
        done = copy(source, target)
        assert names_below(target) == (names_below(source) if to != "torch" else [])
        found = cloudckpt.open(target).to_torch()
        assert torch.equal(found["rows"], WHOLE["rows"])
        assert done.object_count == {"safetensors": 3, "dcp": 2, "torch": 1}[to]
        with pytest.raises(CheckpointExistsError):
            copy(source, target)


def test_a_place_inside_the_other_is_refused(saved, tmp_path):
    for target in (saved, f"{saved}/copy", saved.rpartition("/")[0]):
        with pytest.raises(UsageError, match="lie in one another"):
            copy(saved, target)


def test_the_command_copies_and_says_what_the_server_did(tmp_path):
    save(f"file://{tmp_path}/a", 1)
    command = [COMMAND, "cp", f"file://{tmp_path}/a", f"file://{tmp_path}/b", "--json"]
    plan = json.loads(subprocess.run([*command, "--dry-run"], check=True, capture_output=True).stdout)
    assert names_below(f"file://{tmp_path}/b") == []
    done = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert (done["object_count"], done["nbytes"]) == (2, sum(plan["objects"].values()))
    assert verify(f"file://{tmp_path}/b").is_sound


def test_two_servers_each_have_their_own_options(tmp_path, options, one_server):
    save(f"file://{tmp_path}/a", 1)
    target = f"s3://checkpoints/{token_hex(6)}"
    nobody = replace(options, s3=replace(options.s3, endpoint_url="http://127.0.0.1:9"))
    copy(f"file://{tmp_path}/a", target, store=nobody, to_store=options)
    assert client_of(one_server).head_object(Bucket="checkpoints", Key=f"{target.rpartition('/')[2]}/manifest.json")
