"""What the ranks of the fault matrix do: they live long, and take case after case from the process that drives them.

``python -m torch.distributed.run --nproc-per-node 2 fault_ranks.py ADDRESS KEY``; each rank connects, says its rank
and process id, and answers each case with what it found, until the connection ends.
"""

import ctypes
import gc
import os
import sys
import warnings
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Client

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine import commit, loop
from cloudckpt.engine.budget import Budget
from cloudckpt.engine.commit import find_manifest_blob
from cloudckpt.extensions import AesGcm, BytePlane, ZStandard
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions, open_store

KEYS = {"2026": bytes(range(32))}
NUMBERS = {"parts": 1_400_000, "frames": 1_400_000, "small": 20_000}
"""int32 of each rank: 5.6 MB are two parts."""

PATIENCE = {
    "retry_base_s": 0.002,
    "retry_cap_s": 0.05,
    "retry_deadline_s": 20,
    "read_timeout_s": 0.5,
    "connect_timeout_s": 2,
    "commit_deadline_s": 20,
}


@cache
def noise(count):
    """Numbers that do not compress."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 31), 1 << 31, (count,), generator=random, dtype=torch.int32)


def state_of(workload, seed, mesh=None):
    """What is saved, sharded over the ranks; or what one process holds of it, whole."""
    count = NUMBERS[workload]
    if mesh is None:
        weight = noise(2 * count) + seed
    else:
        start = dist.get_rank() * count
        weight = noise(2 * count)[start : start + count] + seed
        weight = DTensor.from_local(weight, mesh, [Shard(0)], run_check=False)
    return {"weight": weight, "step": seed, "note": {"of": [workload, seed]}}


def is_equal(state, workload, seed):
    mesh = state["weight"].device_mesh if isinstance(state["weight"], DTensor) else None
    wanted = state_of(workload, seed, mesh)
    mine, its = (s["weight"].to_local() if mesh is not None else s["weight"] for s in (state, wanted))
    return torch.equal(mine, its) and state["step"] == seed and state["note"] == wanted["note"]


def load(url, workload, s3, mesh=None):
    """Loads what is there into memory that holds something else."""
    state = state_of(workload, 0, mesh)
    if mesh is not None:
        state["weight"].to_local().fill_(-1)
    keys = KEYS if workload == "frames" else None
    dcp.load(state, storage_reader=ObjectStoreReader(url, keys=keys, **s3), no_dist=mesh is None)
    return state


def save(case, s3, mesh, seed, **more):
    extensions = [BytePlane(), ZStandard(), AesGcm("2026", KEYS)] if case["workload"] == "frames" else []
    writer = ObjectStoreWriter(
        case["url"], part_size=5 << 20, frame_size=1 << 20, extensions=extensions, **s3, **more
    )
    dcp.save(state_of(case["workload"], seed, mesh), storage_writer=writer)


def found_at(url, s3):
    """What lies there: whether something is committed, and the uploads that are open."""

    async def look():
        async with open_store(url, StoreOptions(s3=S3Options(**s3))) as store:
            uploads = [upload.key async for upload in store.list_uploads()]
            return await find_manifest_blob(store) is not None, uploads

    return loop.run(look)


def told(error):
    """An exception as classes and text, by the rank that failed."""
    if not isinstance(error, CheckpointException):
        return {dist.get_rank(): (type(error).__module__, type(error).__name__, repr(error))}
    return {
        rank: (type(e).__module__, type(e).__name__, "\n".join([str(e), *getattr(e, "__notes__", ())]))
        for rank, (e, _) in error.failures.items()
    }


def run(case, mesh):
    rank = dist.get_rank()
    direct = case["s3"]
    through = direct | PATIENCE | case.get("patience", {}) | {"endpoint_url": case["proxies"][rank]}
    readers = {k: v for k, v in through.items() if k != "commit_deadline_s"}
    facts = {"error": None, "damage": None, "is_equal": None, "is_old": False}
    url, workload, seed = case["url"], case["workload"], case["seed"]
    error = None
    try:
        if case["do"] == "save":
            save(case, through, mesh, seed, overwrite=case["overwrite"])
        else:
            facts["is_equal"] = is_equal(load(url, workload, readers, mesh), workload, seed)
    except (Exception, CheckpointException) as e:
        error = e
        facts["error"] = told(e)
    facts["is_budget_whole"] = all(o.is_whole for o in gc.get_objects() if isinstance(o, Budget))
    del error
    if case["do"] == "save":
        dist.barrier()
        facts |= found_after(case) if rank == 0 else {}
        dist.barrier()
    return facts | (kept() if case.get("measures") else {})


def found_after(case):
    """What a save left, by this rank's own look at the server."""
    url, workload, seed, direct = case["url"], case["workload"], case["seed"], case["s3"]
    is_committed, uploads = found_at(url, direct)
    facts = {"is_committed": is_committed, "uploads": uploads}
    if is_committed:
        try:
            state = load(url, workload, direct)
        except CheckpointException as e:
            return facts | {"damage": told(e)}
        facts["is_equal"] = is_equal(state, workload, seed)
        facts["is_old"] = case["overwrite"] and is_equal(state, workload, seed - 1)
    return facts


def kept():
    """What this process holds: open sockets, and bytes of memory, without what its allocator keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open_files = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    sockets = [file for file in open_files if os.path.lexists(file) and os.readlink(file).startswith("socket:")]
    with open("/proc/self/statm") as f:
        return {"sockets": len(sockets), "nbytes": int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}


def main(address, key):
    warnings.simplefilter("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=100))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    host, port = address.rsplit(":", 1)
    with Client((host, int(port)), authkey=bytes.fromhex(key)) as driver:
        driver.send((dist.get_rank(), os.getpid()))
        gc.collect()
        gc.freeze()  # what is made from now on can be looked through quickly
        while (case := driver.recv()) is not None:
            if case["do"] == "prepare":
                save(case, case["s3"], mesh, case["seed"], overwrite=True)
                driver.send(None)
                continue
            store = f"{case['proxies'][dist.get_rank()]}/{case['bucket']}"
            commit._probed.discard(store) if case["probes"] else commit._probed.add(store)
            driver.send(run(case, mesh))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
