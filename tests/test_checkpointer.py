"""The Checkpointer of one process: what is saved, when, and what is told of what fails."""

import gc
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.dcp import Checkpointer, KeepBest, KeepLast
from cloudckpt.dcp.hooks import WriterHook
from cloudckpt.dcp.state.rng import RngStates
from cloudckpt.engine import loop
from cloudckpt.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitConflictError,
    IntegrityError,
    SaveFailedError,
    ShapeMismatchError,
    UnstorableError,
    UsageError,
)
from cloudckpt.layout import MANIFEST
from cloudckpt.store.url import open_store
from states import Net, adamw, train


@pytest.fixture
def root():
    return f"memory://{token_hex(6)}/run"


def state(value=1.0):
    return {"w": torch.full((4, 3), value), "step": int(value)}


def keys_below(root):
    async def find():
        async with open_store(root) as store:
            return sorted([found.key async for found in store.list_objects("")])

    return loop.run(find)


def change(root, key_part, change_bytes):
    """Puts an object of a checkpoint again, changed; removes it if nothing is left."""

    async def put():
        async with open_store(root) as store:
            (key,) = [found.key async for found in store.list_objects("") if key_part in found.key]
            data = change_bytes(bytearray((await store.get(key)).data))
            if data is None:
                await store.delete([key])
            else:
                await store.put(key, [memoryview(data)])

    loop.run(put)


class Gate(WriterHook):
    """Holds saves right before their commit until it is opened."""

    def __init__(self):
        self.arrived = threading.Semaphore(0)
        self.opened = threading.Event()

    def pre_commit(self, info):
        self.arrived.release()
        assert self.opened.wait(60)


class Failing(WriterHook):
    def pre_commit(self, info):
        if info.step == 1:
            raise ValueError("not this one")


# What is saved.


def test_a_model_and_its_optimizer_resume_to_the_same_losses(root):
    model = Net(0)
    optimizer = adamw(model)
    train(model, optimizer)
    with Checkpointer(root) as checkpointer:
        checkpointer.save(7, {"model": model, "optimizer": optimizer, "epoch": 2})
        expected = train(model, optimizer)
        model, fresh = Net(1), {"epoch": 0}
        fresh |= {"model": model, "optimizer": adamw(model)}
        assert checkpointer.load(fresh) == 7
    assert fresh["epoch"] == 2
    assert train(model, fresh["optimizer"]) == expected


def test_what_training_changes_in_place_while_a_save_is_under_way_is_not_saved(root):
    gate, given = Gate(), {"w": torch.ones(1000), "steps": [1], "step": 1}
    with Checkpointer(root, hooks=[gate]) as checkpointer:
        handle = checkpointer.async_save(1, given)
        given["w"].zero_()
        given["steps"].append(2)
        given["step"] = 2
        gate.opened.set()
        assert handle.result().step == 1
        loaded = {"w": torch.zeros(1000), "steps": [], "step": 0}
        checkpointer.load(loaded)
    assert torch.equal(loaded["w"], torch.ones(1000))
    assert (loaded["steps"], loaded["step"]) == ([1], 1)


def test_a_rank_gets_its_random_numbers_back(root):
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, state(), per_rank={"rng": RngStates(), "seen": 17})
        expected = torch.rand(5)
        held = {"rng": RngStates(), "seen": 0}
        checkpointer.load(state(), per_rank=held)
    assert torch.equal(torch.rand(5), expected)
    assert held["seen"] == 17


def test_what_was_saved_without_something_per_rank_is_loaded_so_only_if_asked(root):
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, state())
        with pytest.raises(CheckpointError, match="missing"):
            checkpointer.load(state(), per_rank={"seen": 0})
        held = {"seen": 0}
        assert checkpointer.load(state(), per_rank=held, missing_per_rank="none") == 1
        assert held == {"seen": 0}


