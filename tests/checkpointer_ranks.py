"""What the ranks of a job do with a Checkpointer: each function is a case, run by all of them, one after the other.

``python -m torch.distributed.run --nproc-per-node N checkpointer_ranks.py OUT CONFIG CASE...``; each rank writes to
``OUT.RANK`` what became of each case: null, or a traceback. A case in which ranks are killed comes last.
"""

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cloudckpt import errors
from cloudckpt.dcp import Checkpointer, RngStates, WriterHook
from cloudckpt.engine import loop
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions, open_store
from states import Net, adamw, train

warnings.simplefilter("ignore")


def checkpointer(case, **more):
    return Checkpointer(case["url"], **case["s3"], **more)


def rank():
    return dist.get_rank()


def keys_below(case):
    async def find():
        async with open_store(case["url"], StoreOptions(s3=S3Options(**case["s3"]))) as store:
            uploads = [upload.key async for upload in store.list_uploads("")]
            return sorted([found.key async for found in store.list_objects("")]), uploads

    dist.barrier()
    found = loop.run(find)
    dist.barrier()
    return found


def raised(kind, pattern, fn):
    with pytest.raises(kind, match=pattern) as caught:
        fn()
    return str(caught.value)


def state(value=1.0):
    return {"w": torch.full((40, 30), float(value)), "step": int(value)}


class Gate(WriterHook):
    """Holds saves before their commit on the coordinator, while it is closed."""

    def __init__(self):
        self.opened = threading.Event()

    def pre_commit(self, info):
        assert self.opened.wait(60)


# Cases of two ranks.


