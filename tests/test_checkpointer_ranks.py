"""The Checkpointer on real ranks under torchrun. The cases are in `checkpointer_ranks.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from secrets import token_hex

import pytest
import torch

import checkpointer_ranks
from cloudckpt.dcp import Checkpointer
from conftest import s3_of

TWO = [
    "a_sharded_model_resumes_from_an_async_save_with_each_ranks_random_numbers",
    "keys_may_differ_between_ranks_and_one_key_is_one_shape",
    "what_is_planned_once_is_planned_again_when_it_changes_on_one_rank",
    "all_ranks_name_the_same_step",
    "what_one_rank_cannot_store_fails_all_and_nothing_is_left",
    "what_one_rank_cannot_copy_fails_its_async_save_on_all",
    "a_step_that_is_there_is_skipped_or_replaced_by_all",
    "a_save_that_is_interrupted_on_one_rank_is_not_taken_for_the_next",
    "a_failure_that_one_rank_was_told_of_is_raised_on_all_and_then_no_more",
    "all_ranks_load_the_same",
    "training_may_end_its_groups_first_and_a_subgroup_may_have_its_own",
    "a_busy_save_is_skipped_by_all",
    "a_save_that_one_rank_cancels_is_cancelled_on_all_and_leaves_nothing",
    "the_newest_whole_step_is_found_by_all",
    "a_signal_to_one_rank_has_all_save_once_at_the_same_step",
    "saved_by_two_for_another_number_to_load",
]

LOSING = "a_rank_that_is_killed_during_an_async_save_is_named_to_the_others"


def run_ranks(count, folder, config, *cases):
    """Runs cases on ``count`` ranks; returns what became of each by rank, and what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [str(Path(checkpointer_ranks.__file__)), str(folder / "out"), json.dumps(config), *cases]
    quick = os.environ | {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1"}  # torch looks up the name of each peer
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=quick)
    files = [folder / f"out.{rank}" for rank in range(count)]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files], ended.stderr[-5000:]


@pytest.fixture(scope="module")
def server(one_server):
    return one_server


@pytest.fixture(scope="module")
def config(server):
    return {"url": f"s3://checkpoints/ranks-{token_hex(4)}", "s3": s3_of(server)}


@pytest.fixture(scope="module")
def two(config, tmp_path_factory):
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), config, *TWO)


@pytest.mark.parametrize("case", TWO)
def test_two_ranks(two, case):
    told, printed = two
    for of_rank in told:
        assert of_rank.get(case, printed) is None, of_rank.get(case, printed)


def test_another_number_of_ranks_loads_what_it_has_of_its_own(two, config, caplog):
    assert two[0][0]["saved_by_two_for_another_number_to_load"] is None
    with Checkpointer(f"{config['url']}/saved_by_two_for_another_number_to_load", **config["s3"]) as checkpointer:
        loaded, held = {"w": torch.zeros(10)}, {"of": None}
        assert checkpointer.load(loaded, per_rank=held) == 1
    assert loaded["w"].tolist() == list(range(10))
    assert held["of"] == 0
    assert "ranks (1,)" in caplog.text


def test_after_a_rank_was_killed_the_job_begins_again(config, tmp_path):
    told, printed = run_ranks(3, tmp_path, config, LOSING)
    for of_rank in told[:2]:
        assert of_rank.get(LOSING, printed) is None, of_rank.get(LOSING, printed)
    assert told[2] == {}
    with Checkpointer(f"{config['url']}/{LOSING}", **config["s3"]) as checkpointer:
        assert checkpointer.load({}) in (1, 2)
        assert checkpointer.save(3, {"w": torch.zeros(10)}).step == 3
