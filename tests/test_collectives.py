"""Collectives: on real ranks under torchrun (the cases are in `collective_ranks.py`), and alone."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import collective_ranks
from cloudckpt import errors
from cloudckpt.dcp.ranks.collectives import Collectives
from cloudckpt.dcp.ranks.failures import Failure, error_of
from cloudckpt.dcp.ranks.info import RankInfo

ALIVE = [
    "every_form_shares_what_ranks_return",
    "only_the_coordinator_computes_and_its_own_object_is_not_copied",
    "large_objects_arrive_whole",
    "what_one_rank_raises_all_raise_with_its_class_and_name",
    "what_the_coordinator_raises_all_raise",
    "failures_of_different_classes_name_every_rank",
    "the_same_failure_of_all_ranks_is_told_once",
    "an_exception_that_cannot_be_unpickled_arrives_as_text",
    "values_that_do_not_travel_fail_all_ranks",
    "an_exit_or_interrupt_goes_on_where_it_was_and_is_an_error_elsewhere",
    "what_dcp_raises_is_one_of_ours",
    "a_wrong_number_of_results_is_refused_on_all_ranks",
    "ranks_that_call_different_things_are_told_so",
    "a_subgroup_is_on_its_own_and_names_ranks_of_the_world",
    "two_threads_talk_in_two_groups_at_once",
    "the_default_device_does_not_matter",
    "without_use_dist_a_rank_is_alone",
    "a_rank_knows_itself",
    "a_barrier_that_timed_out_is_passed_by_none_and_can_be_used_again",
]

OF_FOUR = [
    "every_form_shares_what_ranks_return",
    "large_objects_arrive_whole",
    "what_one_rank_raises_all_raise_with_its_class_and_name",
    "failures_of_different_classes_name_every_rank",
    "values_that_do_not_travel_fail_all_ranks",
    "a_subgroup_is_on_its_own_and_names_ranks_of_the_world",
    "two_threads_talk_in_two_groups_at_once",
    "a_barrier_that_timed_out_is_passed_by_none_and_can_be_used_again",
]
"""Those that more ranks can break in another way."""

LOSING = {
    "a_rank_that_hangs_is_named_and_no_other": {0, 1, 2, 3},
    "a_coordinator_that_hangs_is_named": {0, 1, 2, 3},
    "a_rank_that_is_killed_is_named_to_all": {0, 1, 2},
    "a_coordinator_that_is_killed_is_named_to_all": {0, 2},
    "a_barrier_names_all_ranks_that_were_killed": {0, 2},
}
"""The cases in which ranks are lost, in their order, and the ranks that are alive after each."""


def run_ranks(count, tmp_path, *cases):
    """Runs cases on ``count`` ranks; returns what became of each, by rank that got so far, and what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [str(Path(collective_ranks.__file__)), str(tmp_path / "out"), *cases]
    quick = os.environ | {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1"}  # torch looks up the name of each peer
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=quick)
    found = {}
    for rank in range(count):
        out = tmp_path / f"out.{rank}"
        for case, outcome in (json.loads(out.read_text()) if out.exists() else {}).items():
            found.setdefault(case, {})[rank] = outcome
    return found, ended.stderr[-5000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), *ALIVE)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run_ranks(4, tmp_path_factory.mktemp("ranks"), *OF_FOUR, *LOSING)


def check(found, printed, case, ranks):
    told = found.get(case, {})
    assert told == dict.fromkeys(ranks), "\n".join(filter(None, told.values())) or printed


@pytest.mark.parametrize("case", ALIVE)
def test_two_ranks(two, case):
    check(*two, case, range(2))


@pytest.mark.parametrize("case", OF_FOUR)
def test_four_ranks(four, case):
    check(*four, case, range(4))


@pytest.mark.parametrize("case", LOSING)
def test_four_ranks_that_become_fewer(four, case):
    check(*four, case, LOSING[case])


ME = RankInfo(rank=3, world_size=8, local_rank=None, host="a", pid=1)


def failures_of(*told, who=ME):
    return [Failure.of(error, who) for error in told]


@pytest.fixture
def alone():
    assert not dist.is_initialized()
    return Collectives()


