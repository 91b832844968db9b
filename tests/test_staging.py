"""State dicts staged to host memory: what the copy holds, what it costs, and that nothing changes it."""

import gc
import io
import multiprocessing
import os
import pickle
import threading
import warnings
import weakref
from collections import OrderedDict, defaultdict
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cloudckpt.dcp.dtypes import dtype_of
from cloudckpt.dcp.staging.move import Mover
from cloudckpt.dcp.staging.stager import Stager
from cloudckpt.dtypes import DTYPES
from cloudckpt.errors import UnstorableError, UsageError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
MIB = 1 << 20


class Pair(NamedTuple):
    left: torch.Tensor
    right: str


@pytest.fixture(params=[1, 2], ids=["one thread", "threads"])
def stager(request):
    with Stager(threads=request.param) as stager:
        yield stager


def staged_once(state_dict):
    """The copy of a state dict, by a stager that no other test uses."""
    return Stager().stage(state_dict).state_dict


def bits(tensor):
    in_order = tensor.clone(memory_format=torch.contiguous_format)
    return in_order.flatten().view(torch.uint8).tolist() if tensor.numel() else []


def trained(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 4, device=next(model.parameters()).device)).sum().backward()
    optimizer.step()


# What the copy holds.


@pytest.mark.parametrize("device", DEVICES)
def test_training_on_does_not_change_what_was_staged(stager, device):
    model = nn.Sequential(nn.Linear(4, 300), nn.BatchNorm1d(300), nn.Linear(300, 4)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trained(model, optimizer)
    for _ in range(3):
        state_dict = {"model": model.state_dict(), "optim": optimizer.state_dict(), "history": [1, [2]]}
        before = {k: v.clone().cpu() for k, v in state_dict["model"].items()}
        moments = {i: s["exp_avg"].clone().cpu() for i, s in state_dict["optim"]["state"].items()}
        with stager.stage(state_dict) as staged:
            trained(model, optimizer)
            state_dict["history"][1].append(3)
            state_dict["optim"]["param_groups"][0]["lr"] = 7
            got = staged.state_dict
            assert all(torch.equal(got["model"][k], v) and got["model"][k].is_cpu for k, v in before.items())
            assert all(torch.equal(got["optim"]["state"][i]["exp_avg"], v) for i, v in moments.items())
            assert not torch.equal(model.state_dict()["0.weight"].cpu(), before["0.weight"])
            assert got["history"] == [1, [2]]
            assert got["optim"]["param_groups"][0]["lr"] == 0.1
            assert not any(t.requires_grad for t in got["model"].values())
        optimizer.param_groups[0]["lr"] = 0.1


def test_containers_are_those_that_were_given(stager):
    shared = {"t": torch.ones(2)}
    given_ = {
        "tuple": (torch.zeros(1), [1, (torch.ones(1),)]),
        "named": Pair(torch.zeros(2), "x"),
        "ordered": OrderedDict(b=torch.zeros(3), a=None),
        "default": defaultdict(list, {1: [torch.ones(3)]}),
        "shared": [shared, shared],
        5: {torch.float32: torch.Size([2]), "set": {1, 2}},
        "model": nn.Linear(2, 2).state_dict(),
    }
    got = stager.stage(given_).state_dict
    assert list(got) == list(given_)
    assert [type(v) for v in got.values()] == [type(v) for v in given_.values()]
    assert torch.equal(got["tuple"][1][1][0], torch.ones(1))
    assert torch.equal(got["named"].left, torch.zeros(2))
    assert got["named"].right == "x"
    assert list(got["ordered"]) == ["b", "a"]
    assert got["default"]["new"] == []
    assert got["shared"][0] is got["shared"][1] is not shared
    assert got[5] == given_[5]
    assert got[5]["set"] is not given_[5]["set"]
    assert got["model"]._metadata == given_["model"]._metadata
    assert got["model"]._metadata is not given_["model"]._metadata


@pytest.mark.parametrize("first", ["loop", "pair"])
def test_containers_that_lie_within_themselves_are_copied(stager, first):
    loop = [torch.ones(1)]
    pair = (loop, torch.zeros(1))
    loop.append(pair)
    got = stager.stage({first: {"loop": loop, "pair": pair}[first], "loop": loop, "pair": pair}).state_dict
    assert got["loop"][1] is got["pair"]
    assert got["pair"][0] is got["loop"]
    assert got["loop"] is not loop
    assert torch.equal(got["pair"][1], torch.zeros(1))


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_that_can_be_stored_keeps_its_bits(stager, name):
    dtype = dtype_of(name)
    raw = torch.arange(96, dtype=torch.uint8) % 2 if dtype == torch.bool else torch.arange(96, dtype=torch.uint8) * 7
    row = raw.view(dtype)
    given_ = {
        "row": row,
        "half": row[: len(row) // 2].clone(),
        "scalars": [row[0].clone(), row[1].clone()],
        "table": row.reshape(2, -1).t(),
        "every other": row[::2],
        "large": row.repeat(1000),
    }
    for _ in range(2):
        with stager.stage(given_) as staged:
            got = staged.state_dict
            assert all(got[k].dtype == dtype and bits(got[k]) == bits(v) for k, v in given_.items() if k != "scalars")
            assert [bits(t) for t in got["scalars"]] == [bits(t) for t in given_["scalars"]]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(6.0)[::3],
        torch.arange(4.0).reshape(4, 1).expand(4, 500),
        torch.arange(8.0).unfold(0, 3, 1),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.empty(0, 7),
        torch.empty(5, 0).t(),
        torch.tensor(3.5),
        torch.nn.Parameter(torch.ones(3)),
        torch.arange(40.0)[3:9],
    ],
    ids=[
        *("transposed", "gaps", "expanded", "windows", "conjugated", "negated", "channels last"),
        *("empty", "empty, transposed", "scalar", "parameter", "slice"),
    ],
)
def test_every_way_of_lying_in_memory_keeps_its_elements(stager, tensor):
    for _ in range(2):
        with stager.stage({"a": tensor, "beside": torch.ones(3)}) as staged:
            got = staged.state_dict["a"]
            assert torch.equal(got, tensor)
            assert got.shape == tensor.shape
            assert type(got) is torch.Tensor
            assert torch.equal(staged.state_dict["beside"], torch.ones(3))
            assert staged.nbytes <= tensor.untyped_storage().nbytes() + 192


