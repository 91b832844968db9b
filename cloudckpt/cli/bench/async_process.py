"""A generator that runs in a process of its own.

Law: what it yields comes over a pipe; it ends with whoever reads it.
"""

import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import click

T = TypeVar("T")
_LONGEST_END_S = 20


class _End:
    """Nothing more comes; after a failure, its trace."""

    def __init__(self, failure: str | None) -> None:
        self.failure = failure


def in_own_process(function: Callable[..., Iterator[T]], *args: Any, **more: Any) -> Iterator[T]:
    """Yields what ``function(*args, **more)`` yields there; may itself start processes.

    Raises:
        click.ClickException: it failed, or its process ended.
    """
    context = get_context("spawn")  # forked, it would inherit this process's threads
    near, far = context.Pipe()
    process = context.Process(target=_run, args=(far, partial(function, *args, **more)))
    process.start()
    far.close()
    try:
        while True:
            try:
                found = near.recv()
            except EOFError:
                process.join(_LONGEST_END_S)
                msg = f"{function.__name__}: its process ended, exit code {process.exitcode}"
                raise click.ClickException(msg) from None
            if isinstance(found, _End):
                if found.failure is not None:
                    msg = f"{function.__name__} failed:\n{found.failure}"
                    raise click.ClickException(msg)
                return
            yield found
    finally:
        near.close()
        process.join(_LONGEST_END_S)
        if process.is_alive():
            process.kill()
            process.join()


def _run(pipe: "Connection[Any, Any]", function: Callable[[], Iterator[Any]]) -> None:
    warnings.simplefilter("ignore")
    try:
        for found in function():
            pipe.send(found)
        pipe.send(_End(None))
    except (BrokenPipeError, KeyboardInterrupt):
        return
    except BaseException:
        pipe.send(_End(traceback.format_exc()))
