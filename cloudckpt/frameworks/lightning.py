"""Checkpoints of Lightning's Trainer in object storage, by the paths that its `ModelCheckpoint` gives them.

Law: what Lightning hands over is saved as it is, and handed back as it was.
"""

import os
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.utils._pytree import tree_map_only

from cloudckpt.catalog.removal import remove
from cloudckpt.dcp.driving import load
from cloudckpt.dcp.groups import own_collectives
from cloudckpt.dcp.ranks import Collectives
from cloudckpt.dcp.reader import ObjectStoreReader
from cloudckpt.dcp.writer import ObjectStoreWriter
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.write import WriteOptions
from cloudckpt.errors import UsageError
from cloudckpt.frameworks.whole import load_whole, save_whole
from cloudckpt.store.url import StoreOptions

_Path = str | os.PathLike[str]
_MODEL, _OPTIMIZERS = "state_dict", "optimizer_states"


class CloudCheckpointIO(CheckpointIO):
    """For strategies in which one rank holds all that is saved: one device, DDP.

    A path is the URL of a checkpoint. One that is there already is replaced, as Lightning does with its files; until
    the new one is committed, the old one stands.

    Example:
        >>> trainer = Trainer(
        ...     plugins=[AsyncCloudCheckpointIO(CloudCheckpointIO())],  # or CloudCheckpointIO(), to wait for each
        ...     callbacks=[ModelCheckpoint("s3://bucket/run", save_last=True)],
        ... )
        >>> trainer.fit(model, ckpt_path="s3://bucket/run/last.ckpt")
    """

    def __init__(
        self,
        *,
        options: WriteOptions | None = None,
        read_options: ReadOptions | None = None,
        store: StoreOptions | None = None,
    ) -> None:
        """Opens nothing yet.

        Args:
            options: how to write.
            read_options: how to read.
            store: how to reach the store.
        """
        self._options = replace(options or WriteOptions(), overwrite=True)
        self._read_options = read_options or ReadOptions()
        self._store = store or StoreOptions()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _Path, storage_options: Any = None) -> None:
        """Saves, and returns when the checkpoint is committed.

        Raises:
            UsageError: ``storage_options`` were given.
            CheckpointError: whatever failed; nothing was committed, but for a CommitUnknownError.
        """
        _refuse(storage_options)
        save_whole(checkpoint, self._writer(path), Collectives(use_dist=False))

    def load_checkpoint(
        self,
        path: _Path,
        map_location: torch.device | str | None = None,
        weights_only: bool | None = None,  # noqa: FBT001 - Lightning's signature
    ) -> dict[str, Any]:
        """What was saved.

        Args:
            path: URL of the checkpoint.
            map_location: the device to put tensors on; host memory, if None.
            weights_only: False unpickles whatever was saved, and may run code; otherwise classes that torch does not
                hold safe are refused, as `ReadOptions.unsafe_pickle` says.

        Raises:
            CheckpointNotFoundError: no checkpoint is there.
            UnsafePickleError: something in it is of a class that is not safe.
            CheckpointError: whatever failed.
        """
        found = load_whole(self._reader(path, weights_only=weights_only))
        if map_location is None:
            return found
        moved: dict[str, Any] = tree_map_only(torch.Tensor, lambda tensor: tensor.to(map_location), found)
        return moved

    def remove_checkpoint(self, path: _Path) -> None:
        """Removes a checkpoint, if one is there.

        Raises:
            StoreError: the store refused.
        """
        remove(path, store=self._store)

    def _writer(self, path: _Path) -> ObjectStoreWriter:
        return ObjectStoreWriter(path, options=self._options, store=self._store, inline_values=True)

    def _reader(self, path: _Path, *, weights_only: bool | None) -> ObjectStoreReader:
        is_trusted = self._read_options.unsafe_pickle or weights_only is False
        options = replace(self._read_options, unsafe_pickle=is_trusted)
        return ObjectStoreReader(path, options=options, store=self._store)


