"""Bytes of host memory, moved.

Law: every move has ended when the call returns, and no thread waits for another while there is work.
"""

import ctypes
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

_JOB = 4 << 20
"""Bytes that one thread moves before it looks for more: half a millisecond."""

_WORTH_HELP = 16 << 20
"""Bytes below which waking other threads gains nothing."""

_MOST_THREADS = 8
"""More do not move more: a few cores fill the memory's bandwidth."""

Move = tuple[int, int, int]
"""To, from, bytes."""


class Mover:
    """Moves bytes with several threads, which share the work as they come: a core that is busy holds up nobody.

    torch's own threads each get an equal share, and wait for the one that gets no core.
    """

    def __init__(self) -> None:
        """Starts no thread yet."""
        self._helpers = ThreadPoolExecutor(_MOST_THREADS - 1, thread_name_prefix="cloudckpt-staging")

    def move(self, moves: Iterable[Move], *, threads: int) -> None:
        """Moves all.

        Args:
            moves: addresses of memory that is there until this returns.
            threads: that may work at it, this one included.
        """
        jobs = deque(_jobs(moves))
        is_worth_help = len(jobs) * _JOB >= _WORTH_HELP
        helpers = self._call(jobs, min(threads, _MOST_THREADS) - 1) if is_worth_help else []
        try:
            _work(jobs)
        finally:
            jobs.clear()
            for helper in helpers:
                if not helper.cancel():
                    helper.result()

    def close(self) -> None:
        """Lets the threads end."""
        self._helpers.shutdown(wait=False)

    def _call(self, jobs: deque[list[Move]], count: int) -> "list[Future[None]]":
        try:
            return [self._helpers.submit(_work, jobs) for _ in range(count)]
        except RuntimeError:
            return []  # the script is ending, and threads are not to be had


def _jobs(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """Portions of about `_JOB` bytes: long moves in pieces, short ones together."""
    job: list[Move] = []
    room = _JOB
    for to, source, nbytes in moves:
        done = 0
        while done < nbytes:
            size = min(room, nbytes - done)
            job.append((to + done, source + done, size))
            done += size
            room -= size
            if not room:
                yield job
                job, room = [], _JOB
    if job:
        yield job


def _work(jobs: deque[list[Move]]) -> None:
    while True:
        try:
            job = jobs.popleft()
        except IndexError:
            return
        for move in job:
            ctypes.memmove(*move)  # lets other threads of Python run
