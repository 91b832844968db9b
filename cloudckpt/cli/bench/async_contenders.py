"""Who saves behind training: ours, and torch's ``async_save`` with its writer for object stores.

Law: each in its best documented settings, with their source; `Saves.save` returns when the state dict may change.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cloudckpt.cli.bench.peers import Fsspec

Uploads = Literal["thread", "process"]


class UnderWay(Protocol):
    """A save in the background."""

    def done(self) -> bool:
        """Whether it is over."""
        ...

    def result(self) -> object:
        """Waits for it; raises what it failed of."""
        ...


class Saves(Protocol):
    """Saves states below one URL."""

    def save(self, step: int, state: dict[str, Any]) -> UnderWay:
        """Begins to save, and returns when the state may change."""
        ...

    def close(self) -> None:
        """Frees all."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncContender:
    """Somebody who can be measured.

    Attributes:
        name: what it is asked for by.
        is_ours: whether it takes models and optimizers as they are.
        uploads: where the background is.
        keeps_memory: of torch's: whether the stager, and with it the memory, is used again.
    """

    name: str
    is_ours: bool
    uploads: Uploads
    keeps_memory: bool = True

    @property
    def opens_files(self) -> bool:
        """Whether it opens two files for each tensor, of which systems do not allow 20,000."""
        return not self.is_ours and self.uploads == "process"

    def start(self, url: str) -> Saves:
        """Makes what saves below the URL."""
        if self.is_ours:
            return Ours(url, self.uploads)
        return Torchs(url, self.uploads, keeps_memory=self.keeps_memory)


CONTENDERS: Mapping[str, AsyncContender] = {
    contender.name: contender
    for contender in (
        AsyncContender(name="cloudckpt-thread", is_ours=True, uploads="thread"),
        AsyncContender(name="cloudckpt-process", is_ours=True, uploads="process"),
        AsyncContender(name="torch-thread", is_ours=False, uploads="thread", keeps_memory=False),
        AsyncContender(name="torch-thread-kept", is_ours=False, uploads="thread"),
        AsyncContender(name="torch-process", is_ours=False, uploads="process", keeps_memory=False),
        AsyncContender(name="torch-process-kept", is_ours=False, uploads="process"),
    )
}


class Ours:
    """`Checkpointer.async_save`, with its defaults."""

    def __init__(self, url: str, uploads: Uploads) -> None:
        """Opens nothing yet."""
        from cloudckpt.dcp.checkpointer import Checkpointer

        self._checkpointer = Checkpointer(url, uploads=uploads)

    def save(self, step: int, state: dict[str, Any]) -> UnderWay:
        """See `Saves.save`."""
        return self._checkpointer.async_save(step, state)

    def close(self) -> None:
        """See `Saves.close`."""
        self._checkpointer.close()


class Torchs:
    """``dcp.async_save`` over FsspecWriter and s3fs, set as `Fsspec` is.

    Its default stager takes new memory for each save. The fastest that it documents
    (docs.pytorch.org/docs/stable/distributed.checkpoint.html, "DefaultStager" and "StagingOptions") is one that the
    caller keeps: it copies to the same memory again, which for the process is shared, so that nothing is copied
    on the way there. Pinned memory, non-blocking copies and staging in a thread are for CUDA, it says.
    """

    def __init__(self, url: str, uploads: Uploads, *, keeps_memory: bool) -> None:
        """Needs a process group, as the process does."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self._url = url
        self._type = AsyncCheckpointerType(uploads)
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=uploads == "process",
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
        self._stager = DefaultStager(options) if keeps_memory else None

    def save(self, step: int, state: dict[str, Any]) -> UnderWay:
        """See `Saves.save`."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        settings = Fsspec(name="fsspec", threads=1).settings()["writer"]
        under_way: Any = async_save(
            state,
            storage_writer=FsspecWriter(f"{self._url}/step-{step}", **settings),
            async_checkpointer_type=self._type,
            async_stager=self._stager,
        )
        return under_way  # type: ignore[no-any-return]

    def close(self) -> None:
        """See `Saves.close`."""
        if self._stager is not None:
            self._stager.close()