def test_a_structure_is_planned_once_and_again_when_it_changes(root):
    with Checkpointer(root) as checkpointer:
        planned = [checkpointer.save(step, state(step)).is_replanned for step in range(3)]
        changed = {**state(), "w": torch.zeros(5, 3)}
        planned += [checkpointer.save(3, changed).is_replanned, checkpointer.save(4, changed).is_replanned]
        assert planned == [True, False, False, True, False]
        loaded = {"w": torch.ones(5, 3), "step": 0}
        assert checkpointer.load(loaded) == 4
        assert not loaded["w"].any()
        checkpointer.load(loaded := state(0), step=2)
        assert torch.equal(loaded["w"], state(2)["w"])


def test_options_of_writing_reading_and_the_store_are_taken_by_name(root):
    with Checkpointer(root, part_size=8 << 20, max_gap=1, connect_timeout_s=3, concurrency=5) as checkpointer:
        assert checkpointer.save(1, state()).nbytes > 0
    with pytest.raises(UsageError, match="unknown option"):
        Checkpointer(root, part_sise=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"on_exists": "x"},
        {"on_busy": "x"},
        {"uploads": "x"},
        {"timeout_s": 0},
        {"hooks": [1]},
        {"keep": 3},
        {"keep_grace_s": -1},
    ],
)
def test_an_option_that_cannot_be_is_refused(root, wrong):
    with pytest.raises(UsageError):
        Checkpointer(root, **wrong)


@pytest.mark.parametrize("step", [-1, 1.5, True, None, "1"])
def test_a_step_that_is_no_number_from_0_on_is_refused_before_anything_is_written(root, step):
    with Checkpointer(root) as checkpointer:
        for save in (checkpointer.save, checkpointer.async_save):
            with pytest.raises(UsageError, match="from 0 on"):
                save(step, state())
        assert checkpointer.save(torch.tensor(3), state()).step == 3
    assert {key.split("/")[0] for key in keys_below(root)} == {"step-3"}


def test_metadata_that_json_cannot_spell_is_refused_before_anything_is_written(root):
    with Checkpointer(root) as checkpointer, pytest.raises(UsageError, match="metadata"):
        checkpointer.async_save(1, state(), metadata={"a": (1, 2)})
    assert keys_below(root) == []


# A step that is there.


@pytest.mark.parametrize("method", ["save", "async_save"])
def test_a_step_that_is_there_is_refused_replaced_or_skipped(root, method):
    def save(on_exists, value):
        with Checkpointer(root, on_exists=on_exists) as checkpointer:
            done = getattr(checkpointer, method)(1, state(value))
            done = done if method == "save" else done.result()
            loaded = state(0)
            checkpointer.load(loaded)
            return done.was_skipped, loaded["step"]

    assert save("refuse", 1) == (False, 1)
    with pytest.raises(CheckpointExistsError, match="on_exists"):
        save("refuse", 2)
    assert save("skip", 2) == (True, 1)
    assert save("replace", 3) == (False, 3)
    assert len(keys_below(root)) == 2


def test_of_two_jobs_that_save_a_step_at_once_the_second_loses_and_the_first_stands(root):
    class Other(WriterHook):
        def pre_commit(self, info):
            other.save(info.step, state(2))

    with Checkpointer(root) as other, Checkpointer(root, hooks=[Other()]) as checkpointer:
        with pytest.raises(CommitConflictError):
            checkpointer.save(1, state(1))
        loaded = state(0)
        other.load(loaded)
    assert loaded["step"] == 2


# A save while another is under way.


def test_a_second_async_save_waits_for_the_first(root):
    gate = Gate()
    with Checkpointer(root, hooks=[gate]) as checkpointer:
        first = checkpointer.async_save(1, state(1))
        assert gate.arrived.acquire(timeout=60)
        opener = threading.Timer(0.2, gate.opened.set)
        opener.start()
        second = checkpointer.async_save(2, state(2))
        assert first.done()
        assert (first.result().step, second.result().step) == (1, 2)


