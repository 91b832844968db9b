"""Looking inside a checkpoint without torch's help."""

import subprocess
import sys
from secrets import token_hex

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

import cloudckpt
from cloudckpt import errors
from cloudckpt.catalog import newest_step, step_url
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.layout import shard_key
from cloudckpt.store.url import open_store


@pytest.fixture(scope="module")
def url():
    url = f"memory://{token_hex(6)}/step-1"
    state = {
        "grid": torch.arange(5 * 6 * 7, dtype=torch.int32).reshape(5, 6, 7),
        "half": torch.randn(40, 3).bfloat16(),
        "eighth": torch.randn(9).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "complex32": torch.zeros(3, dtype=torch.int32).view(torch.complex32),
        "step": 3,
    }
    writer = ObjectStoreWriter(url, metadata={"run": "x"}, step=1, frame_size=4096)
    dcp.save(state, storage_writer=writer)
    return url


GRID = np.arange(5 * 6 * 7, dtype=np.int32).reshape(5, 6, 7)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_it_is_a_mapping_that_tells_without_reading(url):
    ckpt = cloudckpt.open(url)
    assert set(ckpt.keys()) == {"grid", "half", "eighth", "scalar", "empty", "complex32", "step"}
    assert len(ckpt) == 7
    assert "grid" in ckpt
    grid = ckpt["grid"]
    assert (grid.shape, grid.dtype, grid.ndim, grid.size, grid.nbytes, len(grid)) == (
        (5, 6, 7), np.dtype("int32"), 3, 210, 840, 5,
    )  # fmt: skip
    assert ckpt["half"].dtype == ml_dtypes.bfloat16
    assert ckpt.metadata == {"run": "x"}
    assert ckpt.summary.step == 1
    assert (ckpt.stats.requests, ckpt.stats.bytes_fetched) == (0, 0)
    assert url in repr(ckpt)


INDICES = [
    (), ..., 0, -1, slice(1, 3), (slice(None), 2), (..., 4), (1, ..., slice(2, 5)), (slice(None, None, 2), 1),
    (slice(None, None, -1),), (4, slice(5, 0, -2), 3), slice(3, 3), (slice(0, 5), slice(1, 2), slice(0, 7, 3)),
    (2, 3, 4), (np.int64(2),), (Ellipsis, slice(6, None)),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_indexing_gives_what_numpy_gives(url, index):
    found = cloudckpt.open(url, max_gap=0)["grid"][index]
    np.testing.assert_array_equal(found, GRID[index])
    assert np.asarray(found).shape == np.asarray(GRID[index]).shape


@given(
    st.tuples(*(st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([1, 2, -1, -3])) for _ in range(3)))
)
def test_any_slices_give_what_numpy_gives(url, parts):
    index = tuple(slice(*part) for part in parts)
    np.testing.assert_array_equal(cloudckpt.open(url)["grid"][index], GRID[index])


def test_ten_rows_cost_ten_rows(url):
    ckpt = cloudckpt.open(url)
    assert ckpt["half"][10:20].shape == (10, 3)
    assert (ckpt.stats.requests, ckpt.stats.bytes_fetched, ckpt.stats.bytes_needed) == (1, 60, 60)


def test_scalars_small_floats_bytes_and_empties_are_read(url):
    ckpt = cloudckpt.open(url)
    assert ckpt["scalar"][()] == 2.5
    assert ckpt["eighth"][...].dtype == ml_dtypes.float8_e4m3fn
    assert ckpt["empty"][...].shape == (0, 3)
    assert ckpt["step"][:2] == b"PK"  # torch.save's zip
    assert np.asarray(ckpt["grid"]).sum() == GRID.sum()


@pytest.mark.parametrize("index", [5, -6, (0, 0, 7), (0, 0, 0, 0), (..., ...), "a", 1.5], ids=repr)
def test_an_index_that_does_not_fit_is_told_with_the_shape(url, index):
    with pytest.raises(errors.ShapeMismatchError, match=r"'grid' of shape \(5, 6, 7\)"):
        cloudckpt.open(url)["grid"][index]


def test_an_unknown_key_and_a_dtype_numpy_lacks_are_told(url):
    with pytest.raises(errors.MissingKeyError, match="no entry 'nothing'"):
        cloudckpt.open(url)["nothing"]
    with pytest.raises(errors.DtypeMismatchError, match="complex32"):
        cloudckpt.open(url)["complex32"][...]


def test_nothing_there_is_told():
    with pytest.raises(errors.CheckpointNotFoundError, match="there is no checkpoint"):
        cloudckpt.open(f"memory://{token_hex(6)}/none")
    with pytest.raises(errors.UsageError, match="unknown option"):
        cloudckpt.open("memory://x/none", colour="red")


def test_the_newest_step_is_the_newest_committed_one():
    root = f"memory://{token_hex(6)}/run"
    assert newest_step(root) is None
    for step in (2, 10, 9):
        dcp.save({"a": torch.ones(1)}, storage_writer=ObjectStoreWriter(step_url(root, step)))

    async def leave_a_shard():
        async with open_store(step_url(root, 11)) as store:
            await store.put(shard_key("0" * 32, "safetensors"), [memoryview(b"x")])
        async with open_store(f"{root}/notes") as store:
            await store.put("manifest.json", [memoryview(b"x")])

    loop.run(leave_a_shard)
    assert newest_step(root) == 10


def test_the_core_and_its_readers_work_without_torch(server, s3, root):
    dcp.save({"w": torch.arange(12.0).reshape(4, 3)}, storage_writer=ObjectStoreWriter(root, **s3))
    script = f"""
import sys
import cloudckpt, cloudckpt.catalog
assert cloudckpt.open({root!r}, **{s3!r})["w"][1:3].tolist() == [[3, 4, 5], [6, 7, 8]]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
