"""Partial loads: what they fetch, counted at the server, and how long they take, beside torch's FsspecReader.

Law: both read the same stock checkpoint; ours is measured on its own format too. Rounds are interleaved.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from statistics import median
from time import perf_counter, process_time
from typing import Any

import click

import cloudckpt
from cloudckpt.array import Array
from cloudckpt.checkpoint import Checkpoint
from cloudckpt.cli.bench import ranks
from cloudckpt.cli.bench.contenders import Cloudckpt, Contender
from cloudckpt.cli.bench.counter import Counter, counting
from cloudckpt.cli.bench.peers import Fsspec
from cloudckpt.engine.read import ReadOptions
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions

NAME = "partial"
ROWS, WIDTH = 131072, 1024
"""Of bf16: the tensor whose rows are read, of 256 MiB."""

MESHES = (
    ("FSDP, 8 ranks to 2", 8, 2, 0),
    ("FSDP, 8 ranks to 3", 8, 3, 0),
    ("a column shard each, 4 ranks to 4", 4, 4, 1),
)
COLUMNS = {"2048 x 32768 (runs of 16 KiB)": (2048, 32768), "32 x 2097152 (runs of 1 MiB)": (32, 2097152)}
"""Of bf16, 128 MiB: the first quarter of their columns is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What a load fetched for each byte that it needed, metadata and HTTP's headers included."""

    case: str
    needed: int
    ours: float
    ours_on_stock: float
    peer: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to read columns out of row-major chunks; medians of the rounds."""

    tensor: str
    way: str
    is_default: bool
    requests: int
    needed: int
    fetched: int
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Ten rows of a stock tensor, beside FsspecReader, which loads all of it; ``speed`` is the median of ratios."""

    ours: str
    peer: str
    our_s: float
    peer_s: float
    speed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """All of it."""

    fetched: list[Fetched]
    ways: list[Way]
    slices: list[Slice]


