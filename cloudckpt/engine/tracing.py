"""What one save or load does on a rank: counted always, kept event by event where a trace is wanted.

Law: pure, but for the clock. Whoever has a store puts the trace there.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar

import msgspec

from cloudckpt.progress import Report

T = TypeVar("T")
Kind = Literal["save", "load"]

PLAN: Final = "plan"
"""Deciding what lies where, or where what is wanted lies."""
STAGE: Final = "stage"
"""Bytes copied to where they can be sent from, where they have to be, and checksummed."""
TRANSFORM: Final = "transform"
"""The same, and what extensions make of them."""
CHECKSUM: Final = "checksum"
"""Of a part that was cut from transformed frames."""
UPLOAD: Final = "upload"
"""One request each, the beginning and the end of an upload in parts included."""
COMMIT: Final = "commit"
"""Making the manifest, and putting it."""
FETCH: Final = "fetch"
"""One ranged request each."""
RESTORE: Final = "restore"
"""Frames verified, taken through their extensions where they have any, and placed."""
PLACE: Final = "place"
"""What came to the byte: verified as far as frames came whole, and placed where it was not received in its place."""

_ORDER = (PLAN, STAGE, TRANSFORM, CHECKSUM, UPLOAD, COMMIT, FETCH, RESTORE, PLACE)


class Event(NamedTuple):
    """Something that was done.

    Attributes:
        what: one of the names above.
        began: seconds since the epoch.
        seconds: that it took.
        nbytes: that it was done to, stored bytes where both are known.
        key: of the object, or empty.
    """

    what: str
    began: float
    seconds: float
    nbytes: int
    key: str


@dataclass(frozen=True, slots=True)
class Tally:
    """All that was done of one kind.

    Attributes:
        count: how often.
        nbytes: in all.
        seconds: added up, also of what went on at the same time.
        began: when the first began, in seconds since the epoch.
        ended: when the last ended, likewise.
    """

    count: int
    nbytes: int
    seconds: float
    began: float
    ended: float

    @property
    def span_s(self) -> float:
        """Seconds from the first's beginning to the last's end."""
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was recorded in another process; see `Recorder`."""

    tallies: Mapping[str, Tally]
    events: Sequence[Event]
    retries: int


class _Counts:
    """A tally that grows."""

    __slots__ = ("began", "count", "ended", "nbytes", "seconds")

    def __init__(self) -> None:
        self.count = self.nbytes = 0
        self.seconds, self.began, self.ended = 0.0, float("inf"), 0.0

    def add(self, count: int, nbytes: int, seconds: float, began: float, ended: float) -> None:
        self.count += count
        self.nbytes += nbytes
        self.seconds += seconds
        self.began = min(self.began, began)
        self.ended = max(self.ended, ended)


class Recorder:
    """Takes down what a save or a load does, from any thread.

    Attributes:
        began: when this was made, in seconds since the epoch.
        keeps_events: whether each event is kept, and not only counted.
        report: told of bytes that are done, where somebody wants to know; by one thread at a time.
        retries: requests that were made again.
        context: whatever `engine.telemetry` is to find again.
    """

    def __init__(self, *, keeps_events: bool = False, context: object = None) -> None:
        """Begins now."""
        self.keeps_events = keeps_events
        self.report: Report | None = None
        self.retries = 0
        self.context = context
        self.began = time.time()
        self._epoch = self.began - time.perf_counter()
        self._lock = threading.Lock()
        self._counts: dict[str, _Counts] = {}
        self._events: list[Event] = []
        self._done = self._total = 0

    def step(self, what: str, nbytes: int = 0, key: str = "") -> "Step":
        """A context that takes down what is done in it, however it ends; see `Event`."""
        return Step(self, what, nbytes, key)

    def timed(self, what: str, nbytes: int, key: str, action: Callable[..., T], *args: Any) -> T:
        """Calls ``action`` in a `step`: for what runs in another thread, without the wait for it."""
        with Step(self, what, nbytes, key):
            return action(*args)

    def add(self, what: str, nbytes: int, key: str, began: float, ended: float) -> None:
        """Takes something down; the two times are of `time.perf_counter`."""
        seconds, began, ended = ended - began, self._epoch + began, self._epoch + ended
        with self._lock:
            self._of(what).add(1, nbytes, seconds, began, ended)
            if self.keeps_events:
                self._events.append(Event(what, began, seconds, nbytes, key))

    def tally(self, what: str) -> Tally:
        """All that was done of one kind so far."""
        with self._lock:
            return self._tally(what)

    def tallies(self) -> dict[str, Tally]:
        """All that was done so far, in the order of the names above."""
        with self._lock:
            return {what: self._tally(what) for what in _ORDER if what in self._counts}

    def events(self) -> list[Event]:
        """What was kept so far."""
        with self._lock:
            return list(self._events)

    def recorded(self) -> Recorded:
        """All of it, for another recorder to `absorb`."""
        return Recorded(self.tallies(), self.events(), self.retries)

    def absorb(self, recorded: Recorded) -> None:
        """Takes over what another recorder took down."""
        with self._lock:
            for what, tally in recorded.tallies.items():
                self._of(what).add(tally.count, tally.nbytes, tally.seconds, tally.began, tally.ended)
            if self.keeps_events:
                self._events += recorded.events
            self.retries += recorded.retries

    def expect(self, nbytes: int) -> None:
        """So many bytes more are to be done."""
        self._total += nbytes

    def advance(self, nbytes: int) -> None:
        """So many bytes more are done."""
        if self.report is not None and nbytes:
            self._done += nbytes
            self.report(self._done, self._total)

    def _of(self, what: str) -> _Counts:
        counts = self._counts.get(what)
        if counts is None:
            counts = self._counts[what] = _Counts()
        return counts

    def _tally(self, what: str) -> Tally:
        c = self._counts.get(what)
        return Tally(0, 0, 0.0, 0.0, 0.0) if c is None else Tally(c.count, c.nbytes, c.seconds, c.began, c.ended)


