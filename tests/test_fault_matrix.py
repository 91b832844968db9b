"""Nothing lost: every request of a save and a load failed in every way, and processes killed between any two.

``FAULT_CASES`` says how many cases run on each server (``all``: each fault at each request, and as many pairs),
``FAULT_KILLS`` how many kills (``all`` for each place, before and after its request), ``FAULT_SEED`` which ones;
``make faults`` runs all of them.
"""

import os
import threading
from random import Random

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.testing import faults
from conftest import BUCKET, s3_of
from fault_matrix import WORKS, Matrix, quiet, sample, wrong_with
from fault_ranks import found_at, is_equal, load

CASES = os.environ.get("FAULT_CASES", "120")
KILLS = os.environ.get("FAULT_KILLS", "1")
SEED = int(os.environ.get("FAULT_SEED", "1"))
PARTS = WORKS[0]


@pytest.fixture(scope="module")
def matrix(server):
    with Matrix(server, BUCKET, s3_of(server)) as matrix:
        yield matrix


def some(things, count):
    return things if count == "all" else Random(SEED).sample(things, int(count))


@pytest.mark.timeout(3600)
def test_every_request_fails_in_every_way_and_nothing_is_lost(matrix, capsys):
    cases = matrix.cases()
    cases = sample(cases, 2 * len(cases) if CASES == "all" else int(CASES), SEED)
    tally = matrix.run(cases)
    with capsys.disabled():
        print(f"\n{tally.as_json()}")
    assert tally.wrong == []
    assert tally.unstruck == []
    assert tally.cases == len(cases)


@pytest.mark.timeout(3600)
def test_a_rank_that_is_killed_between_two_requests_leaves_all_or_nothing(matrix, s3, capsys):
    places = matrix.places(PARTS)
    kills = some([(place, is_carried_out) for place in places for is_carried_out in (False, True)], KILLS)
    commit = next(place for place in places if place.key == "manifest.json" and place.operation == "PutObject")
    kills = list(dict.fromkeys([*kills, (commit, True)]))
    committed = 0
    for place, is_carried_out in kills:
        case = matrix.kill(PARTS, place, is_carried_out=is_carried_out)
        is_committed, _ = found_at(case["url"], s3)
        has_landed = is_carried_out and place.key == "manifest.json" and place.operation == "PutObject"
        assert is_committed == has_landed, (place, is_carried_out)
        if is_committed:
            committed += 1
            assert is_equal(load(case["url"], PARTS.workload, s3), PARTS.workload, case["seed"])
        else:
            with pytest.raises(CheckpointException, match=r"CheckpointNotFoundError|NotCommittedError"):
                load(case["url"], PARTS.workload, s3)
            facts = matrix.again(case)  # by new ranks, to the same URL
            problems = wrong_with(quiet(PARTS), facts)
            assert [p for p in problems if "uploads are open" not in p] == []  # those of the dead
    with capsys.disabled():
        print(f"\n{len(kills)} ranks killed on {matrix.tally.server}, {committed} after the commit")


def crash(server):
    """Kills the server before it gets the request, and starts it again."""

    def kill_and_start():
        server.kill9()
        threading.Thread(target=server.start).start()

    return faults.call(kill_and_start, is_carried_out=False)


@pytest.mark.timeout(3600)
def test_a_server_that_is_killed_between_two_requests_costs_time_alone(server, matrix, capsys):
    if not server.durable:
        pytest.skip(f"{server.name} keeps everything in memory: it comes back empty")
    places = [place for place in matrix.places(PARTS) if place.rank == 0]
    places = some(places, KILLS)
    for place in places:
        facts = matrix.strike(PARTS, place, crash(server), retry_deadline_s=120, commit_deadline_s=120)
        assert wrong_with(quiet(PARTS), facts) == [], place
    with capsys.disabled():
        print(f"\n{server.name} killed and restarted {len(places)} times")