def test_a_small_view_of_a_large_storage_takes_no_more_than_its_own_bytes(stager):
    table = torch.zeros(1000, 1000)
    staged = stager.stage({"row": table[3], "column": table[:, 5]})
    assert staged.nbytes < 10_000


def test_tied_tensors_are_one_and_views_that_overlap_stay_so(stager):
    weight = torch.nn.Parameter(torch.arange(64.0).reshape(8, 8))
    given_ = {"in": weight, "out": weight.detach(), "rows": weight.detach()[2:5], "flat": weight.detach().view(-1)}
    staged = stager.stage(given_)
    got = staged.state_dict
    assert got["in"] is got["out"]
    assert staged.nbytes == 256
    got["in"][3, 0] = -1.0
    assert got["rows"][1, 0] == got["flat"][24] == -1.0


def test_views_of_one_storage_that_do_not_overlap_share_nothing(stager):
    flat = torch.zeros(1 << 15)
    got = stager.stage({"a": flat[: 1 << 14], "b": flat[1 << 14 :]}).state_dict
    assert got["a"].untyped_storage().nbytes() == got["b"].untyped_storage().nbytes() == 1 << 16


def test_tensors_that_are_no_longer_the_same_are_seen(stager):
    a = torch.tensor([1 + 2j])
    for b, want in ((a, 1 + 2j), (a.conj(), 1 - 2j), (torch.tensor([7j]), 7j), (a, 1 + 2j)):
        with stager.stage({"a": a, "b": b}) as staged:
            assert staged.state_dict["a"].item() == 1 + 2j
            assert staged.state_dict["b"].item() == want


