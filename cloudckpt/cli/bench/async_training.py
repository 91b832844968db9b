"""What is left of training's throughput while a save goes up to a slow server, on the same cores.

Law: steps count that began and ended during an upload (the first even if it outlasts a short one); beside them stand
steps just before and just after it.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from time import perf_counter
from typing import Any, NamedTuple

import click

from cloudckpt.cli.bench.async_blocking import start_group
from cloudckpt.cli.bench.async_contenders import AsyncContender, Saves
from cloudckpt.cli.bench.async_feeder import Feeder
from cloudckpt.cli.bench.async_figures import FED, Training
from cloudckpt.cli.bench.async_parts import TRAINING
from cloudckpt.cli.bench.null_process import Address, Kind
from cloudckpt.cli.bench.null_server import Shape

BYTES_PER_S = 100e6
SLOW = Kind(shape=Shape(total_bytes_per_s=BYTES_PER_S))
NOTHING = "nothing"
"""Is saved, for as long as the upload takes: what is left then is the machine's own unrest."""

_THREADS = 2
_WIDTH, _BATCH, _LENGTH = 512, 2, 64


def measure(
    nbytes: int, rounds: int, contenders: Sequence[AsyncContender], server: Address, url: str
) -> Iterator[Training]:
    """Trains in this process, and has the contenders save in turns.

    Args:
        nbytes: of weights and moments, about.
        rounds: after a warm-up.
        contenders: who takes part; `NOTHING` and `FED` do always.
        server: that AWS's variables lead to, over http.
        url: below which they save.
    """
    import torch

    from cloudckpt.cli.bench.async_model import Learner

    torch.set_num_threads(_THREADS)
    start_group()
    learner = Learner.of(nbytes, width=_WIDTH, batch=_BATCH, length=_LENGTH)
    with ExitStack() as stack:
        started: list[_Turn] = []
        for contender in contenders:
            saves = stack.enter_context(closing(contender.start(f"{url}/{contender.name}")))
            started.append(
                _Turn(contender.name, saves, learner.objects if contender.is_ours else learner.application)
            )
        started.append(_Turn(NOTHING, _Nothing(learner.nbytes), {}))
        feeder = stack.enter_context(closing(Feeder(server.url, learner.nbytes)))
        started.append(_Turn(FED, feeder, {}))
        _idle(learner)
        for round_ in range(rounds + 1):
            for turn in started if round_ % 2 else reversed(started):
                found = _measured(turn, round_, learner, server.pid)
                _tell(found)
                if round_:  # 0 warms up
                    yield found


class _Nothing:
    """Saves nothing; see `async_contenders.Saves`."""

    def __init__(self, nbytes: int) -> None:
        self._seconds = nbytes / BYTES_PER_S
        self._end = 0.0

    def save(self, step: int, state: dict[str, Any]) -> "_Nothing":
        del step, state
        self._end = perf_counter() + self._seconds
        return self

    def done(self) -> bool:
        return perf_counter() > self._end

    def result(self) -> object:
        return None

    def close(self) -> None:
        return


class _Turn(NamedTuple):
    """Somebody, and what he saves."""

    name: str
    saves: Saves
    state: dict[str, Any]


def _measured(turn: _Turn, round_: int, learner: Any, server: int) -> Training:
    gc.collect()
    idle = _idle(learner)
    began = perf_counter()
    under_way = turn.saves.save(round_, turn.state)
    blocked = perf_counter()
    server_cpu_s = _cpu_s(server)
    busy: list[float] = []
    while True:
        step_s = _seconds(learner.step)
        is_over = under_way.done()
        if not (is_over and busy):
            busy.append(step_s)
        if is_over:
            break
    under_way.result()
    ended, server_cpu_s = perf_counter(), _cpu_s(server) - server_cpu_s
    return Training(
        contender=turn.name,
        round=round_,
        nbytes=learner.nbytes,
        blocked_s=blocked - began,
        upload_s=ended - blocked,
        idle_s=idle + _idle(learner),
        busy_s=busy,
        server_cpu_s=server_cpu_s,
    )


def _idle(learner: Any) -> list[float]:
    """The seconds of steps that are made for half as long as an upload takes at least."""
    end = perf_counter() + learner.nbytes / BYTES_PER_S / 2
    found = [_seconds(learner.step)]
    while perf_counter() < end:
        found.append(_seconds(learner.step))
    return found


def _seconds(action: Callable[[], None]) -> float:
    began = perf_counter()
    action()
    return perf_counter() - began


def _cpu_s(process: int) -> float:
    """Of all its threads until now (man 5 proc_pid_stat)."""
    with open(f"/proc/{process}/stat", encoding="ascii") as file:
        after_name = file.read().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def _tell(found: Training) -> None:
    text = f"{TRAINING}, {f'round {found.round}' if found.round else 'warm-up'}: {found.contender}"
    steps = f"{len(found.busy_s)} steps in {found.upload_s:.2f} s, {found.ratio:.3f} of the throughput"
    click.echo(f"{text} {steps}", err=True)
