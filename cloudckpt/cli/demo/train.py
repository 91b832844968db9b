"""The demo's training: one rank of it. Run by ``python -m torch.distributed.run -m cloudckpt.cli.demo.train``.

Law: an ordinary FSDP training loop. What a step does depends on the seed, the step and the state alone, so that
a resumed run repeats an undisturbed one bit for bit.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cloudckpt.catalog import newest_step, step_url
from cloudckpt.cli.demo.events import Built, Event, Loaded, Ready, Saved, Saving, Stepped, to_line
from cloudckpt.cli.demo.sentences import PAIRS
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter

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
        torch.manual_seed((self.seed * 1_000_003 + step) * world + rank)  # of dropout
        asked, answers = self._embed(torch.cat([mine, mine + len(PAIRS)])).chunk(2)
        loss = torch.nn.functional.cross_entropy(asked @ answers.T / _TEMPERATURE, torch.arange(_BATCH))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        mean = loss.detach()
        dist.all_reduce(mean)
        return mean.item() / world

    def save(self, root: str, step: int) -> None:
        """Saves all that the next step depends on, straight to object storage."""
        # One rank uploads one part at a time: a straggler, as a real cluster always has one.
        limits: dict[str, Any] = {"concurrency": 1} if dist.get_rank() else {}
        writer = ObjectStoreWriter(step_url(root, step), step=step, part_size=8 << 20, **limits)
        dcp.save(self._state(step), storage_writer=writer)  # type: ignore[attr-defined]

    def load(self, root: str, step: int) -> ObjectStoreReader:
        """Loads what `save` saved, and returns the reader for its `stats`."""
        reader = ObjectStoreReader(step_url(root, step), max_request_size=64 << 20)
        state = self._state(0)
        dcp.load(state, storage_reader=reader)  # type: ignore[attr-defined]
        if state["step"] != step:
            msg = f"the checkpoint of step {step} says it is of step {state['step']}"
            raise RuntimeError(msg)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        return reader

    def _state(self, step: int) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": step}

    def _embed(self, rows: Tensor) -> Tensor:
        """Unit vectors of sentences: the mean over their tokens."""
        mask = self.tokens["attention_mask"][rows]
        hidden = self.model(input_ids=self.tokens["input_ids"][rows], attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def build(directory: str, seed: int, *, pretrained: bool) -> Trainer:
    """The model of ``directory``, sharded over all ranks.

    Args:
        directory: with the model's config, weights and tokenizer.
        seed: of all that is random.
        pretrained: read the weights; else leave them random, because a checkpoint is loaded next.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    auto: Any = AutoModel
    torch.manual_seed(seed)
    if pretrained:
        model = auto.from_pretrained(directory, add_pooling_layer=False)
    else:
        model = auto.from_config(AutoConfig.from_pretrained(directory), add_pooling_layer=False)
    model.requires_grad_(requires_grad=False)
    model.encoder.layer[-_TRAINED_LAYERS:].requires_grad_(requires_grad=True)
    model.train()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    tell(Built(parameters=_count(model.parameters()), trained=_count(trained)))
    sentences = [asked for asked, _ in PAIRS] + [answer for _, answer in PAIRS]
    tokens = AutoTokenizer.from_pretrained(directory)(sentences, padding=True, return_tensors="pt")
    return Trainer(model, torch.optim.AdamW(trained, lr=1e-4), dict(tokens), seed)


def train(trainer: Trainer, root: str, *, first: int, steps: int, save_every: int) -> None:
    """Trains from step ``first`` to ``steps``, saving every ``save_every``."""
    for step in range(first, steps + 1):
        tell(Stepped(step=step, loss=trainer.step(step).hex()))
        if step % save_every == 0:
            dist.barrier()
            tell(Saving(step=step))
            began = perf_counter()
            trainer.save(root, step)
            tell(Saved(step=step, seconds=perf_counter() - began))


def resume(trainer: Trainer, root: str) -> int:
    """Loads the newest committed step under ``root``, and returns it."""
    step = newest_step(root)
    if step is None:
        msg = f"no step was ever committed under {root}"
        raise RuntimeError(msg)
    began = perf_counter()
    stats = trainer.load(root, step).stats
    seconds = perf_counter() - began
    tell(Loaded(step=step, seconds=seconds, requests=stats.requests, nbytes=stats.bytes_fetched))
    return step


def tell(event: Event) -> None:
    """Writes an event to stdout; of events that all ranks share, rank 0 tells."""
    if dist.get_rank() == 0 or isinstance(event, Ready):
        sys.stdout.write(to_line(event))
        sys.stdout.flush()


def main() -> None:
    """Trains as the arguments say."""
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
        trainer = build(args.model, args.seed, pretrained=not args.resume)
        done = resume(trainer, args.root) if args.resume else 0
        train(trainer, args.root, first=done + 1, steps=args.steps, save_every=args.save_every)
        # DCP ends a save with a broadcast. A thread of gloo's frees its tensors afterwards, and aborts the process
        # if the interpreter is gone by then (torch 2.13); a barrier gives it the time.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _count(parameters: Iterator[torch.nn.Parameter] | list[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


if __name__ == "__main__":
    main()
