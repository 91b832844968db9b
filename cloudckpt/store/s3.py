"""S3, and what speaks like it, through aiobotocore.

Law: the only file that knows S3. One method, one request: botocore's own retries and aiohttp's re-sending
of requests on lost connections are both off.
"""

import base64
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

from botocore.exceptions import ClientError

from cloudckpt.errors import ChecksumRefusedError, CredentialsError, StaleCredentialsError, StoreError
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import (
    MAX_GET_NBYTES,
    Blob,
    Body,
    Condition,
    IfAbsent,
    IfMatch,
    ObjectInfo,
    Part,
    Upload,
    too_large_to_get,
)
from cloudckpt.store.receive import receive
from cloudckpt.store.s3_abilities import Abilities, ChecksumWay, abilities_of
from cloudckpt.store.s3_clients import s3_client
from cloudckpt.store.s3_credentials import renews, used_by
from cloudckpt.store.s3_errors import code_of, kind_of, told_of, translated
from cloudckpt.store.s3_http import ViewsBody
from cloudckpt.store.s3_listing import Listing
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.silence import heard

_PIECE_NBYTES = 1 << 20
_MAX_DELETE = 1000  # docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html


class S3Store:
    """Implements `Store` over a prefix of a bucket; an async context manager that owns its connections."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        options: S3Options,
        *,
        keeps_client: bool = False,
        max_get_nbytes: int = MAX_GET_NBYTES,
    ) -> None:
        """Roots a store at ``s3://bucket/prefix``.

        Args:
            bucket: its name.
            prefix: empty, or ending in ``/``.
            options: how to reach it.
            keeps_client: see `s3_clients.s3_client`.
            max_get_nbytes: see `Get.get`.
        """
        self._keeps_client = keeps_client
        self._max_get_nbytes = max_get_nbytes
        self._bucket = bucket
        self._prefix = prefix
        self._options = options
        self._client: Any = None
        self._abilities: Abilities
        self._exit = AsyncExitStack()
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.identity = f"{options.endpoint_url or 's3'}/{bucket}"

    async def __aenter__(self) -> Self:
        with translated(self.url):
            self._client = await self._exit.enter_async_context(s3_client(self._options, is_kept=self._keeps_client))
        endpoint_url = self._client.meta.endpoint_url.rstrip("/")  # which may come from the environment
        self.identity = f"{endpoint_url}/{self._bucket}"
        self._abilities = abilities_of(endpoint_url, self._bucket)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client = None
        await self._exit.aclose()

    async def get(self, key: str) -> Blob:
        """See `Get.get`."""
        with self._asked(key) as where:
            reply = await self._client.get_object(**self._at(key))
            async with reply["Body"] as body:
                told = reply.get("ContentLength") or 0
                silence_s = self._options.read_timeout_s
                data = await _read(body, self._max_get_nbytes, silence_s) if told <= self._max_get_nbytes else None
                if data is None:
                    raise too_large_to_get(where, self._max_get_nbytes)
                return Blob(data=data, etag=reply["ETag"])

    async def get_range(self, key: str, at: Range, into: Sequence[memoryview]) -> None:
        """See `Get.get_range`."""
        with self._asked(key) as where:
            reply = await self._client.get_object(**self._at(key), Range=f"bytes={at.start}-{at.stop - 1}")
            async with reply["Body"] as body:
                if reply["ResponseMetadata"]["HTTPStatusCode"] != 206 or reply.get("ContentLength") != len(at):
                    msg = f"{where} ends before byte {at.stop}, or its server does not serve ranges"
                    raise StoreError(msg)
                await receive(body.raw_stream, into, silence_s=self._options.read_timeout_s)

    async def get_first(self, key: str, nbytes: int) -> bytes:
        """See `Get.get_first`."""
        data = b""
        with self._asked(key, ignore={"InvalidRange"}):  # which is the answer where the object is empty
            reply = await self._client.get_object(**self._at(key), Range=f"bytes=0-{nbytes - 1}")
            async with reply["Body"] as body:
                while piece := await heard(body.read(nbytes - len(data)), self._options.read_timeout_s):
                    data += piece
        return data

    async def head(self, key: str) -> ObjectInfo:
        """See `Get.head`."""
        with self._asked(key) as where:
            try:
                reply = await self._client.head_object(**self._at(key))
            except ClientError as e:
                if code_of(e) == "400" and used_by(self._client._get_credentials()) is not None:
                    # S3's answer to expired credentials, for a reply to HEAD has no body that could say so.
                    msg = f"{where}: the credentials may have expired (HTTP 400)"
                    raise StaleCredentialsError(msg) from told_of(e)
                raise
            return ObjectInfo(
                key=key, size=reply["ContentLength"], etag=reply["ETag"], modified=reply["LastModified"]
            )

    async def put(
        self, key: str, body: Body, *, condition: Condition | None = None, crc32c: int | None = None
    ) -> str:
        """See `Put.put`."""
        way = self._abilities.objects
        checksum = None if crc32c is None else self._checksum(way, crc32c)
        with self._asked(key) as where, self._tried(way, where, with_checksum=checksum is not None):
            reply = await self._client.put_object(
                **self._at(key),
                Body=ViewsBody(body),
                **_conditions(condition),
                **_sent(checksum),
                **self._encryption(),
            )
            etag: str = reply["ETag"]
            if checksum is not None:
                self._abilities.look_at_echo(reply, checksum, where)
        return etag

    async def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `List.list_objects`."""
        listing = Listing(self._prefix, prefix, self.url)
        marker: dict[str, str] | None = {}
        while marker is not None:
            with self._asked():
                page, following = await self._page(listing, **marker)
                infos = [listing.info(found) for found in page.get("Contents", ())]
                if following is not None:
                    listing.next_asks(marker, following, ((info.key,) for info in infos))
                marker = following
            for info in infos:
                yield info

    async def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """See `List.list_names`."""
        listing = Listing(self._prefix, prefix, self.url)
        marker: dict[str, str] | None = {}
        while marker is not None:
            with self._asked():
                page, following = await self._page(listing, Delimiter="/", **marker)
                names = [listing.name(found) for found in page.get("CommonPrefixes", ())]
                if following is not None:  # what lies directly there fills pages too
                    beside = [found["Key"] for found in page.get("Contents", ())]
                    below = [found["Prefix"] for found in page.get("CommonPrefixes", ())]
                    listing.next_asks(marker, following, ((key,) for key in beside + below))
                marker = following
            for name in names:
                yield name

    async def delete(self, keys: Sequence[str]) -> None:
        """See `Delete.delete`."""
        for some in _batched(keys, _MAX_DELETE):
            if not self._abilities.deletes_batches or not await self._delete_batch(some):
                for key in some:
                    with self._asked(key, ignore={"NoSuchKey"}):
                        await self._client.delete_object(**self._at(key))

    async def delete_if(self, key: str, condition: IfMatch) -> None:
        """See `Delete.delete_if`."""
        with self._asked(key):
            await self._client.delete_object(**self._at(key), **_conditions(condition))

    async def create_upload(self, key: str) -> Upload:
        """See `Multipart.create_upload`."""
        way = self._abilities.parts
        sends = self._sends(way)
        kind = {"ChecksumAlgorithm": "CRC32C", "ChecksumType": "FULL_OBJECT"} if sends else {}
        # It proves nothing: some ignore at the beginning of an upload what they refuse of its parts.
        with self._asked(key) as where, self._tried(way, where, with_checksum=sends, proves=False):
            reply = await self._client.create_multipart_upload(**self._at(key), **kind, **self._encryption())
            return Upload(key=key, upload_id=reply["UploadId"], has_checksums=sends)

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""
        del offset
        way = self._abilities.parts
        checksum = self._checksum(way, crc32c) if upload.has_checksums else None
        with (
            self._asked(f"{upload.key} (part {number})") as where,
            self._tried(way, where, with_checksum=checksum is not None),
        ):
            reply = await self._client.upload_part(
                **self._at(upload.key),
                UploadId=upload.upload_id,
                PartNumber=number,
                Body=ViewsBody(body),
                **_sent(checksum),
            )
            part = Part(number=number, etag=reply["ETag"], crc32c=crc32c)
            if checksum is not None:
                self._abilities.look_at_echo(reply, checksum, where)
            return part

    def copies_from(self, source: object) -> bool:
        """See `CopiesParts.copies_from`."""
        return isinstance(source, S3Store) and _endpoint_of(source) == _endpoint_of(self)

    async def put_part_copy(
        self, upload: Upload, number: int, source: object, key: str, at: Range, *, crc32c: int | None
    ) -> Part:
        """See `CopiesParts.put_part_copy`."""
        assert isinstance(source, S3Store)  # noqa: S101 - see `copies_from`
        with self._asked(f"{upload.key} (part {number}, copied from {source.url}/{key})") as where:
            reply = await self._client.upload_part_copy(
                **self._at(upload.key),
                UploadId=upload.upload_id,
                PartNumber=number,
                CopySource=source._at(key),
                CopySourceRange=f"bytes={at.start}-{at.stop - 1}",
            )
            result = reply["CopyPartResult"]
            told = result.get("ChecksumCRC32C")  # not by all, and only in uploads with checksums
            if told is not None and crc32c is not None and told != _base64(crc32c):
                msg = f"{where}: the server copied bytes of CRC32C {told}, and {_base64(crc32c)} was expected"
                raise ChecksumRefusedError(msg)
            found = int.from_bytes(base64.b64decode(told), "big") if told else crc32c
            return Part(number=number, etag=result["ETag"], crc32c=found)

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int | None) -> str:
        """See `Multipart.complete_upload`."""
        way = self._abilities.wholes
        names = upload.has_checksums and self._sends(self._abilities.parts)
        checksum = self._checksum(way, crc32c) if names and crc32c is not None else None
        named: list[dict[str, Any]] = []
        for part in sorted(parts, key=lambda p: p.number):
            named.append({"PartNumber": part.number, "ETag": part.etag})
            if checksum is not None and part.crc32c is not None:
                named[-1]["ChecksumCRC32C"] = _base64(part.crc32c)
        whole = {} if checksum is None else {"ChecksumCRC32C": checksum, "ChecksumType": "FULL_OBJECT"}
        with self._asked(upload.key) as where, self._tried(way, where, with_checksum=checksum is not None):
            reply = await self._client.complete_multipart_upload(
                **self._at(upload.key), UploadId=upload.upload_id, MultipartUpload={"Parts": named}, **whole
            )
            etag: str = reply["ETag"]
        return etag

    async def abort_upload(self, upload: Upload) -> None:
        """See `Multipart.abort_upload`."""
        with self._asked(upload.key, ignore={"NoSuchUpload"}):
            await self._client.abort_multipart_upload(**self._at(upload.key), UploadId=upload.upload_id)

    async def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """See `Multipart.list_uploads`."""
        listing = Listing(self._prefix, prefix, self.url)
        marker: dict[str, str] | None = {}
        while marker is not None:
            with self._asked():
                page = await self._client.list_multipart_uploads(
                    Bucket=self._bucket, Prefix=listing.full_prefix, **marker
                )
                _ = page.get("Bucket") or page["IsTruncated"]  # see _page
                uploads = [listing.upload(found) for found in page.get("Uploads", ())]
                following = None
                if page.get("IsTruncated"):
                    following = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
                    listing.next_asks(marker, following, ((upload.key, upload.upload_id) for upload in uploads))
                marker = following
            for upload in uploads:
                yield upload

    async def _page(self, listing: Listing, **more: str) -> tuple[dict[str, Any], dict[str, str] | None]:
        """A page of a listing, and what to ask the next one with."""
        page = await self._client.list_objects_v2(Bucket=self._bucket, Prefix=listing.full_prefix, **more)
        _ = page["Name"]  # every listing has one; an empty answer is none, and must not pass for "no objects"
        return page, {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None

    async def _delete_batch(self, keys: Sequence[str]) -> bool:
        """Whether the server knows how to."""
        with self._asked():
            try:
                reply = await self._client.delete_objects(
                    Bucket=self._bucket,
                    Delete={"Objects": [{"Key": self._prefix + key} for key in keys], "Quiet": True},
                    ChecksumAlgorithm="CRC32C",
                )
            except ClientError as e:
                if self._abilities.falls_back(e):
                    return False
                raise
        for refused in reply.get("Errors", ()):
            code = str(refused.get("Code"))
            if code == "NoSuchKey":
                continue
            msg = f"{self.url}: could not delete {refused.get('Key')}: {code}"
            raise kind_of(code)(msg)
        return True

    @contextmanager
    def _asked(self, key: str | None = None, ignore: Collection[str] = ()) -> Iterator[str]:
        """Around each request: its errors become ours, and expired credentials are renewed for the next."""
        where = self.url if key is None else f"{self.url}/{key}"
        credentials = self._client._get_credentials()
        used = used_by(credentials)
        try:
            with translated(where, ignore):
                yield where
        except StaleCredentialsError as e:
            if renews(credentials, used):
                raise
            msg = (
                f"{e}, and there are no others. A job that outlives its credentials needs credentials=, a function "
                "that gives fresh ones, or a profile or role that AWS's SDK renews"
            )
            raise CredentialsError(msg) from e

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _sends(self, way: ChecksumWay) -> bool:
        return way.is_open if self._options.checksum == "when_supported" else self._options.checksum is not None

    def _checksum(self, way: ChecksumWay, crc32c: int) -> str | None:
        return _base64(crc32c) if self._sends(way) else None

    def _tried(
        self, way: ChecksumWay, where: str, *, with_checksum: bool, proves: bool = True
    ) -> AbstractContextManager[None]:
        if self._options.checksum != "when_supported":
            return nullcontext()
        return way.tried(where, with_checksum=with_checksum, proves=proves)

    def _encryption(self) -> dict[str, str]:
        o = self._options
        named = {"ServerSideEncryption": o.server_side_encryption, "SSEKMSKeyId": o.sse_kms_key_id}
        return {name: value for name, value in named.items() if value is not None}


async def _read(body: Any, most: int, silence_s: float) -> bytes | None:
    """The whole body, or None if it has more bytes than that."""
    pieces, nbytes = [], 0
    while piece := await heard(body.read(_PIECE_NBYTES), silence_s):
        pieces.append(piece)
        nbytes += len(piece)
        if nbytes > most:
            return None
    return b"".join(pieces)


def _endpoint_of(store: S3Store) -> str:
    return store.identity.removesuffix(f"/{store._bucket}")


def _conditions(condition: Condition | None) -> dict[str, str]:
    match condition:
        case IfAbsent():
            return {"IfNoneMatch": "*"}
        case IfMatch(etag):
            return {"IfMatch": etag}
        case None:
            return {}


def _sent(checksum: str | None) -> dict[str, str]:
    return {} if checksum is None else {"ChecksumAlgorithm": "CRC32C", "ChecksumCRC32C": checksum}


def _base64(crc32c: int) -> str:
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()


def _batched(keys: Sequence[str], size: int) -> "list[Sequence[str]]":
    return [keys[i : i + size] for i in range(0, len(keys), size)]
