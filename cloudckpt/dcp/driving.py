"""A save by all ranks, step by step, and a load: what `torch.distributed.checkpoint.save` and ``load`` do.

Law: every step is a collective, so that a failure of one rank is a failure of all; errors are ours, and Exceptions.
What was planned once is not planned again for the same structure.
"""

import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from cloudckpt.dcp.border import border
from cloudckpt.dcp.hooks import CommitInfo
from cloudckpt.dcp.ranks import Collectives
from cloudckpt.dcp.reader import ObjectStoreReader
from cloudckpt.dcp.state.per_rank import attach, look
from cloudckpt.dcp.state.stateful import Destination
from cloudckpt.dcp.writer import ObjectStoreWriter
from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.engine.tracing import PLAN, Recorder
from cloudckpt.errors import (
    CheckpointError,
    IntegrityError,
    LoadFailedError,
    ManifestError,
    MissingKeyError,
    ObjectNotFoundError,
    RanksLostError,
    SaveFailedError,
    ShapeMismatchError,
    UnsupportedVersionError,
)

T = TypeVar("T")
_MOST_NAMED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A save that committed; the same on all ranks but for ``upload_s``.

    Attributes:
        info: of the checkpoint.
        hook_failures: of hooks after the commit, in words.
        is_replanned: whether its structure was planned, and not that of the save before.
        coordination_s: seconds from beginning to end on this rank, without those of the slowest upload.
        upload_s: seconds that this rank uploaded.
    """

    info: CommitInfo
    hook_failures: tuple[str, ...]
    is_replanned: bool
    coordination_s: float
    upload_s: float


@dataclass(frozen=True, slots=True)
class _Planned:
    """What came of planning a structure.

    Attributes:
        structure: of this rank's state dict.
        plan: this rank's, of the global one.
        metadata: the coordinator's; None on other ranks.
    """

    structure: tuple[object, ...]
    plan: SavePlan
    metadata: Metadata | None


class SaveDriver:
    """Saves state dicts one after the other; every rank of the group makes one, and calls the same.

    From the second save of a structure on (keys, types, shapes, dtypes, placements, on every rank), plans are neither
    made nor sent.
    """

    def __init__(self, collectives: Collectives) -> None:
        """Speaks to the other ranks over ``collectives``, and to no one else."""
        self._collectives = collectives
        self._planned: _Planned | None = None

    def save(
        self,
        state: Callable[[], dict[str, Any]],
        writer: ObjectStoreWriter,
        cancellation: Cancellation,
        recorder: Recorder,
        label: str,
    ) -> Done:
        """Saves, and returns when the checkpoint is committed.

        What ranks uploaded for a save that fails before its commit is deleted, on the ranks that are still there.

        Args:
            state: gives the state dict of this rank, for DCP; what it raises fails the save on all ranks.
            writer: with its URL.
            cancellation: stops it until the commit is tried.
            recorder: of the save.
            label: tells this save from all others, the same on all ranks: ranks at different ones are out of step.

        Raises:
            ShapeMismatchError: two ranks hold one key with different shapes or dtypes; nothing was written.
            CheckpointError: whatever failed, on whichever rank; see `Collectives`. Nothing was committed, but for a
                CommitUnknownError or a RanksLostError, after which it may have been.
        """
        began, ranks, planner = time.monotonic(), self._collectives, DefaultSavePlanner()

        structures: list[tuple[object, ...]] = []

        def set_up() -> bool:
            with border(SaveFailedError, "setting up the save"):
                planner.set_up_planner(state(), writer.storage_meta(), ranks.is_coordinator)
                writer.set_up_storage_writer(ranks.is_coordinator, cancellation=cancellation, recorder=recorder)
                structures.append(_structure(planner))
                return self._planned is not None and self._planned.structure == structures[0]

        is_known = ranks.all_reduce(f"setting up the save of {label}", set_up, all)
        if not is_known:
            with recorder.step(PLAN):
                self._plan(planner, writer, label, structures[0])
        planned = self._planned
        assert planned is not None  # noqa: S101 - planned before, or just now
        upload_s, slowest_s = self._upload(planned, planner, writer, label)

        def commit() -> tuple[CommitInfo, tuple[str, ...]]:
            committed = writer.commit()
            return committed.info, tuple(map(str, committed.hook_failures))

        info, failures = ranks.broadcast(f"the commit of {label}", commit)
        return Done(
            info=info,
            hook_failures=failures,
            is_replanned=not is_known,
            coordination_s=time.monotonic() - began - slowest_s,
            upload_s=upload_s,
        )

    def _upload(
        self, planned: _Planned, planner: DefaultSavePlanner, writer: ObjectStoreWriter, label: str
    ) -> tuple[float, float]:
        """Uploads, and prepares the commit: when this returns nothing but the manifest is missing.

        Returns:
            Seconds that it took, on this rank and on the slowest.
        """
        took: list[float] = []

        def write() -> tuple[float, list[WriteResult]]:
            began = time.monotonic()
            planner.finish_plan(planned.plan)
            results = writer.write_data(planned.plan, planner).wait()
            took.append(time.monotonic() - began)
            return took[0], results

        def prepare(found: list[tuple[float, list[WriteResult]]]) -> float:
            assert planned.metadata is not None  # noqa: S101 - only the coordinator reduces
            writer.prepare_commit(planned.metadata, [results for _, results in found])
            return max(seconds for seconds, _ in found)

        try:
            slowest = self._collectives.all_reduce(f"the upload of {label}", write, prepare)
        except RanksLostError as e:  # the coordinator may be alive, and commit
            writer.fail(e)
            raise
        except CheckpointError as e:
            writer.fail(e)
            writer.discard()
            raise
        return took[0], slowest

    def _plan(
        self, planner: DefaultSavePlanner, writer: ObjectStoreWriter, label: str, structure: tuple[object, ...]
    ) -> None:
        made: list[Metadata] = []

        def of_rank() -> SavePlan:
            with border(SaveFailedError, "planning the save"):
                return writer.prepare_local_plan(planner.create_local_plan())

        def of_all(plans: list[SavePlan]) -> list[SavePlan]:
            with border(SaveFailedError, "planning the save"):
                _refuse_differences(plans)
                plans, metadata = planner.create_global_plan(plans)
                made.append(metadata)
                return writer.prepare_global_plan(plans)

        self._planned = None
        plan = self._collectives.reduce_scatter(f"planning the save of {label}", of_rank, of_all)
        self._planned = _Planned(structure, plan, made[0] if made else None)


def load(
    state_dict: MutableMapping[str, Any],
    reader: ObjectStoreReader,
    collectives: Collectives,
    *,
    per_rank: MutableMapping[str, Any] | None = None,
    missing: Literal["error", "none"] = "error",
    options: StateDictOptions | None = None,
) -> tuple[int, ...]:
    """Loads in place, on all ranks; one of them reads the manifest.

    Objects are given their states when all ranks have read all of theirs.

    Args:
        state_dict: of this rank; ranks may ask for different keys.
        reader: with its URL.
        collectives: of the ranks that load.
        per_rank: what this rank holds for itself; see `state.per_rank`.
        missing: what a rank is to get for which nothing was saved: an error, or nothing.
        options: as at the save.

    Returns:
        Ranks that saved something for themselves which no rank of this job loads.

    Raises:
        IntegrityError: the checkpoint is damaged, or some of it is gone. As after the others, what was being loaded
            into is undefined on all ranks.
        CheckpointError: whatever failed, on whichever rank.
    """
    data = collectives.broadcast("reading the manifest", _damage_told(reader.fetch_manifest))
    planner = DefaultLoadPlanner()

    def look_at_it() -> tuple[Metadata, bool, tuple[int, ...]]:
        metadata = reader.read_metadata_from(data)
        if per_rank is None:
            return metadata, False, ()
        share = look(metadata, rank=collectives.rank, world_size=collectives.world_size, missing=missing)
        return metadata, share.is_there, share.left_out

    def read(metadata: Metadata, held: MutableMapping[str, Any] | None) -> Destination:
        destination = Destination(attach(state_dict, held, collectives.rank), metadata, options=options)
        reader.set_up_storage_reader(metadata, collectives.is_coordinator)
        planner.set_up_planner(destination.state_dict, metadata, collectives.is_coordinator)
        _refuse_missing(planner, metadata)
        _refuse_other_shapes(planner, metadata)
        plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
        reader.read_data(plan, planner).wait()
        return destination

    metadata, is_there, left_out = _on_all(collectives, "looking at the manifest", look_at_it)
    held = per_rank if is_there else None
    destination = _on_all(collectives, "the load", lambda: read(metadata, held))
    _on_all(collectives, "giving objects their states", destination.finish)
    return left_out


def _on_all(collectives: Collectives, name: str, fn: Callable[[], T]) -> T:
    """Runs it on all ranks, and returns what it returned on this one, if all succeeded."""
    found: list[T] = []
    told = _damage_told(fn)

    def run() -> None:
        with border(LoadFailedError, name):
            found.append(told())

    collectives.all_gather(name, run)
    return found[0]


def _damage_told(fn: Callable[[], T]) -> Callable[[], T]:
    """Has all ranks raise one class for a damaged checkpoint, in whichever way each ran into it."""

    def run() -> T:
        try:
            return fn()
        except UnsupportedVersionError:
            raise
        except (ManifestError, ObjectNotFoundError) as e:
            msg = f"the checkpoint is damaged: {e}"
            raise IntegrityError(msg) from e

    return run


def _refuse_missing(planner: DefaultLoadPlanner, metadata: Metadata) -> None:
    lacking = [key for key in planner.state_dict if key not in metadata.state_dict_metadata]
    if lacking:
        more = f" and {len(lacking) - _MOST_NAMED} more" if len(lacking) > _MOST_NAMED else ""
        msg = (
            f"the checkpoint has no {', '.join(map(repr, lacking[:_MOST_NAMED]))}{more}; leave out of the state dict "
            "what was not saved"
        )
        raise MissingKeyError(msg)


def _refuse_other_shapes(planner: DefaultLoadPlanner, metadata: Metadata) -> None:
    """What torch's planner would refuse of a sudden, one key at a time."""
    problems = []
    for key, value in planner.state_dict.items():
        saved = metadata.state_dict_metadata[key]
        if (
            isinstance(saved, TensorStorageMetadata)
            and isinstance(value, torch.Tensor)
            and value.size() != saved.size
        ):
            problems.append(f"{key!r} is {tuple(saved.size)} in the checkpoint and {tuple(value.size())} here")
    if problems:
        more = f", and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        msg = f"tensors of other shapes were saved: {'; '.join(problems[:_MOST_NAMED])}{more}; nothing was loaded"
        raise ShapeMismatchError(msg)