def test_a_second_async_save_is_skipped_by_choice(root):
    gate = Gate()
    with Checkpointer(root, hooks=[gate], on_busy="skip") as checkpointer:
        first = checkpointer.async_save(1, state(1))
        assert gate.arrived.acquire(timeout=60)
        second = checkpointer.async_save(2, state(2))
        assert second.result().was_skipped
        assert not first.done()
        gate.opened.set()
        assert not first.result().was_skipped
        assert checkpointer.latest() == 1


def test_a_second_async_save_is_queued_by_choice_and_keeps_its_own_copy(root):
    gate, given = Gate(), state(1)
    with Checkpointer(root, hooks=[gate], on_busy="queue") as checkpointer:
        handles = []
        for step in (1, 2):
            handles.append(checkpointer.async_save(step, given))
            given["w"].add_(1)
        assert not any(handle.done() for handle in handles)
        with pytest.raises(TimeoutError, match="still being saved"):
            handles[0].result(0.01)
        gate.opened.set()
        assert [handle.result().step for handle in handles] == [1, 2]
        for step in (1, 2):
            checkpointer.load(loaded := state(0), step=step)
            assert torch.equal(loaded["w"], torch.full((4, 3), float(step)))


def test_a_save_comes_after_those_under_way_and_a_load_too(root):
    with Checkpointer(root, on_busy="queue") as checkpointer:
        checkpointer.async_save(1, state(1))
        checkpointer.async_save(2, state(2))
        assert checkpointer.load(state(0)) == 2
        checkpointer.async_save(3, state(3))
        checkpointer.save(4, state(4))
        assert checkpointer.steps() == [1, 2, 3, 4]


# Failures.


def test_a_hook_that_fails_before_the_commit_stops_it_and_nothing_is_left(root):
    with Checkpointer(root, hooks=[Failing()]) as checkpointer:
        with pytest.raises(SaveFailedError, match="not this one"):
            checkpointer.save(1, state())
        assert keys_below(root) == []
        checkpointer.save(2, state())
    assert {key.split("/")[0] for key in keys_below(root)} == {"step-2"}


def test_a_hook_that_fails_after_the_commit_is_reported_and_the_checkpoint_stands(root, caplog):
    class Late(WriterHook):
        def post_commit(self, info):
            raise ValueError("too late")

    with Checkpointer(root, hooks=[Late()]) as checkpointer:
        (told,) = checkpointer.save(1, state()).hook_failures
        assert "too late" in told
        assert checkpointer.latest() == 1
    assert "too late" in caplog.text


def test_a_failure_of_an_async_save_is_raised_by_its_handle_and_then_no_more(root):
    with Checkpointer(root, hooks=[Failing()]) as checkpointer:
        handle = checkpointer.async_save(1, state())
        with pytest.raises(SaveFailedError, match="not this one"):
            handle.result()
        checkpointer.save(2, state())


def test_a_failure_that_nobody_asked_for_is_raised_by_the_next_save_once(root):
    with Checkpointer(root, hooks=[Failing()]) as checkpointer:
        checkpointer.async_save(1, state())
        with pytest.raises(SaveFailedError, match="step 1, of before"):
            checkpointer.async_save(2, state())
        assert checkpointer.save(2, state()).step == 2


def test_each_of_several_failures_is_raised_once(root):
    gate = Gate()
    with Checkpointer(root, hooks=[gate, Failing()], on_busy="queue", on_exists="refuse") as checkpointer:
        checkpointer.async_save(1, state())
        checkpointer.async_save(1, state())
        gate.opened.set()
        for _ in range(2):
            with pytest.raises(SaveFailedError, match="step 1, of before"):
                checkpointer.save(2, state())
        assert checkpointer.save(2, state()).step == 2


def test_a_failure_that_nobody_asked_for_is_raised_at_the_end(root):
    checkpointer = Checkpointer(root, hooks=[Failing()])
    checkpointer.async_save(1, state())
    with pytest.raises(SaveFailedError, match="step 1, of before"):
        checkpointer.close()
    checkpointer.close()


