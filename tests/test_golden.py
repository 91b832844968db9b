"""Checked-in checkpoints: one of each format version and extension, read forever. A failure is a broken promise."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.dcp import ObjectStoreReader
from cloudckpt.manifest import parse

GOLDEN = sorted(p.name for p in (Path(__file__).parent / "golden").iterdir())


def url_of(version):
    return f"file://{Path(__file__).parent}/golden/{version}"


EXTENSIONS = {
    "v1": {()},
    "v1-zstd": {("stream.zstd/1",)},
    "v1-byteplane": {("stream.byteplane/1",)},
    "v1-byteplane4-zstd": {("stream.byteplane/1+width=4", "stream.zstd/1")},
    "v1-aesgcm": {("stream.aesgcm/1",)},
    "v1-byteplane-zstd-aesgcm": {(), ("stream.byteplane/1", "stream.zstd/1", "stream.aesgcm/1")},
}
KEYS = {"golden": bytes(range(32))}


@pytest.mark.parametrize("version", EXTENSIONS)
def test_there_is_one_of_each_version_and_extension(version):
    assert version in GOLDEN
    manifest = parse((Path(__file__).parent / "golden" / version / "manifest.json").read_bytes(), version)
    assert {s.extensions for s in manifest.shards} == EXTENSIONS[version]
    if version != "v1":  # some frames shrank where they could, so that restoring is put to the test
        assert manifest.summary.stored_nbytes < manifest.summary.nbytes or "zstd" not in version


@pytest.mark.parametrize("version", GOLDEN)
def test_dcp_loads_it(version):
    state = {
        "rows": torch.zeros(7, 5),
        "columns": torch.zeros(6, 10, dtype=torch.int32),
        "nested": {
            "half": torch.zeros(9).bfloat16(),
            "raw": torch.zeros(2, dtype=torch.complex128),
            "scalar": torch.tensor(0.0),
        },
        "odd@key%": torch.zeros(2, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
        "step": None,
    }
    if version != "v1":
        state["long"] = torch.zeros(90, 100, dtype=torch.int32)
    dcp.load(state, storage_reader=ObjectStoreReader(url_of(version), keys=KEYS))
    assert torch.equal(state["rows"], torch.arange(35.0).reshape(7, 5))
    assert torch.equal(state["columns"], torch.arange(60, dtype=torch.int32).reshape(6, 10))
    assert torch.equal(state["nested"]["half"], torch.arange(9).bfloat16())
    assert state["nested"]["raw"].tolist() == [1 + 2j, 3 - 4j]
    assert state["nested"]["scalar"].item() == 2.5
    assert state["odd@key%"].tolist() == [1, 2]
    assert state["step"] == 12
    if version != "v1":
        assert torch.equal(state["long"], (torch.arange(9000) % 700).reshape(90, 100).to(torch.int32))


@pytest.mark.parametrize("version", GOLDEN)
def test_it_opens_without_torch(version):
    ckpt = cloudckpt.open(url_of(version), keys=KEYS)
    assert ckpt.metadata == {"made": "for tests"}
    assert ckpt.summary.step == 12
    np.testing.assert_array_equal(ckpt["columns"][2:5, 3:8], np.arange(60).reshape(6, 10)[2:5, 3:8])
    if version != "v1":
        rows = np.arange(9000).reshape(90, 100) % 700
        np.testing.assert_array_equal(ckpt["long"][55:65, 20:30], rows[55:65, 20:30])
