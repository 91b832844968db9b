"""Checkpoints by others: PyTorch's own writers and readers, and Amazon's.

Law: each in its best documented settings, with their source.
"""

import os
import shutil
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from cloudckpt.cli.bench.figures import Operation
from cloudckpt.cli.bench.workloads import State


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

    is_raw: ClassVar[bool] = False

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


@dataclass(frozen=True, slots=True, kw_only=True)
class S3TorchConnector:
    """Amazon's S3 Connector for PyTorch: its S3StorageWriter and S3StorageReader, which make a client at each call.

    Its settings: github.com/awslabs/s3-connector-for-pytorch, README, "Distributed checkpoints" and
    "S3ClientConfig". The reader's default, ``S3ReaderConstructor.dcp_optimized()``, is the one it recommends
    for DCP. Of 1 and 8 threads, 10 and 100 Gbit/s, and parts of 8 and 32 MiB, these loaded fastest and with least
    CPU, and saved as fast as any. Its client sends checksums of what it uploads whatever it is told. It is
    OpenSSL's variable, not AWS's, that names the certificates it trusts.

    Attributes:
        name: see `Contender.name`.
        modules: see `Contender.modules`.
        threads: the writer's ``thread_count``; it writes an object for each.
        throughput_target_gbps: decides how many connections its client makes.
        part_size: of its uploads and downloads.
        addressing_style: see `S3Options`; anything but ``virtual`` puts the bucket in the path.
    """

    is_raw: ClassVar[bool] = False

    name: str = "s3torchconnector"
    modules: tuple[str, ...] = ("torch", "s3torchconnector", "s3torchconnectorclient")
    threads: int = 8
    throughput_target_gbps: float = 100.0
    part_size: int = 8 << 20
    addressing_style: Any = "auto"

    def settings(self) -> dict[str, Any]:
        """See `Contender.settings`."""
        return {
            "thread_count": self.threads,
            "reader_constructor": "dcp_optimized",
            "throughput_target_gbps": self.throughput_target_gbps,
            "part_size": self.part_size,
        }

    def save(self, state: State, url: str) -> None:
        """See `Contender.save`."""
        from s3torchconnector.dcp import S3StorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        writer = S3StorageWriter(_region(), url, s3client_config=self._client(), thread_count=self.threads)
        save(state, storage_writer=writer, no_dist=True)

    def load(self, state: State, url: str) -> None:
        """See `Contender.load`."""
        from s3torchconnector.dcp import S3StorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        load(state, storage_reader=S3StorageReader(_region(), url, s3client_config=self._client()), no_dist=True)

    def _client(self) -> Any:
        from s3torchconnector import S3ClientConfig

        if "AWS_CA_BUNDLE" in os.environ:
            os.environ["SSL_CERT_FILE"] = os.environ["AWS_CA_BUNDLE"]
        return S3ClientConfig(
            throughput_target_gbps=self.throughput_target_gbps,
            part_size=self.part_size,
            force_path_style=self.addressing_style != "virtual",
        )


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """PyTorch's FileSystemWriter and FileSystemReader on a local directory, as they come.

    Their defaults, which are what users get: one thread (more of them were not faster), ``sync_files=True``
    (each file is forced to the disk), ``single_file_per_rank=True``.

    Attributes:
        name: see `Contender.name`.
        modules: see `Contender.modules`.
        folder: in which it works; the last checkpoint is removed before the next is saved.
    """

    is_raw: ClassVar[bool] = False

    name: str = "filesystem"
    modules: tuple[str, ...] = ("torch",)
    folder: str

    def settings(self) -> dict[str, Any]:
        """See `Contender.settings`."""
        return {"thread_count": 1, "sync_files": True, "folder": self.folder}

    def prepare(self, operation: Operation, state: State, url: str) -> None:
        """See `Prepares.prepare`."""
        del state, url
        if operation == "save":
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """See `Prepares.close`."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def save(self, state: State, url: str) -> None:
        """See `Contender.save`."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        save(state, storage_writer=FileSystemWriter(self._path(url)), no_dist=True)

    def load(self, state: State, url: str) -> None:
        """See `Contender.load`."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        load(state, storage_reader=FileSystemReader(self._path(url)), no_dist=True)

    def _path(self, url: str) -> str:
        return os.path.join(self.folder, *urlsplit(url).path.strip("/").split("/"))
