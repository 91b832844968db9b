"""Files of torch.save and of stock DCP, planned without torch and opened with it."""

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import replace
from secrets import token_hex

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.serialization import config

import cloudckpt
from cloudckpt.convert.files import Elements, Exported, piece_nbytes
from cloudckpt.convert.pickles import DtypeName, StoredTensor
from cloudckpt.convert.write_pickle import dumps
from cloudckpt.convert.write_stock_dcp import plan_stock_dcp
from cloudckpt.convert.write_torch_file import plan_torch_file
from cloudckpt.convert.write_torch_zip import archive
from cloudckpt.dcp import Checkpointer, ObjectStoreWriter
from cloudckpt.dtypes import DTYPES
from cloudckpt.errors import UnstorableError
from cloudckpt.manifest import BytesEntry, Chunk, TensorEntry, ValueEntry

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

LARGE = 5 << 30


def elements(dtype):
    raw = torch.arange(1, 49, dtype=torch.uint8)
    return (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)


def make_state():
    return {
        "model": {
            "w": torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0)),
            "b": torch.randn(7),
            "types": {d.torch: elements(getattr(torch, d.torch)) for d in DTYPES.values()},
            "layers": [torch.ones(2), {"x": torch.zeros(3), "on": True}],
        },
        "optimizer": {
            "state": {0: {"step": torch.tensor(2.5)}, 1: {"step": torch.tensor(-1.0)}},
            "param_groups": [{"lr": 1e-3, "params": [0, 1]}, {"lr": 0.5, "params": []}],
        },
        "empty": torch.zeros(0, 3),
        "hollow": torch.zeros(3, 0),
        "nothing": {},
        "step": 7,
        "name": "ünï",
        "order": [3, None, "x", [1 << 40, -1]],
    }


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    STATE = make_state()


def equal(one, other):
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert not one.requires_grad
        return one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.fixture
def saved():
    """A checkpoint of `STATE`."""
    root = f"memory://{token_hex(6)}"
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, STATE)
    with cloudckpt.open(f"{root}/step-1") as checkpoint:
        yield checkpoint


def exported_of(checkpoint):
    contents = checkpoint._access.contents
    entries = {key: contents.entry(key) for key in checkpoint}
    return Exported(entries=entries, metadata=checkpoint.metadata, planner_paths=contents.planner_paths)


def write(plans, directory, checkpoint):
    """The files, made of what the plans ask for."""
    directory.mkdir(exist_ok=True)
    for plan in plans:
        (directory / plan.name).write_bytes(b"".join(data_of(piece, checkpoint) for piece in plan.pieces))
    return directory


def data_of(piece, checkpoint):
    if isinstance(piece, bytes):
        return piece
    with checkpoint.open_file(piece.key) as file:
        data = file.readall()
    if piece.region is None:
        return data
    array = checkpoint[piece.key]
    numbers = np.frombuffer(data, np.uint8).reshape(*array.shape, DTYPES[array.dtype_name].itemsize)
    at = zip(piece.region.offsets, piece.region.sizes, strict=True)
    return numbers[tuple(slice(start, start + n) for start, n in at)].tobytes()


def in_chunks(entry, *rows):
    """The tensor, as if several ranks had saved it, one of which had nothing of it."""
    inner = entry.shape[1:]
    starts = [sum(rows[:i]) for i in range(len(rows))]
    chunks = [Chunk((s, *(0 for _ in inner)), (n, *inner), 0, 0, 0, 0) for s, n in zip(starts, rows, strict=True)]
    return msgspec.structs.replace(entry, chunks=tuple(chunks))


def tensor_entry(dtype, *shape):
    return TensorEntry(dtype, shape, (Chunk((0,) * len(shape), shape, 0, 0, 0, 0),))


def alone(**entries):
    return Exported(entries=entries, metadata={}, planner_paths=None)


@pytest.mark.parametrize("how", ["read", "mapped", "calculated"])
def test_a_planned_file_of_torch_save_opens_as_the_state_dict_that_was_saved(saved, tmp_path, how):
    (plan,) = plan_torch_file(exported_of(saved), "all.pt")
    write([plan], tmp_path, saved)
    with config.patch({"load.calculate_storage_offsets": how == "calculated"}):
        assert equal(torch.load(tmp_path / "all.pt", mmap=how != "read", weights_only=True), STATE)


