"""Looking into a checkpoint: its tree of modules, and the numbers of its tensors, by streaming."""

import json
import threading
from secrets import token_hex

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import cloudckpt
from cloudckpt.catalog import Histogram, Statistics, inspect, joined, statistics, tree_of
from cloudckpt.catalog.elements import BATCH_NBYTES, THREADS, batches, read_batch, spread
from cloudckpt.catalog.numbers import MAX_BINS
from cloudckpt.cli.main import cli
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    DtypeMismatchError,
    MissingKeyError,
    UsageError,
)
from cloudckpt.extensions import AesGcm, BytePlane, ZStandard
from cloudckpt.store.memory import MemoryStore
from sharded import put_checkpoint
from terminal import is_coloured, seen, width

RNG = np.random.default_rng(5)


def fresh():
    return f"memory://{token_hex(6)}/ckpt"


def run(*args):
    return CliRunner().invoke(cli, ["inspect", *args], catch_exceptions=False)


@pytest.fixture(scope="module")
def model():
    """A checkpoint whose large tensor is cut in three."""
    url = fresh()
    state = {
        "model.layers.0.w": RNG.normal(size=(30, 4)).astype(np.float32),
        "model.layers.0.b": np.zeros(4, ml_dtypes.bfloat16),
        "model.layers.1.w": RNG.normal(size=(6, 4)).astype(np.float32),
        "model.head.out.proj.w": np.arange(5),
        "model.layers": b"not a module",
        "step": 12,
    }
    cuts = {"model.layers.0.w": [10, 20], "model.layers.1.w": [3]}
    put_checkpoint(url, state, cuts=cuts, step=12, metadata={"run": "a"}, metrics={"loss": 2.0})
    return url


def test_keys_make_a_tree_that_adds_up(model):
    with cloudckpt.open(model) as ckpt:
        tree = tree_of(ckpt)
        layers = tree_of(ckpt, ["model.layers.*"]).children[0].children[0]
    assert [(leaf.name, leaf.kind) for leaf in tree.leaves] == [("step", "value")]
    (top,) = tree.children
    assert (top.path, [child.path for child in top.children]) == ("model", ["model.layers", "model.head"])
    assert [(leaf.key, leaf.kind, leaf.nbytes) for leaf in top.leaves] == [("model.layers", "bytes", 12)]
    assert (tree.entry_count, tree.tensor_count, tree.parameter_count) == (6, 4, 120 + 4 + 24 + 5)
    assert (tree.nbytes, tree.chunk_count, tree.object_count) == (480 + 8 + 96 + 40 + 12, 3 + 1 + 2 + 1 + 1, 3)
    assert list(tree.dtypes.items()) == [("F32", 576), ("I64", 40), ("BF16", 8)]
    assert (layers.path, layers.parameter_count, layers.object_count) == ("model.layers", 148, 3)
    weight = layers.children[0].leaves[0]
    assert (weight.name, weight.dtype, weight.shape, weight.chunk_count) == ("w", "F32", (30, 4), 3)
    assert [nbytes for _, nbytes in weight.objects] == [160, 160, 160]


def test_a_module_that_holds_one_module_and_nothing_else_is_joined_with_it(model):
    with cloudckpt.open(model) as ckpt:
        tree = joined(tree_of(ckpt))
        head = tree.children[0].children[1]
        assert (head.name, head.path, [leaf.name for leaf in head.leaves]) == (
            "head.out.proj", "model.head.out.proj", ["w"],
        )  # fmt: skip
        assert (tree.name, tree.children[0].name) == ("", "model")


def test_odd_keys_make_a_tree_too():
    url, deep = fresh(), ".".join("abc" * 1000)
    keys = {"", ".", "a..b", "x.w", "x.y.z", deep}
    put_checkpoint(url, {key: np.arange(2) for key in keys})
    with cloudckpt.open(url) as ckpt:
        tree = joined(tree_of(ckpt))
    leaves, modules = list(tree.leaves), list(tree.children)
    while modules:
        module = modules.pop()
        leaves += module.leaves
        modules += module.children
    assert {leaf.key for leaf in leaves} == keys
    assert tree.parameter_count == 12


