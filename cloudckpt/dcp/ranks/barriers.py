"""Barriers with a timeout, that name who did not come.

Law: each round of a barrier ends once, for all: passed by every rank, or by none. One compare-and-set in a store
decides, so that a rank that comes late is told that the others gave up, and the next round begins with all.
"""

import math
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, Self

import torch.distributed as dist
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]  # in the docs, not in __all__

from cloudckpt.dcp.ranks.group_store import connected, store_of
from cloudckpt.errors import BarrierTimeoutError, RanksLostError, UsageError

_FIRST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.25
"""Between two looks: a thousand ranks then ask 4,000 times a second, of a store that answers about 40,000."""

_SCAN_S = 5.0
"""For the rank that gave up first to write down who had not come."""

_LEAVE_S = 30.0
"""For the others to let go of a store that this rank serves."""

_PASSED = "passed"


class Barrier(Protocol):
    """A place where ranks wait for each other, any number of times."""

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when all ranks have come.

        Args:
            timeout_s: how long to wait for the others; the barrier's own, if None.

        Raises:
            BarrierTimeoutError: on every rank, also on those that come later, if one of them waited in vain; names
                the ranks that had not come. The barrier can be used again: the next round waits for all ranks.
            RanksLostError: what holds the barrier cannot be reached. It is of no more use.
        """

    def close(self) -> None:
        """Lets go of the barrier; can be done twice."""


class _OverStore:
    """What the barriers have in common: they speak to a store alone, by calls that do not wait."""

    def __init__(
        self, store: Any, rank: int, world_size: int, timeout_s: float, name: str, *, is_server: bool = False
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank={rank} is none of the {world_size} that meet at a barrier")
        self._timeout_s = _checked(timeout_s)
        self._rank, self._size, self._name = rank, world_size, name
        self._store, self._is_server = store, is_server
        self._round = self._kept_from = 0
        self._lock = threading.Lock()
        made = self._ask("add", f"cloudckpt/{name}/made/{rank}", 1)
        self._prefix = f"cloudckpt/{name}/{made}"
        self._ask("set", self._key("who", rank), f"{self._called(rank)} on {socket.gethostname()}")

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when all ranks have come; see `Barrier`.

        Raises:
            UsageError: another thread of this rank waits here.
        """
        within = self._timeout_s if timeout_s is None else _checked(timeout_s)
        if not self._lock.acquire(blocking=False):
            raise UsageError(f"two threads of {self._called(self._rank)} wait at barrier {self._name!r}")
        try:
            mine, self._round = self._round, self._round + 1
            if self._verdict(mine, within) != _PASSED:
                raise BarrierTimeoutError(self._who_was_missing(mine, within))
        finally:
            self._lock.release()

    def close(self) -> None:
        """Lets go of the store; can be done twice. The rank that serves it first waits up to 30 s for the others."""
        store, self._store = self._store, None
        if store is None:
            return
        key = f"{self._prefix}/closed"
        with suppress(RuntimeError):  # the store may be gone: so be it
            store.add(key, 1)
            until = time.monotonic() + _LEAVE_S
            while self._is_server and store.add(key, 0) < self._size and time.monotonic() < until:
                time.sleep(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _verdict(self, mine: int, within: float) -> str:
        """How the round ends; this rank decides it if it is the last to come, or the first to give up."""
        until = time.monotonic() + within
        verdict = self._find(self._key(mine, "verdict"))
        if verdict is None:
            self._ask("set", self._key("came", self._rank), str(mine))
            if self._ask("add", self._key(mine, "count"), 1) == self._size:
                verdict = self._decide(mine, _PASSED)
                self._forget_rounds_before(mine)
        pause = _FIRST_PAUSE_S
        while verdict is None:
            left = until - time.monotonic()
            if left <= 0:
                verdict = self._decide(mine, f"given up by {self._rank}")
                break
            time.sleep(min(pause, left))
            pause = min(pause * 1.2, _LONGEST_PAUSE_S)
            verdict = self._find(self._key(mine, "verdict"))
        if verdict == _PASSED:
            self._kept_from = mine
        return verdict

    def _decide(self, mine: int, verdict: str) -> str:
        """The verdict that stands: the first."""
        stands: bytes = self._ask("compare_set", self._key(mine, "verdict"), "", verdict)
        if stands.decode() == verdict and verdict != _PASSED:
            self._give_up(mine)
        return stands.decode()

    def _give_up(self, mine: int) -> None:
        """Writes down who has not come: one rank does, for all."""
        came = (self._find(self._key("came", rank)) for rank in range(self._size))
        missing = [rank for rank, last in enumerate(came) if last is None or int(last) < mine]
        names = [self._find(self._key("who", rank)) or self._called(rank) for rank in missing]
        said = f"{', '.join(names)} did not come" if names else "some ranks came too late"
        self._ask("set", self._key(mine, "missing"), said)

    def _who_was_missing(self, mine: int, within: float) -> str:
        until = time.monotonic() + _SCAN_S
        while (said := self._find(self._key(mine, "missing"))) is None and time.monotonic() < until:
            time.sleep(0.01)
        said = said or "some ranks did not come (the rank that knew which was lost)"
        return (
            f"barrier {self._name!r} of {self._size} ranks was given up, timed out (here {within:g} s): {said}. "
            "No rank passed it. It can be used again: the next round waits for all ranks"
        )

    def _forget_rounds_before(self, mine: int) -> None:
        """All ranks have come to this round, so that none asks for an earlier one."""
        for earlier in range(self._kept_from, mine):
            for what in ("count", "verdict", "missing"):
                self._ask("delete_key", self._key(earlier, what))

    def _key(self, *parts: object) -> str:
        return "/".join([self._prefix, *map(str, parts)])

    def _find(self, key: str) -> str | None:
        if not self._ask("check", [key]):
            return None
        found: bytes = self._ask("get", key)
        return found.decode()

    def _ask(self, method: str, *args: object) -> Any:
        if self._store is None:
            raise UsageError(f"barrier {self._name!r} is closed")
        try:
            return getattr(self._store, method)(*args)
        except RuntimeError as e:
            raise RanksLostError(f"the store of barrier {self._name!r} does not answer: {e}") from e

    def _called(self, rank: int) -> str:
        return f"rank {rank}"


class StoreBarrier(_OverStore):
    """A barrier over a store of torch.distributed: a `TCPStore`, or any other that can compare and set.

    It has a connection of its own to the store, so that a background thread may wait here while training uses its
    process groups and their store. A rank that was killed is like one that does not come. One thread of a rank waits
    at a time.
    """

    def __init__(
        self, store: Store, *, rank: int, world_size: int, timeout_s: float = 600, name: str = "barrier"
    ) -> None:
        """Writes into the store that this rank is there. Every rank makes its own, and several in the same order.

        Args:
            store: one that all ranks reach. Where it outlives the ranks, the next ones need another ``name``.
            rank: this rank, among those that meet here.
            world_size: how many meet here.
            timeout_s: how long `wait` waits, unless it is told otherwise.
            name: for messages, and a prefix of the keys.

        Raises:
            UsageError: a timeout that is not above 0, or a rank that is none of them.
            RanksLostError: the store cannot be reached.
        """
        super().__init__(connected(store), rank, world_size, timeout_s, name)


class TcpBarrier(_OverStore):
    """A barrier over a `TCPStore` of its own, which rank 0 serves until it closes the barrier."""

    def __init__(
        self, host: str, port: int, *, rank: int, world_size: int, timeout_s: float = 600, name: str = "barrier"
    ) -> None:
        """Waits until rank 0 is there.

        Args:
            host: where rank 0 is to be reached.
            port: where it listens.
            rank: this rank, among those that meet here.
            world_size: how many meet here.
            timeout_s: how long `wait` waits, and how long the others wait here for rank 0 to listen.
            name: for messages, and a prefix of the keys.

        Raises:
            UsageError: a timeout that is not above 0, or a rank that is none of them.
            RanksLostError: rank 0 cannot be reached, or cannot listen.
        """
        within = timedelta(seconds=_checked(timeout_s))
        try:
            store = TCPStore(host, port, None, rank == 0, within, wait_for_workers=False)
        except RuntimeError as e:
            raise RanksLostError(f"the store of barrier {name!r} at {host}:{port} cannot be used: {e}") from e
        super().__init__(store, rank, world_size, timeout_s, name, is_server=rank == 0)


class GroupBarrier(_OverStore):
    """A barrier of the ranks of a process group, of any backend.

    It uses the group's store, on a connection of its own, and none of the group's connections. (torch's
    ``monitored_barrier`` names the missing on one rank only, as text, and when it times out it closes all connections
    of the gloo group, which is then of no use.)
    Without torch.distributed there is one rank, which passes.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, *, timeout_s: float = 600, name: str = "barrier"
    ) -> None:
        """Writes into the group's store that this rank is there. Every rank makes its own, several in the same order.

        Args:
            process_group: the default group, if None.
            timeout_s: how long `wait` waits, unless it is told otherwise.
            name: for messages, and a prefix of the keys.

        Raises:
            UsageError: a timeout that is not above 0, or this rank is not in the group.
            RanksLostError: the store cannot be reached.
        """
        if not (dist.is_available() and dist.is_initialized()):
            self._global = [0]
            super().__init__(HashStore(), 0, 1, timeout_s, name)
            return
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise UsageError(f"rank {dist.get_rank()} is not in the process group of barrier {name!r}")
        group: Any = process_group or dist.group.WORLD
        self._global = dist.get_process_group_ranks(group)
        super().__init__(store_of(group), rank, len(self._global), timeout_s, name)

    def _called(self, rank: int) -> str:
        return f"rank {self._global[rank]}"


def _checked(timeout_s: float) -> float:
    if not 0 < timeout_s < math.inf:
        raise UsageError(f"timeout_s={timeout_s} must be above 0 and finite")
    return timeout_s