def test_a_planned_file_of_torch_save_names_what_torch_names(saved, tmp_path):
    (plan,) = plan_torch_file(exported_of(saved), "ours.pt")
    write([plan], tmp_path, saved)
    torch.save(STATE, tmp_path / "torchs.pt")
    ours, torchs = (set(names_in(tmp_path / name)) for name in ("ours.pt", "torchs.pt"))
    assert ours == torchs
    assert all(piece_nbytes(piece, exported_of(saved).entries) for piece in plan.pieces)


def names_in(path):
    with zipfile.ZipFile(path) as file:
        pickled = file.read(file.namelist()[0])
    return (name for op, name, _ in pickletools.genops(pickled) if op.name == "GLOBAL")


def test_a_planned_file_of_torch_save_is_read_without_torch_too(saved, tmp_path):
    write(plan_torch_file(exported_of(saved), "all.pt"), tmp_path, saved)
    with cloudckpt.open(f"file://{tmp_path}/all.pt") as again:
        assert again["order"] == STATE["order"]
        for key in saved:
            if isinstance(saved[key], cloudckpt.Array):
                with saved.open_file(key) as one, again.open_file(key) as other:
                    assert (again[key].shape, other.readall()) == (saved[key].shape, one.readall())


def test_the_archive_is_laid_out_as_torch_does_it_to_the_byte(tmp_path):
    sizes = [12, 0, 2, LARGE, 8, 0, 100]
    path = tmp_path / "archive.pt"
    with torch.serialization.skip_data():
        torch.save([torch.empty(n, dtype=torch.uint8) for n in sizes], path)
    with zipfile.ZipFile(path) as file:
        texts = archive(file.read("archive/data.pkl"), sizes)
    with path.open("rb") as file:
        for text, nbytes in zip(texts, [*sizes, 0], strict=True):
            assert but_for_identity(text) == but_for_identity(file.read(len(text)))
            file.seek(nbytes, 1)
        assert not file.read()


def but_for_identity(text):
    """Without the digits that say which archive it is, and their checksum."""
    for digits in re.findall(rb"\d{40}", text):
        text = text.replace(digits, b"").replace(struct.pack("<L", zlib.crc32(digits)), b"")
    return text


