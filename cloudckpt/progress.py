"""How far bytes have come, for people: a bar on a terminal, lines in the log elsewhere.

Law: to stderr or to the log. Whoever moves bytes is told of nothing, and nothing fails for what fails here.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

log = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Told of the bytes that are done, and of all that there are to do."""

Progress = bool | Report
"""What a caller wants shown: nothing, what suits the place, or whatever a function of its own does."""

LINES_EVERY_S = 10
"""Between two lines in the log, at least."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


@contextmanager
def shown(what: str, progress: Progress) -> Iterator[Report | None]:
    """Shows, for as long as the context lasts, how far something has come.

    Args:
        what: is done, in a word or two.
        progress: True for a bar where stderr is a terminal, and lines in the log where it is not.

    Yields:
        What is to be told of it, from one thread at a time; None where nothing is to be shown.
    """
    if progress is False:
        yield None
    elif progress is not True:
        yield _Careful(progress)
    elif not sys.stderr.isatty():
        yield Lines(what)
    else:
        with bar(what, None) as (drawn, task):
            yield lambda done, total: drawn.update(task, completed=done, total=total)


@contextmanager
def bar(what: str, total: int | None) -> "Iterator[tuple[RichProgress, TaskID]]":
    """A bar on stderr, with bytes, rate and time left; may be told from any thread.

    Args:
        what: is done, in a word or two.
        total: bytes; None where nobody knows yet.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True)]
    if console.width >= 80:
        columns += [TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as drawn:
        yield drawn, drawn.add_task(what, total=total)


class Lines:
    """A `Report` that writes a line to the log now and then."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins to count."""
        self._what = what
        self._clock = clock
        self._began = self._last = clock()

    def __call__(self, done: int, total: int) -> None:
        """Writes one if the last was long enough ago; what is all done is told by others."""
        now = self._clock()
        if now - self._last < LINES_EVERY_S or not 0 < done < total:
            return
        self._last = now
        rate = done / (now - self._began)
        log.info(
            "%s: %s of %s (%d %%), %s/s, %d s left",
            self._what,
            show_size(done),
            show_size(total),
            100 * done // total,
            show_size(round(rate)),
            (total - done) / rate,
        )


class _Careful:
    """A caller's function, that is not called again once it has failed."""

    def __init__(self, report: Report) -> None:
        self._report: Report | None = report

    def __call__(self, done: int, total: int) -> None:
        if self._report is None:
            return
        try:
            self._report(done, total)
        except Exception as e:
            log.warning("progress is not shown any more: %s: %s", type(e).__name__, e)
            self._report = None


def show_size(nbytes: int) -> str:
    """A number of bytes as people read it."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
