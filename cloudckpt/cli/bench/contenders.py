"""Who is measured: each saves a state dict to a URL and loads it back, in its best documented settings.

Law: a contender's libraries are imported when it first works, in its own process. A contender can be pickled.
"""

import os
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

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
        addressing_style: see `S3Options`.
    """

    name: str = OURS
    modules: tuple[str, ...] = ("cloudckpt", "torch", "aiobotocore", "botocore", "aiohttp", "awscrt", "numpy")
    extensions: tuple[Extension, ...] = ()
    is_on_one_core: bool = False
    addressing_style: Any = "auto"

    def settings(self) -> dict[str, Any]:
        """See `Contender.settings`."""
        return {
            "write": {**asdict(WriteOptions()), "extensions": [e.get_descriptor() for e in self.extensions]},
            "read": asdict(ReadOptions()),
            "addressing_style": self.addressing_style,
            "is_on_one_core": self.is_on_one_core,
        }

    def save(self, state: State, url: str) -> None:
        """See `Contender.save`."""
        from torch.distributed.checkpoint.state_dict_saver import save

        from cloudckpt.dcp.writer import ObjectStoreWriter

        if self.is_on_one_core:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        writer = ObjectStoreWriter(url, store=self._store(), extensions=self.extensions)
        save(state, storage_writer=writer, no_dist=True)

    def load(self, state: State, url: str) -> None:
        """See `Contender.load`."""
        from torch.distributed.checkpoint.state_dict_loader import load

        from cloudckpt.dcp.reader import ObjectStoreReader

        load(state, storage_reader=ObjectStoreReader(url, store=self._store()), no_dist=True)

    def _store(self) -> StoreOptions:
        return StoreOptions(s3=S3Options(addressing_style=self.addressing_style))


@dataclass(frozen=True, slots=True, kw_only=True)
class OnStock:
    """This project's reader, on checkpoints that torch's own writer saves.

    Attributes:
        reads: how it loads.
        writes: how it saves.
    """

    reads: Cloudckpt
    writes: "Fsspec"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Fsspec:
    """PyTorch's own FsspecWriter and FsspecReader over s3fs, which keep their file systems between calls.

    The settings were chosen by measuring those that s3fs documents (s3fs.readthedocs.io/en/latest/api.html,
    filesystem-spec.readthedocs.io/en/latest/api.html#read-buffering).
    Bodies are not hashed with SHA-256 for the signature, as ours are not. s3fs's ``max_concurrency`` is left
    alone: an open file, which is what DCP asks s3fs for, sends its parts one after another whatever it says.

    Attributes:
        name: see `Contender.name`.
        modules: see `Contender.modules`.
        threads: the writer's ``thread_count``; it writes a file for each.
        addressing_style: see `S3Options`.
        write_storage: for s3fs. Parts of 8 MiB took less CPU and a fifth of the memory of those of 50 MiB.
        read_storage: for s3fs. Blocks of 50 MiB, the next fetched by a thread meanwhile, loaded about twice as
            fast as the default read-ahead, and faster than smaller blocks, whole files or no cache.
    """

    name: str
    modules: tuple[str, ...] = ("torch", "s3fs", "fsspec", "aiobotocore", "botocore", "aiohttp")
    threads: int
    addressing_style: Any = "auto"
    write_storage: dict[str, Any] = field(default_factory=lambda: {"default_block_size": 8 << 20})
    read_storage: dict[str, Any] = field(default_factory=lambda: {"default_cache_type": "background"})

    def settings(self) -> dict[str, Any]:
        """See `Contender.settings`."""
        return {"writer": self._writer(), "reader": self._reader()}

    def save(self, state: State, url: str) -> None:
        """See `Contender.save`."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        save(state, storage_writer=FsspecWriter(url, **self._writer()), no_dist=True)

    def load(self, state: State, url: str) -> None:
        """See `Contender.load`."""
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
        from torch.distributed.checkpoint.state_dict_loader import load

        load(state, storage_reader=FsspecReader(url, **self._reader()), no_dist=True)

    def _writer(self) -> dict[str, Any]:
        return {"thread_count": self.threads, "sync_files": False, **self._config(), **self.write_storage}

    def _reader(self) -> dict[str, Any]:
        return {**self._config(), **self.read_storage}

    def _config(self) -> dict[str, Any]:
        return {
            "config_kwargs": {"s3": {"addressing_style": self.addressing_style, "payload_signing_enabled": False}}
        }


def all_contenders(addressing_style: str) -> dict[str, Contender]:
    """Every contender by its name."""
    known: list[Contender] = [
        Cloudckpt(addressing_style=addressing_style),
        Cloudckpt(name=COMPRESSED, extensions=(BytePlane(), ZStandard()), addressing_style=addressing_style),
        Cloudckpt(
            name=SLOW_CORE,
            extensions=(BytePlane(), ZStandard(level=9)),
            is_on_one_core=True,
            addressing_style=addressing_style,
        ),
        OnStock(
            reads=Cloudckpt(addressing_style=addressing_style),
            writes=Fsspec(name="fsspec", threads=1, addressing_style=addressing_style),
        ),
        Fsspec(name="fsspec", threads=1, addressing_style=addressing_style),
        Fsspec(
            name="fsspec-default",
            threads=1,
            addressing_style=addressing_style,
            write_storage={"default_block_size": 8 << 20},
            read_storage={},
        ),
        Fsspec(name="fsspec-8", threads=8, addressing_style=addressing_style),
    ]
    return {contender.name: contender for contender in known}