def test_a_planned_file_beyond_4_gib_opens(tmp_path):
    entries = {
        "head": tensor_entry("U8", 3),
        "body": tensor_entry("BF16", LARGE // 2),
        "tail": tensor_entry("I32", 2),
    }
    (plan,) = plan_torch_file(alone(**entries), "large.pt")
    path = tmp_path / plan.name
    ends = {"head": b"abc", "tail": struct.pack("<2i", -5, 7)}
    with path.open("wb") as file:
        for piece in plan.pieces:
            if piece == Elements("body"):
                file.seek(LARGE, 1)
            else:
                file.write(piece if isinstance(piece, bytes) else ends[piece.key])
    with zipfile.ZipFile(path) as archived:
        assert archived.getinfo("archive/data/1").file_size == LARGE
        assert archived.read("archive/version") == b"3\n"
    loaded = torch.load(path, mmap=True, weights_only=True)
    assert bytes(loaded["head"].tolist()) == b"abc"
    assert (loaded["body"].shape, loaded["body"][-1].item()) == ((LARGE // 2,), 0)
    assert loaded["tail"].tolist() == [-5, 7]


def test_an_archive_of_more_records_than_16_bits_count_opens(tmp_path):
    path = tmp_path / "many.pt"
    path.write_bytes(b"".join(archive(dumps({"a": 1}), [0] * 65_536)))
    with zipfile.ZipFile(path) as archived:
        assert archived.namelist()[4 + 65_535] == "archive/data/65535"
    assert path.read_bytes()[-14:-10] == b"\xff" * 4  # the counts that 16 bits have room for, as torch has them
    assert torch.load(path, weights_only=True) == {"a": 1}


def test_members_that_were_left_out_leave_none_in_lists_and_nothing_in_mappings(saved, tmp_path):
    exported = exported_of(saved)
    chosen = [key for key in saved if "lr" in key or "keys" in key or "state.1" in key]
    some = replace(exported, entries={key: exported.entries[key] for key in chosen if ".0.lr" not in key})
    write(plan_torch_file(some, "some.pt"), tmp_path, saved)
    assert torch.load(tmp_path / "some.pt", weights_only=True) == {
        "optimizer": {"state": {1: {"step": torch.tensor(-1.0)}}, "param_groups": [None, {"lr": 0.5}]}
    }


@pytest.mark.parametrize(
    ("paths", "loaded"),
    [
        (None, {"a.b": 1, "c": 2}),
        ({}, {"a.b": 1, "c": 2}),
        ({"a.b": ("a", "b")}, {"a": {"b": 1}, "c": 2}),
        ({"a.b": (0,), "c": (1, "x")}, [1, {"x": 2}]),
    ],
    ids=["no-planner", "all-at-the-top", "some-nested", "a-list"],
)
def test_values_stand_where_their_paths_say(tmp_path, paths, loaded):
    exported = replace(alone(**{"a.b": ValueEntry(1), "c": ValueEntry(2)}), planner_paths=paths)
    write(plan_torch_file(exported, "values.pt"), tmp_path, None)
    assert torch.load(tmp_path / "values.pt", weights_only=True) == loaded


def test_an_object_without_a_path_is_the_file(tmp_path):
    exported = replace(alone(data=ValueEntry([1, 2])), planner_paths={"data": ()})
    write(plan_torch_file(exported, "values.pt"), tmp_path, None)
    assert torch.load(tmp_path / "values.pt", weights_only=True) == [1, 2]


def deep(n):
    value = 0
    for _ in range(n):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("entries", "paths", "names"),
    [
        ({"b": BytesEntry(1, 0, 0, 1, 0)}, {}, "'b'.*--only"),
        ({"q": tensor_entry("qint8", 2)}, {}, "'q'.*qint8"),
        ({"a": ValueEntry(1), "v": ValueEntry((StoredTensor("0", "F32", 0, (), ()),))}, {}, "'v'.*StoredTensor"),
        ({"v": ValueEntry(deep(2000))}, {}, "'v'.*deep"),
        ({"v": ValueEntry(1 << 2100)}, {}, "'v'.*large"),
        ({"a": ValueEntry({}), "a.b": ValueEntry(1)}, {"a.b": ("a", "b")}, "'a.b'"),
        ({"a.b": ValueEntry(1), "a": ValueEntry({})}, {"a.b": ("a", "b")}, "'a'"),
        ({"x": ValueEntry(1), "y": ValueEntry(1)}, {"x": ("l", 0), "y": ("l", "0")}, "'y'"),
        ({"x": ValueEntry(1)}, {"x": ("l", -1)}, "'x'"),
        ({"x": ValueEntry(1)}, {"x": ("l",) * 1000}, "'x'"),
        ({"x": ValueEntry(1)}, {"x": ("l", 1 << 21)}, "lack 2097152 members"),
    ],
    ids=[
        "bytes", "dtype", "object", "deep-value", "large-number", "below-a-leaf", "over-a-branch", "name-in-a-list",
        "negative", "deep-path", "holes",
    ],
)  # fmt: skip
def test_what_a_file_of_torch_save_has_no_place_for_is_refused_by_name(entries, paths, names):
    with pytest.raises(UnstorableError, match=names):
        plan_torch_file(replace(alone(**entries), planner_paths=paths), "none.pt")


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        (tensor_entry("qint8", 2), "'q'.*qint8"),
        (ValueEntry([StoredTensor("0", "F32", 0, (), ())]), "'q'.*StoredTensor"),
    ],
)
def test_what_dcp_has_no_place_for_is_refused_by_name(entry, names):
    with pytest.raises(UnstorableError, match=names):
        plan_stock_dcp(alone(q=entry))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
    ),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(PLAIN)
def test_plain_values_come_out_of_their_pickle_the_same(value):
    assert repr(pickle.loads(dumps(value))) == repr(value)


def test_torch_loads_all_plain_values_safely(tmp_path):
    names = [f"name {i}" for i in range(300)]
    kinds = [{1, 2}, 1j, bytearray(b"x"), b"\xff\0", OrderedDict(a=1), {2: 3}, (), (1,), (1, 2, 3, 4), "\ud800"]
    value = [*names, *names, *kinds, 1 << 90, -300, float("inf")]
    path = tmp_path / "values.pt"
    path.write_bytes(archive(dumps([*value, DtypeName("BF16"), DtypeName("qint8")]), ())[0])
    assert torch.load(path, weights_only=True) == [*value, torch.bfloat16, torch.qint8]
    assert pickle.loads(dumps(frozenset("ab"))) == frozenset("ab")


def dcp_state():
    """What DCP itself would keep of `STATE`."""
    state = {key: value for key, value in STATE.items() if key not in ("optimizer", "nothing")}
    return state | {"bytes": (1, 2), "few": torch.arange(30.0).reshape(10, 3)}