def test_a_failure_does_not_hide_the_error_that_ended_the_training(root, caplog):
    with pytest.raises(ZeroDivisionError), Checkpointer(root, hooks=[Failing()]) as checkpointer:
        checkpointer.async_save(1, state())
        raise ZeroDivisionError
    assert "not this one" in caplog.text


def test_what_cannot_be_copied_fails_its_save_at_once_and_no_other(root):
    with Checkpointer(root) as checkpointer:
        with pytest.raises(UnstorableError, match="lock"):
            checkpointer.async_save(1, {**state(), "lock": threading.Lock()})
        assert checkpointer.async_save(2, state()).result().step == 2
        assert checkpointer.steps() == [2]


def test_a_closed_checkpointer_refuses_and_one_that_is_closed_waits(root):
    gate = Gate()
    checkpointer = Checkpointer(root, hooks=[gate])
    handle = checkpointer.async_save(1, state())
    threading.Timer(0.2, gate.opened.set).start()
    checkpointer.close()
    assert handle.done()
    for method in (checkpointer.save, checkpointer.async_save):
        with pytest.raises(UsageError, match="closed"):
            method(2, state())
    with pytest.raises(UsageError, match="closed"):
        checkpointer.load(state())
    assert len(keys_below(root)) == 2


def test_a_save_that_is_cancelled_before_its_commit_leaves_nothing(root):
    gate = Gate()
    checkpointer = Checkpointer(root, hooks=[gate], on_busy="queue")
    handles = [checkpointer.async_save(step, state()) for step in (1, 2)]
    assert gate.arrived.acquire(timeout=60)
    threading.Timer(0.2, gate.opened.set).start()
    checkpointer.close(cancel=True)
    for handle in handles:
        with pytest.raises(CheckpointError, match="cancelled"):
            handle.result()
    assert keys_below(root) == []


class Interrupted:
    """An object that somebody interrupts."""

    def __init__(self, error):
        self.error = error

    def state_dict(self):
        raise self.error

    def load_state_dict(self, _):
        pass


@pytest.mark.parametrize("method", ["save", "async_save"])
def test_a_save_that_is_interrupted_before_it_began_is_no_other_save(root, method):
    with Checkpointer(root) as checkpointer:
        with pytest.raises(KeyboardInterrupt):
            getattr(checkpointer, method)(1, {"w": torch.ones(2), "it": Interrupted(KeyboardInterrupt())})
        with pytest.raises(SaveFailedError, match="CheckpointException"):
            getattr(checkpointer, method)(1, {"it": Interrupted(CheckpointException("boom", {}))})
        assert checkpointer.save(2, state(2)).step == 2
        assert checkpointer.steps() == [2]


def test_a_save_that_is_interrupted_stops_before_its_caller_goes_on(root):
    gate = Gate()
    with Checkpointer(root, hooks=[gate]) as checkpointer:

        def interrupt():
            assert gate.arrived.acquire(timeout=60)
            threading.Timer(2.5, gate.opened.set).start()
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(1, state())
        assert gate.opened.is_set()  # it waited
        assert checkpointer.steps() == []
        assert checkpointer.save(2, state()).step == 2
    assert {key.split("/")[0] for key in keys_below(root)} == {"step-2"}


def test_a_hook_that_waits_for_its_own_save_is_refused(root):
    class Loads(WriterHook):
        def pre_commit(self, info):
            checkpointer.load(state())

    with Checkpointer(root, hooks=[Loads()]) as checkpointer:
        with pytest.raises(UsageError, match="wait for itself"):
            checkpointer.save(1, state())


def test_a_hook_that_ends_the_process_after_the_commit_does_not_undo_it(root):
    class Leaves(WriterHook):
        def post_commit(self, info):
            raise SystemExit(3)

    with Checkpointer(root, hooks=[Leaves()]) as checkpointer:
        assert checkpointer.save(1, state()).hook_failures


def test_what_is_no_dict_is_refused(root):
    with Checkpointer(root) as checkpointer, pytest.raises(UsageError, match="pass a dict"):
        checkpointer.save(1, [torch.ones(3)])


