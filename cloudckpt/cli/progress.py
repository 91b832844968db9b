"""How far a command has come, on a terminal.

Law: to stderr, and only where that is a terminal; whoever moves bytes is told of nothing.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]
"""Takes the bytes that were done since it was called last; from any thread."""


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Advance]:
    """A bar with bytes, rate and time left, for as long as the context lasts.

    Args:
        what: is done, in a word or two.
        total: bytes; None where nobody knows.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
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
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)]
    if console.width >= 80:
        columns += [TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
