"""Raw bytes by public clients: what a save sends and a load fetches, with no checkpoint around it.

Law: each client as its own documentation has it, told only what all of them are told.
"""

import asyncio
import io
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from cloudckpt.cli.bench.figures import Operation
from cloudckpt.cli.bench.raw import Raw, bucket_and_key, flat_memory
from cloudckpt.cli.bench.workloads import State
from cloudckpt.ranges import Range, split

T = TypeVar("T")
_BEST_PART_SIZE = 16 << 20


@dataclass(kw_only=True)
class RawAiobotocore(Raw):
    """Aiobotocore over the HTTP session it comes with.

    A reply's body is taken as aiohttp receives it and copied to its place: half the CPU of ``.read()``, which
    joins the chunks first. A part's body has to be bytes: they are made before the clock starts. Parts are of 16 MiB
    at most: what the socket does not take, asyncio moves about in memory, and larger parts took twice the CPU.
    """

    name: str = "raw-aiobotocore"
    modules: tuple[str, ...] = ("aiobotocore", "botocore", "aiohttp")
    _parts: list[bytes] = field(default_factory=list, init=False, repr=False)

    def prepare(self, operation: Operation, state: State, url: str) -> None:
        """See `Prepares.prepare`: cuts the memory in parts."""
        del url
        memory = flat_memory(state)
        if operation == "save" and sum(map(len, self._parts)) != len(memory):
            parts = split(Range(0, len(memory)), min(_BEST_PART_SIZE, self.cut.part_size(len(memory))))
            self._parts = [bytes(memory[part.start : part.stop]) for part in parts]

    def save(self, state: State, url: str) -> None:
        """See `Contender.save`."""
        del state  # `prepare` was given it
        self._runner.run(self._save(*bucket_and_key(url)))

    def load(self, state: State, url: str) -> None:
        """See `Contender.load`."""
        self._runner.run(self._load(flat_memory(state), *bucket_and_key(url)))

    def close(self) -> None:
        """See `Prepares.close`."""
        self._runner.run(self._stack.aclose())
        self._runner.close()

    async def _save(self, bucket: str, key: str) -> None:
        client = await self._connected()
        at = {"Bucket": bucket, "Key": key}
        at["UploadId"] = (await client.create_multipart_upload(**at))["UploadId"]

        async def put(number: int, body: bytes) -> dict[str, Any]:
            reply = await client.upload_part(**at, PartNumber=number + 1, Body=body)
            return {"PartNumber": number + 1, "ETag": reply["ETag"]}

        parts = await _all(self._parts, put, self.concurrency)
        await client.complete_multipart_upload(**at, MultipartUpload={"Parts": parts})

    async def _load(self, memory: memoryview, bucket: str, key: str) -> None:
        client = await self._connected()

        async def get(_: int, at: Range) -> None:
            reply = await client.get_object(Bucket=bucket, Key=key, Range=f"bytes={at.start}-{at.stop - 1}")
            filled = at.start
            async with reply["Body"] as body:
                async for chunk in body.raw_stream.content.iter_any():
                    memory[filled : filled + len(chunk)] = chunk
                    filled += len(chunk)

        await _all(split(Range(0, len(memory)), self.cut.range_size(len(memory))), get, self.concurrency)

    @cached_property
    def _runner(self) -> asyncio.Runner:
        return asyncio.Runner()

    @cached_property
    def _stack(self) -> AsyncExitStack:
        return AsyncExitStack()

    async def _connected(self) -> Any:
        found = self.__dict__.get("_client")
        if found is None:
            from aiobotocore.config import AioConfig
            from aiobotocore.session import AioSession

            context = AioSession().create_client("s3", config=AioConfig(**self._config))
            found = self.__dict__["_client"] = await self._stack.enter_async_context(context)
        return found


async def _all(items: Iterable[T], act: Callable[[int, T], Awaitable[Any]], concurrency: int) -> Sequence[Any]:
    """Acts on each of them, some at a time; returns what came of it, in order."""
    found: dict[int, Any] = {}
    todo = enumerate(items)

    async def work() -> None:
        for number, item in todo:
            found[number] = await act(number, item)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    return [found[number] for number in sorted(found)]


