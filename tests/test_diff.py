"""What differs between two checkpoints: by their manifests where these prove it, else by streaming."""

import json
from math import inf, nan
from secrets import token_hex

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

import cloudckpt
from cloudckpt.catalog import Change, diff, diff_open
from cloudckpt.catalog.elements import BATCH_NBYTES
from cloudckpt.cli.main import cli
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.errors import CheckpointChangedError, UsageError
from cloudckpt.extensions import AesGcm, ZStandard
from cloudckpt.store.memory import MemoryStore
from sharded import put_checkpoint
from terminal import is_coloured, seen, width


def fresh():
    return f"memory://{token_hex(6)}/ckpt"


def put(state, **how):
    url = fresh()
    put_checkpoint(url, state, **how)
    return url


def why(found):
    return {changed.key: changed.why for changed in found.changed}


def run(*args):
    return CliRunner().invoke(cli, ["diff", *args], catch_exceptions=False)


def test_everything_that_can_differ_is_told():
    same = np.arange(1000.0)
    left = {
        "same": same, "shape": np.zeros((2, 3)), "dtype": np.ones(3), "kind": np.ones(3), "gone": np.ones(1),
        "values": np.array([1.0, 2.0, 4.0]), "text": b"abc", "other text": b"abc", "longer": b"abc",
        "lr": 0.1, "flag": True, "nested": {"a": [1, 2], "b": None},
    }  # fmt: skip
    right = {
        "new": np.ones(1), "same": same, "shape": np.zeros((3, 2)), "dtype": np.ones(3, np.float32), "kind": b"x",
        "values": np.array([1.0, 2.5, 3.0]), "text": b"abc", "other text": b"abd", "longer": b"abcd",
        "lr": 0.2, "flag": 1, "nested": {"b": None, "a": [1, 2]},
    }  # fmt: skip
    found = diff(put(left), put(right))
    assert (found.only_left, found.only_right, found.is_equal) == (("gone",), ("new",), False)
    assert why(found) == {
        "shape": "shape", "dtype": "dtype", "kind": "kind", "values": "value", "other text": "value",
        "longer": "value", "lr": "value", "flag": "value",
    }  # fmt: skip
    by_key = {changed.key: changed for changed in found.changed}
    assert by_key["values"].change == Change(count=3, changed_count=2, max_abs=1.0, max_rel=1 / 3)
    assert by_key["dtype"].change == Change(count=3)
    assert (by_key["shape"].left.shape, by_key["shape"].right.shape) == ((2, 3), (3, 2))
    assert (by_key["lr"].left.value, by_key["lr"].right.value) == (0.1, 0.2)
    assert (found.equal_count, found.proven_count) == (3, 2)  # a value needs no proof
    narrowed = diff(put(left), put(right), patterns=["s*", "gone"])
    assert (why(narrowed), narrowed.only_left, narrowed.only_right) == ({"shape": "shape"}, ("gone",), ())


def test_nothing_is_fetched_of_what_checksums_prove_equal():
    state = {f"w{i}": np.random.default_rng(i).normal(size=(50, 40)) for i in range(4)} | {"b": b"bytes"}
    cuts = {"w1": [10, 20]}
    left, right = put(state, cuts=cuts), put(state | {"w3": state["w3"] + 1}, cuts=cuts)
    found = diff(left, right)
    assert (why(found), found.proven_count) == ({"w3": "value"}, 4)
    assert found.nbytes_fetched == 2 * state["w3"].nbytes
    assert diff(left, left).nbytes_fetched == 0


WAYS = {
    "cut alike": ({"cuts": {"w": [15]}}, True),
    "cut otherwise": ({"cuts": {"w": [10]}}, None),
    "cut elsewhere": ({"cuts": {"w": [20]}}, None),
    "cut in fewer": ({"cuts": {}}, None),
    "framed otherwise": ({"cuts": {"w": [15]}, "frame_size": 8192}, None),
}


@pytest.mark.parametrize(("how", "is_proven"), WAYS.values(), ids=WAYS)
def test_manifests_tell_only_what_they_prove(how, is_proven):
    state, other = {"w": np.arange(3000.0).reshape(30, 100)}, {"w": np.arange(3000.0).reshape(30, 100)}
    other["w"][29, 99] = -1
    left, same, differs = put(state, cuts={"w": [15]}), put(state, **how), put(other, **how)
    found = diff(left, same, values=False)
    assert (found.equal_count, found.proven_count) == ((1, 1) if is_proven else (0, 0))
    assert (found.unknown, found.is_equal) == (() if is_proven else ("w",), bool(is_proven))
    unread = diff(left, differs, values=False)
    assert (why(unread), unread.unknown) == (({"w": "value"}, ()) if is_proven else ({}, ("w",)))
    assert (found.nbytes_fetched, unread.nbytes_fetched) == (0, 0)
    assert [changed.change for changed in diff(left, differs).changed] == [
        Change(count=3000, changed_count=1, max_abs=3000.0, max_rel=3000.0)
    ]
    assert diff(left, same).is_equal