def measure(url: str, rounds: int, addressing_style: str) -> Partial:
    """Saves to ``url`` and reads parts of it.

    Raises:
        click.ClickException: the server is reached over https, whose bytes cannot be counted.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if not endpoint.startswith("http://"):
        msg = f"{NAME} counts bytes in front of the server: AWS_ENDPOINT_URL must be one of http://, not {endpoint!r}"
        raise click.ClickException(msg)
    style: Any = addressing_style
    direct = StoreOptions(s3=S3Options(addressing_style=style))
    with counting(endpoint) as counter:
        counted = StoreOptions(s3=S3Options(addressing_style=style, endpoint_url=counter.url))
        fetched = [*_keys_and_rows(url, counter, counted, style), *_meshes(url, counter)]
    return Partial(
        fetched=fetched, ways=list(_ways(url, direct, rounds)), slices=list(_slices(url, direct, rounds, style))
    )


def _tell(text: str) -> None:
    click.echo(f"{NAME}: {text}", err=True)


def _keys_and_rows(url: str, counter: Counter, store: StoreOptions, style: Any) -> Iterator[Fetched]:
    import torch

    state = {
        "embedding": torch.empty(ROWS, WIDTH, dtype=torch.bfloat16).normal_(),
        **{f"layers.{i}": torch.full((8 << 20,), float(i), dtype=torch.bfloat16) for i in range(16)},
    }
    peer = Fsspec(name="fsspec", threads=1, addressing_style=style)
    contenders: dict[str, Contender] = {"own": Cloudckpt(addressing_style=style), "stock": peer}
    for name, contender in contenders.items():
        _tell(f"saving for keys and rows, {name}")
        contender.save(state, f"{url}/{name}")
    own, stock = f"{url}/own", f"{url}/stock"

    def one_key(at: str) -> None:
        with cloudckpt.open(at, store=store) as ckpt:
            ckpt.load("layers.7")

    def some_rows(at: str) -> None:
        with cloudckpt.open(at, store=store) as ckpt:
            _array(ckpt, "embedding")[50000:52048]

    def by_peer(key: str) -> Callable[[], None]:
        return lambda: _load_by_fsspec({key: torch.zeros_like(state[key])}, stock, counter.url, style)

    for case, needed, ours, key in (
        ("one key of 17", 16 << 20, one_key, "layers.7"),
        ("2,048 rows of 131,072", 2048 * WIDTH * 2, some_rows, "embedding"),
    ):
        yield Fetched(
            case=case,
            needed=needed,
            ours=_count(counter, lambda ours=ours: ours(own)) / needed,  # type: ignore[misc]
            ours_on_stock=_count(counter, lambda ours=ours: ours(stock)) / needed,  # type: ignore[misc]
            peer=_count(counter, by_peer(key)) / needed,
        )


def _load_by_fsspec(state: dict[str, Any], url: str, endpoint: str | None, style: Any, **options: Any) -> None:
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
    from torch.distributed.checkpoint.state_dict_loader import load

    where = {} if endpoint is None else {"endpoint_url": endpoint}
    reader = FsspecReader(url, config_kwargs={"s3": {"addressing_style": style}}, **where, **options)
    load(state, storage_reader=reader, no_dist=True)


def _count(counter: Counter, action: Callable[[], object]) -> int:
    counter.reset()
    action()
    return counter.received


def _meshes(url: str, counter: Counter) -> Iterator[Fetched]:
    needed = ranks.TENSORS * prod(ranks.SHAPE) * 2
    saved = set()
    for case, before, after, axis in MESHES:
        root = f"{url}/{before}-{axis}"
        for by in ("cloudckpt", "fsspec"):
            if (root, by) not in saved:
                _tell(f"{before} ranks save by {by}")
                _run_ranks(before, counter.url, ("save", f"{root}-{by}"), by, axis)
                saved.add((root, by))
        found = {}
        for by, saved_by in (("cloudckpt", "cloudckpt"), ("cloudckpt", "fsspec"), ("fsspec", "fsspec")):
            _tell(f"{case}: {by} loads what {saved_by} saved")
            counter.reset()
            _run_ranks(after, counter.url, ("load", f"{root}-{saved_by}"), by, axis)
            found[by, saved_by] = counter.received / needed
        yield Fetched(
            case=case,
            needed=needed,
            ours=found["cloudckpt", "cloudckpt"],
            ours_on_stock=found["cloudckpt", "fsspec"],
            peer=found["fsspec", "fsspec"],
        )


def _array(ckpt: Checkpoint, key: str) -> Array:
    array = ckpt[key]
    assert isinstance(array, Array)  # noqa: S101 - for the type checker
    return array


def _run_ranks(count: int, endpoint: str, what: tuple[str, str], by: str, axis: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", "cloudckpt.cli.bench.ranks", *what]
    command += ["--by", by, "--axis", str(axis)]
    environ = os.environ | {"AWS_ENDPOINT_URL": endpoint, "AWS_ENDPOINT_URL_S3": endpoint, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if ended.returncode:
        msg = f"{count} ranks failed to {what[0]}:\n{ended.stderr[-3000:]}"
        raise click.ClickException(msg)


def _ways(url: str, store: StoreOptions, rounds: int) -> Iterator[Way]:
    """A quarter of the columns of a tensor that was saved whole, fetched in each way."""
    import torch
    from torch.distributed.checkpoint.state_dict_saver import save

    from cloudckpt.dcp.writer import ObjectStoreWriter

    ways = {"short ranges": 0, "by cost": ReadOptions().max_gap, "the whole": 1 << 40}
    for name, shape in COLUMNS.items():
        at = f"{url}/columns-{shape[0]}"
        tensor = torch.arange(prod(shape), dtype=torch.int32).to(torch.bfloat16).reshape(shape)
        save({"w": tensor}, storage_writer=ObjectStoreWriter(at, store=store), no_dist=True)
        costs: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        stats = {}
        for round_ in range(rounds + 1):
            for way, max_gap in sorted(ways.items(), reverse=bool(round_ % 2)):
                _tell(f"columns of {name}, {way}, round {round_}")
                with cloudckpt.open(at, store=store, max_gap=max_gap) as ckpt:
                    _array(ckpt, "w")[:, : shape[1] // 4]  # the way before may have left the memory in another state
                    wall, cpu = perf_counter(), process_time()
                    _array(ckpt, "w")[:, : shape[1] // 4]
                    cost = perf_counter() - wall, process_time() - cpu
                    costs[way] += [cost] if round_ else []
                    stats[way] = ckpt.stats
        for way in ways:
            yield Way(
                tensor=name,
                way=way,
                is_default=way == "by cost",
                requests=stats[way].requests // 2,
                needed=stats[way].bytes_needed // 2,
                fetched=stats[way].bytes_fetched // 2,
                wall_s=median(wall for wall, _ in costs[way]),
                cpu_s=median(cpu for _, cpu in costs[way]),
            )


def _slices(url: str, store: StoreOptions, rounds: int, style: Any) -> Iterator[Slice]:
    import torch

    at = f"{url}/one-stock-tensor"
    state = {"embedding": torch.empty(ROWS, WIDTH, dtype=torch.bfloat16).normal_()}
    tuned = Fsspec(name="fsspec", threads=1, addressing_style=style)
    tuned.save(state, at)
    opened = cloudckpt.open(at, store=store)

    def opening() -> None:
        with cloudckpt.open(at, store=store) as ckpt:
            _array(ckpt, "embedding")[70000:70010]

    actions: dict[str, Callable[[], object]] = {
        "opened for it": opening,
        "open already": lambda: _array(opened, "embedding")[30000:30010],
        "default settings": lambda: _load_by_fsspec(state, at, None, style),
        "fastest settings": lambda: tuned.load(state, at),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(rounds + 1):
        for name, action in actions.items():
            _tell(f"ten rows, {name}, round {round_}")
            began = perf_counter()
            action()
            times[name] += [perf_counter() - began] if round_ else []
    opened.close()
    for ours in ("opened for it", "open already"):
        for peer in ("default settings", "fastest settings"):
            yield Slice(
                ours=ours,
                peer=peer,
                our_s=median(times[ours]),
                peer_s=median(times[peer]),
                speed=median(theirs / mine for mine, theirs in zip(times[ours], times[peer], strict=True)),
            )
