"""One checked-in checkpoint per format version, read forever. A test here that fails is a broken promise."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.dcp import ObjectStoreReader

GOLDEN = sorted(p.name for p in (Path(__file__).parent / "golden").iterdir())


def url_of(version):
    return f"file://{Path(__file__).parent}/golden/{version}"


def test_there_is_one_for_the_first_version():
    assert "v1" in GOLDEN


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
    dcp.load(state, storage_reader=ObjectStoreReader(url_of(version)))
    assert torch.equal(state["rows"], torch.arange(35.0).reshape(7, 5))
    assert torch.equal(state["columns"], torch.arange(60, dtype=torch.int32).reshape(6, 10))
    assert torch.equal(state["nested"]["half"], torch.arange(9).bfloat16())
    assert state["nested"]["raw"].tolist() == [1 + 2j, 3 - 4j]
    assert state["nested"]["scalar"].item() == 2.5
    assert state["odd@key%"].tolist() == [1, 2]
    assert state["step"] == 12


@pytest.mark.parametrize("version", GOLDEN)
def test_it_opens_without_torch(version):
    ckpt = cloudckpt.open(url_of(version))
    assert ckpt.metadata == {"made": "for tests"}
    assert ckpt.summary.step == 12
    np.testing.assert_array_equal(ckpt["columns"][2:5, 3:8], np.arange(60).reshape(6, 10)[2:5, 3:8])
