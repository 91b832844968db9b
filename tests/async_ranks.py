"""What ranks do under torchrun with torch's own async_save; each function is a case, run by all ranks together.

``python -m torch.distributed.run --nproc-per-node N async_ranks.py OUT CONFIG CASE...``; rank 0 writes to ``OUT``
what became of each case, as JSON: null, or the traceback of the rank that failed it. Torch's process imports this
file too.
"""

import json
import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import Shard, distribute_tensor

from cloudckpt import errors
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.dcp.upload_process import ProcessUploader
from cloudckpt.extensions import AesGcm, BytePlane, ZStandard
from ranks import keys_at, mesh, reader, run_cases, whole, writer

warnings.simplefilter("ignore")

KEYS = {"2026": bytes(range(32))}
EXECUTORS = {"thread": AsyncCheckpointerType.THREAD, "process": AsyncCheckpointerType.PROCESS}


def key_of(key_id):
    return KEYS[key_id]


def save(case, state, by, storage, **more):
    """Begins an async save, and returns what gives its end."""
    begun = dcp.async_save(
        state,
        storage_writer=storage,
        process_group=case["group"],
        async_checkpointer_type=EXECUTORS[by],
        **more,
    )
    return getattr(begun, "upload_completion", begun)


def state_of(seed):
    return {
        "rows": distribute_tensor(whole(10, 3, seed=seed), mesh(), [Shard(0)]),
        "slow": whole(8, 6, seed=seed).t(),
        "step": seed,
        "note": {"of": [seed, "x"]},
    }


def assert_loads(case, seed, **more):
    loaded = {"rows": torch.zeros(10, 3), "slow": torch.zeros(6, 8), "step": 0, "note": {"of": [0, ""]}}
    dcp.load(loaded, storage_reader=reader(case, **more))
    assert torch.equal(loaded["rows"], whole(10, 3, seed=seed))
    assert torch.equal(loaded["slow"], whole(8, 6, seed=seed).t())
    assert (loaded["step"], loaded["note"]) == (seed, {"of": [seed, "x"]})


def commits_what_was_staged(case, by):
    for seed in (1, 2):
        at = {**case, "url": f"{case['url']}/{seed}"}
        state = state_of(seed)
        future = save(at, state, by, writer(at))
        state["rows"].to_local().zero_()
        state["slow"].zero_()
        future.result()
        assert_loads(at, seed)


def a_thread_commits_what_was_staged(case):
    commits_what_was_staged(case, "thread")


def a_process_commits_what_was_staged(case):
    commits_what_was_staged(case, "process")


def one_writer_saves_again_and_again(case):
    for by in EXECUTORS:
        one = writer(case)
        for seed in (1, 2):
            at = {**case, "url": f"{case['url']}/{by}-{seed}"}
            save(at, state_of(seed), by, one, checkpoint_id=at["url"]).result()
            assert_loads(at, seed)


def stagers_of_torch_are_taken(case):
    shared = StagingOptions(
        use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
    )
    beside = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
    )
    stagers = {
        "shared": DefaultStager(shared),
        "beside": DefaultStager(beside),
        "blocking": BlockingAsyncStager(),
    }
    for name, stager in stagers.items():
        for by in EXECUTORS:
            for seed in (1, 2):
                at = {**case, "url": f"{case['url']}/{name}-{by}-{seed}"}
                save(at, state_of(seed), by, writer(at), async_stager=stager).result()
                assert_loads(at, seed)
        getattr(stager, "close", lambda: None)()


def extensions_and_keys_go_to_torchs_process(case):
    extensions = [BytePlane(), ZStandard(), AesGcm("2026", keys=key_of)]
    save(case, state_of(3), "process", writer(case, extensions=extensions)).result()
    assert_loads(case, 3, keys=KEYS)


def an_upload_process_works_under_both(case):
    for by in EXECUTORS:
        with ProcessUploader() as uploader:
            for seed in (1, 2):
                at = {**case, "url": f"{case['url']}/{by}-{seed}"}
                save(at, state_of(seed), by, writer(at, uploader=uploader)).result()
                assert_loads(at, seed)


def failure_of(future):
    try:
        future.result()
    except CheckpointException as e:
        failures = {type(failure) for failure, _ in e.failures.values()}
        return failures, " ".join(str(failure) for failure, _ in e.failures.values())
    raise AssertionError("it did not fail")


def a_failure_is_told_by_the_future_as_ours(case):
    for by in EXECUTORS:
        at = {**case, "url": f"{case['url']}/{by}"}
        nowhere = ObjectStoreWriter("s3://nowhere-at-all/run", **case["s3"])
        kinds, said = failure_of(save(at, state_of(1), by, nowhere))
        assert kinds == {errors.BucketNotFoundError}, (by, kinds)
        assert "nowhere-at-all" in said
        save(at, state_of(1), by, writer(at)).result()
        kinds, said = failure_of(save(at, state_of(2), by, writer(at)))
        assert kinds == {errors.CheckpointExistsError}, (by, kinds)
        assert at["url"] in said
        assert_loads(at, 1)


def an_upload_that_is_refused_leaves_nothing(case):
    for by in EXECUTORS:
        at = {**case, "url": f"{case['url']}/{by}"}
        state = {"large": distribute_tensor(torch.ones(8 << 20), mesh(), [Shard(0)])}
        options = {**at["s3"], "endpoint_url": case["breaking_url"]}
        breaking = ObjectStoreWriter(at["url"], part_size=5 << 20, **options)
        kinds, _ = failure_of(save(at, state, by, breaking))
        assert all(issubclass(kind, errors.CredentialsError) for kind in kinds), (by, kinds)
        dist.barrier()
        assert keys_at(at) == ([], [])


def main(out, config, *cases):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    config = {**json.loads(config), "group": dist.new_group(backend="gloo")}
    run_cases(out, {name: globals()[name] for name in cases}, config, lambda name: f"{name}-{dist.get_world_size()}")


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(*sys.argv[1:])
