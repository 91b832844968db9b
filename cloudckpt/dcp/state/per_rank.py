"""What each rank keeps for itself in a checkpoint that all ranks share.

Law: a rank is given what the rank of its number saved, or nothing; never another's.
"""

from collections import ChainMap
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.dcp.state.nesting import RESERVED
from cloudckpt.dcp.state.stateful import is_object
from cloudckpt.errors import MissingKeyError, ReservedNameError

KEY = f"{RESERVED}per_rank"
"""The member of the state dict under which each rank's lies, under the rank's number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a checkpoint has for a rank.

    Attributes:
        is_there: whether it has something for this rank.
        left_out: ranks that saved something and that no rank of this job will load; for the caller to tell.
    """

    is_there: bool
    left_out: tuple[int, ...]


def attach(
    state_dict: MutableMapping[str, Any], held: MutableMapping[str, Any] | None, rank: int
) -> MutableMapping[str, Any]:
    """The state dict with what this rank holds for itself, for `stateful.to_save` and `stateful.Destination`.

    Args:
        state_dict: the user's; a load puts its values into this very one.
        held: values, tensors and objects by name; filled in place by a load. None where there is nothing.
        rank: this one's number in the whole job.

    Raises:
        ReservedNameError: a key of the state dict begins with ``cloudckpt:``.
    """
    for key in state_dict:
        if isinstance(key, str) and key.startswith(RESERVED):
            msg = (
                f"the state dict has the key {key!r}, and those with {RESERVED!r} in front are cloudckpt's: rename it"
            )
            raise ReservedNameError(msg)
    return state_dict if held is None else ChainMap(state_dict, {KEY: {str(rank): _OfRank(held)}})


def look(metadata: Metadata, *, rank: int, world_size: int, missing: Literal["error", "none"] = "error") -> Share:
    """What there is for this rank in a checkpoint that as many ranks saved, or more, or fewer.

    Args:
        metadata: of the checkpoint, as its reader gives it.
        rank: this one's number.
        world_size: of the job that loads.
        missing: what a rank is to get for which nothing was saved: an error, or nothing.

    Raises:
        MissingKeyError: there is nothing for this rank.
    """
    paths = metadata.planner_data or {}
    found = sorted({int(path[1]) for path in paths.values() if len(path) > 1 and path[0] == KEY})
    if rank not in found and missing == "error":
        has = f"has it for {len(found)} ranks, {found[0]} to {found[-1]}" if found else "was saved without it"
        msg = (
            f"nothing was saved per rank for rank {rank} of {world_size}: the checkpoint {has}; load with "
            "missing_per_rank='none' to go on without"
        )
        raise MissingKeyError(msg)
    return Share(is_there=rank in found, left_out=tuple(number for number in found if number >= world_size))


class _OfRank:
    """What a rank holds, as one object: values are replaced, objects are loaded into."""

    def __init__(self, held: MutableMapping[str, Any]) -> None:
        self._held = held

    def state_dict(self) -> dict[str, Any]:
        return {key: value.state_dict() if is_object(value) else value for key, value in self._held.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        lacking = [key for key, value in self._held.items() if is_object(value) and key not in states]
        if lacking:
            msg = f"nothing was saved per rank under {lacking[0]!r}"
            raise MissingKeyError(msg)
        for key, state in states.items():
            if is_object(self._held.get(key)):
                self._held[key].load_state_dict(state)
            else:
                self._held[key] = state