def test_the_objects_of_others_are_told_as_well(tmp_path):
    dcp.save({"a": {"w": torch.ones(3), "v": torch.ones(2)}, "n": 1}, checkpoint_id=tmp_path / "x", no_dist=True)
    found = inspect(f"file://{tmp_path}/x")
    assert (found.format, found.step, found.chains, found.tree.object_count) == ("dcp", None, (), 1)
    assert [leaf.objects for leaf in found.tree.children[0].leaves] == [
        (("__0_0.distcp", 12),), (("__0_0.distcp", 8),),
    ]  # fmt: skip


def test_what_is_encrypted_is_named_and_not_shown():
    url = fresh()
    keys = {"k": bytes(32)}
    dcp.save(
        {"w": torch.ones(3), "v": torch.ones(1)},
        storage_writer=ObjectStoreWriter(url, extensions=[ZStandard(), AesGcm("k", keys)], metadata={"a": 1}),
        no_dist=True,
    )
    found = inspect(url)
    assert found.metadata is None
    assert [(chain.extensions, chain.shard_count) for chain in found.chains] == [
        (("stream.zstd/1", "stream.aesgcm/1"), 1),
    ]  # fmt: skip
    assert "metadata\tencrypted" in run(url).stdout


ARRAYS = [
    RNG.normal(size=200_000),
    RNG.normal(size=1000).astype(np.float32),
    RNG.normal(size=1000).astype(ml_dtypes.bfloat16),
    RNG.normal(size=1000).astype(ml_dtypes.float8_e4m3fn),
    RNG.integers(-(2**62), 2**62, 1000),
    RNG.integers(0, 2, 1000).astype(bool),
    RNG.integers(0, 256, 1000).astype(np.uint8),
    (RNG.normal(size=1000) + 1j * RNG.normal(size=1000)).astype(np.complex64),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: str(array.dtype))
def test_numbers_are_those_that_numpy_tells(array):
    url = fresh()
    put_checkpoint(url, {"w": array}, cuts={"w": [7, 500]})
    (told,) = inspect(url, tensors=["w"]).tensors
    is_complex = array.dtype.kind == "c"
    plain = np.abs(array.astype(np.complex128)) if is_complex else array.astype(np.float64)
    assert (told.count, told.zero_count, told.is_magnitude) == (array.size, np.sum(plain == 0), is_complex)
    exact = array if array.dtype.kind in "iu" else plain
    assert (told.minimum, told.maximum) == (exact.min().item(), exact.max().item())
    assert told.mean == pytest.approx(plain.mean(), rel=1e-9, abs=1e-12)
    assert told.std == pytest.approx(plain.std(), rel=1e-9)
    assert np.histogram(plain, told.bin_edges)[0].tolist() == list(told.bin_counts)
    assert sum(told.bin_counts) == array.size
    assert len(told.bin_counts) <= MAX_BINS


FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)


@given(hnp.arrays(np.float64, st.integers(0, 50), elements=FLOATS), st.integers(0, 50))
def test_parts_add_up_to_the_whole(array, cut):
    whole, parts = Statistics.of(array), Statistics.of(array[cut:]) + Statistics.of(array[:cut])
    finite = array[np.isfinite(array)]
    assert (whole.nan_count, whole.inf_count) == (np.isnan(array).sum(), np.isinf(array).sum())
    for told in (whole, parts):
        assert told.histogram == Histogram.of(finite)
        assert sum(told.histogram.counts) == told.finite_count == finite.size
        assert (told.minimum, told.maximum) == ((finite.min(), finite.max()) if finite.size else (None, None))
    if finite.size:
        edges = whole.histogram.edges
        assert edges[0] <= finite.min() <= finite.max() <= edges[-1]
        assert len(whole.histogram.counts) <= MAX_BINS
        with np.errstate(all="ignore"):
            mean, std = finite.mean(), finite.std()
        if np.isfinite(std) and np.abs(finite).max() < 1e150:
            assert parts.mean == pytest.approx(mean, rel=1e-9, abs=1e-12 * np.abs(finite).max())
            assert parts.std == pytest.approx(std, rel=1e-6, abs=1e-9 * np.abs(finite).max())


