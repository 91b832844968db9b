"""How the ranks of a gloo group talk: each with the coordinator, and the coordinator with each.

Law: knows bytes, not what they say. Each pair of ranks talks on a connection of its own, so that a rank that is
killed breaks its own connection and no other: the coordinator learns which, and tells the rest. Where a connection is
gone (gloo closes all of a rank's when it waits too long for one), the group's store carries the coordinator's last
words. docs/design says what was measured.
"""

import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import msgspec
import numpy as np
import torch

from cloudckpt.dcp.ranks.gloo_group import GlooGroup
from cloudckpt.dcp.ranks.info import RankInfo
from cloudckpt.errors import RanksLostError, UsageError

_TAG = 0x636B
"""Of our messages; a user's own ``dist.send`` has tag 0."""

_SPREAD_FROM = 1 << 20
"""Bytes from which one message for all goes down gloo's tree instead of from the coordinator to each."""

_ROLL_CALL_S = 1.5
"""For ranks whose connection is gone to say that they are alive."""

_LAST_WORDS_S = 3.0
"""For the coordinator to hold its roll call and say what it came to."""

_PAUSE_S = 0.05
"""Between two looks at the store."""


class CoordinatorLostError(Exception):
    """The coordinator cannot be reached, and left no words."""


class Star:
    """The wire of one rank. Every rank makes its own, and calls in the same order as the others.

    Attributes:
        rank, size: within the group.
        lost: why ranks that the last `hear` did not hear cannot be reached, by rank within the group. Those that say
            in the store that they are alive were cut off only because another hung, and are not among them.
    """

    def __init__(self, group: GlooGroup, coordinator: int, me: RankInfo) -> None:
        """Says who this rank is in the group's store, and talks to no other rank.

        Args:
            group: of the ranks.
            coordinator: a rank within the group.
            me: who this rank is.

        Raises:
            UsageError: it has no such coordinator.
            RanksLostError: the group's store cannot be reached.
        """
        self.rank, self.size = group.rank, group.size
        if not 0 <= coordinator < self.size:
            raise UsageError(f"coordinator={coordinator} is no rank of a group of {self.size}")
        self._group = group
        self._coordinator = coordinator
        self._me = me
        self._timeout_s = group.timeout_s
        self._board = _Board(group.store, self.rank, me)
        self._turn = 0
        self._needs_words = False
        self.lost: dict[int, str] = {}

    def hear(self, message: bytearray) -> list[memoryview | None]:
        """The coordinator's turn to listen: a message of each rank, its own among them; None of those lost."""
        self._turn += 1
        until = time.monotonic() + self._timeout_s
        heard: list[memoryview | None] = [None] * self.size
        heard[self.rank] = memoryview(message)
        silent: dict[int, str] = {}
        heads: dict[int, Any] = {}
        bodies: dict[int, Any] = {}
        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            self._begin(silent, rank, heads, 2, torch.int64)
        for rank in list(heads):
            if self._end(silent, rank, heads, until):
                self._begin(silent, rank, bodies, int(heads[rank][0][0]), torch.uint8)
        for rank in list(bodies):
            if self._end(silent, rank, bodies, until):
                heard[rank] = bodies[rank][0].numpy().data
        alive = self._board.call_the_roll(self._turn, list(silent))
        self.lost = {rank: why for rank, why in silent.items() if rank not in alive} or silent
        self._needs_words = bool(silent)
        return heard

    def tell(self, replies: list[bytearray], *, may_spread: bool) -> None:
        """The coordinator's turn to speak. A rank that cannot be told is passed over: the next `hear` will miss it.

        Args:
            replies: for each rank; the same object for all, where it is the same.
            may_spread: another turn follows, in which ranks can say that a long reply broke off.
        """
        if self._needs_words:
            self._board.leave_words(self._turn, replies[0])
        others = [rank for rank in range(self.size) if rank != self.rank and rank not in self.lost]
        is_same = all(reply is replies[0] for reply in replies)
        is_spread = (
            may_spread and is_same and not self._needs_words and len(replies[0]) >= _SPREAD_FROM and self.size > 2
        )
        works, kept = [], []
        for rank in others:
            head = torch.tensor([len(replies[rank]), is_spread], dtype=torch.int64, device="cpu")
            sent = [head] if is_spread else [head, _tensor_over(replies[rank])]
            kept.append(sent)
            works.append([self._send(rank, tensor) for tensor in sent])
        for work in (work for of_rank in works for work in of_rank if work is not None):
            _try_wait(work, self._timeout_s)
        if is_spread:
            self._spread(_tensor_over(replies[0]))

    def ask(self, message: bytearray) -> memoryview | None:
        """A rank's turn: speaks to the coordinator, and waits for its reply.

        It waits twice the group's timeout: that long may pass until the coordinator has come and given up on another.

        Returns:
            The reply; None where a long one broke off on its way.

        Raises:
            CoordinatorLostError: no reply came.
        """
        self._turn += 1
        try:
            head = torch.tensor([len(message), 0], dtype=torch.int64, device="cpu")
            for tensor in (head, _tensor_over(message)):
                _wait(self._group.send(self._coordinator, tensor, _TAG), self._timeout_s)
            size, is_spread = (int(n) for n in self._receive(torch.empty(2, dtype=torch.int64, device="cpu")))
            body = torch.empty(size, dtype=torch.uint8, device="cpu")
            if is_spread:
                return body.numpy().data if self._spread(body) else None
            return self._receive(body).numpy().data
        except RuntimeError as e:
            words = self._board.last_words(self._turn)
            if words is None:
                raise CoordinatorLostError(str(e)) from e
            return memoryview(words)

    def who(self, rank: int) -> RankInfo:
        """Who a rank within the group is, as far as it has said so."""
        return self._board.who(rank) or RankInfo(
            rank=self._group.ranks[rank],
            world_size=self._me.world_size,
            local_rank=None,
            host="an unknown host",
            pid=0,
        )

    def coordinator(self) -> RankInfo:
        """Who the coordinator is."""
        return self.who(self._coordinator)

    def _spread(self, tensor: torch.Tensor) -> bool:
        """One message to all; whether it went well. Who broke it shows in the next turn."""
        try:
            self._group.broadcast(tensor, self._coordinator)
        except RuntimeError:
            return False
        return True

    def _receive(self, tensor: torch.Tensor) -> torch.Tensor:
        _wait(self._group.receive(self._coordinator, tensor, _TAG), 2 * self._timeout_s)
        return tensor

    def _send(self, rank: int, tensor: torch.Tensor) -> Any:
        try:
            return self._group.send(rank, tensor, _TAG)
        except RuntimeError:
            return None

    def _begin(self, silent: dict[int, str], rank: int, to: dict[int, Any], size: int, dtype: torch.dtype) -> None:
        """Begins to receive from a rank."""
        tensor = torch.empty(size, dtype=dtype, device="cpu")
        try:
            to[rank] = tensor, self._group.receive(rank, tensor, _TAG)
        except RuntimeError as e:
            silent[rank] = str(e)

    def _end(self, silent: dict[int, str], rank: int, begun: dict[int, Any], until: float) -> bool:
        """Waits for a rank; whether its message came."""
        try:
            _wait(begun[rank][1], until - time.monotonic())
        except RuntimeError as e:
            silent[rank] = str(e)
            return False
        return True