class Step:
    """See `Recorder.step`."""

    __slots__ = ("_began", "_key", "_nbytes", "_recorder", "_what")

    def __init__(self, recorder: Recorder, what: str, nbytes: int, key: str) -> None:
        """Made by `Recorder.step`."""
        self._recorder = recorder
        self._what = what
        self._nbytes = nbytes
        self._key = key

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._recorder.add(self._what, self._nbytes, self._key, self._began, time.perf_counter())


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a save or a load on one rank: all there is to tell of it beside what was recorded.

    Attributes:
        kind: which of the two.
        url: of the checkpoint.
        rank: in the whole job.
        world_size: ranks of the job.
        nbytes: of this rank, as the user knows them.
        stored_nbytes: that it uploaded or fetched.
        save_id: of the checkpoint, where this rank knows it.
        error: the class of what it failed of; empty if it did not fail.
    """

    kind: Kind
    url: str
    rank: int = 0
    world_size: int = 1
    nbytes: int = 0
    stored_nbytes: int = 0
    save_id: str = ""
    error: str = ""


def encode(outcome: Outcome, events: Iterable[Event], *, host: str, writer: str) -> bytes:
    """A trace as Chrome and Perfetto open it: the object form of the Trace Event Format.

    Each kind of event has lanes (``tid``) of its own, as many as went on at the same time.

    Args:
        outcome: what it is of.
        events: of this rank.
        host: of this rank.
        writer: names and versions what wrote it.
    """
    rank = outcome.rank
    shown: list[dict[str, object]] = [_named("process_name", rank, f"rank {rank} on {host}")]
    lanes = 0
    of_kind: dict[str, list[Event]] = {}
    for event in events:
        of_kind.setdefault(event.what, []).append(event)
    for what in (w for w in _ORDER if w in of_kind):
        placed = _in_lanes(of_kind[what])
        most = 1 + max(lane for lane, _ in placed)
        shown += (_named("thread_name", rank, f"{what} {lane + 1}", tid=lanes + lane) for lane in range(most))
        shown += (_spelled(event, rank, lanes + lane) for lane, event in placed)
        lanes += most
    other = {
        "kind": outcome.kind,
        "url": outcome.url,
        **({"save_id": outcome.save_id} if outcome.save_id else {}),
        **({"error": outcome.error} if outcome.error else {}),
        "rank": rank,
        "world_size": outcome.world_size,
        "host": host,
        "nbytes": outcome.nbytes,
        "stored_nbytes": outcome.stored_nbytes,
        "writer": writer,
    }
    return msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": shown, "otherData": other})


def trace_key(outcome: Outcome) -> str:
    """Where a trace lies, below the place for all of them."""
    return f"{checkpoint_name(outcome.url)}/{outcome.kind}-{outcome.rank}.json"


def checkpoint_name(url: str) -> str:
    """What traces call a checkpoint: the last segment of its URL."""
    return url.rstrip("/").rpartition("/")[2]


def _in_lanes(events: Iterable[Event]) -> list[tuple[int, Event]]:
    """Puts each event in the lowest lane that is free when it begins."""
    placed: list[tuple[int, Event]] = []
    busy: list[tuple[int, int]] = []
    free: list[int] = []
    lanes = 0
    for event in sorted(events, key=lambda e: e.began):
        while busy and busy[0][0] <= _micros(event.began):
            heappush(free, heappop(busy)[1])
        if free:
            lane = heappop(free)
        else:
            lane, lanes = lanes, lanes + 1
        heappush(busy, (_end(event), lane))
        placed.append((lane, event))
    return placed


def _spelled(event: Event, rank: int, lane: int) -> dict[str, object]:
    began = _micros(event.began)
    args = {"nbytes": event.nbytes, **({"key": event.key} if event.key else {})}
    return {
        "ph": "X",
        "name": event.what,
        "cat": event.what,
        "ts": began,
        "dur": _end(event) - began,
        "pid": rank,
        "tid": lane,
        "args": args,
    }


def _named(what: str, rank: int, name: str, **more: int) -> dict[str, object]:
    return {"ph": "M", "name": what, "pid": rank, **more, "args": {"name": name}}


def _micros(seconds: float) -> int:
    return round(seconds * 1e6)


def _end(event: Event) -> int:
    return _micros(event.began + event.seconds)