def test_a_step_that_was_loaded_is_saved_again_when_asked_for_at_a_signal(root):
    with Checkpointer(root, on_exists="replace") as checkpointer:
        checkpointer.save_on_signal(signal.SIGUSR2)
        checkpointer.save(1, state(1))
        checkpointer.load(state(0))
        signal.raise_signal(signal.SIGUSR2)
        assert checkpointer.save_if_asked(1, {**state(1), "step": 5})
        checkpointer.load(loaded := state(0))
        assert loaded["step"] == 5


def test_a_failure_before_does_not_stop_the_save_that_a_signal_asks_for(root):
    with Checkpointer(root, hooks=[Failing()]) as checkpointer:
        checkpointer.save_on_signal(signal.SIGUSR2)
        checkpointer.async_save(1, state(1))
        signal.raise_signal(signal.SIGUSR2)
        assert checkpointer.save_if_asked(2, state(2))
        assert checkpointer.steps() == [2]


def test_what_another_thread_closes_tells_of_its_failure_too(root):
    checkpointer = Checkpointer(root, hooks=[Failing()])
    checkpointer.save_on_signal(signal.SIGUSR2)
    checkpointer.async_save(1, state())
    with ThreadPoolExecutor(1) as other, pytest.raises(SaveFailedError):
        other.submit(checkpointer.close).result()
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)


def test_a_checkpointer_that_is_closed_leaves_the_handlers_that_were_there(root):
    before = signal.getsignal(signal.SIGUSR2)
    with Checkpointer(root) as checkpointer:
        checkpointer.save_on_signal(signal.SIGUSR2)
        with pytest.raises(UsageError, match="before"):
            checkpointer.save_on_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_script_that_ends_without_closing_still_commits_and_tells_of_a_failure(tmp_path):
    script = """
import sys, torch
from cloudckpt.dcp import Checkpointer, KeepLast
c = Checkpointer(sys.argv[1], keep=KeepLast(1))
c.save(1, {"w": torch.ones(3)})
c.async_save(2, {"w": torch.ones(3)})
c.async_save(1, {"w": torch.ones(3)})
"""
    ended = subprocess.run(
        [sys.executable, "-c", script, f"file://{tmp_path}/run"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "async save of step 1 failed" in ended.stderr
    with Checkpointer(f"file://{tmp_path}/run") as checkpointer:
        assert checkpointer.steps() == [1, 2]


# Loading.


def flipped(data):
    data[-1] ^= 1
    return data


DAMAGE = {
    "a flipped bit": ("step-3/shards", flipped),
    "a shard that is gone": ("step-3/shards", lambda _: None),
    "a manifest that is cut off": (f"step-3/{MANIFEST}", lambda data: data[: len(data) // 2]),
    "an empty manifest": (f"step-3/{MANIFEST}", lambda _: b""),
}


@pytest.mark.parametrize(("part", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_of_a_damaged_newest_step_the_one_before_it_is_loaded_only_if_asked(root, part, damage, caplog):
    with Checkpointer(root) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state(step))
        change(root, part, damage)
        with pytest.raises(IntegrityError):
            checkpointer.load(state(0))
        with pytest.raises(IntegrityError):
            checkpointer.load(state(0), step=3, fallback=True)
        assert "step-3" not in caplog.text
        loaded = state(0)
        assert checkpointer.load(loaded, fallback=True) == 2
    assert torch.equal(loaded["w"], state(2)["w"])
    assert "step-3 is damaged" in caplog.text


def test_where_every_step_is_damaged_none_is_loaded(root):
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, state())
        change(root, "step-1/shards", flipped)
        with pytest.raises(IntegrityError):
            checkpointer.load(state(0), fallback=True, missing="none")


def test_a_step_that_was_never_committed_is_passed_over(root):
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, state(1))
        checkpointer.save(2, state(2))
        change(root, f"step-2/{MANIFEST}", lambda _: None)
        assert checkpointer.load(state(0)) == 1
        assert checkpointer.steps() == [1]
        with pytest.raises(CheckpointNotFoundError, match="step 2"):
            checkpointer.load(state(0), step=2)


def test_nothing_there_is_an_error_unless_nothing_will_do(root):
    with Checkpointer(root) as checkpointer:
        assert checkpointer.latest() is None
        with pytest.raises(CheckpointNotFoundError, match="missing='none'"):
            checkpointer.load(state(0))
        assert checkpointer.load(state(0), missing="none") is None
        with pytest.raises(CheckpointNotFoundError, match="step 4"):
            checkpointer.load(state(0), step=4, missing="none")


def test_what_was_not_saved_is_named(root):
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, state())
        with pytest.raises(CheckpointError, match="'other'"):
            checkpointer.load({**state(), "other": torch.ones(3)})
        with pytest.raises((ShapeMismatchError, CheckpointError), match="w"):
            checkpointer.load({"w": torch.ones(7)})


# Old steps.


def test_old_steps_go_after_a_commit_and_pinned_ones_stay(root):
    with Checkpointer(root, keep=KeepLast(2), keep_grace_s=0) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state())
        checkpointer.pin(1)
        for step in (3, 4, 5):
            checkpointer.async_save(step, state())
    assert Checkpointer(root).steps() == [1, 4, 5]
    checkpointer = Checkpointer(root, keep=KeepLast(2), keep_grace_s=0)
    checkpointer.unpin(1)
    checkpointer.save(6, state())
    checkpointer.close()
    assert Checkpointer(root).steps() == [5, 6]
    assert {key.split("/")[0] for key in keys_below(root)} == {"step-5", "step-6"}


def test_a_step_that_was_the_newest_a_moment_ago_stays_for_those_who_load_it(root):
    with Checkpointer(root, keep=KeepLast(1)) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state())
    assert Checkpointer(root).steps() == [1, 2, 3]


