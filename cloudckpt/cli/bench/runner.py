"""Who works when: rounds interleaved between contenders, one operation at a time.

Law: order and bookkeeping only; what an operation is, and what it costs, is the worker's.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from secrets import token_hex
from typing import Protocol

import click

from cloudckpt.cli.bench.contenders import Contender
from cloudckpt.cli.bench.counter import counting
from cloudckpt.cli.bench.figures import OPERATIONS, Figure, Traffic
from cloudckpt.cli.bench.worker import Worker
from cloudckpt.cli.bench.workloads import Workload


class Removes(Protocol):
    """What running asks of the place."""

    def remove(self, name: str = "") -> None:
        """Removes what lies under that name."""
        ...


def run(workload: Workload, contenders: Sequence[Contender], url: str, place: Removes) -> Iterator[Figure]:
    """Measures all contenders with one workload, and yields each figure when it is there.

    A saves, B saves, A loads, B loads; in the next round B is first. Each save goes to a name that was
    never used, and is removed once it was loaded. What is loaded first is compared with what was saved.
    """
    with ExitStack() as stack:
        workers = []
        for contender in contenders:
            name = token_hex(8)
            click.echo(f"{workload.name}: starting {contender.name}", err=True)
            workers.append(stack.enter_context(Worker(contender, workload, f"{url}/{name}")))
            place.remove(name)
        first = 0 if workload.has_warm_up else 1
        for round_ in range(first, workload.rounds + 1):
            yield from _round(round_, workload, workers, url, place, is_verified=round_ == first)
            workers.reverse()


def count(
    workload: Workload, contenders: Sequence[Contender], url: str, place: Removes, endpoint: str
) -> Iterator[Traffic]:
    """Has each contender save and load once through a relay in front of ``endpoint``, and yields what it counted."""
    with counting(endpoint) as counter, _leading_to(counter.url):
        for contender in contenders:
            click.echo(f"{workload.name}: counting requests of {contender.name}", err=True)
            name = token_hex(8)
            with Worker(contender, workload, f"{url}/{name}") as worker:
                for operation in OPERATIONS:
                    counter.reset()
                    worker.measure(operation, f"{url}/{name}/counted", is_verified=False)
                    yield Traffic(
                        workload=workload.name,
                        contender=contender.name,
                        operation=operation,
                        requests=dict(counter.methods),
                        sent=counter.sent,
                        received=counter.received,
                    )
            place.remove(name)


@contextmanager
def _leading_to(endpoint: str) -> Iterator[None]:
    """AWS's variables lead processes that are started meanwhile to another endpoint."""
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, endpoint))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _round(
    round_: int, workload: Workload, workers: Sequence[Worker], url: str, place: Removes, *, is_verified: bool
) -> Iterator[Figure]:
    names = {worker.name: token_hex(8) for worker in workers}
    for operation in OPERATIONS:
        for worker in workers:
            cost = worker.measure(operation, f"{url}/{names[worker.name]}", is_verified=is_verified)
            yield Figure(
                workload=workload.name,
                contender=worker.name,
                round=round_,
                operation=operation,
                cost=cost,
                rss_baseline=worker.rss_baseline,
            )
            if operation == "load":
                place.remove(names[worker.name])
