"""Who works when: rounds interleaved between contenders, one operation at a time.

Law: order and bookkeeping only; what an operation is, and what it costs, is the worker's.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from secrets import token_hex
from typing import Protocol

import click

from cloudckpt.cli.bench.contenders import Contender
from cloudckpt.cli.bench.figures import OPERATIONS, Figure
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
