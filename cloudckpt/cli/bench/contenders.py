"""Who is measured: each saves a state dict to a URL and loads it back, in its best documented settings.

Law: a contender's libraries are imported when it first works, in its own process. A contender can be pickled.
"""

import os
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

from cloudckpt.cli.bench.figures import Operation
from cloudckpt.cli.bench.peers import FileSystem, Fsspec, S3TorchConnector
from cloudckpt.cli.bench.raw import Cut
from cloudckpt.cli.bench.raw_sockets import RawSockets
from cloudckpt.cli.bench.references import RawAiobotocore, RawBoto3, RawObstore
from cloudckpt.cli.bench.workloads import State
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.write import WriteOptions
from cloudckpt.extensions import BytePlane, Extension, ZStandard
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions

OURS = "cloudckpt"
COMPRESSED = "cloudckpt-zstd"
SLOW_CORE = "cloudckpt-zstd-slow"
"""At a level that one core compresses far slower than the store takes."""

OURS_ON_STOCK = "cloudckpt-stock"
"""Loads what torch's own writer saved."""

OUR_KINDS = (OURS, COMPRESSED, SLOW_CORE, OURS_ON_STOCK)


@runtime_checkable
class Prepares(Protocol):
    """A contender with something to do outside the clock."""

    def prepare(self, operation: Operation, state: State, url: str) -> None:
        """Comes before each save and each load of these."""
        ...

    def close(self) -> None:
        """Ends its clients; comes last."""
        ...


class Contender(Protocol):
    """Something that saves and loads checkpoints. Clients it keeps between calls are made by the first."""

    @property
    def name(self) -> str:
        """What it is asked for by."""
        ...

    @property
    def modules(self) -> tuple[str, ...]:
        """The distributions whose versions matter to its figures."""
        ...

    @property
    def is_raw(self) -> bool:
        """Whether it moves bytes, not checkpoints: it is given all bytes of a workload as one tensor."""
        ...

    def settings(self) -> dict[str, Any]:
        """What it runs with, as JSON can spell it."""
        ...

    def save(self, state: State, url: str) -> None:
        """Returns when the checkpoint is complete at ``url``."""
        ...

    def load(self, state: State, url: str) -> None:
        """Fills the tensors of ``state`` in place."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloudckpt:
    """This project, as it comes, or with extensions.

    Attributes:
        name: see `Contender.name`.
        modules: see `Contender.modules`.
        extensions: on saving.
        is_on_one_core: whether its process keeps to one core.
        concurrency: of writer and reader; None for their defaults.
        addressing_style: see `S3Options`.
    """

    is_raw: ClassVar[bool] = False

    name: str = OURS
    modules: tuple[str, ...] = ("cloudckpt", "torch", "aiobotocore", "botocore", "aiohttp", "awscrt", "numpy")
    extensions: tuple[Extension, ...] = ()
    is_on_one_core: bool = False
    concurrency: int | None = None
    addressing_style: Any = "auto"

    def settings(self) -> dict[str, Any]:
        """See `Contender.settings`."""
        return {
            "write": {
                **asdict(replace(WriteOptions(), **self._overrides())),
                "extensions": [e.get_descriptor() for e in self.extensions],
            },
            "read": asdict(replace(ReadOptions(), **self._overrides())),
            "addressing_style": self.addressing_style,
            "is_on_one_core": self.is_on_one_core,
        }

    def save(self, state: State, url: str) -> None:
        """See `Contender.save`."""
        from torch.distributed.checkpoint.state_dict_saver import save

        from cloudckpt.dcp.writer import ObjectStoreWriter

        if self.is_on_one_core:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        writer = ObjectStoreWriter(url, store=self._store(), extensions=self.extensions, **self._overrides())
        save(state, storage_writer=writer, no_dist=True)

    def load(self, state: State, url: str) -> None:
        """See `Contender.load`."""
        from torch.distributed.checkpoint.state_dict_loader import load

        from cloudckpt.dcp.reader import ObjectStoreReader

        reader = ObjectStoreReader(url, store=self._store(), **self._overrides())
        load(state, storage_reader=reader, no_dist=True)

    def _overrides(self) -> dict[str, Any]:
        return {} if self.concurrency is None else {"concurrency": self.concurrency}

    def _store(self) -> StoreOptions:
        return StoreOptions(s3=S3Options(addressing_style=self.addressing_style))


@dataclass(frozen=True, slots=True, kw_only=True)
class OnStock:
    """This project's reader, on checkpoints that torch's own writer saves.

    Attributes:
        reads: how it loads.
        writes: how it saves.
    """

    is_raw: ClassVar[bool] = False

    reads: Cloudckpt
    writes: Fsspec
    name: str = OURS_ON_STOCK

    @property
    def modules(self) -> tuple[str, ...]:
        """See `Contender.modules`."""
        return self.reads.modules

    def settings(self) -> dict[str, Any]:
        """See `Contender.settings`."""
        return {"writer": self.writes.settings()["writer"], "read": self.reads.settings()["read"]}

    def save(self, state: State, url: str) -> None:
        """See `Contender.save`."""
        self.writes.save(state, url)

    def load(self, state: State, url: str) -> None:
        """See `Contender.load`."""
        self.reads.load(state, url)


def all_contenders(
    addressing_style: str,
    *,
    folder: str,
    concurrency: int | None = None,
    connections: int = 8,
    request_size: int | None = None,
) -> dict[str, Contender]:
    """Every contender by its name.

    Args:
        addressing_style: see `S3Options`.
        folder: for those that keep files.
        concurrency: requests under way at a time, of ours and of the references; None for the defaults.
        connections: of the plain sockets.
        request_size: bytes of the references' parts and ranges; None for those of ours.
    """
    style: dict[str, Any] = {"addressing_style": addressing_style}
    ours: dict[str, Any] = {**style, "concurrency": concurrency}
    cut = Cut(concurrency=concurrency or WriteOptions().concurrency, request_size=request_size)
    raw: dict[str, Any] = {**style, "cut": cut, **({} if concurrency is None else {"concurrency": concurrency})}
    known: list[Contender] = [
        Cloudckpt(**ours),
        Cloudckpt(name=COMPRESSED, extensions=(BytePlane(), ZStandard()), **ours),
        Cloudckpt(name=SLOW_CORE, extensions=(BytePlane(), ZStandard(level=9)), is_on_one_core=True, **ours),
        OnStock(reads=Cloudckpt(**ours), writes=Fsspec(name="fsspec", threads=1, **style)),
        Fsspec(name="fsspec", threads=1, **style),
        Fsspec(
            name="fsspec-default",
            threads=1,
            write_storage={"default_block_size": 8 << 20},
            read_storage={},
            **style,
        ),
        Fsspec(name="fsspec-8", threads=8, **style),
        S3TorchConnector(**style),
        FileSystem(folder=folder),
        RawSockets(connections=connections, cut=cut, **style),
        RawAiobotocore(**raw),
        RawBoto3(**raw),
        RawObstore(**raw),
    ]
    return {contender.name: contender for contender in known}
