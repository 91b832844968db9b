"""One call of the benchmark, from its options to its results.

Law: talks to stderr; the results say everything that the report shows.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from secrets import token_hex
from typing import TypeVar

import click

from cloudckpt.cli.bench import partial, rows, weights
from cloudckpt.cli.bench.contenders import Contender, all_contenders
from cloudckpt.cli.bench.figures import Figure, Traffic
from cloudckpt.cli.bench.machine import Machine, describe
from cloudckpt.cli.bench.null_objects import PERIOD
from cloudckpt.cli.bench.null_process import KINDS, serving
from cloudckpt.cli.bench.partial import Partial
from cloudckpt.cli.bench.place import Place
from cloudckpt.cli.bench.raw import CONCURRENCY
from cloudckpt.cli.bench.rows import RowsFigure
from cloudckpt.cli.bench.runner import count, run
from cloudckpt.cli.bench.weights import WeightsFigure
from cloudckpt.cli.bench.workloads import Workload, all_workloads, repeating

T = TypeVar("T")
DEFAULT_WORKLOADS = "weights,rows,partial,stock,bf16-128,one-tensor,small,small-as-one,two-gib,adam,lora"
DEFAULT_NULL_WORKLOADS = {"null": "bf16-128", "null-tls": "bf16-128", "cloud": "bf16-128,small,small-as-one"}
NULL_URL = "s3://bench/run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for: the command's options.

    Attributes:
        workloads, contenders: names, comma-separated; None for the default.
        server: a null server to start.
        concurrency: requests under way at a time, of ours and of the references; None for the defaults.
        connections: of the plain sockets.
        request_size: of the references; None for those of ours.
        is_counted: whether requests and bytes are counted, in a pass of its own.
        local_dir: where folders for files are made; None for the system's temporary one.
    """

    rounds: int
    size: int
    tensors: int
    one_tensor_size: int
    contenders: str | None = None
    workloads: str | None = None
    addressing_style: str = "auto"
    create_bucket: bool = False
    server: str | None = None
    concurrency: int | None = None
    connections: int | None = None
    request_size: int | None = None
    is_counted: bool = True
    local_dir: str | None = None


@dataclass(slots=True, kw_only=True)
class Results:
    """What was measured, of whom, on what.

    Attributes:
        server: the null server that it was, or None for another.
        concurrency: connections that cloud allowed.
        traffic: empty where it could not be counted.
    """

    url: str
    server: str | None
    concurrency: int
    machine: Machine
    contenders: Mapping[str, Contender]
    workloads: Mapping[str, Workload]
    figures: list[Figure]
    traffic: list[Traffic] = field(default_factory=list)
    weights: list[WeightsFigure] = field(default_factory=list)
    rows: RowsFigure | None = None
    partial: Partial | None = None

    def contenders_of(self, workload: str) -> list[str]:
        """Those that were measured with it, in the order they were asked for."""
        return list(dict.fromkeys(f.contender for f in self.figures if f.workload == workload))


def measure(url: str | None, request: Request) -> Results:
    """Measures what was asked for, at ``url`` or on a null server.

    Raises:
        click.ClickException: an option names nothing there is, or a contender failed.
        StoreError: the bucket cannot be reached.
    """
    with ExitStack() as stack:
        if request.server is not None:
            stack.enter_context(_null_server(request.server))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cloudckpt-bench-", dir=request.local_dir))
        return _measure((url or NULL_URL).rstrip("/"), request, os.path.join(folder, "files"))


def _measure(url: str, request: Request, folder: str) -> Results:
    is_cloud = request.server == "cloud"  # there the connections are what is measured: all have as many
    known = all_contenders(
        request.addressing_style,
        folder=folder,
        concurrency=request.concurrency or (CONCURRENCY if is_cloud else None),
        connections=request.connections or (CONCURRENCY if is_cloud else 8),
        request_size=request.request_size,
    )
    asked_for = _named(request.workloads or _default(request), _workloads(request), "--workloads")
    chosen = {name: workload for name, workload in asked_for.items() if workload is not None}
    asked = _named(request.contenders, known, "--contenders") if request.contenders is not None else None
    Place(url, request.addressing_style).check(create_bucket=request.create_bucket)
    url = f"{url}/cloudckpt-bench-{token_hex(4)}"
    place = Place(url, request.addressing_style)
    results = Results(
        url=url,
        server=request.server,
        concurrency=request.concurrency or CONCURRENCY,
        machine=describe(()),
        contenders={},
        workloads=chosen,
        figures=[],
        weights=list(weights.measure(request.rounds)) if weights.NAME in asked_for else [],
    )
    try:
        if rows.NAME in asked_for:
            results.rows = rows.measure(f"{url}/{rows.NAME}", place.store)
        if partial.NAME in asked_for:
            results.partial = partial.measure(f"{url}/{partial.NAME}", request.rounds, request.addressing_style)
        for workload in chosen.values():
            taking_part = list(asked.values()) if asked else [known[name] for name in workload.contenders]
            _measure_one(workload, taking_part, place, results, is_counted=request.is_counted)
    finally:
        place.remove()
    results.contenders = {name: known[name] for name in dict.fromkeys(f.contender for f in results.figures)}
    results.machine = describe({module for c in results.contenders.values() for module in c.modules})
    return results


def _measure_one(
    workload: Workload, contenders: Sequence[Contender], place: Place, results: Results, *, is_counted: bool
) -> None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if is_counted and endpoint.startswith("http://"):
        results.traffic += count(workload, contenders, results.url, place, endpoint)
    for figure in run(workload, contenders, results.url, place):
        _tell(figure, workload)
        results.figures.append(figure)


@contextmanager
def _null_server(name: str) -> Iterator[None]:
    """Starts one, and leads this process and those it starts there."""
    before = dict(os.environ)
    with serving(KINDS[name]) as address:
        os.environ.update(address.environ)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _default(request: Request) -> str:
    return DEFAULT_WORKLOADS if request.server is None else DEFAULT_NULL_WORKLOADS[request.server]


def _workloads(request: Request) -> dict[str, Workload | None]:
    """What this server can be measured with; None for what is no matter of saving and loading a state dict."""
    known = all_workloads(
        size=request.size,
        tensors=request.tensors,
        one_tensor_size=request.one_tensor_size,
        rounds=request.rounds,
    )
    if request.server is None:
        return {**known, weights.NAME: None, rows.NAME: None, partial.NAME: None}
    able = [w for w in known.values() if w.kind != "adam" and w.name != "stock"]  # what does not repeat itself
    return {w.name: repeating(w, PERIOD) for w in able}


def _named(names: str, known: Mapping[str, T], option: str) -> dict[str, T]:
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in known:
            raise click.UsageError(f"{option}: no {name!r}; there are {', '.join(known)}")
    if not asked:
        raise click.UsageError(f"{option}: names none of {', '.join(known)}")
    return {name: known[name] for name in asked}


def _tell(figure: Figure, workload: Workload) -> None:
    round_ = f"round {figure.round}/{workload.rounds}" if figure.round else "warm-up"
    cost = figure.cost
    text = f"{workload.name}, {round_}: {figure.contender} {figure.operation}"
    click.echo(f"{text} {cost.wall_s:.2f} s, CPU {cost.cpu_s:.2f} s", err=True)
