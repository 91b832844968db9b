"""The demo's training: one rank of it. Run by ``python -m torch.distributed.run -m cloudckpt.cli.demo.train``.

Law: an ordinary FSDP training loop. What a step does depends on the seed, the step and the state alone, so that
a resumed run repeats an undisturbed one bit for bit.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cloudckpt.cli.demo.events import (
    Built,
    Event,
    Loaded,
    Ready,
    Saved,
    Saving,
    Staged,
    Stepped,
    Uploaded,
    to_line,
)
from cloudckpt.cli.demo.runs import KEPT
from cloudckpt.cli.demo.sentences import PAIRS
from cloudckpt.dcp import Checkpointer, CommitInfo, KeepLast, RngStates, WriterHook

_BATCH = 8
"""Pairs per rank and step."""

_TRAINED_LAYERS = 2
"""From the top of the encoder; what is below is frozen, and needs no optimizer state."""

_TEMPERATURE = 0.05


@dataclass(frozen=True, slots=True)
class Trainer:
    """A model in training, as this rank holds it."""

    model: Any
    optimizer: torch.optim.Optimizer
    tokens: dict[str, Tensor]
    seed: int

    def step(self, step: int) -> float:
        """Trains one step and returns the mean loss over all ranks."""
        rank, world = dist.get_rank(), dist.get_world_size()
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        mine = torch.randperm(len(PAIRS), generator=order)[rank * _BATCH : (rank + 1) * _BATCH]
        asked, answers = self._embed(torch.cat([mine, mine + len(PAIRS)])).chunk(2)
        loss = torch.nn.functional.cross_entropy(asked @ answers.T / _TEMPERATURE, torch.arange(_BATCH))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        return mean.item() / world

    def state(self, step: int) -> dict[str, Any]:
        """All that the next step depends on, after ``step``; but for what each rank keeps for itself: `own`."""
        return {"model": self.model, "optimizer": self.optimizer, "step": step}

    @property
    def own(self) -> dict[str, Any]:
        """Of this rank alone: the generators that dropout draws from."""
        return {"rng": RngStates()}

    def _embed(self, rows: Tensor) -> Tensor:
        """Unit vectors of sentences: the mean over their tokens."""
        mask = self.tokens["attention_mask"][rows]
        hidden = self.model(input_ids=self.tokens["input_ids"][rows], attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def pretrained(directory: str, seed: int, is_read: bool) -> Trainer:  # noqa: FBT001 - as `Build` says
    """The model of ``directory``, sharded over all ranks.

    Args:
        directory: with the model's config, weights and tokenizer.
        seed: of all that is random.
        is_read: read the weights; else leave them random, because a checkpoint is loaded next.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    auto: Any = AutoModel
    torch.manual_seed(seed)
    if is_read:
        model = auto.from_pretrained(directory, add_pooling_layer=False)
    else:
        model = auto.from_config(AutoConfig.from_pretrained(directory), add_pooling_layer=False)
    sentences = [asked for asked, _ in PAIRS] + [answer for _, answer in PAIRS]
    tokens = AutoTokenizer.from_pretrained(directory)(sentences, padding=True, return_tensors="pt")
    return sharded(model, dict(tokens), seed)


def sharded(model: Any, tokens: dict[str, Tensor], seed: int) -> Trainer:
    """The model over all ranks, its upper layers to be trained."""
    model.requires_grad_(requires_grad=False)
    model.encoder.layer[-_TRAINED_LAYERS:].requires_grad_(requires_grad=True)
    model.train()
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    tell(Built(parameters=_count(model.parameters()), trained=_count(trained)))
    torch.manual_seed(seed * world + dist.get_rank())  # of dropout, from the first step to the last
    return Trainer(model, torch.optim.AdamW(trained, lr=1e-4), tokens, seed)