def test_tensors_that_moved_are_staged_from_where_they_are_now(stager):
    base = torch.arange(100.0)
    first = {"a": torch.zeros(3), "large": torch.zeros(MIB), "v": base[10:30], "w": base[20:40]}
    kept = []
    for turn in range(3):
        moved = {k: v.clone() + turn for k, v in first.items() if k in ("a", "large")}
        other = base + turn
        kept.append((moved, other))
        overlap = turn < 2
        moved |= {"v": other[10:30], "w": other[20:40] if overlap else other[20:40].clone()}
        with stager.stage(moved) as staged:
            got = staged.state_dict
            assert all(torch.equal(got[k], v) for k, v in moved.items())
            assert (got["v"][10:].data_ptr() == got["w"].data_ptr()) == overlap


def test_views_that_overlap_no_longer_or_only_now_are_seen(stager):
    base = torch.arange(100.0)
    for start in (20, 30, 15, 60):
        given_ = {"v": base[10:30], "w": base[start : start + 20]}
        with stager.stage(given_) as staged:
            got = staged.state_dict
            assert all(torch.equal(got[k], v) for k, v in given_.items())
            shares = got["v"].untyped_storage().data_ptr() == got["w"].untyped_storage().data_ptr()
            assert shares == (start < 30)
        base = base.clone() + 1


def test_a_shape_that_changed_in_place_is_seen(stager):
    a = torch.arange(6.0)
    stager.stage({"a": a}).release()
    a.unsqueeze_(0)
    assert stager.stage({"a": a}).state_dict["a"].shape == (1, 6)


