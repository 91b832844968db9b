"""DCP's save and load through our storage, in one process."""

import io
import pickle
import warnings
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.testing._internal.two_tensor import TwoTensor

from cloudckpt import errors
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.engine.commit import read_manifest_blob
from cloudckpt.layout import MANIFEST, shard_key
from cloudckpt.manifest import encode, parse
from cloudckpt.store.memory import _buckets
from cloudckpt.store.url import open_store

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


@pytest.fixture
def url():
    return f"memory://{token_hex(6)}/run/step-1"


def save(state, url, planner=None, **more):
    dcp.save(state, storage_writer=ObjectStoreWriter(url, **more), planner=planner)


def load(state, url, planner=None, **more):
    reader = ObjectStoreReader(url, **more)
    dcp.load(state, storage_reader=reader, planner=planner)
    return reader


@contextmanager
def fails_with(kind, match):
    """The first failure that DCP reports is of that class, says that, and survives pickle."""
    with pytest.raises(CheckpointException) as e:
        yield
    failure, _ = e.value.failures[0]
    assert type(failure) is kind, repr(failure)
    assert match in str(failure)
    again = pickle.loads(pickle.dumps(failure))
    assert (str(again), getattr(again, "__notes__", [])) == (
        str(failure),
        getattr(failure, "__notes__", []),
    )


def keys_at(url):
    async def find():
        async with open_store(url) as store:
            return [o.key async for o in store.list_objects()]

    return loop.run(find)


def put_at(url, key, data):
    async def put():
        async with open_store(url) as store:
            await store.put(key, [memoryview(data)])

    loop.run(put)


def get_at(url, key):
    async def get():
        async with open_store(url) as store:
            return (await store.get(key)).data

    return loop.run(get)


def manifest_at(url):
    async def read():
        async with open_store(url) as store:
            return parse((await read_manifest_blob(store)).data, url)

    return loop.run(read)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        raw_a, raw_b = (t.resolve_conj().resolve_neg().contiguous().reshape(-1) for t in (a, b))
        return (
            a.shape == b.shape
            and a.dtype == b.dtype
            and bytes(raw_a.view(torch.uint8).numpy()) == bytes(raw_b.view(torch.uint8).numpy())
        )
    return a == b


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64,
    torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64,
    torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
]  # fmt: skip


