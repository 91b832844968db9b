"""Files and pickles of others that lie are refused, or read as they were saved; never anything else."""

import pickle
import struct
import tracemalloc

import msgspec
import pytest
import torch
from hypothesis import given, settings

from cloudckpt.convert import pickles
from cloudckpt.convert.items import ForeignContents
from cloudckpt.convert.pickle_bombs import MAX_DEPTH, refuse_bombs
from cloudckpt.convert.safetensors import header_range
from cloudckpt.errors import ManifestError, UnsafePickleError
from cloudckpt.manifest import Chunk, TensorEntry
from fuzz import fuzz_safetensors, fuzz_zip
from fuzz.mutations import HOSTILE, altered_bytes, altered_tree
from fuzz.reading import read

FEWER = settings(HOSTILE, max_examples=150)


@HOSTILE
@given(altered_bytes(fuzz_safetensors.seeds()))
def test_a_safetensors_file_of_altered_bytes_is_refused_or_read(data):
    fuzz_safetensors.check(data)


HEADER = {
    "__metadata__": {"format": "np"},
    "a": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]},
    "b": {"dtype": "I8", "shape": [5], "data_offsets": [96, 101]},
}


def safetensors_file(tree, nbytes=101):
    header = msgspec.json.encode(tree)
    return len(header).to_bytes(8, "little") + header + bytes(nbytes)


@HOSTILE
@given(altered_tree(HEADER))
def test_a_safetensors_header_of_absurd_values_is_refused_or_read(tree):
    fuzz_safetensors.check(safetensors_file(tree))


@pytest.mark.parametrize("claimed", [100_000_000, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_a_header_that_is_only_claimed_takes_no_memory(claimed):
    tracemalloc.start()
    try:
        found = read({"model.safetensors": claimed.to_bytes(8, "little") + b"{}"}, "model.safetensors")
        assert isinstance(found, ManifestError)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_header_as_long_as_the_file_claims_to_be_is_not_believed_beyond_safetensors_own_limit():
    with pytest.raises(ManifestError):
        header_range((100_000_001).to_bytes(8, "little"), 1 << 50, "here")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param([1] * 65, "I8", id="65 axes"),
        pytest.param([0, 1 << 62, 1 << 62], "I8", id="strides of 2^124"),
        pytest.param([0, 10**300], "I8", id="a number of 300 digits"),
    ],
)
def test_a_shape_that_no_array_can_have_is_refused(shape, dtype):
    nbytes = 0 if 0 in shape else 1
    tree = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}
    found = read({"model.safetensors": safetensors_file(tree, nbytes)}, "model.safetensors")
    assert isinstance(found["a"], ManifestError)


@FEWER
@given(altered_bytes(fuzz_zip.seeds()))
def test_an_archive_or_pickle_of_altered_bytes_is_refused_or_read(data):
    fuzz_zip.check(data)


# Pickles that are made up.


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("named", [print, eval, __import__, torch.load, pickle.loads], ids=str)
def test_what_is_named_is_refused_before_it_is_imported_or_called(named, protocol):
    class Calls:
        def __reduce__(self):
            return named, ("1",)

    data = pickle.dumps(Calls(), protocol)
    fuzz_zip.check_pickle(data, pickles.TORCH_NAMES, is_of_torch_save=True)
    with pytest.raises(UnsafePickleError):
        pickles.load(data, pickles.TORCH_NAMES, "here")


def doubled(times, get=b"h%c", put=b"q%c"):
    """A tuple that unfolds to two to the power of ``times``, in some bytes for each."""
    return b")" + put % 0 + b"".join(get % i + b"\x86" + put % (i + 1) for i in range(times))


