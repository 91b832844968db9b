"""Checkpoints that torch's own DCP writers wrote, read by the slice."""

import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from secrets import token_hex

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

import cloudckpt
from cloudckpt import errors
from cloudckpt.dcp import ObjectStoreReader
from cloudckpt.dtypes import DTYPES
from cloudckpt.testing import Rot13, get_test_extension_registry

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")

BIG = (700, 1024)
"""Of float32: larger than what is fetched whole and taken apart in memory."""


def big(seed):
    return torch.randn(*BIG, generator=torch.Generator().manual_seed(seed))


def elements(dtype):
    raw = torch.arange(1, 49, dtype=torch.uint8)
    return (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)


def make_state():
    small = {f"dtype-{d.torch}": elements(getattr(torch, d.torch)) for d in DTYPES.values()}
    return {
        "model": {"a": big(0), "b": big(1), "c": big(2), "bf": big(3).bfloat16(), "turned": big(4).t()},
        "small": small,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "rows": torch.arange(40.0).reshape(10, 4)[2:7],
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "step": 3,
        "names": ["x", "y"],
        "mixed": [1, torch.full((2,), 5.0)],
    }


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    STATE = make_state()


def flat(state, path=()):
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        here = (*path, str(key))
        opened = isinstance(value, dict) or (isinstance(value, list) and any(map(torch.is_tensor, value)))
        if opened:
            yield from flat(value, here)
        else:
            yield ".".join(here), value


def raw(value):
    tensor = value.detach().contiguous() if torch.is_tensor(value) else torch.from_numpy(np.ascontiguousarray(value))
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def write(directory, state=None, **options):
    writer = FileSystemWriter(directory, sync_files=False, **options)
    dcp.save(STATE if state is None else state, storage_writer=writer, no_dist=True)
    return f"file://{directory}"


@pytest.fixture(scope="module", params=["stored", "zstd"])
def url(request, tmp_path_factory):
    extensions = {"_extensions": [ZStandard()]} if request.param == "zstd" else {}
    return write(tmp_path_factory.mktemp("stock") / "ckpt", **extensions)


def test_it_looks_as_one_of_ours_does(url):
    with cloudckpt.open(url) as ckpt:
        assert ckpt.format == "dcp"
        assert set(ckpt) == dict(flat(STATE)).keys()
        assert ckpt["model.a"].shape == BIG
        assert ckpt["model.bf"].nbytes == 700 * 1024 * 2
        assert (ckpt.summary, ckpt.metadata) == (None, {})
        assert ckpt.match("model.?") == ["model.a", "model.b", "model.c"]


def test_every_tensor_comes_back_bit_for_bit(url):
    with cloudckpt.open(url) as ckpt:
        for key, value in flat(STATE):
            if torch.is_tensor(value):
                with ckpt.open_file(key) as file:
                    assert file.read() == raw(value), key


def test_what_is_no_tensor_is_the_bytes_that_torch_saved(url):
    with cloudckpt.open(url) as ckpt:
        assert torch.load(io.BytesIO(ckpt["step"]), weights_only=True) == 3
        with ckpt.open_file("names") as file:
            assert torch.load(file, weights_only=True) == ["x", "y"]


SLICES = [
    np.s_[3:5], np.s_[-1], np.s_[::-350, 5:900:7], np.s_[10:20, 1000:], np.s_[..., 3], np.s_[699, 1023],
    np.s_[100:100], np.s_[5:600:100],
]  # fmt: skip


@pytest.mark.parametrize("index", SLICES, ids=repr)
@pytest.mark.parametrize("key", ["a", "turned"])
def test_slices_are_those_of_the_tensor(url, key, index):
    with cloudckpt.open(url) as ckpt:
        expected = STATE["model"][key].numpy()
        index = index if key == "a" else index[::-1] if isinstance(index, tuple) and Ellipsis not in index else index
        np.testing.assert_array_equal(ckpt[f"model.{key}"][index], expected[index])


def test_dcp_loads_it_through_our_reader(url):
    target = dict(flat(STATE))
    state = {k: torch.zeros_like(v) if torch.is_tensor(v) else None for k, v in target.items()}
    reader = ObjectStoreReader(url)
    dcp.load(state, storage_reader=reader, no_dist=True)
    for key, value in target.items():
        assert (raw(state[key]) == raw(value)) if torch.is_tensor(value) else state[key] == value, key


def test_nested_state_dicts_load_as_they_were_saved(url):
    state = {"model": {"a": torch.zeros(BIG)}, "step": 0, "mixed": [0, torch.zeros(2)]}
    dcp.load(state, storage_reader=ObjectStoreReader(url), no_dist=True)
    assert torch.equal(state["model"]["a"], STATE["model"]["a"])
    assert (state["step"], state["mixed"][1].tolist()) == (3, [5.0, 5.0])


