"""Azure Blob Storage: blocks that are put in any order, and a list of them that makes the blob.

Law: the only file that knows Azure's blobs.
"""

import base64
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from awscrt.checksums import crc64nvme

from cloudckpt.errors import (
    BucketNotFoundError,
    ChecksumRefusedError,
    CredentialsError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PreconditionFailedError,
    StoreUnavailableError,
    ThrottledError,
)
from cloudckpt.store.azure_account import Account, account_of
from cloudckpt.store.cloud_options import AzureOptions
from cloudckpt.store.local import verify
from cloudckpt.store.protocols import Body, Condition, IfAbsent, IfMatch, ObjectInfo, Part, Upload
from cloudckpt.store.rest import Meaning, RestStore, http_session, next_page, text, time_of
from cloudckpt.store.s3_http import OneAttemptSession
from cloudckpt.store.s3_options import S3Options
from cloudckpt.threads import in_thread

_BLOCKS = "blocks"
"""The name of every upload: a blob's blocks are its own, and no two uploads of ours share a key."""

_BY_CODE: dict[str, Meaning] = {  # learn.microsoft.com/rest/api/storageservices/blob-service-error-codes
    "ContainerNotFound": (BucketNotFoundError, "no such container; create it, or check the URL and the account"),
    "ContainerBeingDeleted": (BucketNotFoundError, "the container is being deleted"),
    "BlobNotFound": (ObjectNotFoundError, "no such blob"),
    "InvalidBlockList": (ObjectNotFoundError, "the blocks of this upload are not there any more"),
    "BlobAlreadyExists": (PreconditionFailedError, "the condition of the request does not hold"),
    "ConditionNotMet": (PreconditionFailedError, "the condition of the request does not hold"),
    "Crc64Mismatch": (ChecksumRefusedError, "the body was damaged on its way"),
    "AuthenticationFailed": (CredentialsError, "the credentials are not accepted"),
    "InvalidAuthenticationInfo": (CredentialsError, "the credentials are not accepted"),
    "NoAuthenticationInformation": (CredentialsError, "the account wants credentials"),
    "PublicAccessNotPermitted": (PermissionDeniedError, "the account lets nobody in without credentials"),
    "ServerBusy": (ThrottledError, "the server asks for fewer requests"),
    "OperationTimedOut": (StoreUnavailableError, "the server had no time left"),
    "InternalError": (StoreUnavailableError, "the server had an error of its own"),
}


@asynccontextmanager
async def azure_store(
    container: str, prefix: str, options: AzureOptions, http: S3Options, *, keeps_client: bool
) -> AsyncIterator["AzureStore"]:
    """A store rooted at ``az://container/prefix``, for as long as the context lasts.

    Args:
        container: its name.
        prefix: empty, or ending in ``/``.
        options: which account, and how to reach it.
        http: timeouts and the like, whether to ask without credentials, and whether to send checksums.
        keeps_client: leave the connections open for the next on this loop.

    Raises:
        CredentialsError: no account is named.
        MissingLibraryError: azure-identity is needed, and not installed.
    """
    account = await in_thread(lambda: account_of(options, is_anonymous=http.is_anonymous))
    async with http_session(account.endpoint_url, http, is_kept=keeps_client) as session:
        yield AzureStore(container, prefix, account, session, sends_checksums=http.checksum is not None)


