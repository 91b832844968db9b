"""Saves one checkpoint from two ranks, sharded in every way there is, for the tests of moving it."""

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from cloudckpt.dcp import ObjectStoreWriter


def state():
    """What is saved, whole."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "rows": (normal(2560, 2048), [Shard(0)]),
        "columns": (normal(512, 4096, dtype=torch.bfloat16), [Shard(1)]),
        "experts": (normal(2, 1024, 64), [Shard(1)]),
        "uneven": (normal(7, 3), [Shard(0)]),
        "replicated": (normal(40), [Replicate()]),
        "scalar": (torch.tensor(2.5), None),
        "empty": (torch.zeros(0, 3), None),
    }


def main(url):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    sharded = {
        key: value if placements is None else distribute_tensor(value, mesh, placements, src_data_rank=None)
        for key, (value, placements) in state().items()
    }
    dcp.save({**sharded, "step": 3}, storage_writer=ObjectStoreWriter(url, step=3, metadata={"run": "x", "n": 1}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
