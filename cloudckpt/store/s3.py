"""S3, and what speaks like it, through aiobotocore.

Law: the only file that knows S3. One method, one request: botocore's own retries and aiohttp's re-sending
of requests on lost connections are both off.
"""

import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from cloudckpt.errors import StoreError
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import (
    Blob,
    Body,
    Condition,
    IfAbsent,
    IfMatch,
    ObjectInfo,
    Part,
    Upload,
)
from cloudckpt.store.receive import receive
from cloudckpt.store.s3_clients import s3_client
from cloudckpt.store.s3_errors import translated
from cloudckpt.store.s3_http import ViewsBody
from cloudckpt.store.s3_options import S3Options

_MAX_DELETE = 1000  # docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html


class S3Store:
    """Implements `Store` over a prefix of a bucket; an async context manager that owns its connections."""

    def __init__(self, bucket: str, prefix: str, options: S3Options, *, keeps_client: bool = False) -> None:
        """Roots a store at ``s3://bucket/prefix``.

        Args:
            bucket: its name.
            prefix: empty, or ending in ``/``.
            options: how to reach it.
            keeps_client: see `s3_clients.s3_client`.
        """
        self._keeps_client = keeps_client
        self._bucket = bucket
        self._prefix = prefix
        self._options = options
        self._client: Any = None
        self._exit = AsyncExitStack()
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.identity = f"{options.endpoint_url or 's3'}/{bucket}"

    async def __aenter__(self) -> Self:
        with translated(self.url):
            self._client = await self._exit.enter_async_context(s3_client(self._options, is_kept=self._keeps_client))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client = None
        await self._exit.aclose()

    async def get(self, key: str) -> Blob:
        """See `Get.get`."""
        with translated(f"{self.url}/{key}"):
            reply = await self._client.get_object(**self._at(key))
            async with reply["Body"] as body:
                return Blob(data=await body.read(), etag=reply["ETag"])

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `Get.get_range`."""
        where = f"{self.url}/{key}"
        with translated(where):
            reply = await self._client.get_object(**self._at(key), Range=f"bytes={at.start}-{at.stop - 1}")
            async with reply["Body"] as body:
                if reply["ResponseMetadata"]["HTTPStatusCode"] != 206 or reply.get("ContentLength") != len(at):
                    msg = f"{where} ends before byte {at.stop}, or its server does not serve ranges"
                    raise StoreError(msg)
                await receive(body.raw_stream, into)

    async def head(self, key: str) -> ObjectInfo:
        """See `Get.head`."""
        with translated(f"{self.url}/{key}"):
            reply = await self._client.head_object(**self._at(key))
            return ObjectInfo(
                key=key, size=reply["ContentLength"], etag=reply["ETag"], modified=reply["LastModified"]
            )

    async def put(
        self, key: str, body: Body, *, condition: Condition | None = None, crc32c: int | None = None
    ) -> str:
        """See `Put.put`."""
        with translated(f"{self.url}/{key}"):
            reply = await self._client.put_object(
                **self._at(key),
                Body=ViewsBody(body),
                **_conditions(condition),
                **self._checksum(crc32c),
                **self._encryption(),
            )
            etag: str = reply["ETag"]
        return etag

    async def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `List.list_objects`."""
        async for page in self._pages(prefix):
            for found in page.get("Contents", ()):
                yield ObjectInfo(
                    key=found["Key"].removeprefix(self._prefix),
                    size=found["Size"],
                    etag=found["ETag"],
                    modified=found["LastModified"],
                )

    async def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """See `List.list_names`."""
        full = self._prefix + prefix
        async for page in self._pages(prefix, Delimiter="/"):
            for found in page.get("CommonPrefixes", ()):
                yield found["Prefix"].removeprefix(full).rstrip("/")

    async def delete(self, keys: Sequence[str]) -> None:
        """See `Delete.delete`."""
        for some in _batched(keys, _MAX_DELETE):
            with translated(self.url):
                reply = await self._client.delete_objects(
                    Bucket=self._bucket,
                    Delete={"Objects": [{"Key": self._prefix + key} for key in some], "Quiet": True},
                )
            for refused in reply.get("Errors", ()):
                msg = f"{self.url}: could not delete {refused.get('Key')}: {refused.get('Code')}"
                raise StoreError(msg)

    async def delete_if(self, key: str, condition: IfMatch) -> None:
        """See `Delete.delete_if`."""
        with translated(f"{self.url}/{key}"):
            await self._client.delete_object(**self._at(key), **_conditions(condition))

    async def create_upload(self, key: str) -> Upload:
        """See `Multipart.create_upload`."""
        kind = {"ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"}
        with translated(f"{self.url}/{key}"):
            reply = await self._client.create_multipart_upload(
                **self._at(key), **(kind if self._options.checksum else {}), **self._encryption()
            )
            return Upload(key=key, upload_id=reply["UploadId"])

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""
        del offset
        with translated(f"{self.url}/{upload.key} (part {number})"):
            reply = await self._client.upload_part(
                **self._at(upload.key),
                UploadId=upload.upload_id,
                PartNumber=number,
                Body=ViewsBody(body),
                **self._checksum(crc32c),
            )
            return Part(number=number, etag=reply["ETag"], crc32c=crc32c)

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int) -> str:
        """See `Multipart.complete_upload`."""
        named: list[dict[str, Any]] = []
        for part in sorted(parts, key=lambda p: p.number):
            named.append({"PartNumber": part.number, "ETag": part.etag})
            if self._options.checksum:
                named[-1]["ChecksumCRC32C"] = _base64(part.crc32c)
        whole = {"ChecksumCRC32C": _base64(crc32c), "ChecksumType": "FULL_OBJECT"}
        with translated(f"{self.url}/{upload.key}"):
            reply = await self._client.complete_multipart_upload(
                **self._at(upload.key),
                UploadId=upload.upload_id,
                MultipartUpload={"Parts": named},
                **(whole if self._options.checksum else {}),
            )
            etag: str = reply["ETag"]
        return etag

    async def abort_upload(self, upload: Upload) -> None:
        """See `Multipart.abort_upload`."""
        with translated(f"{self.url}/{upload.key}", ignore={"NoSuchUpload"}):
            await self._client.abort_multipart_upload(**self._at(upload.key), UploadId=upload.upload_id)

    async def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """See `Multipart.list_uploads`."""
        marker: dict[str, str] = {}
        while True:
            with translated(self.url):
                page = await self._client.list_multipart_uploads(
                    Bucket=self._bucket, Prefix=self._prefix + prefix, **marker
                )
            for found in page.get("Uploads", ()):
                key = found["Key"].removeprefix(self._prefix)
                yield Upload(key=key, upload_id=found["UploadId"], started=found.get("Initiated"))
            if not page.get("IsTruncated"):
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    async def _pages(self, prefix: str, **more: str) -> AsyncIterator[dict[str, Any]]:
        token: dict[str, str] = {}
        while True:
            with translated(self.url):
                page = await self._client.list_objects_v2(
                    Bucket=self._bucket, Prefix=self._prefix + prefix, **token, **more
                )
                _ = page["Name"]  # every listing has one; an empty answer is none, and must not pass for "no objects"
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _checksum(self, crc32c: int | None) -> dict[str, str]:
        if crc32c is None or self._options.checksum is None:
            return {}
        return {"ChecksumAlgorithm": "CRC32C", "ChecksumCRC32C": _base64(crc32c)}

    def _encryption(self) -> dict[str, str]:
        o = self._options
        named = {"ServerSideEncryption": o.server_side_encryption, "SSEKMSKeyId": o.sse_kms_key_id}
        return {name: value for name, value in named.items() if value is not None}


def _conditions(condition: Condition | None) -> dict[str, str]:
    match condition:
        case IfAbsent():
            return {"IfNoneMatch": "*"}
        case IfMatch(etag):
            return {"IfMatch": etag}
        case None:
            return {}


def _base64(crc32c: int) -> str:
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


def _batched(keys: Sequence[str], size: int) -> "list[Sequence[str]]":
    return [keys[i : i + size] for i in range(0, len(keys), size)]