def test_a_histogram_tells_apart_as_much_as_it_has_room_for():
    for low, high in [(0, 1), (-1e-300, 3e-300), (1e20, 1e20 + 1e6), (-1.7e308, 1.7e308), (5, 5.0001)]:
        numbers = 2 * np.linspace(low / 2, high / 2, 5000)
        assert MAX_BINS // 2 <= len(Histogram.of(numbers).counts) <= MAX_BINS


@pytest.mark.parametrize("extensions", [(), (BytePlane(), ZStandard())], ids=["plain", "compressed"])
def test_large_tensors_are_read_in_bounded_batches_each_element_once(extensions):
    url = fresh()
    large = torch.arange(3 * BATCH_NBYTES // 4 + 12345, dtype=torch.int32)
    state = {"large": large, "turned": large[:60_000].reshape(200, 300)}
    state |= {f"small.{i}": torch.full((i + 1,), i) for i in range(30)}
    dcp.save(state, storage_writer=ObjectStoreWriter(url, extensions=extensions), no_dist=True)
    found = {key: [] for key in state}
    with cloudckpt.open(url) as ckpt:
        planned = list(batches(ckpt._access, list(state)))
        assert all(sum(piece.nbytes for piece in batch) <= BATCH_NBYTES for batch in planned)
        assert len(planned) == 4  # the last with what is left of the large one, and all small ones
        for batch in planned:
            for piece, part in zip(batch, read_batch(ckpt._access, batch), strict=True):
                found[piece.key].append(part)
        assert ckpt.stats.bytes_fetched <= 1.01 * sum(tensor.nbytes for tensor in state.values())
    assert all(np.array_equal(np.concatenate(found[key]), state[key].numpy().reshape(-1)) for key in state)


def test_no_more_batches_are_under_way_than_there_are_threads():
    begun, done, most = 0, 0, 0
    lock = threading.Lock()

    def work(job):
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - done)
        return job * 2

    for job, result in spread(work, iter(range(100))):
        assert result == job * 2
        done = job + 1
    assert begun == 100
    assert most <= THREADS + 1  # with the one whose result is looked at

    def fail(job):
        if job == 3:
            raise ValueError
        return job

    with pytest.raises(ValueError):
        list(spread(fail, iter(range(10**9))))


def test_what_has_no_numbers_is_refused():
    url = fresh()
    dcp.save(
        {"odd": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "text": "x"},
        storage_writer=ObjectStoreWriter(url),
        no_dist=True,
    )
    with cloudckpt.open(url) as ckpt:
        with pytest.raises(DtypeMismatchError, match="float4_e2m1fn_x2"):
            statistics(ckpt, "odd")
        with pytest.raises(UsageError, match="no tensor"):
            statistics(ckpt, "text")
        with pytest.raises(MissingKeyError, match="did you mean 'odd'"):
            statistics(ckpt, "od")
        assert ckpt.stats.requests == 0


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_complex_halves_are_told_by_their_magnitudes():
    url = fresh()
    dcp.save(
        {"c": torch.tensor([3 + 4j, 0]).to(torch.complex32)}, storage_writer=ObjectStoreWriter(url), no_dist=True
    )
    (told,) = inspect(url, tensors=["c"]).tensors
    assert (told.dtype, told.is_magnitude, told.minimum, told.maximum) == ("complex32", True, 0, 5)


def remove(url, *, only_shards):
    bucket = MemoryStore(url.split("/")[2])._bucket
    for key in list(bucket.objects):
        if not only_shards or "/shards/" in key:
            del bucket.objects[key]