@given(
    st.lists(
        st.tuples(
            *(st.integers(0, 8), st.sampled_from([torch.uint8, torch.int16, torch.float64, torch.complex64])),
            st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=3),
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([1, 3]),
)
@settings(max_examples=150, deadline=None)
def test_whatever_views_of_one_storage_are_staged_they_hold_what_the_views_held(views, threads):
    base = torch.arange(2048).to(torch.uint8)
    given_ = [
        base.view(dtype).as_strided([n for n, _ in dims], [step for _, step in dims], offset)
        for offset, dtype, dims in views
    ]
    stager = Stager(threads=threads)
    for turn in range(2):
        base.copy_(torch.arange(2048) + 5 * turn)
        want = [bits(t) for t in given_]
        with stager.stage({"views": given_, "alone": torch.ones(2)}) as staged:
            base.zero_()
            assert [bits(t) for t in staged.state_dict["views"]] == want
            assert staged.nbytes <= sum(t.nbytes + 80 for t in given_) + 64


def test_what_has_no_plain_memory_is_left_to_be_refused_and_does_not_change_either(stager):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates quantized tensors
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    sparse, meta = torch.eye(2).to_sparse(), torch.empty(3, device="meta")
    got = stager.stage({"sparse": sparse, "again": [sparse], "meta": meta, "quantized": quantized}).state_dict
    sparse.mul_(5)
    assert torch.equal(got["sparse"].to_dense(), torch.eye(2))
    assert got["again"][0] is got["sparse"]
    assert got["meta"] is meta
    assert got["quantized"] is not quantized
    assert got["quantized"].is_quantized


class Tagged(torch.Tensor):
    """A subclass that staging knows nothing of."""


def test_an_unknown_subclass_is_copied_as_what_it_is(stager):
    tagged = torch.ones(3).as_subclass(Tagged)
    got = stager.stage({"a": tagged}).state_dict["a"]
    tagged.zero_()
    assert type(got) is Tagged
    assert got.tolist() == [1, 1, 1]


class Holder:
    def __init__(self, tensor):
        self.tensor = tensor


def test_objects_are_copied_with_what_is_in_them(stager):
    holder = Holder(torch.nn.Parameter(torch.ones(3)))
    got = stager.stage({"a": holder, "same": holder, "direct": holder.tensor}).state_dict
    holder.tensor.data.zero_()
    assert got["a"] is got["same"] is not holder
    assert got["a"].tensor.tolist() == [1, 1, 1]
    assert type(got["a"].tensor) is torch.nn.Parameter


def test_a_value_that_cannot_be_copied_is_named_and_takes_no_lease(stager):
    state_dict = {"good": torch.ones(3), "nest": [0, {"bad": threading.Lock()}]}
    with pytest.raises(UnstorableError, match=r"nest\.1\.bad.*lock"):
        stager.stage(state_dict)
    assert not stager.is_busy
    state_dict["nest"] = []
    assert stager.stage(state_dict).state_dict["good"].tolist() == [1, 1, 1]


def test_what_was_staged_under_inference_mode_can_be_staged_over_without(stager):
    with torch.inference_mode():
        stager.stage({"a": torch.ones(3), "b": torch.ones(3)}).release()
    assert stager.stage({"a": torch.zeros(3), "b": torch.ones(3)}).state_dict["a"].tolist() == [0, 0, 0]


def test_a_default_device_does_not_lead_staging_astray(stager):
    with torch.device("meta"):
        got = stager.stage({"a": torch.ones(3, device="cpu"), "e": torch.empty(0, device="cpu")}).state_dict
    assert got["a"].tolist() == [1, 1, 1]
    assert got["e"].is_cpu


def test_a_staged_tensor_that_is_pickled_takes_its_own_bytes_along(stager):
    got = stager.stage({"pair": [(torch.ones(3), 1)], "large": torch.zeros(MIB)}).state_dict
    out = io.BytesIO()
    torch.save(got["pair"], out)
    assert len(out.getvalue()) < 4096


# Leases and memory.


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_state_dict_leaves_alone_the_first_that_is_in_use(device):
    stager = Stager(leases=2)
    tensor = torch.zeros(1000, device=device)
    first = stager.stage({"a": tensor})
    tensor.fill_(1)
    second = stager.stage({"a": tensor})
    tensor.fill_(2)
    assert stager.is_busy
    assert first.state_dict["a"].unique().tolist() == [0]
    assert second.state_dict["a"].unique().tolist() == [1]
    first.release()
    third = stager.stage({"a": tensor})
    assert second.state_dict["a"].unique().tolist() == [1]
    assert third.state_dict["a"].unique().tolist() == [2]
    assert stager.nbytes == first.nbytes + second.nbytes + third.nbytes


def test_more_than_the_leases_are_refused_until_one_is_released(stager):
    first = stager.stage({"a": torch.zeros(3)})
    with pytest.raises(UsageError, match="still in use"):
        stager.stage({"a": torch.ones(3)})
    assert first.state_dict["a"].tolist() == [0, 0, 0]
    first.release()
    first.release()
    with stager.stage({"a": torch.ones(3)}) as second:
        first.release()  # is not the second's
        assert stager.is_busy
        assert second.state_dict["a"].tolist() == [1, 1, 1]
    assert not stager.is_busy


def test_what_was_released_cannot_be_used(stager):
    staged = stager.stage({"a": torch.zeros(3)})
    staged.release()
    assert staged.nbytes == 0
    with pytest.raises(UsageError, match="was released"):
        _ = staged.state_dict
    with pytest.raises(UsageError, match="was released"):
        staged.wait()


def test_a_closed_stager_refuses_and_what_is_staged_stays():
    with Stager() as stager:
        staged = stager.stage({"a": torch.zeros(3)})
    assert staged.state_dict["a"].tolist() == [0, 0, 0]
    staged.release()
    assert stager.nbytes == 0
    with pytest.raises(UsageError, match="closed"):
        stager.stage({})


@pytest.mark.parametrize("options", [{"leases": 0}, {"leases": -1}, {"threads": 0}])
def test_a_stager_without_leases_or_threads_is_refused(options):
    with pytest.raises(UsageError, match="at least 1"):
        Stager(**options)


def test_an_empty_state_dict_is_staged(stager):
    for _ in range(2):
        with stager.stage({}) as staged:
            assert staged.state_dict == {}
            assert staged.nbytes == 0


def test_the_same_memory_serves_other_keys_and_shapes_of_like_size(stager):
    with stager.stage({"a": torch.zeros(100_000), "b": torch.zeros(50_000)}) as first:
        address, held = first.state_dict["a"].data_ptr(), stager.nbytes
    with stager.stage({"x": torch.ones(20, 5000), "y": {"z": torch.ones(40_000)}}) as second:
        assert second.state_dict["x"].data_ptr() == address
        assert stager.nbytes == held


def test_memory_of_a_much_larger_state_dict_is_not_kept_for_a_smaller(stager):
    stager.stage({"a": torch.zeros(MIB)}).release()
    stager.stage({"a": torch.zeros(1024)}).release()
    assert stager.nbytes == 4096


def test_the_old_memory_is_given_back_before_more_is_taken(stager):
    staged = stager.stage({"a": torch.zeros(100)})
    ended = weakref.ref(staged.state_dict["a"])
    staged.release()
    stager.stage({"a": torch.zeros(100, dtype=torch.float64)}).release()
    assert ended() is None


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux what is resident")
@pytest.mark.parametrize("share", [False, True], ids=["own", "shared"])
def test_a_hundred_stagings_do_not_grow_and_closing_gives_all_back(share):
    state_dict = {
        "large": torch.zeros(64 * MIB // 4),
        "small": [torch.zeros(64) for _ in range(500)],
        "n": [0] * 1000,
    }
    gc.collect()
    before = resident()
    stager = Stager(share=share)
    stager.stage(state_dict).release()
    gc.collect()
    warm, held = resident(), stager.nbytes
    assert warm - before > 40 * MIB
    for i in range(100):
        state_dict["large"] = state_dict["large"].clone() if i % 10 == 0 else state_dict["large"]
        stager.stage(state_dict).release()
    gc.collect()
    assert stager.nbytes == held
    assert resident() - warm < 20 * MIB
    stager.close()
    gc.collect()
    assert stager.nbytes == 0
    assert resident() - before < 20 * MIB


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="asks Linux what is resident")
def test_a_state_dict_that_grows_never_takes_the_memory_of_two(stager):
    stager.stage({"a": torch.zeros(24 * MIB)}).release()
    larger = {"a": torch.zeros(25 * MIB)}
    peak = [0]
    held = resident()

    class Probe:
        def __deepcopy__(self, memo):
            peak[0] = resident()
            return self

    stager.stage({**larger, "probe": Probe()}).release()
    assert peak[0] - held < 16 * MIB


def test_the_stager_keeps_no_tensor_of_the_state_dict(stager):
    tensor, view = torch.zeros(1000), torch.zeros(100).t()
    ends = [weakref.ref(tensor), weakref.ref(view)]
    staged = stager.stage({"a": tensor, "v": [view]})
    del tensor, view
    assert [end() for end in ends] == [None, None]
    staged.release()


def test_leases_are_released_by_other_threads():
    stager = Stager(leases=3)
    for turn in range(50):
        staged = stager.stage({"a": torch.full((100,), float(turn))})
        assert staged.state_dict["a"][0] == turn
        thread = threading.Thread(target=staged.release)
        thread.start()
        thread.join()
    assert not stager.is_busy


# Bytes, moved.


@pytest.mark.parametrize("threads", [1, 4])
def test_bytes_are_moved_whole_by_however_many_threads(threads):
    mover = Mover()
    source = torch.arange(6 * MIB, dtype=torch.int64)  # 48 MiB
    out = torch.zeros_like(source)
    cuts = [0, 3, 1000, MIB + 1, 5 * MIB - 7, 6 * MIB]
    pairs = pairwise(cuts)
    moves = [(out.data_ptr() + 8 * a, source.data_ptr() + 8 * a, 8 * (b - a)) for a, b in pairs]
    mover.move(moves, threads=threads)
    assert torch.equal(out, source)
    mover.close()
    out.zero_()
    mover.move(moves, threads=threads)  # without helpers
    assert torch.equal(out, source)


# Shared memory.


def child(conn):
    while (staged := conn.recv()) is not None:
        got = staged.state_dict
        saved = io.BytesIO()
        torch.save(got["pair"], saved)
        report = {
            "sum": got["large"].sum().item(),
            "pair": [got["pair"][0].tolist(), got["pair"][1]],
            "tied": got["tied"] is got["large"],
            "rows": [t.tolist() for t in got["many"][:2]],
            "is_shared": got["large"].untyped_storage().nbytes(),
            "saved": len(saved.getvalue()),
            "note": got["note"],
        }
        del got
        staged.release()
        conn.send(report)


def test_another_process_reads_the_same_memory():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,), daemon=True)
    process.start()
    try:
        large = torch.zeros(MIB)
        many = [torch.full((3,), float(i)) for i in range(2000)]
        stager = Stager(share=True)
        for turn in (1, 2):
            large.fill_(turn)
            state_dict = {
                "large": large,
                "tied": large,
                "pair": (torch.ones(2), "x"),
                "many": many,
                "note": {"t": turn},
            }
            with stager.stage(state_dict) as staged:
                sent = multiprocessing.reduction.ForkingPickler.dumps(staged)
                assert len(sent) < 500_000
                ours.send(staged)
                large.zero_()
                assert ours.poll(120)
                report = ours.recv()
                assert report.pop("saved") < 4096
                assert report == {
                    "sum": turn * MIB,
                    "pair": [[1, 1], "x"],
                    "tied": True,
                    "rows": [[0, 0, 0], [1, 1, 1]],
                    "is_shared": 4 * MIB,
                    "note": {"t": turn},
                }
        ours.send(None)
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()


