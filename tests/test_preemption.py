"""A signal that asks for a last checkpoint: real signals, and real processes that agree."""

import math
import signal
import subprocess
import sys
import threading
import time

import pytest

from cloudckpt.dcp.preemption import PreemptionWatch
from cloudckpt.dcp.ranks.collectives import Collectives
from cloudckpt.errors import UsageError

ASK = signal.SIGUSR1


def send(number):
    signal.raise_signal(number)


@pytest.fixture(autouse=True)
def handlers_are_as_they_were():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.fixture
def earlier():
    """A handler that stood there before, and what it was called with."""
    seen = []

    def handle(number, frame):
        seen.append(number)

    before = signal.signal(ASK, handle)
    yield seen, handle
    signal.signal(ASK, before)


class Ranks:
    """This rank's answer among those of others."""

    def __init__(self, *others):
        self.others, self.calls = others, 0

    def all_reduce(self, name, map_fn, reduce_fn):
        self.calls += 1
        return reduce_fn([map_fn(), *self.others])


ALONE = (False, math.inf)


def test_a_signal_sets_the_flag_and_the_process_goes_on():
    with PreemptionWatch() as watch:
        assert not watch.is_requested
        send(signal.SIGTERM)
        assert watch.is_requested


def test_any_of_several_signals_counts():
    with PreemptionWatch((signal.SIGTERM, signal.SIGUSR2)) as watch:
        send(signal.SIGUSR2)
        assert watch.is_requested


def test_handlers_are_put_back_and_what_was_heard_stays():
    before = signal.getsignal(signal.SIGTERM)
    watch = PreemptionWatch()
    assert signal.getsignal(signal.SIGTERM) != before
    send(signal.SIGTERM)
    watch.close()
    watch.close()
    assert signal.getsignal(signal.SIGTERM) == before
    assert watch.is_requested


def test_an_earlier_handler_is_not_called_and_is_put_back(earlier):
    seen, handle = earlier
    with PreemptionWatch([ASK]):
        send(ASK)
    assert seen == []
    assert signal.getsignal(ASK) is handle
    send(ASK)
    assert seen == [ASK]


def test_an_earlier_handler_is_called_too_where_asked_for(earlier):
    seen, _ = earlier
    with PreemptionWatch([ASK], is_chained=True) as watch:
        send(ASK)
        assert watch.is_requested
    assert seen == [ASK]


def test_pythons_own_default_actions_are_not_called():
    with PreemptionWatch((signal.SIGINT, signal.SIGTERM), is_chained=True) as watch:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert watch.is_requested


def test_a_handler_that_came_later_is_left_in_place():
    later = lambda number, frame: None  # noqa: E731
    before = signal.getsignal(ASK)
    watch = PreemptionWatch([ASK])
    signal.signal(ASK, later)
    watch.close()
    assert signal.getsignal(ASK) is later
    signal.signal(ASK, before)


def in_a_thread(run):
    raised = []

    def keep():
        try:
            run()
        except UsageError as e:
            raised.append(e)

    thread = threading.Thread(target=keep)
    thread.start()
    thread.join()
    return raised


def test_it_is_refused_elsewhere_than_in_the_main_thread():
    (error,) = in_a_thread(PreemptionWatch)
    assert "main thread" in str(error)


def test_it_cannot_be_closed_elsewhere_either_and_goes_on():
    with PreemptionWatch() as watch:
        (error,) = in_a_thread(watch.close)
        assert "main thread" in str(error)
        send(signal.SIGTERM)
        assert watch.is_requested


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"signals": ()}, "must name some"),
        ({"deadline_s": 0}, "be positive"),
        ({"signals": (signal.SIGUSR2, signal.SIGKILL)}, "cannot be handled"),
        ({"signals": (signal.SIGUSR2, 10_000)}, "is no signal"),
    ],
    ids=["no signals", "no time", "a signal that cannot be handled", "no signal"],
)
def test_what_cannot_work_is_refused_and_changes_no_handler(options, match):
    with pytest.raises(UsageError, match=match):  # the fixture looks at the handlers
        PreemptionWatch(**options)


def test_the_deadline_counts_from_the_first_signal():
    with PreemptionWatch(deadline_s=1000) as watch:
        assert watch.remaining_s == math.inf
        before = time.monotonic()
        send(signal.SIGTERM)
        after = time.monotonic()
        first = watch.remaining_s
        assert 1000 - (time.monotonic() - before) <= first <= 1000 - (time.monotonic() - after) + 1
        send(signal.SIGTERM)
        assert watch.remaining_s <= first


def test_a_deadline_that_passed_leaves_nothing():
    with PreemptionWatch(deadline_s=1e-9) as watch:
        send(signal.SIGTERM)
        assert watch.remaining_s == 0


def test_nobody_asked_and_all_go_on():
    ranks = Ranks(ALONE, ALONE)
    with PreemptionWatch() as watch:
        assert not watch.agree(ranks)
        assert not watch.agree(ranks)
    assert ranks.calls == 2


def test_what_one_rank_heard_all_act_on_and_by_its_deadline():
    with PreemptionWatch(deadline_s=1000) as watch:
        assert watch.agree(Ranks(ALONE, (True, 10.0), (True, 500.0)))
        assert watch.is_requested
        assert 0 < watch.remaining_s <= 10


def test_once_agreed_it_is_not_asked_again():
    ranks = Ranks(ALONE)
    with PreemptionWatch() as watch:
        send(signal.SIGTERM)
        assert watch.agree(ranks)
        assert watch.agree(ranks)
    assert ranks.calls == 1


def test_one_process_alone_agrees_with_itself():
    ranks = Collectives(use_dist=False)
    with PreemptionWatch() as watch:
        assert not watch.agree(ranks)
        send(signal.SIGTERM)
        assert watch.agree(ranks)


ONE_OF_TWO = """
import os, signal, sys
import torch.distributed as dist
from cloudckpt.dcp.ranks.collectives import Collectives
from cloudckpt.dcp.preemption import PreemptionWatch

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
ranks = Collectives()
answers = []
with PreemptionWatch(deadline_s=60) as watch:
    for step in range(6):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        answers.append(watch.agree(ranks))
        if answers[-1]:
            break
    assert watch.remaining_s <= 60
print(answers)
dist.destroy_process_group()
"""


def test_two_processes_stop_at_the_same_step_though_one_was_asked(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", ONE_OF_TWO]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said == ["[False, False, False, True]"] * 2
