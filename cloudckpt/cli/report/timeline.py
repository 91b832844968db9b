"""A save or a load as bars over time, a row for each kind of work of each rank.

Law: pure. However many requests there were and ranks there are, a timeline has a few thousand bars.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from msgspec import Struct

from cloudckpt.catalog.traces import Event, Trace
from cloudckpt.cli.report.words import cut
from cloudckpt.engine.tracing import Kind

PHASES = ("plan", "stage", "transform", "checksum", "upload", "commit", "fetch", "restore", "place")
"""In the order in which they happen; others come behind."""

MOST_RANKS = 16
"""That are shown: those that ended last, and the first."""

_MOST_BARS = 2000
_MOST_LANES = 16
_MOST_PHASES = 16


class Bar(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Work without a pause, or with pauses too short to see; times in seconds since the timeline's beginning."""

    start_s: float
    stop_s: float
    count: int = 1
    nbytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kind of work of one rank.

    Attributes:
        phase: what it is called.
        busy_s: in which any of it was going on.
        count: events.
        nbytes: that they moved, where they say.
        lanes: bars that do not overlap in a lane.
    """

    phase: str
    busy_s: float
    count: int
    nbytes: int
    lanes: tuple[tuple[Bar, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRows:
    """One rank's; ``nbytes`` as the rank says it, ``stop_s`` when its last work ended."""

    rank: int
    host: str
    nbytes: int
    stop_s: float
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A save or a load.

    Attributes:
        kind: ``save`` or ``load``.
        began: by the clock of the host that began first.
        span_s: until the last rank's last work ended.
        world_size: ranks that took part.
        left: ranks whose traces were found; fewer may be shown.
        error: the class of what it failed of, on any rank; empty if it did not fail.
        ranks: that are shown.
    """

    kind: Kind
    began: datetime
    span_s: float
    world_size: int
    left: int
    error: str
    ranks: tuple[RankRows, ...]


def timeline_of(traces: Sequence[Trace]) -> Timeline | None:
    """The timeline of the traces of one save, or of one load; None where they tell of no work."""
    events = {trace.other_data.rank: [e for e in trace.trace_events if e.ph == "X"] for trace in traces}
    everything = [event for found in events.values() for event in found]
    if not everything:
        return None
    began = min(event.ts for event in everything)
    stops = {rank: max((e.ts + e.dur for e in found), default=began) for rank, found in events.items()}
    shown = set(sorted(stops, key=lambda rank: -stops[rank])[:MOST_RANKS]) | {min(stops)}
    lanes = {rank: _lanes(found) for rank, found in events.items() if rank in shown}
    span = max(stops.values()) - began
    gap = _gap([lane for phases in lanes.values() for found in phases.values() for lane in found], span)
    return Timeline(
        kind=traces[0].other_data.kind,
        began=datetime.fromtimestamp(began / 1e6, UTC),
        span_s=span / 1e6,
        world_size=traces[0].other_data.world_size,
        left=len(traces),
        error=next((cut(trace.other_data.error) for trace in traces if trace.other_data.error), ""),
        ranks=tuple(
            RankRows(
                rank=trace.other_data.rank,
                host=cut(trace.other_data.host),
                nbytes=trace.other_data.nbytes,
                stop_s=(stops[trace.other_data.rank] - began) / 1e6,
                rows=tuple(_row(phase, found, began, gap) for phase, found in lanes[trace.other_data.rank].items()),
            )
            for trace in traces
            if trace.other_data.rank in shown
        ),
    )


_Lane = list[Event]


def _lanes(events: Iterable[Event]) -> dict[str, list[_Lane]]:
    """Events by phase, in lanes in which none overlaps another, but for the last lane."""
    phases: dict[str, list[_Lane]] = {}
    for event in sorted(events, key=lambda event: event.ts):
        phase = event.name if event.name in phases or len(phases) < _MOST_PHASES else "other"
        lanes = phases.setdefault(phase, [])
        free = next((lane for lane in lanes if lane[-1].ts + lane[-1].dur <= event.ts), None)
        if free is not None:
            free.append(event)
        elif len(lanes) < _MOST_LANES:
            lanes.append([event])
        else:
            lanes[-1].append(event)
    return dict(sorted(phases.items(), key=lambda item: _place_of(item[0])))


def _place_of(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def _gap(lanes: Sequence[_Lane], span: float) -> float:
    """The pause in microseconds up to which bars are made one, so that there are not too many."""
    gap = 0.0
    while sum(len(_merged(lane, gap)) for lane in lanes) > _MOST_BARS and gap < span:
        gap = max(gap * 2, span / 4000)
    return gap


def _merged(lane: _Lane, gap: float) -> list[list[Event]]:
    """Runs of events with no pause longer than ``gap`` between them; without one, each that does not overlap."""
    runs: list[list[Event]] = []
    stop = 0.0
    for event in lane:
        if runs and event.ts - stop < gap:
            runs[-1].append(event)
        else:
            runs.append([event])
        stop = max(stop, event.ts + event.dur)
    return runs


def _row(phase: str, lanes: Sequence[_Lane], began: float, gap: float) -> Row:
    events = sorted((event for lane in lanes for event in lane), key=lambda event: event.ts)
    return Row(
        phase=cut(phase, 40),
        busy_s=sum(_span(run) for run in _merged(events, 0.0)) / 1e6,
        count=len(events),
        nbytes=sum(event.nbytes for event in events),
        lanes=tuple(tuple(_bar(run, began) for run in _merged(lane, gap)) for lane in lanes),
    )


def _bar(run: Sequence[Event], began: float) -> Bar:
    start = (run[0].ts - began) / 1e6
    return Bar(
        start_s=round(start, 6),
        stop_s=round(start + _span(run) / 1e6, 6),
        count=len(run),
        nbytes=sum(event.nbytes for event in run),
    )


def _span(run: Sequence[Event]) -> float:
    return max(event.ts + event.dur for event in run) - run[0].ts