def test_checksums_of_what_is_not_stored_plainly_prove_nothing():
    state = {"w": torch.arange(1000.0)}
    keys = {"k": bytes(32)}
    urls = [fresh() for _ in range(2)]
    for url, text in zip(urls, ("short", "long" * 1000), strict=True):
        writer = ObjectStoreWriter(url, extensions=[ZStandard()])
        dcp.save({**state, "text": text}, storage_writer=writer, no_dist=True)
    unread = diff(*urls, values=False)
    assert (unread.unknown, why(unread)) == (("w",), {"text": "value"})  # as its lengths tell
    found = diff(*urls)
    assert (found.equal_count, found.proven_count, why(found)) == (1, 0, {"text": "value"})
    assert found.nbytes_fetched > 0
    sealed = fresh()
    writer = ObjectStoreWriter(sealed, extensions=[AesGcm("k", keys)], inline_values=True)
    dcp.save({**state, "step": 3}, storage_writer=writer, no_dist=True)
    hidden = diff(sealed, sealed, patterns="step")
    assert (hidden.unknown, hidden.is_equal) == (("step",), False)
    assert diff(sealed, sealed, options=cloudckpt.engine.read.ReadOptions(keys=keys)).is_equal


def test_checkpoints_of_any_format_are_compared(tmp_path):
    state = {"a": torch.randn(300, 20), "b": torch.randn(40).bfloat16(), "c": torch.arange(7)}
    dcp.save(state, checkpoint_id=tmp_path / "stock", no_dist=True)
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "model.pt")
    dcp.save(state, storage_writer=ObjectStoreWriter(f"file://{tmp_path}/ours"), no_dist=True)
    ours = f"file://{tmp_path}/ours"
    for other in ("stock", "model.safetensors", "model.pt"):
        found = diff(ours, f"file://{tmp_path}/{other}")
        assert (found.is_equal, found.equal_count, found.proven_count) == (True, 3, 0)
        assert sorted(diff(f"file://{tmp_path}/{other}", ours, values=False).unknown) == ["a", "b", "c"]


def test_large_tensors_are_compared_whole():
    large = np.zeros(2 * BATCH_NBYTES + 1000, np.uint8)
    other = large.copy()
    other[[0, BATCH_NBYTES, -1]] = 7, 8, 9
    told = []
    found = diff(
        put({"w": large, "v": large[:10]}, frame_size=1 << 20),
        put({"w": other, "v": large[:10]}, cuts={"w": [BATCH_NBYTES + 5]}, frame_size=1 << 20),
        report=lambda done, total: told.append((done, total)),
    )
    assert found.changed[0].change == Change(count=large.size, changed_count=3, max_abs=9, max_rel=1.0)
    assert told[-1] == (large.size, large.size)
    assert len(told) == 3


def test_long_byte_strings_are_compared_whole():
    left = bytes(BATCH_NBYTES + 100)
    right = left[:-1] + b"x"
    assert diff(put({"b": left}), put({"b": left}, frame_size=8192)).is_equal
    assert why(diff(put({"b": left}), put({"b": right}, frame_size=8192))) == {"b": "value"}


NUMBERS = st.floats(width=64) | st.sampled_from([0.0, -0.0, 1.0, 1.001, inf, -inf, nan])
PAIRS = st.integers(0, 30).flatmap(
    lambda n: st.tuples(*(hnp.arrays(np.float64, n, elements=NUMBERS) for _ in range(2)))
)


@example((np.array([1.0]), np.array([2.0])), 0.5, 0)  # beside the right one, and no other
@example((np.array([1.7e308]), np.array([-1.7e308])), 0, 0)
@given(PAIRS, st.sampled_from([0, 1e-3, 0.5]), st.sampled_from([0, 1e-3, 10]))
def test_tolerances_are_those_of_numpy(pair, rtol, atol):
    left, right = pair
    change = Change.between(left, right, rtol=rtol, atol=atol)
    with np.errstate(all="ignore"):
        close = np.isclose(left, right, rtol=rtol, atol=atol, equal_nan=True)
    assert (change.count, change.changed_count) == (left.size, np.count_nonzero(~close))
    finite = np.isfinite(left) & np.isfinite(right)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    assert change.special_count == np.count_nonzero(~finite & ~same)
    with np.errstate(all="ignore"):
        most = np.abs(left - right)[finite].max() if finite.any() else 0
    assert change.max_abs == min(most, np.finfo(np.float64).max)


EXACT = [
    (np.int64, [2**63 - 1, -(2**63), 5], [-(2**63), -(2**63), 6], 2**64 - 1),
    (np.uint64, [2**64 - 1, 2**53], [0, 2**53 + 1], 2**64 - 1),
    (np.int8, [-128, 127, 1], [127, 127, 2], 255),
    (np.bool_, [True, False, False], [False, False, True], 1),
    (np.complex64, [1 + 1j, 2, 3], [1, 2, 3.5], 1),
    (ml_dtypes.float8_e4m3fn, [1, 448, 2], [1, -448, 3], 896),
    (ml_dtypes.bfloat16, [1, nan, 1], [1.0078125, nan, 1.5], 0.5),
]


