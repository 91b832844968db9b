"""A nested state dict saved to a URL by one rank or all, and given back whole to who does not know what is in it.

Law: what is given back is new, and equals what was saved; nothing is loaded in place.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.dcp.border import border
from cloudckpt.dcp.driving import SaveDriver
from cloudckpt.dcp.ranks import Collectives
from cloudckpt.dcp.reader import ObjectStoreReader
from cloudckpt.dcp.state.nesting import fold, unfold
from cloudckpt.dcp.writer import ObjectStoreWriter
from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.errors import LoadFailedError


def save_whole(state: Mapping[str, Any], writer: ObjectStoreWriter, collectives: Collectives) -> None:
    """Saves, and returns when the checkpoint is committed.

    Args:
        state: of this rank: tensors in dicts and lists, and values that are kept as they are.
        writer: with its URL.
        collectives: of the ranks that save.

    Raises:
        CheckpointError: whatever failed, on whichever rank; see `SaveDriver.save`.
    """
    label = str(writer.checkpoint_id)
    SaveDriver(collectives).save(lambda: dict(fold(state)), writer, Cancellation(), writer.new_recorder(), label)


def load_whole(reader: ObjectStoreReader, wanted: Callable[[str], bool] = lambda _: True) -> dict[str, Any]:
    """What was saved, in new tensors in host memory; one rank for itself.

    Args:
        reader: with its URL.
        wanted: says of a name at the top whether it is read.

    Raises:
        CheckpointNotFoundError: no checkpoint is there.
        IntegrityError: it is damaged.
        CheckpointError: whatever failed.
    """
    state: dict[str, Any] = {}
    with border(LoadFailedError, "the load"):
        metadata = reader.read_metadata_from(reader.fetch_manifest())
        keys = {name for name in _names(metadata) if wanted(name)}
        planner = _EmptyStateDictLoadPlanner(keys=keys)  # type: ignore[no-untyped-call]
        planner.set_up_planner(state, metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
        reader.read_data(plan, planner).wait()
    found: dict[str, Any] = unfold(state)
    return found


def _names(metadata: Metadata) -> set[str]:
    paths = metadata.planner_data or {}
    return {str(paths[key][0]) if key in paths else key for key in metadata.state_dict_metadata}
