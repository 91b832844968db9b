"""One table of dtypes, told apart by nobody else."""

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open

from cloudckpt import safetensors_header
from cloudckpt.dcp import dtypes as torch_dtypes
from cloudckpt.dtypes import DTYPES, RAW
from cloudckpt.safetensors_header import HeaderItem

ALL = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@ALL
def test_a_dtype_stands_under_its_own_name(dtype):
    assert DTYPES[dtype.name] is dtype


@ALL
def test_the_itemsize_is_that_of_torch_and_of_numpy(dtype):
    assert torch_dtypes.dtype_of(dtype.name).itemsize == dtype.itemsize
    if dtype.numpy is not None:
        kind = getattr(ml_dtypes, dtype.numpy[3:]) if dtype.numpy.startswith("ml:") else dtype.numpy
        assert np.dtype(kind).itemsize == dtype.itemsize


@ALL
def test_torchs_dtype_is_the_inverse_of_its_name(dtype):
    assert torch_dtypes.name_of(torch_dtypes.dtype_of(dtype.name)) == dtype.name


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.numpy not in {None, "bool"}], ids=lambda d: d.name)
def test_numpy_and_torch_read_the_same_numbers_from_the_same_bytes(dtype):
    data = bytes(range(16, 112))
    kind = getattr(ml_dtypes, dtype.numpy[3:]) if dtype.numpy.startswith("ml:") else dtype.numpy
    of_numpy = np.frombuffer(data, kind).astype(np.complex128)
    of_torch = torch.frombuffer(bytearray(data), dtype=torch_dtypes.dtype_of(dtype.name))
    if of_torch.dtype.is_floating_point:
        of_torch = of_torch.to(torch.float64)
    np.testing.assert_array_equal(of_numpy, of_torch.numpy().astype(np.complex128))


@ALL
def test_a_name_marked_as_one_of_safetensors_is_opened_by_its_torch_reader(dtype, tmp_path):
    path = tmp_path / "one.safetensors"
    item = HeaderItem(name="x", dtype=dtype.name, shape=(3,), nbytes=3 * dtype.itemsize)
    path.write_bytes(safetensors_header.encode([item], {}) + bytes(3 * dtype.itemsize))
    if dtype.is_safetensors:
        with safe_open(path, "pt") as opened:
            assert opened.get_tensor("x").dtype == torch_dtypes.dtype_of(dtype.name)
    else:
        with pytest.raises(Exception, match=dtype.name):
            safe_open(path, "pt").__enter__()


def test_raw_bytes_are_stored_as_a_safetensors_dtype_of_one_byte():
    assert DTYPES[RAW].itemsize == 1
    assert DTYPES[RAW].is_safetensors


def test_a_quantized_dtype_has_no_name():
    assert torch_dtypes.name_of(torch.quint8) is None


@pytest.mark.parametrize("itemsize", sorted({d.itemsize for d in DTYPES.values()}))
def test_elements_of_every_width_can_be_moved_as_they_are(itemsize):
    assert torch_dtypes.RAW[itemsize].itemsize == itemsize
