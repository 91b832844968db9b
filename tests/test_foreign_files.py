"""Files of safetensors and of torch.save, read by the slice."""

import argparse
import io
import json
import os
import struct
import zipfile
from secrets import token_hex

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt import errors
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.dtypes import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


def elements(dtype):
    raw = torch.arange(1, 49, dtype=torch.uint8)
    return (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# safetensors


WEIGHTS = {
    **{f"dtype-{d.torch}": elements(getattr(torch, d.torch)) for d in DTYPES.values() if d.is_safetensors},
    "grid": torch.arange(6 * 7 * 8, dtype=torch.int32).reshape(6, 7, 8),
    "large": torch.randn(600, 1000),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(1.5),
}


@pytest.fixture
def file(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.fixture
def sharded(tmp_path):
    """As Hugging Face's libraries lay a large model out."""
    files = {name: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, name in enumerate(WEIGHTS)}
    for made in set(files.values()):
        safetensors.torch.save_file({n: WEIGHTS[n] for n, f in files.items() if f == made}, tmp_path / made)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def check_weights(url):
    with cloudckpt.open(url) as ckpt:
        assert ckpt.format == "safetensors"
        assert set(ckpt) == set(WEIGHTS)
        for name, tensor in WEIGHTS.items():
            with ckpt.open_file(name) as view:
                assert view.read() == raw(tensor), name
        np.testing.assert_array_equal(ckpt["grid"][1:5:2, ..., -3:], WEIGHTS["grid"].numpy()[1:5:2, ..., -3:])
        assert ckpt["dtype-bfloat16"].dtype == ml_dtypes.bfloat16


def test_a_file_of_safetensors_is_read(file):
    check_weights(f"file://{file}")
    with cloudckpt.open(f"file://{file}") as ckpt:
        assert ckpt.metadata == {"format": "pt"}
        ckpt["large"][100:110]
        assert (ckpt.stats.requests, ckpt.stats.bytes_fetched, ckpt.stats.bytes_needed) == (1, 40000, 40000)


def test_a_directory_with_one_file_is_that_file(file):
    check_weights(f"file://{file.parent}")


def test_a_sharded_model_is_one_checkpoint(sharded):
    check_weights(f"file://{sharded}")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
    dcp.load(loaded, storage_reader=ObjectStoreReader(f"file://{sharded}"), no_dist=True)
    assert all(raw(loaded[name]) == raw(tensor) for name, tensor in WEIGHTS.items())


def test_a_long_header_is_read_whole(tmp_path):
    many = {f"layers.{i}.a.rather.long.name.for.a.weight": torch.full((2,), i) for i in range(1000)}
    safetensors.torch.save_file(many, tmp_path / "m.safetensors")
    with cloudckpt.open(f"file://{tmp_path}/m.safetensors") as ckpt:
        assert len(ckpt) == 1000
        assert ckpt["layers.777.a.rather.long.name.for.a.weight"][...].tolist() == [777, 777]


def header_of(tensors, data=bytes(24), length=None):
    text = json.dumps(tensors).encode() if not isinstance(tensors, bytes) else tensors
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def spec(start, stop, dtype="F32", shape=(3,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


LIES = {
    "offsets beyond the file": (header_of({"a": spec(0, 12), "b": spec(12, 1000, shape=(247,))}), "ends at 1000"),
    "a hole": (header_of({"a": spec(0, 12), "b": spec(16, 28)}, bytes(28)), "a hole, or an overlap"),
    "an overlap": (header_of({"a": spec(0, 12), "b": spec(8, 20)}, bytes(20)), "a hole, or an overlap"),
    "a size that is not its shape's": (header_of({"a": spec(0, 24)}), "has 24 bytes"),
    "a start after its stop": (header_of({"a": spec(12, 0, shape=(0,))}), "not sound"),
    "bytes that belong to nothing": (header_of({"a": spec(0, 12)}), "end at 12 of 24"),
    "a negative shape": (header_of({"a": spec(0, 24, shape=(-2, -3))}), "has the shape"),
    "a header longer than the file": (header_of({}, length=10**6), "claims a header of"),
    "a header of no length": (header_of({}, length=0), "claims a header of"),
    "a header longer than the format allows": (header_of({}, length=2**63), "claims a header of"),
    "no JSON": (header_of(b"{nonsense"), "not that of a safetensors file"),
    "JSON of another kind": (header_of([1, 2]), "not that of a safetensors file"),
    "offsets of another kind": (header_of({"a": {**spec(0, 24), "data_offsets": "all"}}), "not that of a"),
    "nothing at all": (b"", "claims a header of"),
    "less than a length": (b"abc", "claims a header of"),
}


@pytest.mark.parametrize(("data", "message"), LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused_before_anything_is_planned_from_it(tmp_path, data, message):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(errors.ManifestError, match=message):
        cloudckpt.open(f"file://{tmp_path}/m.safetensors")


INDICES = {
    "a file elsewhere": ({"weight_map": {"a": "../m.safetensors"}}, errors.ManifestError, "names a file"),
    "a tensor that is not there": ({"weight_map": {"zz": "F"}}, errors.ManifestError, "has no tensor 'zz'"),
    "a file that is not there": ({"weight_map": {"a": "n.safetensors"}}, errors.ObjectNotFoundError, "n.safetensors"),
    "no map": ({"weights": {}}, errors.ManifestError, "no index"),
    "no JSON": ("{", errors.ManifestError, "no index"),
}


@pytest.mark.parametrize(("index", "error", "message"), INDICES.values(), ids=INDICES)
def test_an_index_that_lies_is_refused(sharded, index, error, message):
    text = index if isinstance(index, str) else json.dumps(index).replace('"F"', '"model-00001-of-00003.safetensors"')
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(error, match=message):
        cloudckpt.open(f"file://{sharded}")


def test_several_files_without_an_index_are_not_guessed_at(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(errors.CheckpointNotFoundError, match="give the URL of one"):
        cloudckpt.open(f"file://{sharded}")


def test_a_dtype_of_later_days_is_listed_and_refused_when_it_is_asked_for(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(header_of({"a": spec(0, 12), "b": spec(12, 24, dtype="F4_NEW")}))
    with cloudckpt.open(f"file://{tmp_path}/m.safetensors") as ckpt:
        assert set(ckpt) == {"a", "b"}
        assert ckpt["a"][...].tolist() == [0, 0, 0]
        with pytest.raises(errors.ManifestError, match="dtype F4_NEW"):
            ckpt["b"]


# torch.save


def state():
    torch.manual_seed(0)
    shared = torch.randn(40, 50)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "dtypes": {d.torch: elements(getattr(torch, d.torch)) for d in DTYPES.values()},
        "parameter": torch.nn.Parameter(torch.arange(3.0)),
        "large": torch.randn(700, 1000),
        "turned": torch.randn(600, 700).t(),
        "shared": shared,
        "part of shared": shared[3:9, 10:20:3],
        "expanded": torch.arange(4.0).expand(3, 4),
        "scalar": torch.tensor(7, dtype=torch.int16),
        "empty": torch.zeros(3, 0),
        "step": 12,
        "betas": (0.9, 0.95),
        "name": "run",
        "bytes": b"\x00\xff",
        "none": None,
        "set": {1, 2},
        "complex": 1 + 2j,
        "list": [torch.ones(2), {"deep": torch.zeros(1)}, 5],
        "plain list": [1, "a"],
    }


def torch_file(tmp_path, value, name="model.pt", **options):
    torch.save(value, tmp_path / name, **options)
    return f"file://{tmp_path}/{name}"


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    elif isinstance(value, list) and any(isinstance(v, torch.Tensor | dict) for v in value):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, str(i)))
    else:
        yield ".".join(path), value


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_of_torch_save_is_read_by_paths_as_dcp_would_name_them(tmp_path, protocol):
    saved = state()
    with cloudckpt.open(torch_file(tmp_path, saved, pickle_protocol=protocol)) as ckpt:
        assert ckpt.format == "torch.save"
        expected = dict(leaves(saved))
        assert set(ckpt) == set(expected)
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert ckpt[key].shape == tuple(value.shape), key
                with ckpt.open_file(key) as view:
                    assert view.read() == raw(value), key
            else:
                assert ckpt[key] == value, key


def test_rows_of_a_tensor_in_it_cost_the_rows(tmp_path):
    saved = state()
    with cloudckpt.open(torch_file(tmp_path, saved)) as ckpt:
        found = ckpt["large"][300:310]
        assert (found == saved["large"].numpy()[300:310]).all()
        assert ckpt.stats.requests == 2
        assert 40000 <= ckpt.stats.bytes_fetched <= 40000 + 100
        np.testing.assert_array_equal(ckpt["turned"][5:7, ::100], saved["turned"].numpy()[5:7, ::100])


def test_dcp_loads_it_through_our_reader(tmp_path):
    saved = state()
    url = torch_file(tmp_path, saved)
    loaded = {
        "model": {k: torch.zeros_like(v) for k, v in saved["model"].items()},
        "step": 0,
        "large": torch.zeros(700, 1000),
    }
    dcp.load(loaded, storage_reader=ObjectStoreReader(url), no_dist=True)
    assert all(torch.equal(loaded["model"][k], v) for k, v in saved["model"].items())
    assert torch.equal(loaded["large"], saved["large"])
    assert loaded["step"] == 12


@pytest.mark.parametrize(
    ("value", "keys"), [(torch.ones(3), ["data"]), ([torch.ones(1), 2], ["0", "1"]), (5, ["data"])]
)
def test_what_is_no_mapping_is_read_too(tmp_path, value, keys):
    with cloudckpt.open(torch_file(tmp_path, value)) as ckpt:
        assert list(ckpt) == keys


def test_files_without_checksums_and_with_many_tensors_are_read(tmp_path):
    many = {f"layers.{i}.weight": torch.full((3,), float(i)) for i in range(3000)}
    with cloudckpt.open(torch_file(tmp_path, many)) as ckpt:  # its directory is larger than what is fetched first
        assert len(ckpt) == 3000
        loaded = ckpt.load("layers.29*")
        assert len(loaded) == 111
        assert all(value[0] == float(key.split(".")[1]) for key, value in loaded.items())
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        url = torch_file(tmp_path, {"w": torch.arange(5.0)}, "n.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    with cloudckpt.open(url) as ckpt:
        assert ckpt["w"][...].tolist() == [0, 1, 2, 3, 4]


class Touch:
    """What a pickle must not do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_names_a_function_is_refused_and_the_function_never_run(tmp_path):
    url = torch_file(tmp_path, {"w": torch.ones(2), "evil": Touch(tmp_path / "made")})
    with pytest.raises(errors.UnsafePickleError, match=r"posix\.mkdir"):
        cloudckpt.open(url)
    assert not (tmp_path / "made").exists()


def test_a_class_of_the_users_own_is_named(tmp_path):
    with pytest.raises(errors.UnsafePickleError, match=r"argparse\.Namespace"):
        cloudckpt.open(torch_file(tmp_path, {"args": argparse.Namespace(lr=1)}))


def rewritten(path, compression=zipfile.ZIP_STORED, **replaced):
    """The same archive, some of its records replaced."""
    old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            short = info.filename.rpartition("/")[2].replace(".", "_")
            new.writestr(info.filename, replaced.get(short, old.read(info)), compression)


def test_broken_archives_are_refused(tmp_path):
    url = torch_file(tmp_path, {"w": torch.randn(600, 500)})
    path, whole = tmp_path / "model.pt", (tmp_path / "model.pt").read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(errors.IntegrityError, match="no zip archive"):
        cloudckpt.open(url)
    path.write_bytes(whole)
    rewritten(path, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(errors.IntegrityError, match="compressed"):
        cloudckpt.open(url)
    path.write_bytes(whole)
    rewritten(path, data_pkl=b"\x80\x02nonsense")
    with pytest.raises(errors.ManifestError, match="not sound"):
        cloudckpt.open(url)
    path.write_bytes(whole)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        (record,) = [n for n in archive.namelist() if "/data/" in n and "serialization" not in n]
    rewritten(path, **{record.rpartition("/")[2]: bytes(100)})
    with cloudckpt.open(url) as ckpt, pytest.raises(errors.IntegrityError, match="beyond its storage"):
        ckpt["w"][3]
    with cloudckpt.open(url) as ckpt, pytest.raises(errors.IntegrityError, match="beyond its storage"):
        ckpt["w"][...]


def test_a_file_from_before_zip_archives_is_told(tmp_path):
    url = torch_file(tmp_path, {"w": torch.ones(3)}, _use_new_zipfile_serialization=False)
    with pytest.raises(errors.IntegrityError, match="no zip archive") as told:
        cloudckpt.open(url)
    assert "before torch 1.6" in str(told.value.__notes__)


def bomb():
    """Thirty lists, each holding the one before it twice."""
    value = [torch.ones(1)]
    for _ in range(30):
        value = [value, value]
    return {"a": value}


def test_a_pickle_that_describes_more_than_it_may_is_refused(tmp_path):
    with pytest.raises(errors.ManifestError, match="more than 500000"):
        cloudckpt.open(torch_file(tmp_path, bomb()))


def test_a_pickle_that_holds_itself_is_refused(tmp_path):
    value = {"w": torch.ones(1)}
    value["self"] = value
    with pytest.raises(errors.ManifestError, match="holds itself"):
        cloudckpt.open(torch_file(tmp_path, value))


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_checkpoint_of_ours_may_be_named_as_a_file_is(scheme, tmp_path):
    url = f"memory://{token_hex(4)}/model.pt" if scheme == "memory" else f"file://{tmp_path}/model.pt"
    dcp.save({"w": torch.ones(2)}, storage_writer=ObjectStoreWriter(url), no_dist=True)
    with cloudckpt.open(url) as ckpt:
        assert ckpt.format == "cloudckpt"
    with pytest.raises(errors.CheckpointNotFoundError, match="there is no checkpoint"):
        cloudckpt.open(f"memory://{token_hex(4)}/other.safetensors")


def test_foreign_files_are_read_from_a_bucket(server, s3, root, client):
    bucket, prefix = root.removeprefix("s3://").split("/")
    tensor = torch.randn(300, 1000)
    buffer = io.BytesIO()
    torch.save({"w": tensor}, buffer)
    for name, data in {"m.safetensors": safetensors.torch.save({"w": tensor}), "m.pt": buffer.getvalue()}.items():
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=data)
        with cloudckpt.open(f"{root}/{name}", **s3) as ckpt:
            np.testing.assert_array_equal(ckpt["w"][17:20, ::3], tensor.numpy()[17:20, ::3])
            assert (ckpt.to_torch()["w"] == tensor).all()