def test_rows_cost_the_rows_and_what_torch_put_around_them(tmp_path):
    url = write(tmp_path / "x")
    with cloudckpt.open(url) as ckpt:
        ckpt["model.a"][300:340]
        needed = 40 * 4096
        assert ckpt.stats.bytes_needed == needed
        assert ckpt.stats.bytes_fetched <= 1.05 * needed
        assert ckpt.stats.requests == 3
        ckpt["model.a"][5:6]
        assert (ckpt.stats.requests, ckpt.stats.bytes_needed) == (4, needed + 4096)


def test_layouts_that_are_alike_are_looked_at_once(tmp_path):
    state = {f"w{i}": big(i) for i in range(8)}
    reader = ObjectStoreReader(write(tmp_path / "x", state), max_request_size=3 << 20)
    loaded = {key: torch.zeros(BIG) for key in state}
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert reader.stats.requests <= 8 + 2
    assert reader.stats.bytes_needed == sum(t.nbytes for t in state.values())
    assert reader.stats.bytes_fetched <= 1.01 * reader.stats.bytes_needed


def test_items_of_other_sizes_are_guessed_from_one_another(tmp_path):
    shapes = [(700, 1024), (900, 1024), (600, 512), (701, 1023), (600, 1000), (3, 400000), (2, 2), (800, 512)]
    state = {f"w{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    url = write(tmp_path / "x", state)
    for keys in (list(state), list(reversed(state))):
        loaded = {key: torch.zeros_like(state[key]) for key in keys}
        reader = ObjectStoreReader(url)
        dcp.load(loaded, storage_reader=reader, no_dist=True)
        assert all(torch.equal(loaded[key], state[key]) for key in keys)
        assert reader.stats.bytes_fetched <= 1.01 * sum(t.nbytes for t in state.values())
        assert reader.stats.bytes_needed == sum(t.nbytes for t in state.values())  # read once


def rewritten(tmp_path, change, state=None):
    """A checkpoint whose items were changed by ``change(key, archive bytes) -> archive bytes``."""
    directory = tmp_path / token_hex(4)
    write(directory, state)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    made, infos = bytearray(), {}
    for index, info in metadata.storage_data.items():
        data = (directory / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        data = change(index.fqn, data)
        infos[index] = _StorageInfo("__0_0.distcp", len(made), len(data))
        made += data
    metadata.storage_data = infos
    (directory / "__0_0.distcp").write_bytes(made)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return f"file://{directory}"


def zipped(data, compression=zipfile.ZIP_STORED, skip=(), first=()):
    """The same archive, written anew."""
    old, made = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(made, "w") as new:
        infos = sorted(old.infolist(), key=lambda i: not any(name in i.filename for name in first))
        for info in infos:
            if not any(name in info.filename for name in skip):
                new.writestr(zipfile.ZipInfo(info.filename), old.read(info), compression)
    return made.getvalue()


def test_elements_that_lie_elsewhere_than_guessed_are_found(tmp_path):
    """Of archives with equal bytes around their elements, one has them elsewhere."""

    def change(key, data):
        at_front = key in {"w3", "w5"}
        return zipped(data, first=("data/0",) if at_front else ())

    state = {f"w{i}": big(i) for i in range(8)}
    url = rewritten(tmp_path, change, state)
    loaded = {key: torch.zeros(BIG) for key in state}
    reader = ObjectStoreReader(url)
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    for key, value in state.items():
        assert torch.equal(loaded[key], value), key
    with cloudckpt.open(url) as ckpt:
        into = {key: np.zeros(BIG, np.float32) for key in state}
        ckpt.load(into=into)
        assert all((into[key] == state[key].numpy()).all() for key in state)
        assert (ckpt["w5"][7] == state["w5"][7].numpy()).all()


def misplaced(data):
    """The directory says that the elements begin 64 bytes later than they do."""
    at = data.rindex(b"PK\1\2", 0, data.rindex(b"archive/data/0"))
    offset = int.from_bytes(data[at + 42 : at + 46], "little")
    return data[: at + 42] + (offset + 64).to_bytes(4, "little") + data[at + 46 :]


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


BROKEN = {
    "a compressed record": (lambda d: zipped(d, zipfile.ZIP_DEFLATED), "compressed"),
    "a misplaced record": (misplaced, "not where its directory says"),
    "a record too few": (lambda d: zipped(d, skip=("data/0",)), "no record data/0|fewer than"),
    "no pickle": (lambda d: zipped(d, skip=("data.pkl",)), "no record data.pkl"),
    "another byte order": (lambda d: d.replace(b"little", b"bigger"), "byte order"),
    "its end is missing": (lambda d: d[:-100], "no zip archive"),
    "no archive": (lambda d: bytes(len(d)), "no zip archive"),
    "nothing": (lambda d: b"", "fewer than|no zip archive"),
    "another shape": (lambda d: saved(torch.zeros(1024, 700)), "where the metadata has"),
    "another dtype": (lambda d: saved(torch.zeros(BIG, dtype=torch.int32)), "where the metadata has"),
    "not a tensor": (lambda d: saved([1, 2]), "where the metadata has|fewer than"),
}


@pytest.mark.parametrize("size", [BIG, (30, 4)], ids=["large", "small"])
@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_item_is_told_with_its_place_and_fails_alone(tmp_path, change, message, size):
    state = {"good": torch.ones(5), "bad": torch.zeros(size)}
    url = rewritten(tmp_path, lambda key, data: change(data) if key == "bad" else data, state)
    with cloudckpt.open(url) as ckpt:
        assert ckpt["good"][...].tolist() == [1.0] * 5
        for index in (np.s_[3:5], np.s_[...]):
            with pytest.raises(errors.IntegrityError, match=message) as told:
                ckpt["bad"][index]
            assert "bad" in f"{told.value} {getattr(told.value, '__notes__', '')}"
    with pytest.raises(CheckpointException, match=message):
        dcp.load({"bad": torch.zeros(size)}, storage_reader=ObjectStoreReader(url), no_dist=True)


@pytest.mark.parametrize("chain", ["zr", "rz", "zz"])
def test_chains_of_extensions_are_undone_in_reverse(tmp_path, chain):
    kinds = {"z": ZStandard, "r": Rot13}
    directory = tmp_path / "x"
    write(directory, {"w": big(0), "step": 5}, _extensions=[kinds[c]() for c in chain])
    with cloudckpt.open(f"file://{directory}", registry=get_test_extension_registry()) as ckpt:
        assert (ckpt["w"][3:5] == big(0).numpy()[3:5]).all()
        assert torch.load(io.BytesIO(ckpt["step"]), weights_only=True) == 5


def test_an_extension_that_is_not_registered_is_named(tmp_path):
    directory = tmp_path / "x"
    write(directory, {"w": big(0)}, _extensions=[Rot13()])
    with cloudckpt.open(f"file://{directory}") as ckpt, pytest.raises(errors.CheckpointError, match="rot13"):
        ckpt["w"][3]


def test_a_file_that_is_missing_or_cut_short_is_told(tmp_path):
    url = write(tmp_path / "x", {"w": big(0)})
    file = tmp_path / "x" / "__0_0.distcp"
    with cloudckpt.open(url) as ckpt:
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(errors.StoreError, match=r"__0_0\.distcp"):
            ckpt["w"][600:]
        file.unlink()
        with pytest.raises(errors.ObjectNotFoundError, match=r"__0_0\.distcp"):
            ckpt["w"][1:3]


class Touch:
    """What a pickle must not do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_metadata_that_names_a_function_is_refused_and_the_function_never_run(tmp_path):
    write(tmp_path / "x", {"w": torch.ones(3)})
    metadata = pickle.loads((tmp_path / "x" / ".metadata").read_bytes())
    metadata.planner_data = Touch(tmp_path / "made")
    evil = pickle.dumps(metadata)
    (tmp_path / "x" / ".metadata").write_bytes(evil)
    with pytest.raises(errors.UnsafePickleError, match=r"posix\.mkdir"):
        cloudckpt.open(f"file://{tmp_path}/x")
    with pytest.raises(CheckpointException, match=r"posix\.mkdir"):
        dcp.load({"w": torch.ones(3)}, storage_reader=ObjectStoreReader(f"file://{tmp_path}/x"), no_dist=True)
    assert not (tmp_path / "made").exists()
    pickle.loads(evil)  # it would have
    assert (tmp_path / "made").exists()


def test_an_item_that_names_a_function_is_refused_and_the_function_never_run(tmp_path):
    def change(_, data):
        evil = zipped(data, skip=("data.pkl",))
        buffer = io.BytesIO(evil)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Touch(tmp_path / "made"), protocol=2))
        return buffer.getvalue()

    url = rewritten(tmp_path, change, {"w": big(0), "small": torch.ones(3)})
    with cloudckpt.open(url) as ckpt:
        for key in ("w", "small"):
            with pytest.raises(errors.UnsafePickleError, match=r"posix\.mkdir|nt\.mkdir"):
                ckpt[key][1]
            with pytest.raises(errors.UnsafePickleError, match=r"posix\.mkdir|nt\.mkdir"):
                ckpt[key][...]
    assert not (tmp_path / "made").exists()


def altered(metadata, **state):
    for name, value in state.items():
        setattr(metadata, name, value)
    return metadata


def index_of(fqn):
    return MetadataIndex(fqn, (0,))


WRONG = {
    "no pickle": (lambda m: b"hello", "not sound"),
    "cut short": (lambda m: pickle.dumps(m)[:-20], "not sound"),
    "something else": (lambda m: pickle.dumps([1, 2]), "not DCP's Metadata"),
    "no places": (lambda m: pickle.dumps(altered(m, storage_data={})), "does not say where 'w'"),
    "no storage data": (lambda m: pickle.dumps(altered(m, storage_data=None)), "not laid out"),
    "a file elsewhere": (
        lambda m: pickle.dumps(altered(m, storage_data={index_of("w"): _StorageInfo("../x", 0, 10)})),
        "lies elsewhere",
    ),
    "a file at the root": (
        lambda m: pickle.dumps(altered(m, storage_data={index_of("w"): _StorageInfo("/etc/passwd", 0, 10)})),
        "lies elsewhere",
    ),
    "a negative place": (
        lambda m: pickle.dumps(altered(m, storage_data={index_of("w"): _StorageInfo("a", -1, 10)})), "names bytes",
    ),
    "entries of another kind": (lambda m: pickle.dumps(Metadata({"w": 3}, storage_data={})), "not laid out"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_a_metadata_that_cannot_be_is_refused(tmp_path, make, message):
    write(tmp_path / "x", {"w": torch.ones(3)})
    file = tmp_path / "x" / ".metadata"
    file.write_bytes(make(pickle.loads(file.read_bytes())))
    with pytest.raises(errors.ManifestError, match=message):
        cloudckpt.open(f"file://{tmp_path}/x")


def test_a_save_that_never_finished_is_told_apart(tmp_path):
    write(tmp_path / "x", {"w": torch.ones(3)})
    (tmp_path / "x" / ".metadata").unlink()
    with pytest.raises(errors.NotCommittedError, match="never finished"):
        cloudckpt.open(f"file://{tmp_path}/x")


def test_zstd_that_was_damaged_or_restores_to_too_much_is_refused(tmp_path):
    directory = tmp_path / "x"
    write(directory, {"w": big(0)}, _extensions=[ZStandard()])
    file = directory / "__0_0.distcp"
    data = file.read_bytes()
    for damaged in (bytes(100) + data[100:], data[:-300] + bytes(300), data[: len(data) // 2] * 2):
        file.write_bytes(damaged[: len(data)].ljust(len(data), b"\0"))
        with cloudckpt.open(f"file://{directory}") as ckpt, pytest.raises(errors.IntegrityError, match="'w'"):
            ckpt["w"][0]
    import zstandard

    metadata = pickle.loads((directory / ".metadata").read_bytes())
    bomb = zstandard.compress(bytes(64 << 20))
    file.write_bytes(bomb)
    metadata.storage_data = {k: _StorageInfo(i.relative_path, 0, len(bomb), i.transform_descriptors)
                             for k, i in metadata.storage_data.items()}  # fmt: skip
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with cloudckpt.open(f"file://{directory}") as ckpt, pytest.raises(errors.IntegrityError, match="more than the"):
        ckpt["w"][0]


def test_require_seal_refuses_it(tmp_path):
    with pytest.raises(errors.IntegrityError, match="no seal"):
        cloudckpt.open(write(tmp_path / "x", {"w": torch.ones(3)}), require_seal=True)


def test_one_written_over_s3fs_is_read_from_the_bucket_without_torch(server, s3, root):
    options = {"key": s3["access_key_id"], "secret": s3["secret_access_key"], "endpoint_url": s3["endpoint_url"]}
    state = {"w": big(0), "step": 4}
    dcp.save(state, storage_writer=FsspecWriter(root, sync_files=False, **options), no_dist=True)
    script = f"""
import sys
import cloudckpt
with cloudckpt.open({root!r}, **{s3!r}) as ckpt:
    assert ckpt["w"][3:5, 10].tolist() == {state["w"][3:5, 10].tolist()!r}
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    loaded = {"w": torch.zeros(BIG), "step": 0}
    dcp.load(loaded, storage_reader=ObjectStoreReader(root, **s3), no_dist=True)
    assert torch.equal(loaded["w"], state["w"])
    assert loaded["step"] == 4