def of_dtype(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).itemsize
    raw = torch.randint(0, 2, (*shape, size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def all_sorts(seed=0):
    """Tensors and values of every kind that a state dict holds."""
    torch.manual_seed(seed)
    base = torch.randn(64, 48)
    return {
        "dtypes": {str(d): of_dtype(d, 5, 3, seed=seed) for d in DTYPES},
        "scalar": torch.tensor(float(seed)),
        "empty": torch.zeros(0, 4),
        "transposed": base.t(),
        "strided": base[::2, ::3],
        "expanded": torch.full((1, 7), float(seed)).expand(5, 7),
        "deep": torch.randn(3, 4, 5, 6).permute(3, 1, 0, 2),
        "conjugated": torch.randn(4, 3, dtype=torch.complex64).conj(),
        "negated": torch.randn(4, 3, dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(torch.randn(3, 3)),
        "step": seed,
        "text": f"run {seed}",
        "nested": [1, {"a": torch.randn(3), "b": None}, (seed, 2.5)],
        "odd@key%41 \u00fc/..": torch.randn(2),
        "__metadata__": torch.randn(2),
        "": torch.randn(1),
    }


def blank(state):
    """The same structure with other contents."""
    if isinstance(state, dict):
        return {k: blank(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(blank(v) for v in state)
    if isinstance(state, torch.Tensor):
        out = torch.empty_strided(state.size(), torch.empty(state.shape).stride(), dtype=state.dtype)
        out.reshape(-1).view(torch.uint8).fill_(1)
        return torch.nn.Parameter(out) if isinstance(state, torch.nn.Parameter) else out
    return None


def test_everything_a_state_dict_holds_comes_back_equal(url):
    state, loaded = all_sorts(3), blank(all_sorts(3))
    save(state, url)
    load(loaded, url)
    assert equal(state, loaded)


def test_it_comes_back_equal_from_a_real_server_in_many_parts_and_ranges(root, s3):
    state = all_sorts(5) | {"large": torch.randn(3_000_000), "slow": torch.randn(1500, 1100).t()}
    loaded = blank(state)
    save(state, root, part_size=5 << 20, frame_size=1 << 16, max_inflight_nbytes=16 << 20, **s3)
    load(loaded, root, max_request_size=1 << 20, **s3)
    assert equal(state, loaded)


def test_it_comes_back_equal_from_files(tmp_path):
    state, loaded = all_sorts(7), blank(all_sorts(7))
    save(state, f"file://{tmp_path}/run/step-1")
    load(loaded, f"file://{tmp_path}/run/step-1")
    assert equal(state, loaded)


def test_every_shard_opens_as_a_safetensors_file_with_equal_tensors(tmp_path):
    state = {str(d): of_dtype(d, 4, 3) for d in DTYPES} | {"odd@key%": torch.randn(2, 3).t()}
    save(state, f"file://{tmp_path}")
    (path,) = Path(tmp_path).glob("shards/*/*.safetensors")
    raw = {"torch.complex32", "torch.complex128", "torch.float8_e8m0fnu", "torch.float4_e2m1fn_x2"}
    with safe_open(path, "pt") as shard:
        names = {k: k.replace("%", "%25").replace("@", "%40") for k in state}
        assert set(shard.keys()) == set(names.values())
        for key, tensor in state.items():
            stored = shard.get_tensor(names[key])
            if key in raw:
                assert stored.dtype == torch.uint8
                assert bytes(stored.numpy()) == bytes(tensor.reshape(-1).view(torch.uint8).numpy())
            else:
                assert equal(stored, tensor)


def test_a_small_checkpoint_is_one_put_per_shard_and_one_for_the_manifest(url):
    save({"a": torch.ones(3), "b": 5}, url)
    keys = keys_at(url)
    assert len(keys) == 2
    assert keys[0] == MANIFEST
    assert _buckets[url.split("/")[2]].uploads == {}


def test_the_url_may_come_as_checkpoint_id_and_a_writer_may_save_again(url):
    writer, reader = ObjectStoreWriter(), ObjectStoreReader()
    for step in (1, 2):
        dcp.save({"a": torch.full((2,), float(step))}, checkpoint_id=f"{url}-{step}", storage_writer=writer)
    for step in (1, 2):
        state = {"a": torch.zeros(2)}
        dcp.load(state, checkpoint_id=f"{url}-{step}", storage_reader=reader)
        assert state["a"].tolist() == [step, step]


def test_an_async_save_commits_what_was_staged(url):
    state = {"w": torch.ones(1000), "step": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        future = dcp.async_save(state, storage_writer=ObjectStoreWriter(url))
        state["w"].zero_()
        future.result()
    loaded = {"w": torch.zeros(1000), "step": 0}
    load(loaded, url)
    assert loaded["step"] == 3
    assert loaded["w"].sum() == 1000


def test_a_model_and_its_optimizer_resume_where_they_were(url):
    def make(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 2))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def train(model, optimizer):
        for i in range(3):
            loss = model(torch.full((4, 5), float(i))).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item().hex()

    model, optimizer = make(0)
    train(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": moments}, url)
    expected = train(model, optimizer)
    model, optimizer = make(1)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    load(state, url)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert train(model, optimizer) == expected


def test_loading_casts_as_torch_does_or_refuses(url):
    state = {"a": torch.randn(5, 4), "t": torch.randn(6, 4).t()}
    save(state, url)
    loaded = {"a": torch.zeros(5, 4, dtype=torch.bfloat16), "t": torch.zeros(4, 6, dtype=torch.float64)}
    load(loaded, url)
    assert equal(loaded["a"], state["a"].bfloat16())
    assert equal(loaded["t"], state["t"].double())
    with fails_with(errors.DtypeMismatchError, "'a' is stored as torch.float32"):
        load({"a": torch.zeros(5, 4, dtype=torch.bfloat16)}, url, cast=False)


def test_loading_into_a_strided_destination_touches_nothing_else(url):
    save({"a": torch.arange(12.0).reshape(3, 4)}, url)
    around = torch.full((6, 9), -1.0)
    load({"a": around[1:4, 2:6]}, url)
    assert equal(around[1:4, 2:6].contiguous(), torch.arange(12.0).reshape(3, 4))
    assert (around == -1).sum() == 6 * 9 - 12


def test_a_load_bumps_the_version_of_what_it_wrote(url):
    save({"a": torch.ones(3)}, url)
    state = {"a": torch.zeros(3)}
    before = state["a"]._version
    load(state, url)
    assert state["a"]._version > before


def test_a_load_tells_what_it_did(url):
    save({"a": torch.ones(1000), "b": torch.ones(1000)}, url)
    stats = load({"a": torch.zeros(1000)}, url).stats
    assert (stats.requests, stats.bytes_fetched, stats.bytes_needed) == (1, 4000, 4000)


@pytest.mark.parametrize("is_cached", [False, True], ids=["plan cache off", "plan cache on"])
def test_saving_again_and_again_stores_each_time_what_is_there(is_cached):
    class Planner(DefaultSavePlanner):  # DCP keys its cache by class name
        pass

    Planner.__name__ = token_hex(4)
    name = token_hex(6)
    for step in range(3):
        state = {"a": torch.full((4,), float(step)), "n": {"step": step}}
        save(state, f"memory://{name}/{step}", Planner(enable_plan_caching=is_cached))
    seen = set()
    for step in range(3):
        state = {"a": torch.zeros(4), "n": {"step": None}}
        load(state, f"memory://{name}/{step}")
        assert state["a"].tolist() == [step] * 4
        assert state["n"] == {"step": step}
        seen |= {s.key for s in manifest_at(f"memory://{name}/{step}").shards}
    assert len(seen) == 3


def test_a_dtype_that_changed_under_the_plan_cache_is_refused():
    class Planner(DefaultSavePlanner):
        pass

    Planner.__name__ = token_hex(4)
    name = token_hex(6)
    save({"a": torch.ones(4)}, f"memory://{name}/1", Planner(enable_plan_caching=True))
    with fails_with(errors.SaveFailedError, "'a' is torch.bfloat16 (4,) now but was planned as torch.float32"):
        save({"a": torch.ones(4).bfloat16()}, f"memory://{name}/2", Planner(enable_plan_caching=True))
    assert keys_at(f"memory://{name}/2") == []


def test_metadata_and_step_are_kept(url):
    save({"a": torch.ones(1)}, url, metadata={"lr": 0.1, "tags": ["x"]}, step=7)
    manifest = manifest_at(url)
    assert manifest.metadata == {"lr": 0.1, "tags": ["x"]}
    assert manifest.summary.step == 7
    assert manifest.summary.nbytes == 4


# Bad input: a clear error, nothing lost, nothing half there.


def test_a_save_onto_a_checkpoint_needs_overwrite(url):
    save({"a": torch.ones(2)}, url)
    before = keys_at(url)
    with fails_with(errors.CheckpointExistsError, "overwrite=True"):
        save({"a": torch.zeros(2)}, url)
    assert keys_at(url) == before
    save({"a": torch.zeros(2)}, url, overwrite=True)
    assert len(keys_at(url)) == 2
    assert not set(keys_at(url)) & set(before[1:])
    state = {"a": torch.ones(2)}
    load(state, url)
    assert state["a"].tolist() == [0, 0]


class Plain:
    """A class that a pickle would import."""


BAD_TENSORS = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "meta": (lambda: torch.ones(3, device="meta"), "meta device"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "qint8"),
    "fake": (lambda: FakeTensorMode().from_tensor(torch.ones(3)), "fake"),
    "wrapper subclass": (lambda: TwoTensor(torch.ones(3), torch.ones(3)), "wraps"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_a_tensor_that_cannot_be_stored_is_refused_before_anything_is_written(url, kind):
    make, match = BAD_TENSORS[kind]
    with pytest.raises(CheckpointException) as e:
        save({"fine": torch.ones(4), "bad": make()}, url)
    failure, _ = e.value.failures[0]
    if kind != "sparse" or isinstance(failure, errors.CheckpointError):
        assert type(failure) is errors.UnstorableError, repr(failure)
        assert "'bad'" in str(failure)
    assert match.lower() in str(failure).lower()
    assert keys_at(url) == []


def test_a_subclass_that_has_its_own_memory_is_stored(url):
    class Named(torch.Tensor):
        pass

    save({"a": torch.ones(3).as_subclass(Named)}, url)
    state = {"a": torch.zeros(3)}
    load(state, url)
    assert state["a"].tolist() == [1, 1, 1]


def test_nothing_at_the_url_is_told_as_such(url):
    with fails_with(errors.CheckpointNotFoundError, "there is no checkpoint at"):
        load({"a": torch.ones(1)}, url)


def test_a_prefix_with_shards_and_no_manifest_was_never_committed(url):
    put_at(url, shard_key("0" * 32, "safetensors"), b"x")
    with fails_with(errors.NotCommittedError, "was never committed"):
        load({"a": torch.ones(1)}, url)


def test_a_manifest_of_an_unknown_version_is_named(url):
    save({"a": torch.ones(1)}, url)
    put_at(url, MANIFEST, get_at(url, MANIFEST).replace(b'"version":1', b'"version":9', 1))
    with fails_with(errors.UnsupportedVersionError, "format version 9"):
        load({"a": torch.ones(1)}, url)


def test_a_truncated_manifest_is_told_as_such(url):
    save({"a": torch.ones(1)}, url)
    put_at(url, MANIFEST, get_at(url, MANIFEST)[:-40])
    with fails_with(errors.ManifestError, "truncated"):
        load({"a": torch.ones(1)}, url)


def test_an_altered_manifest_is_told_with_every_problem(url):
    save({"a": torch.ones(1), "b": torch.ones(1)}, url)
    data = get_at(url, MANIFEST)
    altered = data.replace(b'["tensor","F32",[1]', b'["tensor","F99",[1]').replace(b"shards/", b"../../../", 1)
    put_at(url, MANIFEST, altered)
    with pytest.raises(CheckpointException) as e:
        load({"a": torch.ones(1)}, url)
    said = str(e.value.failures[0][0])
    for part in ("4 problem(s)", "entries['a']: unknown dtype 'F99'", "entries['b']", "../../../", "crc32c"):
        assert part in said


def test_a_manifest_whose_claims_cannot_be_is_refused_even_if_its_checksum_is_right(url):
    save({"a": torch.ones(2)}, url)
    data = encode(manifest_at(url))
    bad = data.replace(b"[[[0],[2],", b"[[[0],[9],")[:-1]
    bad = bad[: bad.rindex(b',"crc32c"')]
    from awscrt.checksums import crc32c

    put_at(url, MANIFEST, bad + b',"crc32c":"%08x"}' % crc32c(bad))
    with fails_with(errors.ManifestError, "outside the tensor's shape"):
        load({"a": torch.ones(2)}, url)


def test_a_missing_key_and_a_wrong_shape_are_named_before_anything_is_fetched(url):
    save({"a": torch.ones(2)}, url)
    with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: b"):
        load({"b": torch.ones(2)}, url)
    state = {"a": torch.zeros(3)}
    with pytest.raises(CheckpointException, match=r"Size mismatch.*for a"):
        load(state, url)
    assert state["a"].tolist() == [0, 0, 0]


def test_a_tensor_is_not_taken_for_a_value(url):
    save({"a": torch.ones(2)}, url)
    with pytest.raises(CheckpointException, match=r"'a'|Invalid checkpoint metadata"):
        load({"a": 3}, url)


def test_a_pickle_that_would_load_a_class_is_refused_by_name(url):
    save({"a": Plain(), "w": torch.ones(2)}, url)
    with fails_with(errors.UnsafePickleError, "Plain"):
        load({"a": None, "w": torch.zeros(2)}, url)
    state = {"a": None, "w": torch.zeros(2)}
    load(state, url, unsafe_pickle=True)
    assert type(state["a"]) is Plain


class Bomb:
    """Unpickles into a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_would_run_code_is_refused_and_never_run(url, tmp_path):
    save({"a": Bomb(str(tmp_path / "ran"))}, url)
    with fails_with(errors.UnsafePickleError, "open"):
        load({"a": None}, url)
    assert not (tmp_path / "ran").exists()


def test_use_collectives_false_is_refused(url):
    with pytest.raises(errors.UsageError, match="use_collectives=False"):
        dcp.save({"a": torch.ones(1)}, storage_writer=ObjectStoreWriter(url), use_collectives=False, no_dist=True)
    assert keys_at(url) == []


@pytest.mark.parametrize("make", [ObjectStoreWriter, ObjectStoreReader])
def test_urls_and_options_that_cannot_work_are_refused_at_once(make):
    with pytest.raises(errors.UnsupportedUrlError, match="s3://"):
        make("gopher://b/k")
    with pytest.raises(errors.UsageError, match=r"unknown option\(s\) no_such.*region"):
        make("s3://b/k", no_such=3)
    assert not make.validate_checkpoint_id("/tmp/x")
    assert make.validate_checkpoint_id("s3://b/k")


@pytest.mark.parametrize("bad", [{"part_size": 1}, {"frame_size": 1}, {"max_inflight_nbytes": 1}, {"concurrency": 0}])
def test_sizes_that_cannot_work_are_refused(bad):
    with pytest.raises(errors.UsageError):
        ObjectStoreWriter("s3://b/k", **bad)


@pytest.mark.parametrize("bad", [{"x": torch.ones(1)}, {"x": (1, 2)}, {"x": b"1"}, {1: "x"}])
def test_metadata_that_json_would_not_give_back_is_refused(bad):
    with pytest.raises(errors.UsageError, match="metadata="):
        ObjectStoreWriter("s3://b/k", metadata=bad)


def test_no_url_is_told_as_such():
    with fails_with(errors.UsageError, "checkpoint_id="):
        dcp.save({"a": torch.ones(1)}, storage_writer=ObjectStoreWriter())
    with fails_with(errors.UsageError, "checkpoint_id="):
        dcp.load({"a": torch.ones(1)}, storage_reader=ObjectStoreReader())


def test_a_planner_whose_data_would_need_pickle_is_refused_by_name(url):
    class Planner(DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            metadata.planner_data = Plain()
            return plans, metadata

    with fails_with(errors.UsageError, "Plain"):
        save({"a": torch.ones(1)}, url, Planner())
    assert MANIFEST not in keys_at(url)


def test_a_damaged_shard_is_found_when_it_is_read(url):
    save({"a": torch.ones(1000)}, url)
    (key,) = [k for k in keys_at(url) if k != MANIFEST]
    data = bytearray(get_at(url, key))
    data[-5] ^= 1
    put_at(url, key, bytes(data))
    with fails_with(errors.IntegrityError, "'a': bytes"):
        load({"a": torch.zeros(1000)}, url)


def test_a_shard_that_is_gone_is_told_and_what_was_loaded_is_called_undefined(url):
    save({"a": torch.ones(1000)}, url)

    async def remove():
        async with open_store(url) as store:
            await store.delete([k for k in keys if k != MANIFEST])

    keys = keys_at(url)
    loop.run(remove)
    with pytest.raises(CheckpointException) as e:
        load({"a": torch.zeros(1000)}, url)
    failure, _ = e.value.failures[0]
    assert isinstance(failure, errors.ObjectNotFoundError)
    assert "undefined" in failure.__notes__[0]


class UnpicklableError(Exception):
    """Its pickle cannot be read back: what DCP's coordinator would choke on."""

    def __init__(self, a, b):
        super().__init__(a)


def test_a_foreign_exception_becomes_one_that_survives_pickle(url):
    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item):
            raise UnpicklableError("disk on fire", 2)

    with fails_with(errors.SaveFailedError, "UnpicklableError: disk on fire"):
        save({"a": torch.ones(1)}, url, Planner())
    assert keys_at(url) == []


def test_a_planner_that_loads_nothing_loads_nothing(url):
    save({"a": torch.ones(1)}, url)
    state = {"b": torch.zeros(1)}
    load(state, url, DefaultLoadPlanner(allow_partial_load=True))
    assert state["b"].item() == 0


def test_no_bucket_and_no_credentials_are_told_before_anything_is_written(s3, monkeypatch, tmp_path):
    with fails_with(errors.BucketNotFoundError, "no such bucket"):
        save({"a": torch.ones(1)}, "s3://no-such-bucket-here/x", **s3)
    with fails_with(errors.BucketNotFoundError, "no such bucket"):
        load({"a": torch.ones(1)}, "s3://no-such-bucket-here/x", **s3)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bare = {k: v for k, v in s3.items() if "key" not in k}
    with fails_with(errors.CredentialsError, "AWS_ACCESS_KEY_ID"):
        save({"a": torch.ones(1)}, "s3://checkpoints/x", **bare)


def test_writers_and_readers_pickle():
    writer = pickle.loads(pickle.dumps(ObjectStoreWriter("s3://b/k", part_size=6 << 20, region="x")))
    assert writer.checkpoint_id == "s3://b/k"
    assert writer._options.part_size == 6 << 20
    assert pickle.loads(pickle.dumps(ObjectStoreReader("s3://b/k"))).checkpoint_id == "s3://b/k"


def test_what_torch_saved_as_bytes_is_what_a_shard_holds(tmp_path):
    save({"x": [1, 2]}, f"file://{tmp_path}", DefaultSavePlanner(flatten_state_dict=False))
    (path,) = Path(tmp_path).glob("shards/*/*.safetensors")
    with safe_open(path, "pt") as shard:
        assert torch.load(io.BytesIO(bytes(shard.get_tensor("x").numpy()))) == [1, 2]


def test_a_writer_that_is_pointed_elsewhere_in_mid_save_commits_where_its_shards_are(url):
    """As happens when a second async_save is begun with the same writer before the first has ended."""
    writer = ObjectStoreWriter(url)

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item):
            writer.reset(f"{url}-other")
            return super().resolve_data(write_item)

    dcp.save({"a": torch.ones(4)}, storage_writer=writer, planner=Planner())
    state = {"a": torch.zeros(4)}
    load(state, url)
    assert state["a"].tolist() == [1, 1, 1, 1]
    assert keys_at(f"{url}-other") == []