class AsyncCloudCheckpointIO(AsyncCheckpointIO):
    """Lightning's way to save behind training, in which removals too wait for their turn.

    Lightning's own removes at once what is still being saved, so that it stays.
    """

    def remove_checkpoint(self, path: _Path) -> None:
        """Has a checkpoint removed when the saves before are done; a failure is raised as theirs are."""
        self._ensure_setup()
        assert self._executor is not None  # noqa: S101 - for the type checker
        self._executor.submit(self._remove, path)

    def _remove(self, path: _Path) -> None:
        try:
            super().remove_checkpoint(path)
        except BaseException as e:  # as its saves do
            self._error = e


class CloudModelParallelStrategy(ModelParallelStrategy):
    """FSDP2 and tensor parallelism: each rank saves its shards, and a load fits them to any mesh.

    Its checkpoints and those of `CloudCheckpointIO` hold the model under the same keys.

    Example:
        >>> strategy = CloudModelParallelStrategy(data_parallel_size=8, tensor_parallel_size=1)
        >>> trainer = Trainer(strategy=strategy, callbacks=[ModelCheckpoint("s3://bucket/run", save_last=True)])
        >>> trainer.fit(model, ckpt_path="s3://bucket/run/last.ckpt")
    """

    def __init__(self, *args: Any, checkpoint_io: CloudCheckpointIO | None = None, **kwargs: Any) -> None:
        """Makes Lightning's strategy.

        Args:
            *args: Lightning's.
            checkpoint_io: how to read, to write, and to reach the store.
            **kwargs: Lightning's.

        Raises:
            UsageError: ``save_distributed_checkpoint=False``.
        """
        super().__init__(*args, **kwargs)
        if not self._save_distributed_checkpoint:
            msg = "save_distributed_checkpoint=False would gather all shards on one rank; leave it out"
            raise UsageError(msg)
        self._io = checkpoint_io or CloudCheckpointIO()
        self._ranks: Collectives | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _Path, storage_options: Any = None) -> None:
        """Saves, and returns when the checkpoint is committed; every rank calls it.

        Raises:
            UsageError: ``storage_options`` were given.
            CheckpointError: whatever failed, on whichever rank.
        """
        _refuse(storage_options)
        save_whole(checkpoint, self._io._writer(self._path(filepath)), self._collectives())

    def load_checkpoint(self, checkpoint_path: _Path, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: FBT001
        """Loads into the model and the optimizers, in place, and returns what else was saved; every rank calls it.

        Raises:
            CheckpointNotFoundError: no checkpoint is there.
            MissingKeyError: the model or an optimizer has what the checkpoint lacks.
            CheckpointError: whatever failed, on whichever rank.
        """
        path = self._path(checkpoint_path)
        into: dict[str, Any] = {_MODEL: self.model}
        if self.optimizers:
            into[_OPTIMIZERS] = list(self.optimizers)
        load(into, self._io._reader(path, weights_only=weights_only), self._collectives())
        rest = load_whole(
            self._io._reader(path, weights_only=weights_only), lambda name: name not in (_MODEL, _OPTIMIZERS)
        )
        return {_MODEL: {}, _OPTIMIZERS: [], **rest}

    def remove_checkpoint(self, filepath: _Path) -> None:
        """Removes a checkpoint, if one is there."""
        if self.is_global_zero:
            self._io.remove_checkpoint(filepath)

    def teardown(self) -> None:
        """Ends with its process groups."""
        self._ranks = None
        super().teardown()

    def _path(self, path: _Path) -> str:
        told: str = self.broadcast(os.fspath(path))
        return told

    def _collectives(self) -> Collectives:
        if self._ranks is None:
            self._ranks, _ = own_collectives(None, (self._timeout or default_pg_timeout).total_seconds())
        return self._ranks


def _refuse(storage_options: object) -> None:
    if storage_options is not None:
        msg = "storage_options= is for Lightning's own files; say how to reach the store with store=StoreOptions(...)"
        raise UsageError(msg)
