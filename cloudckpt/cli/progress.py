"""How far a command has come, on a terminal.

Law: to stderr, and only where that is a terminal; whoever moves bytes is told of nothing.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cloudckpt.progress import bar

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
    with bar(what, total) as (drawn, task):
        yield lambda nbytes: drawn.advance(task, nbytes)