class AzureStore(RestStore):
    """Implements `Store` over a prefix of a container.

    Azure verifies CRC-64, and not the CRC32C of our manifests: a body is held against that here, and sent with its
    CRC-64.
    """

    def __init__(
        self, container: str, prefix: str, account: Account, session: OneAttemptSession, *, sends_checksums: bool
    ) -> None:
        """See `azure_store`."""
        super().__init__("az", container, prefix, account.endpoint_url, session)
        self._account = account
        self._sends_checksums = sends_checksums

    async def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `List.list_objects`."""
        async for page in self._pages(prefix, {}):
            for found in page.iter("Blob"):
                with self._understood(self.url):
                    info = self._info(found, prefix)
                yield info

    async def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """See `List.list_names`."""
        async for page in self._pages(prefix, {"delimiter": "/"}):
            for found in page.iter("BlobPrefix"):
                with self._understood(self.url):
                    name = self._name(text(found, "Name"), prefix)
                yield name

    async def create_upload(self, key: str) -> Upload:
        """See `Multipart.create_upload`. Nothing is sent: the first block begins it."""
        return Upload(key=key, upload_id=_BLOCKS)

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""
        del offset
        query = {"comp": "block", "blockid": _block(number)}
        headers = await self._checksums(body, crc32c, f"{upload.key} (part {number})")
        await self._ask("PUT", upload.key, query=query, headers=headers, body=body)
        return Part(number=number, etag=_block(number), crc32c=crc32c)

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int | None) -> str:
        """See `Multipart.complete_upload`."""
        del crc32c  # each block was verified when it came
        return await self._put_blocks(upload.key, [part.etag for part in sorted(parts, key=lambda p: p.number)], None)

    async def abort_upload(self, upload: Upload) -> None:
        """See `Multipart.abort_upload`. Blocks go when a blob is made without them; Azure has no request for it."""
        try:
            etag = await self._put_blocks(upload.key, [], IfAbsent())
            await self.delete_if(upload.key, IfMatch(etag))
        except (PreconditionFailedError, ObjectNotFoundError):
            return  # it was completed, or another did the same

    async def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """See `Multipart.list_uploads`: blobs that are listed only where those without committed blocks are too."""
        found: dict[str, datetime | None] = {}
        async for page in self._pages(prefix, {"include": "uncommittedblobs"}):
            for blob in page.iter("Blob"):
                with self._understood(self.url):
                    if not int(blob.findtext("Properties/Content-Length") or 0):
                        told = blob.findtext("Properties/Last-Modified")
                        found[self._own(text(blob, "Name"), prefix)] = time_of(told) if told else None
        committed = {info.key async for info in self.list_objects(prefix)} if found else set()
        for key in sorted(found.keys() - committed):
            yield Upload(key=key, upload_id=_BLOCKS, started=found[key])

    async def _put_blocks(self, key: str, blocks: Sequence[str], condition: Condition | None) -> str:
        root = Element("BlockList")
        for block in blocks:
            SubElement(root, "Uncommitted").text = block
        headers = {"Content-Type": "application/xml", **self._conditions(condition)}
        body = [memoryview(tostring(root))]
        reply = await self._ask("PUT", key, query={"comp": "blocklist"}, headers=headers, body=body)
        with self._understood(self._where(key)):
            return self._etag(reply.headers)

    async def _pages(self, prefix: str, more: dict[str, str]) -> AsyncIterator[Element]:
        marker: str | None = ""
        while marker is not None:
            query: dict[str, str | int] = {
                "restype": "container",
                "comp": "list",
                "prefix": self._prefix + prefix,
                **more,
            }
            if marker:
                query["marker"] = marker
            page = await self._ask_xml("GET", None, query)
            with self._understood(self.url):
                following = text(page, "NextMarker")  # every listing has one, empty at the end
            yield page
            marker = next_page(marker, following, self.url)

    def _info(self, found: Element, prefix: str) -> ObjectInfo:
        return ObjectInfo(
            key=self._own(text(found, "Name"), prefix),
            size=int(text(found, "Properties/Content-Length")),
            etag=_quoted(text(found, "Properties/Etag")),
            modified=time_of(text(found, "Properties/Last-Modified")),
        )

    async def _signed(self, method: str, url: str, headers: dict[str, str], body: Body) -> tuple[str, dict[str, str]]:
        del body
        return await self._account.signed(method, url, headers)

    def _code(self, reply: Any, body: bytes) -> str:
        del body
        code: str = reply.headers.get("x-ms-error-code", "")
        return code

    def _meaning(self, code: str) -> Meaning | None:
        return _BY_CODE.get(code)

    def _etag(self, headers: Mapping[str, str]) -> str:
        return _quoted(headers["etag"])

    def _conditions(self, condition: Condition | None) -> dict[str, str]:
        match condition:
            case IfAbsent():
                return {"If-None-Match": "*"}
            case IfMatch(etag):
                return {"If-Match": etag}
            case None:
                return {}

    async def _checksums(self, body: Body, crc32c: int | None, where: str) -> dict[str, str]:
        if crc32c is None:
            return {}

        def look() -> str:
            verify(body, crc32c, where)
            found = 0
            for view in body:
                found = crc64nvme(view, found)
            return base64.b64encode(found.to_bytes(8, "little")).decode()

        return {"x-ms-content-crc64": await in_thread(look)} if self._sends_checksums else {}

    def _put_headers(self) -> dict[str, str]:
        return {"x-ms-blob-type": "BlockBlob"}


def _block(number: int) -> str:
    return base64.b64encode(f"{number:05}".encode()).decode()  # of one length for all blocks of a blob


def _quoted(etag: str) -> str:
    return '"' + etag.strip('"') + '"'  # listings leave the quotes out