@pytest.fixture
def stock(tmp_path):
    """A checkpoint of `dcp_state` in several chunks and files, and where stock DCP has it."""
    url = f"memory://{token_hex(6)}"
    dcp.save(dcp_state(), storage_writer=ObjectStoreWriter(url))
    with cloudckpt.open(url) as checkpoint:
        exported = exported_of(checkpoint)
        entries = dict(exported.entries)
        entries["few"] = in_chunks(entries["few"], 4, 0, 3, 3)
        entries["model.w"] = in_chunks(entries["model.w"], 1, 5)
        entries["empty"] = in_chunks(entries["empty"], 0, 0)
        entries["inline"] = ValueEntry({"a": [1, 2.5]})
        plans = plan_stock_dcp(replace(exported, entries=entries), max_file_nbytes=8000)
        yield write(plans, tmp_path / "stock", checkpoint), plans


def test_a_planned_checkpoint_of_stock_dcp_loads(stock):
    directory, plans = stock
    state = {**dcp_state(), "inline": None, "step": 0, "bytes": None}
    for key in ("few", "empty", "hollow"):
        state[key] = torch.full_like(state[key], 9)
    state["model"] = {**state["model"], "w": torch.zeros(6, 5, 4)}
    dcp.load(state, storage_reader=FileSystemReader(directory))
    assert equal(state["few"], dcp_state()["few"])
    assert equal(state["model"], STATE["model"])
    assert (state["inline"], state["bytes"], state["step"]) == ({"a": [1, 2.5]}, (1, 2), 7)
    assert plans[-1].name == ".metadata"
    assert len(plans) > 3
    assert all(plan.pieces and b"" not in plan.pieces for plan in plans)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_loads_its_shards_of_it(stock, rank):
    directory, _ = stock
    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        sharded = DTensor.from_local(torch.zeros(5, 3), mesh, [Shard(0)], run_check=False)
        dcp.load({"few": sharded}, storage_reader=FileSystemReader(directory), no_dist=True)
        assert sharded.to_local().equal(torch.arange(30.0).reshape(10, 3)[5 * rank : 5 * rank + 5])
    finally:
        dist.destroy_process_group()


def test_torch_makes_a_nested_file_of_it(stock, tmp_path):
    directory, _ = stock
    dcp_to_torch_save(directory, tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt", weights_only=True)
    assert loaded.pop("inline") == {"a": [1, 2.5]}
    wanted = dcp_state()
    assert {key: equal(loaded[key], wanted[key]) for key in loaded} == dict.fromkeys(wanted, True)


def test_its_metadata_is_what_torch_writes(stock, tmp_path):
    directory, _ = stock
    dcp.save(dcp_state(), storage_writer=FileSystemWriter(tmp_path / "torch", sync_files=False))
    ours, torchs = (FileSystemReader(path).read_metadata() for path in (directory, tmp_path / "torch"))
    cut = {"few", "model.w"}
    assert set(ours.state_dict_metadata) - set(torchs.state_dict_metadata) == {"inline"}
    for key, meta in torchs.state_dict_metadata.items():
        assert key in cut or ours.state_dict_metadata[key] == meta
    whole = {index for index in torchs.storage_data if index.fqn not in cut}
    assert {index for index in ours.storage_data if index.fqn not in cut | {"inline"}} == whole
    assert {ours.planner_data.pop("inline"), ours.version} == {("inline",), torchs.version}
    assert ours.planner_data == torchs.planner_data


def test_it_is_read_without_torch_too(stock):
    directory, _ = stock
    with cloudckpt.open(f"file://{directory}") as again:
        assert again.format == "dcp"
        assert again["few"][3:8].tolist() == torch.arange(30.0).reshape(10, 3)[3:8].tolist()
        assert [len(again._access.contents.entry(key).chunks) for key in ("few", "empty")] == [3, 1]


def test_paths_that_begin_with_a_number_begin_with_a_name_in_stock_dcp(tmp_path):
    exported = replace(
        alone(**{"0.a": ValueEntry(1), "data": ValueEntry(2)}), planner_paths={"0.a": (0, "a"), "data": ()}
    )
    write(plan_stock_dcp(exported), tmp_path / "stock", None)
    dcp_to_torch_save(tmp_path / "stock", tmp_path / "all.pt")
    assert torch.load(tmp_path / "all.pt", weights_only=True) == {"0": {"a": 1}, "data": 2}
