"""What ranks under torchrun spend on a save besides copying and sending.

Law: run as a module it is a rank, which saves and tells; imported it starts them, and reads what they tell.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import click

from cloudckpt.cli.bench.async_figures import Coordination
from cloudckpt.cli.bench.async_parts import RANKS

COUNT = 2
CASES = {"128 tensors": (128, (512, 512)), "10,000 tensors": (10_000, (2, 512))}
"""How many sharded tensors of bf16, of which shape."""


def measure(case: str, where: str, rounds: int, url: str, environ: dict[str, str]) -> Iterator[Coordination]:
    """Has `COUNT` ranks save.

    Args:
        case: one of `CASES`.
        where: the server's name.
        rounds: saves after the first.
        url: below which they save.
        environ: AWS's variables that lead there.
    """
    click.echo(f"{RANKS}: {case}, {where}", err=True)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={COUNT}", "-m", __name__, case, f"{url}/{case.split(' ', 1)[0]}", str(rounds)]
    environ = os.environ | environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if ended.returncode:
        msg = f"{COUNT} ranks failed to save:\n{ended.stderr[-3000:]}"
        raise click.ClickException(msg)
    for round_, (coordination_s, begin_s) in enumerate(json.loads(ended.stdout.splitlines()[-1]), 1):
        yield Coordination(case=f"{case}, {where}", round=round_, coordination_s=coordination_s, begin_s=begin_s)


def main() -> None:
    """Saves as the arguments say; the first rank prints the seconds of the slowest for each save but the first."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from cloudckpt.dcp.checkpointer import Checkpointer

    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("url")
    parser.add_argument("rounds", type=int)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    count, shape = CASES[args.case]
    whole = torch.zeros(shape, dtype=torch.bfloat16)
    state: dict[str, Any] = {f"layers.{i}.weight": distribute_tensor(whole, mesh, [Shard(0)]) for i in range(count)}
    found = []
    with Checkpointer(args.url) as checkpointer:
        for step in range(args.rounds + 1):
            dist.barrier()  # or one would wait for another's beginning
            began = perf_counter()
            handle = checkpointer.async_save(step, state)
            blocked_s = perf_counter() - began
            saved = handle.result()
            seconds = torch.tensor([saved.coordination_s, blocked_s - saved.staging_s])
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            found.append(seconds.tolist())
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(found[1:]) + "\n")
    dist.barrier()  # see cli/demo/train.py
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
