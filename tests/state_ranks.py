"""What two ranks do with models, optimizers and what each keeps for itself; ``python state_ranks.py RANK FOLDER``.

Prints, as JSON, the names under which a model and its optimizer were kept, by the way they were wrapped.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cloudckpt.dcp import ObjectStoreReader
from cloudckpt.dcp.state import per_rank
from cloudckpt.dcp.state.rng import RngStates
from cloudckpt.dcp.state.stateful import Destination
from states import Net, adamw, load, metadata_at, save, train


def fsdp2(seed):
    model = Net(seed)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.a, model.b):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, adamw(model)


def ddp(seed):
    model = DistributedDataParallel(Net(seed))
    return model, adamw(model)


def a_model_resumes_with_its_optimizer(make, other, url):
    model, optimizer = make(0)
    train(model, optimizer)
    save({"model": model, "optim": optimizer}, url)
    expected = train(model, optimizer)
    for makes in (make, other):
        fresh, again = makes(1)
        load({"model": fresh, "optim": again}, url)
        losses = train(fresh, again)
        assert makes is not make or losses == expected, makes
        torch.testing.assert_close([float.fromhex(a) for a in losses], [float.fromhex(a) for a in expected])
    return sorted(metadata_at(url).state_dict_metadata)


def a_sharded_optimizer_alone_resumes_in_shards(url):
    model, optimizer = fsdp2(0)
    train(model, optimizer)
    save({"optim": optimizer, "weights": model}, f"{url}-model")
    save({"optim": optimizer}, url)
    expected = train(model, optimizer)
    fresh, again = fsdp2(1)
    load({"weights": fresh}, f"{url}-model")
    destination = Destination({"optim": again}, metadata_at(url))
    moments = [v for s in destination.state_dict["optim"]["state"].values() if s for v in s.values() if v.dim()]
    assert moments
    assert all(isinstance(moment, DTensor) for moment in moments)
    dcp.load(destination.state_dict, storage_reader=ObjectStoreReader(url))
    destination.finish()
    assert train(fresh, again) == expected


def each_rank_gets_its_own(rank, url):
    held = {"rank": rank, "rng": RngStates(), "cache": {rank: torch.full((2 + rank,), rank)}}
    torch.manual_seed(rank)
    save(per_rank.attach({"step": 1}, held, rank), url)
    drawn = torch.rand(4)
    held, state = {"rank": None, "rng": RngStates(), "cache": None}, {"step": 0}
    share = per_rank.look(metadata_at(url), rank=rank, world_size=2)
    assert share == per_rank.Share(is_there=True, left_out=())
    load(per_rank.attach(state, held, rank), url)
    assert (state, held["rank"], list(held["cache"])) == ({"step": 1}, rank, [rank])
    assert torch.equal(held["cache"][rank], torch.full((2 + rank,), rank))
    assert torch.equal(torch.rand(4), drawn)


def main():
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    names = {
        "fsdp2": a_model_resumes_with_its_optimizer(fsdp2, ddp, f"file://{folder}/fsdp2"),
        "ddp": a_model_resumes_with_its_optimizer(ddp, fsdp2, f"file://{folder}/ddp"),
    }
    a_sharded_optimizer_alone_resumes_in_shards(f"file://{folder}/optim")
    each_rank_gets_its_own(rank, f"file://{folder}/own")
    print(json.dumps(names), flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads at times abort a process that ends while DDP's reducers are still there


if __name__ == "__main__":
    main()