def test_the_best_steps_stay_by_what_was_measured(root):
    with Checkpointer(root, keep=KeepBest("loss", 1), keep_grace_s=0) as checkpointer:
        for step, loss in enumerate([0.5, 0.1, 0.7, 0.3]):
            checkpointer.save(step, state(), metrics={"loss": loss})
    assert Checkpointer(root).steps() == [1, 3]


def test_after_a_roll_back_the_step_that_was_just_saved_stays_among_higher_ones(root):
    with Checkpointer(root) as checkpointer:
        for step in (7, 8, 9):
            checkpointer.save(step, state())
    with Checkpointer(root, keep=KeepLast(1), keep_grace_s=0) as checkpointer:
        checkpointer.save(3, state())
    assert Checkpointer(root).steps() == [3, 9]


def test_a_policy_that_fails_fails_no_save(root, caplog):
    class Wrong:
        def keep(self, steps):
            raise ZeroDivisionError

    with Checkpointer(root, keep=Wrong()) as checkpointer:
        assert checkpointer.save(1, state()).step == 1
    assert "could not be removed" in caplog.text


def test_a_hundred_async_saves_take_no_more_memory_threads_or_files_than_twenty(tmp_path):
    given, seen = {"w": torch.zeros(1 << 20), "more": [torch.zeros(1000) for _ in range(50)]}, []
    with Checkpointer(f"file://{tmp_path}/run", keep=KeepLast(1), keep_grace_s=0) as checkpointer:
        for step in range(100):
            given["w"].add_(1)
            checkpointer.async_save(step, given)
            if step in (20, 99):
                gc.collect()
                status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
                resident = int(status["VmRSS"].split()[0]) >> 10
                seen.append((resident, threading.active_count(), len(os.listdir("/proc/self/fd"))))
    (resident, threads, files), (resident_after, threads_after, files_after) = seen
    assert resident_after < resident + 24, seen  # MiB; the state dict takes 4, one that leaked 320
    assert threads_after <= threads + 1
    assert files_after <= files + 4