def test_what_is_not_in_shared_memory_is_not_sent(stager):
    staged = stager.stage({"a": torch.zeros(3)})
    with pytest.raises(UsageError, match="share=True"):
        pickle.dumps(staged)


# Sharded tensors.


def ranks(rank, where):
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
    try:
        dtensors_keep_their_placements()
        fsdp_state_dicts_are_staged()
    finally:
        dist.destroy_process_group()


def dtensors_keep_their_placements():
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(35.0).reshape(7, 5)
    for placement in (Shard(0), Shard(1), Replicate()):
        given_ = distribute_tensor(whole.clone(), mesh, [placement])
        stager = Stager(share=True)
        for turn in range(2):
            with stager.stage({"a": given_, "tied": given_, "plain": torch.ones(3)}) as staged:
                got = staged.state_dict["a"]
                given_.to_local().add_(1)
                assert type(got) is DTensor
                assert got._spec == given_._spec
                assert got is staged.state_dict["tied"]
                assert torch.equal(got.full_tensor(), whole + turn)
        stager.stage({"a": distribute_tensor(whole, mesh, [Shard(0)])}).release()
        with stager.stage({"a": distribute_tensor(whole, mesh, [Replicate()])}) as staged:
            assert staged.state_dict["a"].placements == (Replicate(),)
    lone = distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)])  # rank 1 has nothing of it
    assert torch.equal(staged_once({"a": lone})["a"].full_tensor(), torch.ones(1, 3))


def fsdp_state_dicts_are_staged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 13), nn.Linear(13, 4))
    for layer in (*model, model):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trained(model, optimizer)
    stager = Stager()
    for _ in range(3):
        state_model, state_optim = get_state_dict(model, optimizer)
        want = {k: v.full_tensor().clone() for k, v in state_model.items()}
        moments = {k: v["exp_avg"].full_tensor().clone() for k, v in state_optim["state"].items()}
        with stager.stage({"model": state_model, "optim": state_optim}) as staged:
            trained(model, optimizer)
            got = staged.state_dict
            assert all(type(v) is DTensor for v in got["model"].values())
            assert all(torch.equal(got["model"][k].full_tensor(), v) for k, v in want.items())
            assert all(torch.equal(got["optim"]["state"][k]["exp_avg"].full_tensor(), v) for k, v in moments.items())


def test_sharded_tensors_are_staged_with_their_placements(tmp_path):
    torch.multiprocessing.spawn(ranks, (str(tmp_path / "store"),), nprocs=2)