class Telling(WriterHook):
    """Tells what becomes of saves behind training, as soon as the coordinator's background knows."""

    def __init__(self) -> None:
        """Knows of no save yet."""
        self._began: dict[int | None, float] = {}

    def saving(self, step: int) -> None:
        """A save begins."""
        self._began[step] = perf_counter()
        tell(Saving(step=step))

    def staged(self, step: int) -> None:
        """Training goes on."""
        tell(Staged(step=step, seconds=perf_counter() - self._began[step]))

    def pre_commit(self, info: CommitInfo) -> None:
        """See `WriterHook`."""
        tell(Uploaded(step=info.step or 0))

    def post_commit(self, info: CommitInfo) -> None:
        """See `WriterHook`."""
        tell(Saved(step=info.step or 0, seconds=perf_counter() - self._began.pop(info.step)))


def train(
    trainer: Trainer, checkpointer: Checkpointer, telling: Telling, *, first: int, steps: int, save_every: int
) -> None:
    """Trains from step ``first`` to ``steps``, saving every ``save_every`` behind training."""
    for step in range(first, steps + 1):
        tell(Stepped(step=step, loss=trainer.step(step).hex()))
        if step % save_every == 0:
            telling.saving(step)
            checkpointer.async_save(step, trainer.state(step), per_rank=trainer.own)
            telling.staged(step)


def resume(trainer: Trainer, checkpointer: Checkpointer, *, missing: Literal["error", "none"]) -> int:
    """Loads the newest committed step, and returns it; 0 where there is none and ``missing="none"``."""
    began = perf_counter()
    state = trainer.state(0)
    step = checkpointer.load(state, per_rank=trainer.own, missing=missing)
    if step is None:
        return 0
    if state["step"] != step:
        msg = f"the checkpoint of step {step} says it is of step {state['step']}"
        raise RuntimeError(msg)
    tell(Loaded(step=step, seconds=perf_counter() - began))
    return step


def tell(event: Event) -> None:
    """Writes an event to stdout; of events that all ranks share, rank 0 tells."""
    if dist.get_rank() == 0 or isinstance(event, Ready):
        os.write(1, to_line(event).encode())  # at once and whole: two threads tell, and may be killed while they do


Build = Callable[[str, int, bool], Trainer]
"""Makes the trainer of a model's directory and a seed; the last says whether the weights are read from there."""


def main(build: Build = pretrained, *, missing: Literal["error", "none"] = "error") -> None:
    """Trains as the arguments say.

    Args:
        build: makes the trainer.
        missing: what to do where the arguments say to resume, and nothing was ever committed.
    """
    parser = argparse.ArgumentParser()
    for name, kind in (("root", str), ("model", str), ("steps", int), ("save-every", int), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two ranks share what cores there are, and one thread adds in one order
    torch.use_deterministic_algorithms(mode=True)
    dist.init_process_group("gloo")
    try:
        tell(Ready(rank=dist.get_rank(), pid=os.getpid()))
        trainer = build(args.model, args.seed, not args.resume)
        telling = Telling()
        with checkpointer_of(args.root, telling) as checkpointer:
            done = resume(trainer, checkpointer, missing=missing) if args.resume else 0
            train(trainer, checkpointer, telling, first=done + 1, steps=args.steps, save_every=args.save_every)
    finally:
        dist.destroy_process_group()


def checkpointer_of(root: str, telling: Telling) -> Checkpointer:
    """Saves and loads below ``root``; the steps before the newest ones go at once, for nobody else reads them."""
    # One rank uploads one part at a time: a straggler, as a real cluster always has one.
    limits: dict[str, Any] = {"concurrency": 1} if dist.get_rank() else {}
    return Checkpointer(
        root,
        keep=KeepLast(KEPT),
        keep_grace_s=0,
        hooks=[telling],
        part_size=8 << 20,
        max_request_size=64 << 20,
        **limits,
    )


def _count(parameters: Iterator[torch.nn.Parameter] | list[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


if __name__ == "__main__":
    main()
