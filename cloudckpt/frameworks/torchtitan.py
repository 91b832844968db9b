"""torchtitan's checkpoint manager over object storage.

Law: torchtitan says what to save and when, under the keys that its own manager uses; the Checkpointer does it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.checkpoint import MODEL, AsyncMode, CheckpointManager

from cloudckpt.dcp import Checkpointer, KeepLast, ObjectStoreReader
from cloudckpt.dcp.driving import load
from cloudckpt.dcp.groups import own_collectives
from cloudckpt.errors import UsageError


class CloudCheckpointManager(CheckpointManager):
    """Saves behind training to the URL ``checkpoint.folder``; takes all of torchtitan's options but pinned memory.

    ``async_mode`` of anything but ``disabled`` saves behind training. ``keep_latest_k`` counts for committed steps.
    ``initial_load_path`` may be a checkpoint of cloudckpt's or of DCP's own, at any URL. A save that failed is raised
    by the next one, or when the manager is closed.

    Example:
        >>> config.checkpoint = CloudCheckpointManager.Config(
        ...     enable=True, folder="s3://bucket/run", interval=500, async_mode="async"
        ... )
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):
        """torchtitan's, by another name: the name says which manager is made."""

    def __init__(self, config: Config, *, base_folder: str = "", **kwargs: Any) -> None:
        """Makes the manager, with all ranks.

        Args:
            config: of the job.
            base_folder: of what torchtitan dumps; the URL stands by itself.
            **kwargs: of torchtitan's manager.

        Raises:
            UsageError: the folder is no URL of a store.
        """
        del base_folder
        self.enable = config.enable
        if not self.enable:
            return
        keep = KeepLast(config.keep_latest_k) if config.keep_latest_k else None
        self._checkpointer = Checkpointer(config.folder, keep=keep)
        super().__init__(config, base_folder="", **kwargs)

    @torch.no_grad()
    def _save(self, curr_step: int, last_step: bool = False) -> bool:  # noqa: FBT001, FBT002 - torchtitan's signature
        if not self._should_save(curr_step, last_step):
            return False
        if last_step:
            self._save_last_step(curr_step)
        elif self.async_mode == AsyncMode.DISABLED:
            self._checkpointer.save(curr_step, self._flattened_model_states_sd())
        else:
            self._checkpointer.async_save(curr_step, self._flattened_model_states_sd())
        return True

    @torch.no_grad()
    def _load(self, step: int = -1) -> bool:
        newest = self._checkpointer.latest() if step == -1 else step
        if newest is None:
            return self._begin()
        states = self._states_to_load(model_only=newest == 0)
        self._checkpointer.load(states, step=newest)
        self.states[MODEL].load_state_dict(states)
        return True

    def _begin(self) -> bool:
        """Loads what a job begins with, if it was told."""
        if self.initial_load_in_hf:
            return bool(super()._load())
        if not self.initial_load_path:
            return False
        self.dcp_load(self._states_to_load(self.initial_load_model_only), self.initial_load_path)
        return True

    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,  # noqa: FBT001, FBT002 - torchtitan's signature
        to_hf: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        """Saves the last step."""
        del async_mode, enable_garbage_collection
        if to_hf:
            msg = "last_save_in_hf writes files: save, and use cloudckpt export on what was saved"
            raise UsageError(msg)
        self._checkpointer.save(int(checkpoint_id.rpartition("-")[2]), state_dict)

    def dcp_load(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        from_hf: bool = False,  # noqa: FBT001, FBT002
        from_quantized: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        """Loads a checkpoint that is none of the job's steps."""
        if from_hf:
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        url = Path(checkpoint_id).as_uri() if checkpoint_id.startswith("/") else checkpoint_id
        ranks, _ = own_collectives(None, 1800)
        load(state_dict, ObjectStoreReader(url), ranks)
        self.states[MODEL].load_state_dict(state_dict)

    def _find_load_step(self, folder: str = "") -> int:
        del folder
        return -1  # `_load` has looked

    def _purge_stale_checkpoints(self) -> None:
        """Nothing: the Checkpointer keeps ``keep_latest_k``."""

    def _close(self) -> None:
        super()._close()
        if hasattr(self, "_checkpointer"):
            self._checkpointer.close()
