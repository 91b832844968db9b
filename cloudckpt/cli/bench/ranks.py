"""What ranks save and load under torchrun for the benchmark.

Law: one operation a run; each rank keeps the shard that its mesh gives it.
"""

import argparse
import sys
from typing import Any

SHAPE = (4096, 2048)
TENSORS = 8
"""Of bf16: 16 MiB each."""


def main() -> None:
    """Does what the arguments say."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter

    parser = argparse.ArgumentParser()
    parser.add_argument("operation", choices=("save", "load"))
    parser.add_argument("url")
    parser.add_argument("--by", choices=("cloudckpt", "fsspec"), required=True)
    parser.add_argument("--axis", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {}
    for i in range(TENSORS):
        whole = torch.full(SHAPE, float(i + 1), dtype=torch.bfloat16)
        tensor = whole if args.operation == "save" else torch.zeros_like(whole)
        state[f"layers.{i}.weight"] = distribute_tensor(tensor, mesh, [Shard(args.axis)])
    if args.operation == "save":
        ours = args.by == "cloudckpt"
        writer = ObjectStoreWriter(args.url) if ours else FsspecWriter(args.url, sync_files=False)
        dcp.save(state, storage_writer=writer)  # type: ignore[attr-defined]
    else:
        reader = ObjectStoreReader(args.url) if args.by == "cloudckpt" else FsspecReader(args.url)
        dcp.load(state, storage_reader=reader)  # type: ignore[attr-defined]
        for i in range(TENSORS):
            if not (state[f"layers.{i}.weight"].to_local() == float(i + 1)).all():
                sys.exit(f"rank {dist.get_rank()} loaded other values than were saved")
    # DCP ends a save with a broadcast. A thread of gloo's frees its tensors afterwards, and aborts the process if the
    # interpreter is gone by then (torch 2.13); a barrier gives it the time.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
