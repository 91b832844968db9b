"""Trainings with torchtitan's parts on the ranks of torchrun: what `test_torchtitan` looks at.

``torchrun ... torchtitan_ranks.py URL``. torchtitan's own loop needs triton, which torch for CPUs comes without.
"""

import json
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from recipes import recipe

STEPS = 12
ADAM = ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.05})


class Job:
    """What torchtitan's trainer is, as far as a checkpoint manager sees it."""

    def __init__(self, checkpoint):
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizers = OptimizersContainer.Config(param_groups=[ADAM], implementation="for-loop").build(
            model_parts=[self.model]
        )
        self.schedules = LRSchedulersContainer.Config(warmup_steps=2).build(
            optimizers=self.optimizers, training_steps=STEPS
        )
        self.step, self.losses = 0, {}
        self.checkpointer = checkpoint.build(
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedules,
            states={"train_state": self},
            sd_adapter=None,
            base_folder="dump",
        )

    def state_dict(self):
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state):
        self.step = int(state["step"])

    def train(self, lost_after=STEPS):
        """As torchtitan's: loads, trains, saves, closes. Comes to its end after some step."""
        try:
            self.checkpointer.load()
            while self.step < STEPS:
                self.step += 1
                random = torch.Generator().manual_seed(100 * self.step + dist.get_rank())
                loss = self.model(torch.randn(4, 8, generator=random)).square().mean()
                loss.backward()
                self.optimizers.step()
                self.schedules.step()
                self.optimizers.zero_grad()
                self.losses[self.step] = loss.item()
                self.checkpointer.save(self.step, last_step=self.step == STEPS)
                if self.step == lost_after:
                    break
        finally:
            self.checkpointer.close()
        return self.losses


def main(root, directory):
    """Trains undisturbed, is lost, and goes on; begins with what torchtitan's own manager saved. Tells the losses."""
    checkpoint = recipe("torchtitan")[0]["checkpoint"]
    told = {"undisturbed": Job(replace(checkpoint, folder=f"{root}/undisturbed")).train()}
    lost = replace(checkpoint, folder=f"{root}/lost")
    Job(lost).train(lost_after=10)
    told["resumed"] = Job(lost).train()
    own = CheckpointManager.Config(enable=True, folder=f"{directory}/own", interval=4, keep_latest_k=0)
    Job(own).train(lost_after=6)
    begun = replace(
        checkpoint, folder=f"{root}/begun", initial_load_path=f"{directory}/own/step-4", initial_load_model_only=False
    )
    told["begun"] = Job(begun).train()
    if dist.get_rank() == 0:
        print("TOLD", json.dumps(told))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    try:
        main(*sys.argv[1:])
    finally:
        dist.destroy_process_group()
