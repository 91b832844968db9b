"""The traces that the ranks of a save or a load left: read, checked, and joined.

Law: sync; looks, and changes nothing. What one rank left tells nothing that another must believe.
"""

import asyncio
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from cloudckpt.engine.session import Session
from cloudckpt.engine.tracing import Kind, checkpoint_name
from cloudckpt.errors import ManifestError, ObjectNotFoundError
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, check_url

KINDS: tuple[Kind, ...] = ("save", "load")

_NAME = re.compile(r"(save|load)-(0|[1-9][0-9]{0,8})\.json")
_CONCURRENCY = 16
"""Traces that are read at a time."""

_Micros = Annotated[float, msgspec.Meta(ge=0)]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that took time, or a name for a rank (``ph`` is ``X`` or ``M``), as Chrome's trace format has it.

    Attributes:
        name: what was done, in the words of the design: ``stage``, ``upload``, ``fetch`` ...
        ts: when it began, in microseconds since the epoch, by its host's clock.
        dur: microseconds that it took.
        pid: the rank.
        tid: a lane: what is in one does not overlap.
        args: what else there is to say, such as ``nbytes``.
    """

    ph: str
    name: str
    cat: str = ""
    ts: _Micros = 0.0
    dur: _Micros = 0.0
    pid: int = 0
    tid: int = 0
    args: dict[str, Any] = {}  # msgspec makes a new one for each

    @property
    def nbytes(self) -> int:
        """Bytes that it moved, where it says."""
        found = self.args.get("nbytes")
        return found if isinstance(found, int) and found > 0 else 0


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Which rank of what left a trace.

    Attributes:
        kind: ``save`` or ``load``.
        url: of the checkpoint.
        save_id: of the save; empty where the rank did not know.
        nbytes: that the rank moved, plain.
        stored_nbytes: the same as stored.
        error: the class of what it failed of; empty if it did not fail.
    """

    kind: Kind
    url: str
    rank: Annotated[int, msgspec.Meta(ge=0)]
    world_size: Annotated[int, msgspec.Meta(ge=1)]
    save_id: str | None = ""
    host: str = ""
    nbytes: int = 0
    stored_nbytes: int = 0
    error: str = ""


class Trace(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What one rank left."""

    trace_events: tuple[Event, ...]
    other_data: Origin


_decoder = msgspec.json.Decoder(Trace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """What all ranks left.

    Attributes:
        found: of the last save and of the last load, in the order of their ranks.
        problems: what lies there and was left out, and why.
    """

    found: tuple[Trace, ...]
    problems: tuple[str, ...]

    def of(self, kind: Kind) -> tuple[Trace, ...]:
        """Those of saving, or those of loading."""
        return tuple(trace for trace in self.found if trace.other_data.kind == kind)


def read_traces(place: str, url: str, *, save_id: str | None = None, store: StoreOptions | None = None) -> Traces:
    """Reads what saves and loads of the checkpoint at ``url`` left at ``place``: one listing, one GET for each trace.

    Args:
        place: as `WriteOptions.trace` and `ReadOptions.trace` were told.
        url: of the checkpoint.
        save_id: of the save that is there now: traces of another are left out.
        store: how to reach the store.

    Raises:
        ObjectNotFoundError: there are none.
        StoreError: the store refused.
    """
    where = f"{check_url(place)}/{checkpoint_name(check_url(url))}"
    with Session(where, store or StoreOptions()) as session:
        objects = session.run(_read_all)
    if not objects:
        msg = (
            f"no traces lie at {where}: saves leave them with WriteOptions(trace={place!r}), "
            f"loads with ReadOptions(trace={place!r})"
        )
        raise ObjectNotFoundError(msg)
    found, problems = [], []
    for key, data in sorted(objects.items(), key=lambda item: _rank_of(item[0])):
        try:
            found.append(_parse(key, data))
        except ManifestError as e:
            problems.append(str(e))
    kept = [trace for kind in KINDS for trace in _of_one_run(kind, found, save_id, problems)]
    return Traces(found=tuple(kept), problems=tuple(problems))


def joined(traces: Iterable[Trace]) -> bytes:
    """One Chrome trace of many: each rank is a process, and its saving and its loading are two."""
    events = [event for trace in traces for event in _renumbered(trace)]
    return msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": events})


def _renumbered(trace: Trace) -> Iterator[Event | dict[str, object]]:
    origin = trace.other_data
    pid = 2 * origin.rank + KINDS.index(origin.kind)
    name = f"{origin.kind}: rank {origin.rank}" + (f" on {origin.host}" if origin.host else "")
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    for event in trace.trace_events:
        if event.ph == "M" and event.name == "thread_name":
            yield {"ph": "M", "name": event.name, "pid": pid, "tid": event.tid, "args": event.args}
        elif event.ph != "M":
            yield msgspec.structs.replace(event, pid=pid)


def _parse(key: str, data: bytes) -> Trace:
    try:
        trace = _decoder.decode(data)
    except (ValueError, RecursionError) as e:
        msg = f"{key} is no trace: {e}"
        raise ManifestError(msg) from e
    kind, rank = trace.other_data.kind, trace.other_data.rank
    if key != f"{kind}-{rank}.json":
        msg = f"{key} says it is of another rank: {kind}-{rank}"
        raise ManifestError(msg)
    return trace


def _of_one_run(kind: Kind, found: Sequence[Trace], save_id: str | None, problems: list[str]) -> list[Trace]:
    """Those that belong together: with the lowest rank's, which every run leaves anew."""
    origins = [trace.other_data for trace in found if trace.other_data.kind == kind]
    told = {origin.save_id for origin in origins if origin.save_id}
    if save_id and told and save_id not in told:
        problems.append(f"the traces of the {kind} are of another save of this name: {', '.join(sorted(told))}")
        return []
    kept = []
    for trace in found:
        origin = trace.other_data
        if origin.kind != kind:
            continue
        is_other = save_id and origin.save_id and origin.save_id != save_id
        if is_other or (origin.url, origin.world_size) != (origins[0].url, origins[0].world_size):
            problems.append(f"{kind}-{origin.rank}.json is of another {kind} of this name")
        else:
            kept.append(trace)
    return kept


def _rank_of(key: str) -> tuple[str, int]:
    kind, _, rank = key.removesuffix(".json").partition("-")
    return kind, int(rank)


async def _read_all(store: Store) -> dict[str, bytes]:
    keys = [found.key async for found in store.list_objects() if _NAME.fullmatch(found.key)]
    slots = asyncio.Semaphore(_CONCURRENCY)

    async def read(key: str) -> bytes:
        async with slots:
            return (await store.get(key)).data

    async with asyncio.TaskGroup() as group:
        tasks = {key: group.create_task(read(key)) for key in keys}
    return {key: task.result() for key, task in tasks.items()}