@pytest.mark.parametrize(("dtype", "left", "right", "most"), EXACT, ids=lambda value: getattr(value, "__name__", ""))
def test_differences_are_exact_in_every_dtype(dtype, left, right, most):
    change = Change.between(np.array(left, dtype), np.array(right, dtype))
    assert (change.count, change.changed_count, change.max_abs) == (len(left), 2, most)


def test_elements_that_numpy_does_not_know_are_compared_as_bytes():
    a, b = (torch.tensor(codes, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for codes in ([1, 2, 3], [1, 2, 4]))
    urls = [fresh() for _ in range(3)]
    for url, tensor in zip(urls, (a, b, a.view(torch.uint8)), strict=True):
        dcp.save({"w": tensor}, storage_writer=ObjectStoreWriter(url), no_dist=True)
    (changed,) = diff(urls[0], urls[1]).changed
    assert changed.change == Change(count=3, changed_count=1, max_abs=None, max_rel=None)
    (changed,) = diff(urls[0], urls[2]).changed
    assert (changed.why, changed.change) == ("dtype", None)


def test_a_difference_within_the_tolerances_does_not_count():
    left, right = put({"w": np.array([1.0, 2.0])}), put({"w": np.array([1.0, 2.01])})
    assert not diff(left, right, rtol=1e-3).is_equal
    assert diff(left, right, rtol=1e-2).is_equal
    with pytest.raises(UsageError, match="must not be negative"):
        diff(left, right, atol=-1)


def test_one_that_is_replaced_underneath_is_told_as_such():
    state = {"w": np.arange(10.0)}
    left, right = put(state), put({"w": np.arange(10.0) + 1})
    with cloudckpt.open(left) as one, cloudckpt.open(right) as other:
        objects = MemoryStore(right.split("/")[2])._bucket.objects
        for key in [key for key in objects if "/shards/" in key]:
            del objects[key]
        put_checkpoint(right, state)
        with pytest.raises(CheckpointChangedError, match=f"{right} was replaced by another save"):
            diff_open(one, other)


def test_the_command_prints_lines_and_json_and_exits_as_diff_does():
    left = put({"w": np.array([1.0, 2.0, nan]), "lr": 0.5, "b": b"abc", "old": np.ones(1), "same": np.ones(2)})
    right = put({"w": np.array([1.0, 2.5, 3.0]), "lr": 1, "b": b"abcd", "new": np.ones(1), "same": np.ones(2)})
    shown = run(left, right)
    assert (shown.exit_code, shown.stdout.splitlines()) == (
        1,
        [
            "-\told\tonly left\t\t\t",
            "+\tnew\tonly right\t\t\t",
            "~\tw\telements, 1 NaN or infinite\t0.5\t0.2\t2/3",
            "~\tlr\t0.5 -> 1\t\t\t",
            "~\tb\t3 bytes -> 4 bytes\t\t\t",
        ],
    )
    assert shown.stderr == "1 only left, 1 only right, 3 changed, 1 equal (1 by their checksums alone, 48 B read)\n"
    told = json.loads(run(left, right, "w", "--json").stdout)
    assert told["changed"] == [
        {
            "key": "w",
            "why": "value",
            "left": {"kind": "tensor", "dtype": "F64", "shape": [3], "nbytes": 24, "value": None},
            "right": {"kind": "tensor", "dtype": "F64", "shape": [3], "nbytes": 24, "value": None},
            "change": {"count": 3, "changed_count": 2, "special_count": 1, "max_abs": 0.5, "max_rel": 0.2},
        }
    ]
    assert (told["is_equal"], told["only_left"], told["has_values"]) == (False, [], True)
    equal = run(left, left)
    assert (equal.exit_code, equal.stdout) == (0, "")
    assert equal.stderr == "5 equal (4 by their checksums alone, none of their bytes read)\n"
    unread = run(left, right, "w", "--no-values")
    assert (unread.exit_code, unread.stdout) == (1, "~\tw\telements\t\t\t\n")
    assert run(left, right, "w", "--rtol", "x").exit_code == 2


def test_it_fits_a_terminal_of_40_columns_and_sets_no_colour_when_told_not_to(tmp_path):
    left, right = (f"file://{tmp_path}/{name}" for name in "ab")
    key = "encoder.layers.17.attention.query.weight"
    put_checkpoint(left, {key: np.arange(6.0), "lr": 0.1})
    put_checkpoint(right, {key: np.arange(6.0) * 1.001, "lr": 0.2})
    shown = seen("diff", left, right, columns=40, NO_COLOR="1")
    assert width(shown) <= 40
    assert not is_coloured(shown)
    assert "0.005" in shown
    assert "max rel" not in shown  # for which there is no room
