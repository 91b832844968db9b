"""What ranks do under torchrun: each function is a case, run by all ranks together, one after the other.

``python -m torch.distributed.run --nproc-per-node N ranks.py OUT CONFIG CASE...``; rank 0 writes to ``OUT`` what
became of each case, as JSON: null, or the traceback of the rank that failed it.
"""

import json
import os
import pickle
import socket
import sys
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cloudckpt import errors
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine import loop
from cloudckpt.engine.commit import read_manifest_blob
from cloudckpt.extensions import AesGcm, BytePlane, ZStandard
from cloudckpt.layout import MANIFEST
from cloudckpt.manifest import parse
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions, open_store
from cloudckpt.testing import with_checkpoint_logging, with_temp_prefix

warnings.simplefilter("ignore")


def writer(case, **more):
    return ObjectStoreWriter(case["url"], **case["s3"], **more)


def reader(case, **more):
    return ObjectStoreReader(case["url"], **case["s3"], **more)


def mesh(dims=None):
    return init_device_mesh("cpu", dims or (dist.get_world_size(),))


def whole(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keys_at(case):
    async def find():
        async with open_store(case["url"], StoreOptions(s3=S3Options(**case["s3"]))) as store:
            uploads = [u.key async for u in store.list_uploads()]
            return [o.key async for o in store.list_objects()], uploads

    return loop.run(find)


def manifest_at(case):
    async def read():
        async with open_store(case["url"], StoreOptions(s3=S3Options(**case["s3"]))) as store:
            return parse((await read_manifest_blob(store)).data, store.url)

    return loop.run(read)


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(6, 17), nn.Linear(17, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def train(model, optimizer, steps=3):
    losses = []
    for i in range(steps):
        loss = model(torch.linspace(0, 1 + i, 24).reshape(4, 6)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


def sharded(seed):
    model = Net(seed)
    for layer in (model.a, model.b, model.c):
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


# Cases of two ranks.


def fsdp2_model_and_optimizer_resume_bit_for_bit(case):
    model, optimizer = sharded(0)
    train(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": moments, "step": 3}, storage_writer=writer(case))
    expected = train(model, optimizer)
    model, optimizer = sharded(1)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": moments, "step": 0}
    dcp.load(state, storage_reader=reader(case))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert state["step"] == 3
    assert train(model, optimizer) == expected


def tensor_parallel_and_replicated_tensors(case):
    state = {
        "rows": distribute_tensor(whole(7, 5, seed=1), mesh(), [Shard(0)]),
        "columns": distribute_tensor(whole(6, 10, seed=2), mesh(), [Shard(1)]),
        "replicated": distribute_tensor(whole(4, 4, seed=3), mesh(), [Replicate()]),
        "plain": whole(9, seed=4),
        "few": distribute_tensor(whole(1, 3, seed=5), mesh(), [Shard(0)]),
    }
    dcp.save(state, storage_writer=writer(case))
    loaded = {
        "rows": distribute_tensor(torch.zeros(7, 5), mesh(), [Shard(1)]),
        "columns": distribute_tensor(torch.zeros(6, 10), mesh(), [Shard(0)]),
        "replicated": distribute_tensor(torch.zeros(4, 4), mesh(), [Shard(0)]),
        "plain": torch.zeros(9),
        "few": distribute_tensor(torch.zeros(1, 3), mesh(), [Replicate()]),
    }
    dcp.load(loaded, storage_reader=reader(case))
    for key, seed in (("rows", 1), ("columns", 2), ("replicated", 3), ("few", 5)):
        assert torch.equal(loaded[key].full_tensor(), state[key].full_tensor()), key
        assert torch.equal(loaded[key].full_tensor(), whole(*loaded[key].shape, seed=seed)), key
    assert torch.equal(loaded["plain"], whole(9, seed=4))
    chunks = {k: len(e.chunks) for k, e in manifest_at(case).entries.items()}
    assert chunks["replicated"] == chunks["plain"] == 1
    assert chunks["rows"] == chunks["columns"] == 2


def a_load_fetches_the_rows_that_each_rank_keeps(case):
    dcp.save({"w": whole(1000, 64)}, storage_writer=writer(case))
    state = {"w": distribute_tensor(torch.zeros(1000, 64), mesh(), [Shard(0)])}
    from_store = reader(case)
    dcp.load(state, storage_reader=from_store)
    assert torch.equal(state["w"].full_tensor(), whole(1000, 64))
    assert from_store.stats.bytes_fetched == from_store.stats.bytes_needed == 1000 * 64 * 4 // 2


def saved_by_eight_for_fewer(case):
    """Fully sharded, and by tensor parallelism."""
    state = {
        "rows": distribute_tensor(whole(1000, 64, seed=1), mesh(), [Shard(0)]),
        "columns": distribute_tensor(whole(64, 1000, seed=2), mesh(), [Shard(1)]),
    }
    dcp.save(state, storage_writer=writer(case))
    loaded = {"columns": distribute_tensor(torch.zeros(64, 1000), mesh(), [Shard(1)])}
    from_store = reader(case, max_gap=0)
    dcp.load(loaded, storage_reader=from_store)
    assert torch.equal(loaded["columns"].to_local(), state["columns"].to_local())
    assert from_store.stats.requests == 1  # the same mesh: each rank's columns are a chunk of their own
    assert from_store.stats.bytes_fetched == from_store.stats.bytes_needed == 64 * 125 * 4


def saved_by_eight_loaded_by_fewer(case):
    url = case["url"].rpartition("/")[0] + "/saved_by_eight_for_fewer"
    loaded = {"rows": distribute_tensor(torch.zeros(1000, 64), mesh(), [Shard(0)])}
    from_store = reader({**case, "url": url})
    dcp.load(loaded, storage_reader=from_store)
    assert torch.equal(loaded["rows"].full_tensor(), whole(1000, 64, seed=1))
    mine = loaded["rows"].to_local().nbytes
    assert from_store.stats.bytes_fetched == from_store.stats.bytes_needed == mine
    chunks = -(-8 // dist.get_world_size()) + 1
    assert from_store.stats.requests <= chunks
    loaded = {"columns": distribute_tensor(torch.zeros(64, 1000), mesh(), [Shard(1)])}
    dcp.load(loaded, storage_reader=reader({**case, "url": url}))
    assert torch.equal(loaded["columns"].full_tensor(), whole(64, 1000, seed=2))


def plan_cache_on_saves_what_is_there_each_time(case):
    class Planner(DefaultSavePlanner):
        pass

    for step in range(3):
        at = {**case, "url": f"{case['url']}/{step}"}
        state = {"w": distribute_tensor(torch.full((8, 3), float(step)), mesh(), [Shard(0)]), "step": step}
        dcp.save(state, storage_writer=writer(at), planner=Planner(enable_plan_caching=True))
    for step in range(3):
        at = {**case, "url": f"{case['url']}/{step}"}
        state = {"w": distribute_tensor(torch.zeros(8, 3), mesh(), [Shard(0)]), "step": None}
        dcp.load(state, storage_reader=reader(at))
        assert state["step"] == step
        assert torch.equal(state["w"].full_tensor(), torch.full((8, 3), float(step)))


def one_rank_of_many_loads_alone(case):
    dcp.save({"w": whole(10, 3)}, storage_writer=writer(case))
    if dist.get_rank() == 1:
        state = {"w": torch.zeros(10, 3)}
        dcp.load(state, storage_reader=reader(case), no_dist=True)
        assert torch.equal(state["w"], whole(10, 3))


def a_subgroup_loads(case):
    dcp.save({"w": whole(10, 3)}, storage_writer=writer(case))
    group = dist.new_group([1])
    if dist.get_rank() == 1:
        state = {"w": torch.zeros(10, 3)}
        dcp.load(state, storage_reader=reader(case), process_group=group)
        assert torch.equal(state["w"], whole(10, 3))


def one_rank_reads_the_manifest_for_its_group(case):
    dcp.save({"w": whole(10, 3)}, storage_writer=writer(case))
    state = {"w": torch.zeros(10, 3)}
    dcp.load(state, storage_reader=reader(case, process_group=dist.group.WORLD))
    assert torch.equal(state["w"], whole(10, 3))
    nowhere = {**case, "url": case["url"] + "-none"}
    failures = failures_of(lambda: dcp.load(state, storage_reader=reader(nowhere, process_group=dist.group.WORLD)))
    assert [type(f) for f in failures.values()] == [errors.CheckpointNotFoundError] * 2


def an_async_save_commits_what_was_staged(case):
    group = dist.new_group(backend="gloo")
    state = {"w": distribute_tensor(whole(10, 3), mesh(), [Shard(0)])}
    future = dcp.async_save(state, storage_writer=writer(case), process_group=group)
    state["w"].to_local().zero_()
    future.result()
    loaded = {"w": torch.zeros(10, 3)}
    dcp.load(loaded, storage_reader=reader(case))
    assert torch.equal(loaded["w"], whole(10, 3))


def failures_of(action):
    """What each rank failed of, as DCP shows it on every rank."""
    try:
        action()
    except CheckpointException as e:
        return {rank: failure for rank, (failure, _) in e.failures.items()}
    raise AssertionError("no rank raised")


class UnpicklableError(Exception):
    def __init__(self, a, b):
        super().__init__(a)


class FailingPlanner(DefaultSavePlanner):
    """Rank 1 fails when it is asked for its tensors."""

    def resolve_data(self, write_item):
        if dist.get_rank() == 1:
            raise UnpicklableError("cannot be unpickled", 2)
        return super().resolve_data(write_item)


def a_foreign_exception_of_one_rank_reaches_all_with_its_rank_and_host(case):
    state = {"w": distribute_tensor(whole(10, 3), mesh(), [Shard(0)])}
    failures = failures_of(lambda: dcp.save(state, storage_writer=writer(case), planner=FailingPlanner()))
    assert list(failures) == [1]
    assert type(failures[1]) is errors.SaveFailedError
    said = str(failures[1])
    assert f"rank 1 on {socket.gethostname()}: the save failed: UnpicklableError: cannot be" in said
    assert "resolve_data" in "".join(failures[1].__notes__)
    pickle.loads(pickle.dumps(failures[1]))
    assert MANIFEST not in keys_at(case)[0]


def a_rank_that_fails_in_mid_upload_leaves_nothing_of_its_own(case):
    """Rank 1's credentials go bad after its upload began."""
    state = {"w": distribute_tensor(whole(6_000_000, seed=1), mesh(), [Shard(0)])}
    mine = {**case}
    if dist.get_rank() == 1:
        mine["s3"] = {**case["s3"], "endpoint_url": case["breaking_url"]}
    failures = failures_of(
        lambda: dcp.save(state, storage_writer=writer(mine, part_size=5 << 20, retry_deadline_s=0.5))
    )
    assert list(failures) == [1]
    assert isinstance(failures[1], errors.StoreError), repr(failures[1])
    assert f"rank 1 on {socket.gethostname()}" in str(failures[1])
    keys, uploads = keys_at(case)
    assert uploads == []
    assert len(keys) == 1  # the healthy rank's shard stays until it is swept
    assert keys[0] != MANIFEST


def a_save_onto_a_checkpoint_is_refused_on_all_ranks(case):
    state = {"w": distribute_tensor(whole(10, 3), mesh(), [Shard(0)])}
    dcp.save(state, storage_writer=writer(case))
    before = keys_at(case)
    failures = failures_of(lambda: dcp.save(state, storage_writer=writer(case)))
    assert [type(f) for f in failures.values()] == [errors.CheckpointExistsError]
    dist.barrier()
    assert keys_at(case) == before


def use_collectives_false_is_refused(case):
    try:
        dcp.save({"w": torch.ones(3)}, storage_writer=writer(case), use_collectives=False)
    except errors.UsageError as e:
        assert "use_collectives=False" in str(e)  # noqa: PT017
    else:
        raise AssertionError("not refused")
    assert keys_at(case) == ([], [])


def nothing_there_is_told_to_all_ranks(case):
    failures = failures_of(lambda: dcp.load({"w": torch.zeros(3)}, storage_reader=reader(case)))
    assert [type(f) for f in failures.values()] == [errors.CheckpointNotFoundError] * 2


def a_temporary_prefix_is_shared_by_all_ranks_and_removed_after(case):
    store = StoreOptions(s3=S3Options(**case["s3"]))
    seen = []

    @with_checkpoint_logging
    @with_temp_prefix(case["url"], store)
    def body(prefix):
        seen.append(prefix)
        dcp.save({"w": torch.ones(3)}, storage_writer=writer({**case, "url": prefix}))

    body()
    gathered = [None, None]
    dist.all_gather_object(gathered, seen[0])
    assert gathered[0] == gathered[1]
    dist.barrier()
    assert keys_at(case) == ([], [])


KEYS = {"k": bytes(range(32))}


def extensions_by_pattern_on_every_rank(case):
    planes = [BytePlane(), ZStandard()]
    chains = {"optim.*": planes, "plain": [], "*": [*planes, AesGcm("k", KEYS)]}
    model, optimizer = sharded(0)
    train(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": moments, "plain": whole(9, seed=4)}
    dcp.save(state, storage_writer=writer(case, extensions=chains))
    expected = train(model, optimizer)
    shards = manifest_at(case).shards
    assert len({s.extensions for s in shards}) == 3
    assert len(shards) in (5, 6)  # the plain tensor is one rank's
    wrapped = [p["wrapped_key"] for s in shards for p in s.extension_params if p]
    assert len(set(wrapped)) == len(wrapped) == 2
    model, optimizer = sharded(1)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": moments, "plain": torch.zeros(9)}
    dcp.load(state, storage_reader=reader(case, keys=KEYS))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    assert torch.equal(state["plain"], whole(9, seed=4))
    assert train(model, optimizer) == expected


def a_key_that_one_rank_lacks_fails_all_before_anything_is_committed(case):
    mine = KEYS if dist.get_rank() == 0 else {}
    state = {"rows": distribute_tensor(whole(7, 5, seed=1), mesh(), [Shard(0)])}
    chain = [AesGcm("k", mine)]
    failures = failures_of(lambda: dcp.save(state, storage_writer=writer(case, extensions=chain)))
    assert {rank: type(failure) for rank, failure in failures.items()} == {1: errors.EncryptionKeyError}
    dist.barrier()
    assert MANIFEST not in keys_at(case)[0]


def saved_by_two_for_others_to_load(case):
    state = {
        "rows": distribute_tensor(whole(7, 5, seed=1), mesh(), [Shard(0)]),
        "columns": distribute_tensor(whole(6, 10, seed=2), mesh(), [Shard(1)]),
        "step": 12,
    }
    dcp.save(state, storage_writer=writer(case, extensions={"columns": [BytePlane(), ZStandard()]}))


# Cases of four ranks.


def saved_by_one_loaded_by_four(case):
    """The caller saved ``w`` and ``t`` from one process."""
    square = mesh((2, 2))
    state = {
        "w": distribute_tensor(torch.zeros(50, 8), mesh(), [Shard(0)]),
        "t": DTensor.from_local(torch.zeros(8, 3), square, [Shard(0), Shard(1)]),
        "step": None,
    }
    dcp.load(state, storage_reader=reader(case))
    assert torch.equal(state["w"].full_tensor(), whole(50, 8, seed=1))
    assert torch.equal(state["t"].full_tensor(), whole(16, 6, seed=2))
    assert state["step"] == 9


def saved_by_two_loaded_by_four(case):
    state = {
        "rows": distribute_tensor(torch.zeros(7, 5), mesh(), [Shard(1)]),
        "columns": distribute_tensor(torch.zeros(6, 10), mesh((2, 2)), [Shard(1), Shard(0)]),
        "step": None,
    }
    dcp.load(state, storage_reader=reader(case))
    assert torch.equal(state["rows"].full_tensor(), whole(7, 5, seed=1))
    assert torch.equal(state["columns"].full_tensor(), whole(6, 10, seed=2))
    assert state["step"] == 12


def main(out, config, *cases):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    config = json.loads(config)
    run_cases(out, {name: globals()[name] for name in cases}, config, lambda name: config.get("shared") or name)


def run_cases(out, cases, config, place_of):
    """Runs functions one after the other, each with a place of its own, and writes down what became of them."""
    torch.set_num_threads(1)
    outcomes = {}
    for name, run in cases.items():
        print(f"rank {dist.get_rank()}: {name}", file=sys.stderr, flush=True)  # where a hang is
        try:
            run({**config, "url": f"{config['url']}/{place_of(name)}"})
            mine = None
        except BaseException:
            mine = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        outcomes[name] = next((told for told in gathered if told), None)
    if dist.get_rank() == 0:
        with open(out, "w") as f:
            json.dump(outcomes, f)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(*sys.argv[1:])