BOMBS = {
    "a place in the memo": b"\x80\x02]r\x00\x00\x00\x04.",
    "a place in the memo, as text": b"\x80\x02]p67108864\n.",
    "a byte array of 8 GiB": b"\x80\x05\x96" + struct.pack("<Q", 8 << 30) + b".",
    "a text of 2^63 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b".",
    "a key that unfolds": b"\x80\x02}" + doubled(60) + b"Ns.",
    "keys that unfold": b"\x80\x02}(" + doubled(60) + b"Nu.",
    "a key that unfolds, without a memo": b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
    "a member that unfolds": b"\x80\x04\x8f(" + doubled(60) + b"\x90.",
    "a frozen set of one that unfolds": b"\x80\x04(" + doubled(60) + b"\x91.",
    "a set of a list of one that unfolds": b"\x80\x02cbuiltins\nset\n](" + doubled(60) + b"e\x85R.",
    "a mapping with one that unfolds": b"\x80\x02ccollections\nOrderedDict\n](" + doubled(60) + b"N\x86e\x85R.",
    "a reference that unfolds": b"\x80\x02" + doubled(60) + b"Q.",
    "sizes that unfold": b"\x80\x02ctorch\nSize\n" + doubled(2) + b"\x85R.",
    "a device that unfolds": b"\x80\x02ctorch\ndevice\n" + doubled(2) + b"\x85R.",
    "a parameter that unfolds": b"\x80\x02}ctorch._utils\n_rebuild_parameter\n" + doubled(12) + b"\x85RNs.",
    "keys that together unfold to too much": b"\x80\x02}(" + doubled(12) + b"N" + b"h\x0cN" * 10_000 + b"u.",
    "members that together unfold to too much": b"\x80\x04\x8f(" + doubled(12) + b"h\x0c" * 10_000 + b"\x90.",
    "a set of a list of many that unfold": b"\x80\x02cbuiltins\nset\n]("
    + doubled(12)
    + b"h\x0c" * 10_000
    + b"e\x85R.",
    "a key nested deep": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("names", [pickles.TORCH_NAMES, pickles.DCP_NAMES], ids=["torch.save", "DCP"])
def test_a_few_bytes_take_no_memory_and_no_time_without_end(bomb, names):
    tracemalloc.start()
    try:
        with pytest.raises((ManifestError, UnsafePickleError)):
            pickles.load(bomb, names, "here", is_of_torch_save=names is pickles.TORCH_NAMES)
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        pytest.param({(1, (2, 3)): [4], "a": {"b": (5,)}}, id="keys that are tuples"),
        pytest.param([(i, i + 1) for i in range(2000)], id="tuples"),
        pytest.param(tuple(range(50_000)), id="a long tuple"),
        pytest.param({"s": {1, 2, 3}, "f": frozenset({(1, 2)}), "c": 1 + 2j}, id="sets"),
        pytest.param([b"x" * 300, bytearray(b"y" * 70_000), "é" * 300, 1 << 3000, -1, 2.5, None, True], id="values"),
    ],
)
def test_what_people_write_is_no_bomb(value, protocol):
    data = pickle.dumps(value, protocol)
    refuse_bombs(memoryview(data))
    assert pickles.load(data, pickles.TORCH_NAMES, "here") == value


def test_a_tuple_in_a_tuple_as_deep_as_allowed_is_no_bomb():
    refuse_bombs(memoryview(b"\x80\x02)" + b"\x85" * (MAX_DEPTH - 1) + b"."))
    with pytest.raises(pickle.UnpicklingError):
        refuse_bombs(memoryview(b"\x80\x02)" + b"\x85" * (MAX_DEPTH + 1) + b"."))


POISONS = {
    "a storage's kind": b"\x80\x02ctorch\nFloatStorage\n]X\x03\x00\x00\x00F64ab.",
    "a dtype": b"\x80\x02ctorch\nfloat32\n]X\x03\x00\x00\x00F64ab.",
    "a function's defaults": b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
    "a function's attributes": b"\x80\x02c_codecs\nencode\n}X\x01\x00\x00\x00a)sb.",
    "a class": b"\x80\x02ctorch.nn.parameter\nParameter\nN}X\x08\x00\x00\x00__init__)s\x86b.",
    "a tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K\x02\x85K\x01\x85tR"
    b"](X\x01\x00\x00\x000X\x03\x00\x00\x00F32J\xff\xff\xff\xffJ\xff\xff\xff\xff\x85K\x01\x85eb.",
}
"""Each builds something of the table, or what that makes, and then gives it a state."""


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_a_pickle_changes_nothing_for_the_next(poison):
    with pytest.raises(ManifestError):
        pickles.load(poison, pickles.TORCH_NAMES, "here", is_of_torch_save=True)
    assert pickles.TORCH_NAMES["torch", "FloatStorage"].dtype == "F32"
    assert pickles.TORCH_NAMES["torch", "float32"].name == "F32"
    fuzz_zip.check(fuzz_zip.archive())


# Where things lie.


@pytest.mark.parametrize(
    ("chunks", "told"),
    [
        pytest.param([((0, 0), (2, 6))], "no chunk holds its element at \\(2, 0\\)", id="a gap"),
        pytest.param([((0, 0), (4, 6)), ((0, 0), (4, 6))], "the same rectangle", id="twice"),
        pytest.param([((1, 0), (4, 6))], "outside its shape", id="outside"),
        pytest.param([((0,), (4,))], "outside its shape", id="other axes"),
    ],
)
def test_chunks_of_another_writer_that_do_not_make_up_their_tensor_are_refused(chunks, told):
    made = tuple(Chunk(offsets, sizes, 0, 0, 0, i) for i, (offsets, sizes) in enumerate(chunks))
    contents = ForeignContents(format="dcp", items=[], entries={"a": TensorEntry("F32", (4, 6), made)})
    with pytest.raises(ManifestError, match=told):
        contents.entry("a")
