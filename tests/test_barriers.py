"""Barriers over stores: the ranks are threads here. Over process groups: `test_collectives.py`."""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from cloudckpt.dcp.ranks.barriers import Barrier, GroupBarrier, StoreBarrier, TcpBarrier
from cloudckpt.errors import BarrierTimeoutError, RanksLostError, UsageError

HOST = socket.gethostname()


@pytest.fixture(params=["tcp", "prefix", "hash", "file"])
def store(request, tmp_path):
    if request.param == "hash":
        return dist.HashStore()
    if request.param == "file":
        return dist.FileStore(str(tmp_path / "store"), 4)
    server = tcp_server()
    return dist.PrefixStore("p", server) if request.param == "prefix" else server


def tcp_server():
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)


def barriers_of(store, count, **more):
    return [StoreBarrier(store, rank=rank, world_size=count, **more) for rank in range(count)]


def on_all(actions):
    """Runs each action in a thread of its own; returns what they return, or raise."""
    with ThreadPoolExecutor(len(actions)) as threads:
        futures = [threads.submit(action) for action in actions]
    return [future.exception() or future.result() for future in futures]


def waiting(barriers, timeout_s=30):
    return [lambda b=b: b.wait(timeout_s) for b in barriers]


def test_nobody_passes_before_all_have_come_each_time(store):
    barriers = barriers_of(store, 3)
    count, seen, lock = [0], [], threading.Lock()

    def rounds(barrier):
        for k in range(1, 11):
            with lock:
                count[0] += 1
            barrier.wait(30)
            with lock:
                seen.append(count[0] >= 3 * k)

    assert on_all([lambda b=b: rounds(b) for b in barriers]) == [None] * 3
    assert seen == [True] * 30


def test_all_who_came_are_told_who_did_not(store):
    barriers = barriers_of(store, 4)
    told = on_all(waiting([barriers[0], barriers[2]], 0.2))
    for error in told:
        assert type(error) is BarrierTimeoutError
        assert f": rank 1 on {HOST}, rank 3 on {HOST} did not come. No rank passed it." in str(error)
    assert isinstance(told[0], TimeoutError)


def test_a_rank_that_never_made_its_barrier_is_named_without_a_host(store):
    barrier = StoreBarrier(store, rank=1, world_size=3)
    with pytest.raises(BarrierTimeoutError, match=": rank 0, rank 2 did not come"):
        barrier.wait(0.1)


def test_who_comes_late_is_told_at_once_and_then_all_pass(store):
    early, late = barriers_of(store, 2, name="step")
    with pytest.raises(BarrierTimeoutError):
        early.wait(0.1)
    with pytest.raises(BarrierTimeoutError, match=f"'step' of 2 ranks .*: rank 1 on {HOST} did not come"):
        late.wait(3600)
    assert on_all(waiting([early, late])) == [None, None]


def test_a_rank_that_gave_up_many_times_waits_for_one_that_must_hear_of_each(store):
    early, late = barriers_of(store, 2)
    for _ in range(3):
        with pytest.raises(BarrierTimeoutError):
            early.wait(0.05)

    def catch_up():
        failed = 0
        while True:
            try:
                late.wait(30)
            except BarrierTimeoutError:
                failed += 1
            else:
                return failed

    assert on_all([*waiting([early]), catch_up]) == [None, 3]


def test_a_round_leaves_no_keys_behind():
    store = dist.HashStore()
    barriers = barriers_of(store, 2)
    counts = []
    for k in range(8):
        if k == 4:
            for barrier in barriers:
                with pytest.raises(BarrierTimeoutError):
                    barrier.wait(0.05)
        on_all(waiting(barriers))
        counts.append(store.num_keys())
    assert counts == [counts[0]] * 8


def test_barriers_of_one_store_do_not_meet():
    store = dist.HashStore()
    first, second = barriers_of(store, 2), barriers_of(store, 2)
    other = barriers_of(store, 2, name="other")
    assert on_all(waiting([first[0]], 0.1) + waiting([second[1]], 0.1) + waiting([other[0]], 0.1)) != [None] * 3
    for told in on_all(waiting([first[0]], 0.1) + waiting([second[1]], 0.1)):
        assert type(told) is BarrierTimeoutError


def test_two_threads_of_one_rank_are_refused(store):
    mine, other = barriers_of(store, 2)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(mine.wait, 30)
        while not store.check([f"{mine._prefix}/came/0"]):
            pass
        with pytest.raises(UsageError, match="two threads of rank 0"):
            mine.wait(1)
        other.wait(30)
        assert waits.result() is None


def test_a_timeout_holds_while_another_thread_waits_on_the_store():
    server = tcp_server()
    barrier = StoreBarrier(server, rank=0, world_size=2)
    with ThreadPoolExecutor(2) as threads:
        other = threads.submit(server.wait, ["never"], timedelta(seconds=8))
        gave_up = threads.submit(barrier.wait, 0.2)
        assert type(gave_up.exception(timeout=20)) is BarrierTimeoutError
        assert not other.done()
        with contextlib.suppress(RuntimeError):
            server.clone().set("never", "1")
        other.result()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_ranks_meet_at_an_address():
    port = free_port()

    def live(rank):
        with TcpBarrier("127.0.0.1", port, rank=rank, world_size=3, timeout_s=30) as barrier:
            for _ in range(5):
                barrier.wait()
        with pytest.raises(UsageError, match="closed"):
            barrier.wait()
        barrier.close()

    assert on_all([lambda rank=rank: live(rank) for rank in range(3)]) == [None] * 3


def test_the_rank_that_serves_leaves_last():
    port = free_port()
    server = TcpBarrier("127.0.0.1", port, rank=0, world_size=2)
    with ThreadPoolExecutor(1) as threads, TcpBarrier("127.0.0.1", port, rank=1, world_size=2) as other:
        closes = threads.submit(server.close)
        while not other._store.add(f"{other._prefix}/closed", 0):
            pass
        with pytest.raises(BarrierTimeoutError):  # and not that the store is gone
            other.wait(0.1)
        assert not closes.done()
        other.close()
        assert closes.result() is None


def test_a_server_that_nobody_listens_at_is_an_error():
    with pytest.raises(RanksLostError, match=r"barrier 'barrier' at 127\.0\.0\.1:\d+ cannot be used"):
        TcpBarrier("127.0.0.1", free_port(), rank=1, world_size=2, timeout_s=0.2)


def test_a_store_that_is_gone_is_an_error():
    server = tcp_server()
    client = dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=20), wait_for_workers=False)
    barrier = StoreBarrier(client, rank=0, world_size=2)
    del server
    with pytest.raises(RanksLostError, match="'barrier' does not answer"):
        barrier.wait(30)
    barrier.close()


def test_without_torch_distributed_one_rank_passes():
    assert not dist.is_initialized()
    barrier: Barrier = GroupBarrier()
    with contextlib.closing(barrier):
        for _ in range(3):
            assert barrier.wait(0.1) is None


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan")])
def test_a_timeout_that_is_none_is_refused(timeout_s):
    with pytest.raises(UsageError, match="timeout_s"):
        GroupBarrier(timeout_s=timeout_s)
    with pytest.raises(UsageError, match="timeout_s"):
        GroupBarrier().wait(timeout_s)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_is_none_of_them_is_refused(rank):
    with pytest.raises(UsageError, match="none of the 2"):
        StoreBarrier(dist.HashStore(), rank=rank, world_size=2)