def _structure(planner: DefaultSavePlanner) -> tuple[object, ...]:
    """All that a plan of this rank depends on."""
    entries = tuple((key, _kind(value)) for key, value in planner.state_dict.items())
    return entries, tuple(planner.mappings.items())


def _kind(value: object) -> object:
    if isinstance(value, DTensor):
        local = value.to_local()
        return (
            DTensor,
            value.shape,
            value.dtype,
            value.layout,
            value.placements,
            value.device_mesh.mesh_dim_names,
            tuple(value.device_mesh.get_coordinate() or ()),
            tuple(value.device_mesh.shape),
            local.shape,
        )
    if isinstance(value, torch.Tensor):
        shards = value.local_shards() if hasattr(value, "local_shards") else ()
        metadata = tuple((tuple(s.metadata.shard_offsets), tuple(s.metadata.shard_sizes)) for s in shards)
        return type(value), value.shape, value.dtype, value.layout, metadata
    return None  # bytes, whatever their type and size


def _refuse_differences(plans: list[SavePlan]) -> None:
    """Keys may differ between ranks, and what one key means may not."""
    seen: dict[str, tuple[object, int]] = {}
    problems = []
    for rank, plan in enumerate(plans):
        for item in plan.items:
            data = item.tensor_data
            what = "bytes" if data is None else (data.properties.dtype, tuple(data.size))
            first, of = seen.setdefault(item.index.fqn, (what, rank))
            if first != what:
                problems.append(f"{item.index.fqn!r} is {_told(first)} on rank {of} and {_told(what)} on rank {rank}")
    if problems:
        more = f", and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        msg = f"ranks hold different things under one key: {'; '.join(problems[:_MOST_NAMED])}{more}"
        raise ShapeMismatchError(msg)


def _told(what: object) -> str:
    return what if isinstance(what, str) else " ".join(map(str, what))  # type: ignore[call-overload]