def test_one_process_needs_no_ranks_and_no_pickle(alone):
    def kept():
        return alone  # a closure: no pickle could hold it

    assert (alone.rank, alone.world_size, alone.is_coordinator) == (0, 1, True)
    assert alone.broadcast("x", lambda: kept) is kept
    assert alone.all_gather("x", lambda: kept) == [kept]
    assert alone.all_reduce("x", lambda: kept, lambda values: values[0]) is kept
    assert alone.reduce_scatter("x", lambda: kept, lambda values: values) is kept
    assert alone.broadcast_object(kept) is kept
    assert alone.all_gather_object(kept) == [kept]
    assert alone.gather_object(kept) == [kept]
    assert alone.scatter_object([kept]) is kept
    assert alone.barrier() is None


def test_one_process_raises_what_many_would(alone):
    told = errors.CheckpointExistsError("is there")
    with pytest.raises(errors.CheckpointExistsError) as caught:
        alone.all_gather("save", collective_ranks.fails_on_any(told))
    assert caught.value is told  # there is no other rank to name it to
    with pytest.raises(errors.RanksFailedError, match="ZeroDivisionError"):
        alone.all_reduce("save", lambda: 0, lambda values: 1 / values[0])
    with pytest.raises(SystemExit):
        alone.broadcast("save", lambda: sys.exit(3))
    with pytest.raises(errors.UsageError, match="2 objects cannot be scattered to 1 ranks"):
        alone.scatter_object([1, 2])
    with pytest.raises(errors.UsageError, match="0 objects"):
        alone.scatter_object()
    assert alone.broadcast("save", lambda: 1) == 1


def test_one_process_has_no_other_coordinator():
    with pytest.raises(errors.UsageError, match="coordinator=1"):
        Collectives(coordinator=1)


@pytest.mark.parametrize("backend", ["fake", "cuda:fake"])
def test_a_group_without_gloo_is_refused(backend):
    """As a group of NCCL alone is: it has no backend for CPU tensors."""
    dist.init_process_group(backend, rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(errors.UsageError, match=r"has c.*:fake.*new_group\(backend=\"gloo\"\)"):
            Collectives()
    finally:
        dist.destroy_process_group()


def test_a_rank_knows_its_host_and_process():
    told = RankInfo.read()
    assert (told.rank, told.world_size) == (0, 1)
    assert (told.host, told.pid) == (socket.gethostname(), os.getpid())
    assert str(ME) == "rank 3 on a"


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ([errors.CheckpointExistsError("x")], errors.CheckpointExistsError),
        ([errors.CheckpointExistsError("x"), errors.CheckpointExistsError("y")], errors.CheckpointExistsError),
        ([errors.ThrottledError("x"), errors.StoreUnavailableError("y")], errors.StoreUnavailableError),
        ([errors.ThrottledError("x"), errors.PermissionDeniedError("y")], errors.StoreError),
        ([errors.CheckpointExistsError("x"), errors.IntegrityError("y")], errors.RanksFailedError),
        ([errors.CheckpointExistsError("x"), ValueError("y")], errors.RanksFailedError),
        ([errors.UsageError("x"), ValueError("y")], errors.RanksFailedError),
        ([ValueError("x"), ValueError("y")], errors.RanksFailedError),
        ([errors.CheckpointError("x")], errors.RanksFailedError),
        ([errors.RanksLostError("x"), errors.UsageError("y")], errors.RanksLostError),
        ([KeyboardInterrupt()], errors.RanksFailedError),
        ([ExceptionGroup("g", [errors.IntegrityError("x"), ValueError("y")])], errors.IntegrityError),
    ],
)
def test_the_class_is_the_nearest_that_all_failures_share(told, kind):
    error = error_of("save", failures_of(*told))
    assert type(error) is kind
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_rank_that_its_message_names_already_is_named_once():
    told = errors.SaveFailedError("rank 3 on a: the save failed: ValueError: x")
    assert str(error_of("save", failures_of(told))) == "save failed on rank 3 on a: the save failed: ValueError: x"


def test_what_was_noted_of_a_failure_is_noted_of_the_error():
    told = errors.IntegrityError("x")
    told.add_note("frame 7")
    error = error_of("load", failures_of(ExceptionGroup("g", [told, ValueError("y")])))
    assert error.__notes__[:2] == ["frame 7", "meanwhile also: ValueError: y"]
    assert error.__notes__[2].startswith("on rank 3 on a:\n")
    assert "IntegrityError: x" in error.__notes__[2]
