"""How long an async save holds up training, beside one copy of the same tensors into warm memory.

Law: nothing else is under way while either is measured; from the second save of each contender on.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import Any

import click

from cloudckpt.cli.bench import workloads
from cloudckpt.cli.bench.async_contenders import AsyncContender, Saves
from cloudckpt.cli.bench.async_figures import Blocking
from cloudckpt.cli.bench.async_parts import BLOCKING
from cloudckpt.cli.bench.workloads import Workload

CASES = ("bf16-128", "gpt-adamw", "small")
SMALL = 10_000 * 4096
_COPIES = 3
_GPT = {"width": 1024, "batch": 1, "length": 8}


@dataclass(frozen=True, slots=True)
class _State:
    """One case's state dict, for ours and for torch's, and its tensors."""

    ours: dict[str, Any]
    theirs: dict[str, Any]
    tensors: list[Any]


def measure(
    case: str, *, nbytes: int, threads: Sequence[int], rounds: int, contenders: Sequence[AsyncContender], url: str
) -> Iterator[Blocking]:
    """Measures one case, in this process.

    Args:
        case: one of `CASES`.
        nbytes: of the tensors, about; of ``small`` at most `SMALL`.
        threads: of torch, one after the other.
        rounds: for each of them, after a warm-up.
        contenders: who takes part, in turns.
        url: below which they save; AWS's variables lead there.
    """
    import torch

    start_group()
    state = _make(case, nbytes)
    buffers = [torch.empty_like(tensor) for tensor in state.tensors]
    steps = count()
    with ExitStack() as stack:
        started: list[tuple[AsyncContender, Saves]] = []
        for contender in contenders:
            if case == "small" and contender.opens_files:
                continue
            saves = stack.enter_context(closing(contender.start(f"{url}/{case}/{contender.name}")))
            started.append((contender, saves))
        for number in threads:
            torch.set_num_threads(number)
            for round_ in range(0 if number == threads[0] else 1, rounds + 1):
                for contender, saves in started if round_ % 2 else reversed(started):
                    blocked_s, copy_s = _beside_a_copy(contender, saves, state, buffers, next(steps))
                    found = Blocking(
                        case=case,
                        threads=number,
                        contender=contender.name,
                        round=round_,
                        nbytes=sum(tensor.nbytes for tensor in state.tensors),
                        blocked_s=blocked_s,
                        copy_s=copy_s,
                    )
                    _tell(found)
                    if round_:  # 0 warms up
                        yield found


def _beside_a_copy(
    contender: AsyncContender, saves: Saves, state: _State, buffers: list[Any], step: int
) -> tuple[float, float]:
    """Seconds that a save blocked, and those of a copy."""
    import torch

    def copy() -> float:
        began = perf_counter()
        torch._foreach_copy_(buffers, state.tensors)
        return perf_counter() - began

    gc.collect()
    copy()  # the save and the copies find the same in the caches
    copy_s = min(copy() for _ in range(_COPIES))
    began = perf_counter()
    under_way = saves.save(step, state.ours if contender.is_ours else state.theirs)
    blocked_s = perf_counter() - began
    under_way.result()
    return blocked_s, copy_s


def _tell(found: Blocking) -> None:
    when = f"round {found.round}" if found.round else "warm-up"
    text = f"{BLOCKING}, {found.case}, threads {found.threads}, {when}: {found.contender}"
    click.echo(f"{text} {found.blocked_s:.3f} s, a copy {found.copy_s:.3f} s", err=True)


def start_group() -> None:
    """Makes a process group of one rank, which torch needs for its process."""
    import torch.distributed as dist

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def _make(case: str, nbytes: int) -> _State:
    if case == "gpt-adamw":
        from torch.distributed.checkpoint.state_dict import get_state_dict

        from cloudckpt.cli.bench.async_model import Learner

        learner = Learner.of(nbytes, **_GPT)
        model, optimizer = get_state_dict(learner.model, learner.optimizer)
        found = [*workloads.all_tensors(model), *workloads.all_tensors(optimizer)]
        return _State(learner.objects, learner.application, found)
    is_small = case == "small"
    tensors = max(1, min(nbytes, SMALL) // 4096) if is_small else 128
    workload = Workload(
        name=case, nbytes=tensors * 4096 if is_small else nbytes, tensors=tensors, rounds=1, contenders=()
    )
    state = workloads.make_state(workload)
    return _State(state, state, list(workloads.all_tensors(state)))