def test_a_checkpoint_that_is_replaced_or_removed_underneath_is_told_as_such():
    url, state = fresh(), {"w": np.arange(10.0)}
    put_checkpoint(url, state)
    with cloudckpt.open(url) as ckpt:
        remove(url, only_shards=True)
        put_checkpoint(url, state)
        with pytest.raises(CheckpointChangedError, match="was replaced by another save while it was read"):
            statistics(ckpt, "w")
    with cloudckpt.open(url) as ckpt:
        remove(url, only_shards=False)
        with pytest.raises(CheckpointNotFoundError, match="was removed while it was read"):
            statistics(ckpt, "w")


def test_a_file_of_others_that_is_written_over_underneath_is_told_as_such(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros(1000)}, path)
    with cloudckpt.open(f"file://{path}") as ckpt:
        assert statistics(ckpt, "w").maximum == 0
        with pytest.raises(CheckpointChangedError):
            statistics(ckpt, "w", report=lambda *_: save_file({"w": np.ones(1000)}, path))


def test_the_command_prints_lines_and_json(model):
    shown = run(model, "--depth", "2")
    whole, tree = shown.stdout.split("\n\n")
    lines = dict(line.split("\t") for line in whole.splitlines())
    assert lines == {
        "format": "cloudckpt", "step": "12", "created": "2026-01-02 03:04:05+0000 by a test",
        "size": "636 B in 3 objects, 0 B stored", "entries": "6", "tensors": "4 of 153 elements",
        "dtypes": "F32 576 B, I64 40 B, BF16 8 B", "stored": "plain: 3 shards", "metrics": "loss=2",
        "metadata": '{"run": "a"}',
    }  # fmt: skip
    assert tree.splitlines() == [
        "model.\tF32, I64, BF16\t153\t636 B\t8\t3",
        "model.layers.\tF32, BF16\t148\t584 B\t6\t3",
        "model.head.out.proj.\tI64\t5\t40 B\t1\t1",
        "model.layers\tbytes\t0\t12 B\t1\t1",
        "step\tvalue\t0\t0 B\t0\t0",
    ]
    told = json.loads(run(model, "*.b", "--json").stdout)
    assert (told["url"], told["format"], told["step"], told["metadata"]) == (model, "cloudckpt", 12, {"run": "a"})
    assert told["chains"] == [{"extensions": [], "shard_count": 3}]
    assert told["tree"]["children"][0]["children"][0]["children"][0]["leaves"][0]["key"] == "model.layers.0.b"


def test_the_command_tells_a_tensors_numbers():
    url = fresh()
    put_checkpoint(
        url, {"w": np.array([0.0, 1.0, 1.0, np.nan, np.inf]), "empty": np.zeros(0), "i": np.array([2**60])}
    )
    shown = run(url, "--tensor", "w", "--tensor", "empty")
    first, second = shown.stdout.split("\n\n")
    lines = [line.split("\t") for line in first.splitlines()]
    assert lines[:10] == [
        ["dtype", "F64"], ["shape", "[5]"], ["elements", "5"], ["minimum", "0"], ["maximum", "1"],
        ["mean", "0.666667"], ["std", "0.471405"], ["nan", "1"], ["infinite", "1"], ["zero", "1"],
    ]  # fmt: skip
    assert lines[10][1].strip("▁") == f"▅{'▁' * 15}█"
    assert "minimum\t\n" in second
    told = json.loads(run(url, "--tensor", "w", "--tensor", "empty", "--tensor", "i", "--json").stdout)["tensors"]
    assert (told[0]["bin_counts"], told[0]["nan_count"]) == ([1, *[0] * 15, 2], 1)
    assert (told[1]["minimum"], told[1]["std"], told[1]["bin_edges"]) == (None, None, [])
    assert told[2]["minimum"] == 2**60


def test_it_fits_a_terminal_of_40_columns_and_sets_no_colour_when_told_not_to(tmp_path):
    url = f"file://{tmp_path}/ckpt"
    put_checkpoint(url, {"encoder.layers.17.attention.query.weight": np.arange(6.0), "[red]x": np.arange(3)})
    tree = seen("inspect", url, columns=40, NO_COLOR="1")
    assert width(tree) <= 40
    assert not is_coloured(tree)
    assert "[red]x" in tree
    assert width(seen("inspect", url, "--tensor", "[red]x", columns=40)) <= 40
