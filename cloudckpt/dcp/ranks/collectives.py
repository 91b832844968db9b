"""What all ranks of a group do together: share objects, and share failures.

Law: whatever one rank raises, all ranks raise, in step; no rank is left waiting. Every call is a turn or two, and in
a turn each rank speaks to the coordinator, which decides what all are told. The second turn of a call is for ranks
that cannot read what they were sent.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.dcp.ranks.failures import Failure, error_of
from cloudckpt.dcp.ranks.gloo_group import GlooGroup
from cloudckpt.dcp.ranks.info import RankInfo
from cloudckpt.dcp.ranks.star import CoordinatorLostError, Star
from cloudckpt.errors import CheckpointError, RanksLostError, UsageError

T = TypeVar("T")
R = TypeVar("R")


class _Said(msgspec.Struct, frozen=True):
    """What a rank says in a turn."""

    at: str
    """The call it is in: ranks that are in different calls are out of step."""
    blob: memoryview
    failure: Failure | None


class _Told(msgspec.Struct, frozen=True):
    """What it is told."""

    blobs: list[memoryview]
    failures: list[Failure]


@dataclass(frozen=True)
class _Attempt(Generic[T]):
    """What came of something that could fail."""

    value: T | None = None
    blob: bytes = b""
    failure: Failure | None = None
    error: BaseException | None = None


class Collectives:
    """Object collectives of the ranks of a process group, or of one process.

    The forms that take a function (`broadcast`, `all_gather`, `all_reduce`, `reduce_scatter`) run it and share what
    it returns. If it raises on any rank, all ranks raise the same error: its message names every rank that failed,
    with its host, the tracebacks are its notes, and it survives pickle. Its class is the nearest class in
    `cloudckpt.errors` that all failures are of, else `RanksFailedError`. A rank's own exception is its ``__cause__``.
    What is no `Exception` (KeyboardInterrupt, SystemExit) reaches the others so, and goes on unchanged on its rank.

    A rank that is killed, or does not come within the group's timeout, is named in a `RanksLostError` on all others:
    at once if it was killed, else within twice the timeout and a few seconds. From then on every call raises it.

    Each rank calls the same forms in the same order, from one thread at a time; ranks at different calls get a
    `UsageError`. Two threads need two groups: gloo mixes up what they send. Objects go as pickles, from rank to rank.
    After an error other than `RanksLostError` the ranks are in step, and the next call works.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | GlooGroup | None = None,
        *,
        use_dist: bool = True,
        coordinator: int = 0,
    ) -> None:
        """Talks to no other rank; but all ranks of a group make theirs in the same order, as they do groups.

        Args:
            process_group: a group with gloo for CPU tensors, for as long as this is used; the default group, if None.
            use_dist: False for one process alone, whatever there is of torch.distributed. One process is also what
                it is where torch.distributed is not initialized.
            coordinator: the rank that computes `broadcast` and reduces; a rank within the group.

        Raises:
            UsageError: the group has no gloo, this rank is not in it, or it has no such coordinator.
        """
        self.info = RankInfo.read()
        is_one_of_many = use_dist and dist.is_available() and dist.is_initialized()
        if is_one_of_many and not isinstance(process_group, GlooGroup):
            process_group = GlooGroup.of(process_group, self.info)
        self._star = (
            Star(process_group, coordinator, self.info) if use_dist and isinstance(process_group, GlooGroup) else None
        )
        self._coordinator = coordinator if self._star else 0
        if self._star is None and coordinator != 0:
            raise UsageError(
                f"coordinator={coordinator}, but there is one rank only: torch.distributed is not in use"
            )
        self._lost: str | None = None

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return self._star.rank if self._star else 0

    @property
    def world_size(self) -> int:
        """Of the group."""
        return self._star.size if self._star else 1

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank computes what is broadcast, and reduces."""
        return self.rank == self._coordinator

    def broadcast(self, name: str, fn: Callable[[], T]) -> T:
        """Runs ``fn`` on the coordinator; returns on all ranks what it returned.

        Args:
            name: what is done, for messages; the same on all ranks.
            fn: called on the coordinator only.
        """
        mine: _Attempt[T] = self._attempt(fn) if self.is_coordinator else _Attempt()
        blobs = self._turn("broadcast", name, mine, lambda _: [[mine.blob]])
        value: T
        (value,) = self._read("broadcast", name, blobs, {0: mine.value} if self.is_coordinator else {})
        return value

    def all_gather(self, name: str, fn: Callable[[], T]) -> list[T]:
        """Runs ``fn`` on all ranks; returns on all ranks what they returned, by rank."""
        mine = self._attempt(fn)
        blobs = self._turn("all_gather", name, mine, lambda blobs: [blobs])
        return self._read("all_gather", name, blobs, {self.rank: mine.value})

    def all_reduce(self, name: str, map_fn: Callable[[], T], reduce_fn: Callable[[list[T]], R]) -> R:
        """Runs ``map_fn`` on all ranks, then ``reduce_fn`` on the coordinator; returns its result on all ranks.

        Args:
            name: what is done, for messages; the same on all ranks.
            map_fn: called on all ranks.
            reduce_fn: called on the coordinator with what the ranks returned, by rank.
        """
        mine, own = self._attempt(map_fn), dict[int, Any]()

        def reduce(blobs: list[Any]) -> list[list[Any]]:
            own[0] = reduce_fn(self._loads(blobs, {self.rank: mine.value}))
            return [[self._dumps(own[0])]]

        blobs = self._turn("all_reduce", name, mine, reduce)
        result: R
        (result,) = self._read("all_reduce", name, blobs, own)
        return result

    def reduce_scatter(self, name: str, map_fn: Callable[[], T], reduce_fn: Callable[[list[T]], list[R]]) -> R:
        """Runs ``map_fn`` on all ranks, then ``reduce_fn`` on the coordinator; returns on each rank its own result.

        Args:
            name: what is done, for messages; the same on all ranks.
            map_fn: called on all ranks.
            reduce_fn: called on the coordinator with what the ranks returned, by rank; returns one result for each
                rank, by rank.
        """
        mine, own = self._attempt(map_fn), dict[int, Any]()

        def reduce(blobs: list[Any]) -> list[list[Any]]:
            results = reduce_fn(self._loads(blobs, {self.rank: mine.value}))
            if len(results) != self.world_size:
                raise UsageError(f"{len(results)} objects cannot be scattered to {self.world_size} ranks")
            own[0] = results[self.rank]
            return [[self._dumps(result)] for result in results]

        blobs = self._turn("reduce_scatter", name, mine, reduce)
        result: R
        (result,) = self._read("reduce_scatter", name, blobs, own)
        return result

    def broadcast_object(self, value: T | None = None) -> T:
        """The coordinator's object, on all ranks."""
        return self.broadcast("broadcast_object", lambda: value)  # type: ignore[return-value]  # theirs is not sent

    def all_gather_object(self, value: T) -> list[T]:
        """The objects of all ranks, by rank, on all ranks."""
        return self.all_gather("all_gather_object", lambda: value)

    def gather_object(self, value: T) -> list[T] | None:
        """The objects of all ranks, by rank, on the coordinator; None on the others."""
        mine, own = self._attempt(lambda: value), list[T]()

        def gather(blobs: list[Any]) -> list[list[Any]]:
            own.extend(self._loads(blobs, {self.rank: value}))
            return [[]]

        self._turn("gather_object", "gather_object", mine, gather)
        return own if self.is_coordinator else None

    def scatter_object(self, values: list[T] | None = None) -> T:
        """Its own object for each rank, of those that the coordinator gives, by rank; what others give is ignored."""
        return self.reduce_scatter("scatter_object", lambda: None, lambda _: values if values is not None else [])

    def barrier(self) -> None:
        """Returns when all ranks have come."""
        self._turn("barrier", "barrier", _Attempt(), lambda _: [[]])

    def _read(self, form: str, name: str, blobs: list[Any] | None, own: dict[int, Any]) -> list[Any]:
        """What this rank was told, as objects, if all ranks could read theirs."""

        def read() -> list[Any]:
            if blobs is None:
                raise ConnectionError("what the coordinator sent broke off on its way")
            return self._loads(blobs, own)

        mine = self._attempt(read, is_sent=False)
        self._turn(f"{form} (read)", name, mine, lambda _: [[]])
        return mine.value or []

    def _turn(
        self, form: str, name: str, mine: _Attempt[Any], decide: Callable[[list[Any]], list[list[Any]]]
    ) -> list[Any] | None:
        """All say what came of their attempt; the coordinator decides what all are told, or each, by rank.

        Returns:
            What this rank was told; None if it broke off on its way.

        Raises:
            CheckpointError: for what failed on any rank, the coordinator's deciding included.
        """
        if self._lost:
            raise RanksLostError(
                f"{name} was not tried on {self.info}: {self._lost}. Start the job again, or make a new process group"
            )
        said = _Said(f"{form} {name!r}", memoryview(mine.blob), mine.failure)
        error = mine.error
        try:
            if self.is_coordinator:
                decided = self._lead(said, decide)
                told, error = decided.value, decided.error or error
            else:
                told = self._follow(said)
        except BaseException as e:
            self._lost = f"an earlier call was broken off on this rank by {type(e).__name__}"
            raise
        if told is None:
            return None
        if told.failures:
            raise self._shared(name, told.failures, error)
        return told.blobs

    def _lead(self, said: _Said, decide: Callable[[list[Any]], list[list[Any]]]) -> _Attempt[_Told]:
        """The coordinator's side of a turn."""
        if self._star is None:
            heard = [said]
            failures = [said.failure] if said.failure else []
        else:
            messages = self._star.hear(_encode(said))
            heard = [msgspec.msgpack.decode(m, type=_Said) for m in messages if m is not None]
            failures = self._failures(messages)
        mine: _Attempt[list[list[Any]]] = _Attempt()
        if not failures:
            mine = self._attempt(lambda: decide([each.blob for each in heard]), is_sent=False)
            failures += [mine.failure] if mine.failure else []
        replies = [_Told(blobs, []) for blobs in mine.value or ()]
        if failures:
            replies = [_Told([], failures)]
        if self._star is not None:
            texts = [_encode(reply) for reply in replies]
            self._star.tell(texts if len(texts) > 1 else texts * self.world_size, may_spread=not failures)
        return _Attempt(value=replies[self.rank if len(replies) > 1 else 0], error=mine.error)

    def _follow(self, said: _Said) -> _Told | None:
        """The other ranks' side of a turn."""
        assert self._star is not None  # noqa: S101 - one rank alone is its own coordinator
        try:
            reply = self._star.ask(_encode(said))
        except CoordinatorLostError as e:
            return _Told(
                [], [Failure.lost(self._star.coordinator(), "is the coordinator, and does not answer", str(e))]
            )
        return None if reply is None else msgspec.msgpack.decode(reply, type=_Told)

    def _failures(self, messages: list[memoryview | None]) -> list[Failure]:
        """What failed on ranks, which ranks are lost, and which are out of step with the coordinator."""
        assert self._star is not None  # noqa: S101 - see _lead
        found = []
        heard = [None if m is None else msgspec.msgpack.decode(m, type=_Said) for m in messages]
        mine = heard[self.rank]
        for rank, said in enumerate(heard):
            if rank in self._star.lost:
                found.append(Failure.lost(self._star.who(rank), "does not answer", self._star.lost[rank]))
            elif said is not None and said.failure:
                found.append(said.failure)
            elif said is not None and mine is not None and said.at != mine.at:
                error = UsageError(f"is at {said.at}, and {self.info}, the coordinator, at {mine.at}: out of step")
                found.append(Failure.of(error, self._star.who(rank)))
        return found

    def _shared(self, name: str, failures: list[Failure], mine: BaseException | None) -> BaseException:
        """What to raise: the error that all ranks share, or this rank's own exception that is no Exception."""
        if self._star is None and isinstance(mine, CheckpointError):
            return mine  # there is nobody to tell it to
        error = error_of(name, failures)
        if isinstance(error, RanksLostError):
            self._lost = str(error)
        if mine is not None and not isinstance(mine, Exception | CheckpointException):
            return mine
        error.__cause__ = mine
        return error

    def _attempt(self, fn: Callable[[], T], *, is_sent: bool = True) -> _Attempt[T]:
        """Runs ``fn``, and keeps what it raises: this rank must speak to the others first."""
        try:
            value = fn()
            return _Attempt(value=value, blob=self._dumps(value) if is_sent else b"")
        except BaseException as e:
            return _Attempt(failure=Failure.of(e, self.info), error=e)

    def _dumps(self, value: object) -> bytes:
        return b"" if self._star is None else pickle.dumps(value, pickle.HIGHEST_PROTOCOL)

    def _loads(self, blobs: list[Any], own: dict[int, Any]) -> list[Any]:
        """The objects; its own as they are, so that one rank alone needs no pickle."""
        found = []
        for i, blob in enumerate(blobs):
            try:
                found.append(own[i] if i in own else pickle.loads(blob))  # noqa: S301 - from a rank of our own job
            except Exception as e:
                e.add_note(f"while reading object {i} of {len(blobs)} that ranks sent")
                raise
        return found


def _encode(message: _Said | _Told) -> bytearray:
    buffer = bytearray()
    msgspec.msgpack.Encoder().encode_into(message, buffer)
    return buffer
