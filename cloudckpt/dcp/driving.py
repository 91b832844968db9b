"""A save by all ranks, step by step, and a load: what `torch.distributed.checkpoint.save` and ``load`` do.

Law: every step is a collective, so that a failure of one rank is a failure of all; errors are ours, and Exceptions.
What was planned once is not planned again for the same structure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from cloudckpt.dcp.collectives import Collectives
from cloudckpt.dcp.reader import ObjectStoreReader
from cloudckpt.dcp.writer import ObjectStoreWriter
from cloudckpt.errors import ShapeMismatchError

_MOST_NAMED = 10


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

    Attributes:
        plans_made: how often a structure was planned.
    """

    def __init__(self, collectives: Collectives) -> None:
        """Speaks to the other ranks over ``collectives``, and to no one else."""
        self._collectives = collectives
        self._planned: _Planned | None = None
        self.plans_made = 0

    def save(
        self,
        state_dict: STATE_DICT_TYPE,
        writer: ObjectStoreWriter,
        new_planner: Callable[[], DefaultSavePlanner] = DefaultSavePlanner,
    ) -> None:
        """Saves, and returns when the checkpoint is committed.

        Args:
            state_dict: of this rank.
            writer: with its URL.
            new_planner: makes the planner of one save; the same class each time.

        Raises:
            ShapeMismatchError: two ranks hold one key with different shapes or dtypes; nothing was written.
            CheckpointError: whatever failed, on whichever rank; see `Collectives`. Nothing was committed.
        """
        ranks, planner = self._collectives, new_planner()

        def set_up() -> bool:
            planner.set_up_planner(state_dict, writer.storage_meta(), ranks.is_coordinator)
            writer.set_up_storage_writer(ranks.is_coordinator)
            return self._planned is not None and self._planned.structure == _structure(planner)

        if not ranks.all_reduce("setting up the save", set_up, all):
            self._plan(planner, writer)
        planned = self._planned
        assert planned is not None  # noqa: S101 - planned before, or just now
        planner.finish_plan(planned.plan)

        def write() -> list[Any]:
            results: list[Any] = writer.write_data(planned.plan, planner).wait()
            return results

        def finish(results: list[list[Any]]) -> None:
            assert planned.metadata is not None  # noqa: S101 - only the coordinator reduces
            writer.finish(planned.metadata, results)

        ranks.all_reduce("the save", write, finish)

    def _plan(self, planner: DefaultSavePlanner, writer: ObjectStoreWriter) -> None:
        made: list[Metadata] = []

        def of_rank() -> SavePlan:
            return writer.prepare_local_plan(planner.create_local_plan())

        def of_all(plans: list[SavePlan]) -> list[SavePlan]:
            _refuse_differences(plans)
            plans, metadata = planner.create_global_plan(plans)
            made.append(metadata)
            return writer.prepare_global_plan(plans)

        self._planned = None
        plan = self._collectives.reduce_scatter("planning the save", of_rank, of_all)
        self._planned = _Planned(_structure(planner), plan, made[0] if made else None)
        self.plans_made += 1


def load(state_dict: STATE_DICT_TYPE, reader: ObjectStoreReader, collectives: Collectives) -> None:
    """Loads in place, on all ranks; one of them reads the manifest.

    Args:
        state_dict: of this rank; ranks may ask for different keys.
        reader: with its URL.
        collectives: of the ranks that load.

    Raises:
        CheckpointError: whatever failed, on whichever rank; what was being loaded into is undefined on all.
    """
    planner = DefaultLoadPlanner()
    data = collectives.broadcast("reading the manifest", reader.fetch_manifest)

    def of_rank() -> None:
        metadata = reader.read_metadata_from(data)
        reader.set_up_storage_reader(metadata, collectives.is_coordinator)
        planner.set_up_planner(state_dict, metadata, collectives.is_coordinator)
        plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
        reader.read_data(plan, planner).wait()

    collectives.all_gather("the load", of_rank)


def _structure(planner: DefaultSavePlanner) -> tuple[object, ...]:
    """All that a plan of this rank depends on."""
    entries = tuple((key, _kind(value)) for key, value in planner.state_dict.items())
    return type(planner), entries, tuple(planner.mappings.items())


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
    return what if isinstance(what, str) else " ".join(map(str, what))  # type: ignore[call-overload,no-any-return]
