"""Trainings of a sharded Lightning module on the ranks of torchrun: what `test_lightning` looks at.

``torchrun ... lightning_ranks.py URL``.
"""

import json
import sys
from contextlib import suppress

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard

from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.frameworks.lightning import CloudModelParallelStrategy
from recipes import Lost, lost_after, recipe

BATCHES = recipe("Lightning")[0]["Batches"]


class Sharded(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.losses = {}

    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch):
        loss = self.net(batch).square().mean()
        self.losses[self.global_step] = loss.item()
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def fit(url, ckpt_path=None):
    seed_everything(7, verbose=False)
    net, ranks = Sharded(), dist.get_world_size()
    trainer = Trainer(
        max_steps=12,
        strategy=CloudModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1),
        callbacks=[ModelCheckpoint(url, every_n_train_steps=6, save_last=True, save_top_k=1)],
        accelerator="cpu",
        devices=ranks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(net, BATCHES(), ckpt_path=ckpt_path)
    return net


def main(root):
    """Trains undisturbed, is lost, and goes on; tells the losses, and the weights at the end."""
    undisturbed = fit(f"{root}/undisturbed")
    with suppress(Lost), lost_after(8):
        fit(f"{root}/lost")
    resumed = fit(f"{root}/lost", f"{root}/lost/last.ckpt")
    told = {"undisturbed": undisturbed.losses, "resumed": resumed.losses}
    told["weight"] = resumed.net[0].weight.full_tensor().tolist()
    try:
        fit(f"{root}/none", f"{root}/none/last.ckpt")
    except CheckpointNotFoundError as error:
        told["missing"] = str(error)
    if dist.get_rank() == 0:
        print("TOLD", json.dumps(told))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    try:
        main(*sys.argv[1:])
    finally:
        dist.destroy_process_group()