def sharded(seed):
    model = Net(seed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    return model, adamw(model)


def a_sharded_model_resumes_from_an_async_save_with_each_ranks_random_numbers(case):
    model, optimizer = sharded(0)
    train(model, optimizer)
    torch.manual_seed(rank())
    with checkpointer(case) as saves:
        held = {"rng": RngStates(), "of": rank()}
        handle = saves.async_save(5, {"model": model, "optimizer": optimizer, "epoch": 1}, per_rank=held)
        drawn, expected = torch.rand(4), train(model, optimizer)
        assert handle.result().step == 5
        model, optimizer = sharded(1)
        given, held = {"model": model, "optimizer": optimizer, "epoch": 0}, {"rng": RngStates(), "of": None}
        assert saves.load(given, per_rank=held) == 5
        assert (given["epoch"], held["of"]) == (1, rank())
        assert torch.equal(torch.rand(4), drawn)
        assert train(model, optimizer) == expected


def keys_may_differ_between_ranks_and_one_key_is_one_shape(case):
    with checkpointer(case) as saves:
        saves.save(1, {f"stage{rank()}": torch.full((3,), rank()), "step": 1})
        mine = {f"stage{rank()}": torch.zeros(3), "step": 0}
        assert saves.load(mine) == 1
        assert mine[f"stage{rank()}"].tolist() == [rank()] * 3
        before = keys_below(case)
        wrong = {"w": torch.zeros(3 + rank())}
        raised(
            errors.ShapeMismatchError,
            r"'w' is .*\(3,\) on rank 0 and .*\(4,\) on rank 1",
            lambda: saves.save(2, wrong),
        )
        assert keys_below(case) == before


def what_is_planned_once_is_planned_again_when_it_changes_on_one_rank(case):
    with checkpointer(case) as saves:
        planned = [saves.save(step, state(step)).is_replanned for step in range(3)]
        more = {"of 1": torch.ones(2)} if rank() == 1 else {}
        planned += [saves.save(step, {**state(step), **more}).is_replanned for step in (3, 4)]
        assert planned == [True, False, False, True, False]
        loaded = {**state(0), "of 1": torch.zeros(2)}
        assert saves.load(loaded) == 4
        assert loaded["of 1"].tolist() == [1, 1]
        assert torch.equal(loaded["w"], state(4)["w"])


def all_ranks_name_the_same_step(case):
    with checkpointer(case) as saves:
        raised(errors.UsageError, "different steps: 1, 2", lambda: saves.save(1 + rank(), state()))
        raised(errors.UsageError, "from 0 on", lambda: saves.async_save(-rank(), state()))
        assert keys_below(case) == ([], [])
        assert saves.save(1, state()).step == 1


def what_one_rank_cannot_store_fails_all_and_nothing_is_left(case):
    with checkpointer(case) as saves:
        given = {"w": torch.full((300, 300), 1.0), f"own{rank()}": torch.ones(300, 300)}
        given |= {"meta": torch.empty(2, device="meta")} if rank() == 1 else {}
        for save in (lambda: saves.save(1, given), lambda: saves.async_save(1, given).result()):
            assert "rank 0 on" not in raised(errors.UnstorableError, "rank 1 on .*meta", save)
        assert keys_below(case) == ([], [])
        assert saves.save(2, state()).step == 2


def what_one_rank_cannot_copy_fails_its_async_save_on_all(case):
    with checkpointer(case) as saves:
        given = {**state(), **({"lock": threading.Lock()} if rank() == 1 else {})}
        if rank() == 1:
            raised(errors.UnstorableError, "lock", lambda: saves.async_save(1, given))
        else:
            raised(errors.UnstorableError, "rank 1 on .*lock", saves.async_save(1, given).result)
        assert saves.async_save(2, state()).result().step == 2
        assert {key.split("/")[0] for key in keys_below(case)[0]} == {"step-2"}


def a_step_that_is_there_is_skipped_or_replaced_by_all(case):
    with checkpointer(case) as saves:
        saves.save(1, state(1))
        raised(errors.CheckpointExistsError, "on_exists", lambda: saves.save(1, state(2)))
    with checkpointer(case, on_exists="skip") as saves:
        assert saves.async_save(1, state(2)).result().was_skipped
        saves.load(loaded := state(0))
        assert loaded["step"] == 1
    with checkpointer(case, on_exists="replace") as saves:
        saves.save(1, state(3))
        saves.load(loaded := state(0))
        assert loaded["step"] == 3


class Interrupted:
    def state_dict(self):
        raise KeyboardInterrupt

    def load_state_dict(self, _):
        pass


def a_save_that_is_interrupted_on_one_rank_is_not_taken_for_the_next(case):
    with checkpointer(case) as saves:
        given = {**state(1), "it": Interrupted()} if rank() == 1 else state(1)
        if rank() == 1:
            raised(KeyboardInterrupt, "", lambda: saves.async_save(1, given))
        else:
            raised(errors.SaveFailedError, "rank 1 on .*KeyboardInterrupt", saves.async_save(1, given).result)
        assert saves.save(2, state(2)).step == 2
        assert saves.steps() == [2]


def a_failure_that_one_rank_was_told_of_is_raised_on_all_and_then_no_more(case):
    class Failing(WriterHook):
        def pre_commit(self, info):
            if info.step == 1:
                raise ValueError("not this one")

    with checkpointer(case, hooks=[Failing()]) as saves:
        handle = saves.async_save(1, state(1))
        if rank() == 0:
            raised(errors.SaveFailedError, "not this one", handle.result)
        raised(errors.SaveFailedError, "step 1, of before.*not this one", lambda: saves.save(2, state(2)))
        assert saves.save(2, state(2)).step == 2


def all_ranks_load_the_same(case):
    with checkpointer(case) as saves:
        for step in (0, 1):
            saves.save(step, state(step))
        raised(errors.UsageError, "different things.*rank 1", lambda: saves.load(state(0), step=rank()))
        raised(errors.UsageError, "different things", lambda: saves.load(state(0), fallback=rank() == 1))
        raised(errors.UsageError, "missing='x'", lambda: saves.load(state(0), missing="x" if rank() else "none"))
        assert saves.load(state(0)) == 1


def training_may_end_its_groups_first_and_a_subgroup_may_have_its_own(case):
    mine = dist.new_group([rank()])
    for _ in range(2):
        with Checkpointer(f"{case['url']}/{rank()}", **case["s3"], process_group=mine, on_exists="replace") as saves:
            saves.save(1, {"rank": rank()})
            loaded = {"rank": None}
            saves.load(loaded)
            assert loaded["rank"] == rank()
    other = dist.new_group([0, 1])
    with checkpointer(case, process_group=other) as saves:
        dist.destroy_process_group(other)
        assert saves.save(1, state(1)).step == 1


def a_busy_save_is_skipped_by_all(case):
    gate = Gate()
    with checkpointer(case, hooks=[gate], on_busy="skip") as saves:
        first = saves.async_save(1, state(1))
        assert saves.async_save(2, state(2)).result().was_skipped
        dist.barrier()
        gate.opened.set()
        assert first.result().step == 1
        assert saves.latest() == 1


def a_save_that_one_rank_cancels_is_cancelled_on_all_and_leaves_nothing(case):
    gate = Gate()
    saves = checkpointer(case, hooks=[gate])
    handle = saves.async_save(1, state())
    threading.Timer(0.3, gate.opened.set).start()
    saves.close(cancel=True)
    raised(errors.SaveCancelledError, "cancelled", handle.result)
    assert keys_below(case) == ([], [])


def the_newest_whole_step_is_found_by_all(case):
    with checkpointer(case) as saves:
        for step in (1, 2):
            saves.save(step, {f"own{rank()}": torch.full((50,), float(step))})
        if rank() == 0:
            damage(case, "step-2/shards")
        dist.barrier()
        mine = {f"own{rank()}": torch.zeros(50)}
        raised(errors.IntegrityError, "", lambda: saves.load(mine))
        assert saves.load(mine, fallback=True) == 1
        assert mine[f"own{rank()}"].tolist() == [1.0] * 50


def damage(case, prefix):
    async def put():
        async with open_store(case["url"], StoreOptions(s3=S3Options(**case["s3"]))) as store:
            key = [found.key async for found in store.list_objects(prefix)].pop()
            data = bytearray((await store.get(key)).data)
            data[-1] ^= 1
            await store.put(key, [memoryview(data)])

    loop.run(put)


def a_signal_to_one_rank_has_all_save_once_at_the_same_step(case):
    with checkpointer(case, on_busy="queue") as saves:
        raised(errors.UsageError, "save_on_signal", lambda: saves.save_if_asked(0, state()))
        saves.save_on_signal(signal.SIGUSR1, deadline_s=60)
        ended = None
        for step in range(100):
            if step == 3:
                saves.async_save(step, state(step))
            if step == 7 and rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            if saves.save_if_asked(step, state(step)):
                ended = step
                break
        assert ended == 7, ended
        assert saves.save_if_asked(8, state(8))
        assert saves.steps() == [3, 7]
        saves.load(loaded := state(0))
        assert loaded["step"] == 7


def saved_by_two_for_another_number_to_load(case):
    with checkpointer(case) as saves:
        saves.save(1, {"w": torch.arange(10.0)}, per_rank={"of": rank()}, metrics={"loss": 0.5})


# A case of three ranks, after which two are left.


def a_rank_that_is_killed_during_an_async_save_is_named_to_the_others(case):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends the others when one is killed
    with checkpointer(case, timeout_s=20) as saves:
        saves.save(1, state(1))
    gate = Gate()
    saves = checkpointer(case, timeout_s=20, hooks=[gate])
    handle = saves.async_save(2, {f"own{rank()}": torch.ones(100)})
    dist.barrier()
    if rank() == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    gate.opened.set()
    with suppress(errors.RanksLostError):
        handle.result()  # or the killed one had its part up, and the others committed
    raised(errors.RanksLostError, "rank 2 on", lambda: saves.save(3, state(3)))
    saves.close()


def main():
    out, config, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    told = {}
    for name in cases:
        config_of = json.loads(config)
        config_of["url"] += f"/{name}"
        try:
            globals()[name](config_of)
            told[name] = None
        except BaseException:
            told[name] = traceback.format_exc()
        with open(f"{out}.{rank()}", "w") as file:
            json.dump(told, file)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads at times abort a process that ends while others are still there


if __name__ == "__main__":
    main()
