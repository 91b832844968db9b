"""Files and pickles of others that lie are refused, or read as they were saved; never anything else."""

import pickle
import struct
import tracemalloc

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt.convert import pickles
from cloudckpt.convert.items import ForeignContents
from cloudckpt.convert.pickle_bombs import MAX_DEPTH, refuse_bombs
from cloudckpt.convert.safetensors import header_range
from cloudckpt.dcp import ObjectStoreReader
from cloudckpt.errors import ManifestError, ObjectNotFoundError, TooLargeError, UnsafePickleError
from cloudckpt.manifest import Chunk, TensorEntry
from fuzz import fuzz_manifest, fuzz_safetensors, fuzz_zip
from fuzz.mutations import HOSTILE, altered_bytes, altered_tree
from fuzz.reading import put, read

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


# What a checkpoint claims may be asked for whole.


ABSURD = 1 << 60
"""Bytes: more than can be addressed, so that no machine has them."""


def absurd_shard(token):
    return {
        "key": f"shards/4a/{token * 32}.safetensors", "size": ABSURD + 312, "crc32c": 0, "frame_size": 1 << 62,
        "frame_checksums": "AAAAAA==", "extensions": [], "frame_sizes": "", "extension_params": [],
    }  # fmt: skip


@pytest.fixture
def absurd():
    """A checkpoint that is possible, and of which there is only the manifest."""
    summary = {
        "format": "cloudckpt", "version": 1, "save_id": "0" * 32, "created": "2026-11-25T00:00:00Z", "writer": "x",
        "step": None, "nbytes": 2 * ABSURD, "stored_nbytes": 2 * ABSURD + 624, "shard_count": 2, "entry_count": 2,
        "chunk_count": 1, "is_tombstone": False,
    }  # fmt: skip
    tensor = ["tensor", "I8", [ABSURD // 16, 16], [[[0, 0], [ABSURD // 16, 16], 0, 312, 312 + ABSURD, 0]]]
    manifest = {
        "summary": summary,
        "metadata": {},
        "planner_paths": {},
        "shards": [absurd_shard("a"), absurd_shard("b")],
        "entries": {"w": tensor, "b": ["bytes", ABSURD, 1, 312, 312 + ABSURD, 0]},
    }
    return put({"manifest.json": fuzz_manifest.resealed_tree(manifest)})


WHOLE = {
    "an array": (lambda ckpt: ckpt["w"][...], "'w'"),
    "every other row": (lambda ckpt: ckpt["w"][::2], "'w'"),
    "rows far apart": (lambda ckpt: ckpt["w"][:: 1 << 20], "'w'"),
    "numpy's own way": (lambda ckpt: np.asarray(ckpt["w"]), "'w'"),
    "a load": (lambda ckpt: ckpt.load("w"), "'w'"),
    "torch": (lambda ckpt: ckpt.to_torch("w"), "'w'"),
    "torch, of another dtype": (lambda ckpt: ckpt.to_torch("w", dtype=torch.float64), "'w'"),
    "bytes": (lambda ckpt: ckpt["b"], "'b'"),
    "a file": (lambda ckpt: ckpt.open_file("w").readall(), "'w'"),
    "much of a file": (lambda ckpt: ckpt.open_file("b").read(ABSURD // 2), "'b'"),
}


@pytest.mark.parametrize(("ask", "named"), WHOLE.values(), ids=WHOLE)
def test_what_no_memory_can_hold_is_refused_by_name_before_anything_is_fetched(absurd, ask, named):
    with cloudckpt.open(absurd) as ckpt:
        with pytest.raises(TooLargeError, match=r"takes \d{12,} bytes.*read it in slices") as caught:
            ask(ckpt)
        assert named in str(caught.value)
        assert ckpt.stats.requests == 0


def test_so_it_is_by_dcp(absurd):
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"b": None}, storage_reader=ObjectStoreReader(absurd), no_dist=True)
    (failure,) = [error for error, _ in caught.value.failures.values()]
    assert isinstance(failure, TooLargeError)
    assert "'b'" in str(failure)


def test_little_of_what_is_absurd_is_asked_for_like_any_other_slice(absurd):
    with cloudckpt.open(absurd) as ckpt:
        assert ckpt["w"][5:1].shape == (0, 16)
        assert ckpt["w"].nbytes == ABSURD
        for ask in (lambda: ckpt["w"][7], lambda: ckpt["w"][:: 1 << 54], lambda: ckpt.open_file("b").read(5)):
            with pytest.raises(ObjectNotFoundError):
                ask()


def test_what_torch_itself_refuses_is_told_as_torch_does(absurd):
    with cloudckpt.open(absurd) as ckpt, pytest.raises(RuntimeError, match="nowhere"):
        ckpt.to_torch("w", device="nowhere")
