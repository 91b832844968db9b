"""A process of one contender with one workload, told what to do over a pipe.

Law: nothing is measured before libraries are imported, connections made and the state dict touched.
"""

import gc
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Self

import click

from cloudckpt.cli.bench import meter, workloads
from cloudckpt.cli.bench.contenders import Contender, Prepares
from cloudckpt.cli.bench.figures import Cost, Operation
from cloudckpt.cli.bench.workloads import State, Workload


@dataclass(frozen=True, slots=True)
class _Order:
    """One operation on one URL; what a load brings is looked at where ``is_verified``."""

    operation: Operation
    url: str
    is_verified: bool


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str


class Worker:
    """The near end: starts the process, sends orders, ends it. A context manager."""

    def __init__(self, contender: Contender, workload: Workload, url: str) -> None:
        """Starts the process and waits until it is ready.

        Args:
            contender: who works.
            workload: on what.
            url: a place for a small checkpoint that sets the clients up; the caller removes it.
        """
        self.name = contender.name
        context = get_context("spawn")  # forked, it would inherit this process's memory and threads
        self._pipe, far = context.Pipe()
        process = context.Process(target=_serve, args=(far, contender, workload, url), daemon=True)
        process.start()
        far.close()
        self._process: BaseProcess = process
        self.rss_baseline: int | None = self._reply()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()  # which it takes for the end
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def measure(self, operation: Operation, url: str, *, is_verified: bool) -> Cost:
        """Has the operation done, and returns what it cost.

        Raises:
            click.ClickException: the contender failed, or loaded something else than it saved.
        """
        self._pipe.send(_Order(operation, url, is_verified))
        cost: Cost = self._reply()
        return cost

    def _reply(self) -> Any:
        try:
            reply = self._pipe.recv()
        except EOFError:
            self._process.join(timeout=10)
            msg = f"{self.name}: its process ended, exit code {self._process.exitcode}"
            raise click.ClickException(msg) from None
        if isinstance(reply, _Failure):
            raise click.ClickException(f"{self.name} failed:\n{reply.text}")
        return reply


def _serve(pipe: "Connection[Any, Any]", contender: Contender, workload: Workload, url: str) -> None:
    warnings.simplefilter("ignore")
    try:
        _set_up(contender, workload, url)
        state = workloads.make_state(workload, is_flat=contender.is_raw)
        fingerprint = workloads.fingerprint(state)
        gc.collect()
        pipe.send(meter.resident())
        while True:
            order: _Order = pipe.recv()
            pipe.send(_carry_out(order, contender, state, fingerprint))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return
    except BaseException:
        pipe.send(_Failure(traceback.format_exc()))
    finally:
        if isinstance(contender, Prepares):
            with suppress(Exception):
                contender.close()


def _set_up(contender: Contender, workload: Workload, url: str) -> None:
    small = workloads.make_state(workloads.small(workload), is_flat=contender.is_raw)
    _prepare("save", contender, small, url)
    contender.save(small, url)
    _prepare("load", contender, small, url)
    contender.load(small, url)


def _prepare(operation: Operation, contender: Contender, state: State, url: str) -> None:
    if isinstance(contender, Prepares):
        contender.prepare(operation, state, url)


def _carry_out(order: _Order, contender: Contender, state: State, fingerprint: list[int]) -> Cost:
    _prepare(order.operation, contender, state, order.url)
    gc.collect()
    if order.operation == "save":
        return meter.cost_of(lambda: contender.save(state, order.url))
    workloads.clear(state)
    cost = meter.cost_of(lambda: contender.load(state, order.url))
    if order.is_verified and workloads.fingerprint(state) != fingerprint:
        raise RuntimeError("what was loaded is not what was saved")
    return cost