class _Board:
    """The group's store, as a board that ranks pin notes to."""

    def __init__(self, store: Any, rank: int, me: RankInfo) -> None:
        self._rank = rank
        self._store = store
        try:
            made = store.add(f"cloudckpt/made/{rank}", 1)  # all ranks make theirs in the same order
        except RuntimeError as e:
            raise RanksLostError(f"the store of the process group does not answer {me}: {e}") from e
        self._prefix = f"cloudckpt/{made}"
        self._pin(f"who/{rank}", msgspec.json.encode(me))

    def who(self, rank: int) -> RankInfo | None:
        found = self._find(f"who/{rank}")
        return None if found is None else msgspec.json.decode(found, type=RankInfo)

    def call_the_roll(self, turn: int, ranks: list[int]) -> set[int]:
        """Which of the ranks are alive; waits for those that do not say so."""
        until = time.monotonic() + _ROLL_CALL_S
        alive: set[int] = set()
        while len(alive) < len(ranks) and time.monotonic() < until:
            alive |= {rank for rank in ranks if rank not in alive and self._find(f"{turn}/alive/{rank}") is not None}
            time.sleep(_PAUSE_S)
        return alive

    def leave_words(self, turn: int, words: bytearray) -> None:
        self._pin(f"{turn}/words", bytes(words))

    def last_words(self, turn: int) -> bytes | None:
        """What the coordinator left for those that it cannot reach; this rank says that it is one, and alive."""
        self._pin(f"{turn}/alive/{self._rank}", b"1")
        until = time.monotonic() + _LAST_WORDS_S
        while (words := self._find(f"{turn}/words")) is None and time.monotonic() < until:
            time.sleep(_PAUSE_S)
        return words

    def _pin(self, key: str, value: bytes) -> None:
        with suppress(RuntimeError):  # a store that is gone tells nobody; the error that is raised then says less
            self._store.set(f"{self._prefix}/{key}", value)

    def _find(self, key: str) -> bytes | None:
        name = f"{self._prefix}/{key}"
        with suppress(RuntimeError):
            if self._store.check([name]):
                found: bytes = self._store.get(name)
                return found
        return None


def _tensor_over(message: bytearray) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(message, np.uint8))


def _wait(work: Any, timeout_s: float) -> None:
    work.wait(timedelta(seconds=max(timeout_s, 0.001)))  # zero means the group's timeout


def _try_wait(work: Any, timeout_s: float) -> None:
    try:
        _wait(work, timeout_s)
    except RuntimeError:
        return