@dataclass(kw_only=True)
class RawBoto3(Raw):
    """boto3's transfer manager, ``upload_fileobj`` and ``download_fileobj``.

    Its settings: docs.aws.amazon.com/boto3, "S3 customization reference", TransferConfig. ``io_chunksize`` is
    what a thread reads from a reply at a time: 1 MiB instead of 256 KiB means a quarter of the calls.
    """

    name: str = "raw-boto3"
    modules: tuple[str, ...] = ("boto3", "botocore", "s3transfer", "urllib3")

    def settings(self) -> dict[str, Any]:
        """See `Contender.settings`."""
        return {**Raw.settings(self), "io_chunksize": 1 << 20}

    def save(self, state: State, url: str) -> None:
        """See `Contender.save`."""
        bucket, key = bucket_and_key(url)
        memory = flat_memory(state)
        transfer = self._transfer(self.cut.part_size(len(memory)))
        self._client.upload_fileobj(_Memory(memory), bucket, key, Config=transfer)

    def load(self, state: State, url: str) -> None:
        """See `Contender.load`."""
        bucket, key = bucket_and_key(url)
        memory = flat_memory(state)
        transfer = self._transfer(self.cut.range_size(len(memory)))
        self._client.download_fileobj(bucket, key, _Memory(memory), Config=transfer)

    def close(self) -> None:
        """See `Prepares.close`."""
        self._client.close()

    def _transfer(self, size: int) -> Any:
        from boto3.s3.transfer import TransferConfig

        return TransferConfig(
            multipart_threshold=size,
            multipart_chunksize=size,
            max_concurrency=self.concurrency,
            io_chunksize=1 << 20,
            preferred_transfer_client="classic",
        )

    @cached_property
    def _client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client("s3", config=Config(**self._config))


class _Memory(io.RawIOBase):
    """Memory as a file."""

    def __init__(self, memory: memoryview) -> None:
        super().__init__()
        self._memory = memory
        self._at = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._memory))[whence]
        return self._at

    def read(self, nbytes: int = -1) -> bytes:  # as io's would do, but for one copy less
        stop = len(self._memory) if nbytes < 0 else self._at + nbytes
        data = bytes(self._memory[self._at : stop])
        self._at += len(data)
        return data

    def readinto(self, into: Any) -> int:
        count = min(len(into), len(self._memory) - self._at)
        into[:count] = self._memory[self._at : self._at + count]
        self._at += count
        return count

    def write(self, data: Any) -> int:
        count = len(data)
        self._memory[self._at : self._at + count] = data
        self._at += count
        return count


@dataclass(kw_only=True)
class RawObstore(Raw):
    """obstore, the Rust crate object_store: a multipart ``put``, and ``get_range_async`` some at a time.

    Its settings: developmentseed.org/obstore, ``put``: ``chunk_size`` and ``max_concurrency``. ``get_ranges``
    would fetch ten at a time, whatever is asked, and keep all of the object in its own memory.
    """

    name: str = "raw-obstore"
    modules: tuple[str, ...] = ("obstore",)

    def save(self, state: State, url: str) -> None:
        """See `Contender.save`."""
        import obstore

        bucket, key = bucket_and_key(url)
        memory = flat_memory(state)
        obstore.put(
            self._store(bucket),
            key,
            memory,
            use_multipart=True,
            chunk_size=self.cut.part_size(len(memory)),
            max_concurrency=self.concurrency,
        )

    def load(self, state: State, url: str) -> None:
        """See `Contender.load`."""
        import obstore

        memory = flat_memory(state)
        bucket, key = bucket_and_key(url)
        store = self._store(bucket)

        async def get(_: int, at: Range) -> None:
            found = await obstore.get_range_async(store, key, start=at.start, end=at.stop)
            memory[at.start : at.stop] = memoryview(found)

        asyncio.run(
            _everything(_all(split(Range(0, len(memory)), self.cut.range_size(len(memory))), get, self.concurrency))
        )

    def _store(self, bucket: str) -> Any:
        stores: dict[str, Any] = self.__dict__.setdefault("_stores", {})
        if bucket not in stores:
            from obstore.store import S3Store

            ca_file = os.environ.get("AWS_CA_BUNDLE")
            client: dict[str, Any] = {"allow_http": True}
            if ca_file:
                with open(ca_file, "rb") as file:
                    client["root_certificate"] = file.read()
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            where = {"endpoint": endpoint} if endpoint else {}
            stores[bucket] = S3Store(bucket, **where, client_options=client, retry_config={"max_retries": 0})  # type: ignore[arg-type]
        return stores[bucket]


async def _everything(found: Awaitable[Any]) -> None:
    await found
