"""Google Cloud Storage, through its XML interface: the one with parallel parts.

Law: the only file that knows GCS. An object's ETag is its generation here, which every condition of GCS's takes:
docs.cloud.google.com/storage/docs/request-preconditions.
"""

import base64
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from xml.etree.ElementTree import Element, ParseError, SubElement, fromstring, tostring

from cloudckpt.errors import (
    BucketNotFoundError,
    ChecksumRefusedError,
    CredentialsError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PreconditionFailedError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
)
from cloudckpt.store.cloud_credentials import Tokens, google_tokens
from cloudckpt.store.cloud_options import GCS_NAMES, GcsOptions, check_address
from cloudckpt.store.protocols import Body, Condition, IfAbsent, ObjectInfo, Part, Upload
from cloudckpt.store.rest import Meaning, Reply, RestStore, http_session, next_page, text, time_of
from cloudckpt.store.s3_http import OneAttemptSession
from cloudckpt.store.s3_options import S3Options

_ENDPOINT_URL = "https://storage.googleapis.com"
_ABSENT = "0"
_NOBODYS = "1"
"""Generations are microseconds since 1970: no object has this one."""

_BY_CODE: dict[str, Meaning] = {  # docs.cloud.google.com/storage/docs/xml-api/reference-status
    "NoSuchBucket": (BucketNotFoundError, "no such bucket; create it, or check the URL"),
    "NoSuchKey": (ObjectNotFoundError, "no such object"),
    "NoSuchUpload": (ObjectNotFoundError, "no such multipart upload"),
    "PreconditionFailed": (PreconditionFailedError, "the condition of the request does not hold"),
    "BadDigest": (ChecksumRefusedError, "the body was damaged on its way"),
    "AuthenticationRequired": (CredentialsError, "the credentials are not accepted"),
    "InvalidSecurity": (CredentialsError, "the credentials are not accepted"),
    "AccessDenied": (PermissionDeniedError, "the credentials do not allow this request"),
    "SlowDown": (ThrottledError, "the server asks for fewer requests"),
    "RateLimitExceeded": (ThrottledError, "the server asks for fewer requests"),
    "InternalError": (StoreUnavailableError, "the server had an error of its own"),
}


@asynccontextmanager
async def gcs_store(
    bucket: str, prefix: str, options: GcsOptions, http: S3Options, *, keeps_client: bool
) -> AsyncIterator["GcsStore"]:
    """A store rooted at ``gs://bucket/prefix``, for as long as the context lasts.

    Args:
        bucket: its name.
        prefix: empty, or ending in ``/``.
        options: how to reach it.
        http: timeouts and the like, and whether to ask without credentials.
        keeps_client: leave the connections open for the next on this loop.

    Raises:
        MissingLibraryError: google-auth is not installed.
    """
    emulator = os.environ.get("STORAGE_EMULATOR_HOST") if options.gcs_endpoint_url is None else None
    endpoint_url = options.gcs_endpoint_url or _url_of(emulator)
    check_address(endpoint_url, GCS_NAMES)
    tokens = None if http.is_anonymous or emulator else google_tokens(options.gcs_credentials)
    async with http_session(endpoint_url, http, is_kept=keeps_client) as session:
        yield GcsStore(bucket, prefix, endpoint_url, session, tokens=tokens, project=options.gcs_project)


def _url_of(emulator: str | None) -> str:
    if not emulator:
        return _ENDPOINT_URL
    return emulator if "://" in emulator else f"http://{emulator}"


class GcsStore(RestStore):
    """Implements `Store` over a prefix of a bucket."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        endpoint_url: str,
        session: OneAttemptSession,
        *,
        tokens: Tokens | None,
        project: str | None,
    ) -> None:
        """See `gcs_store`; without ``tokens``, requests are anonymous."""
        super().__init__("gs", bucket, prefix, endpoint_url, session)
        self._tokens = tokens
        self._project = project

    async def put(
        self, key: str, body: Body, *, condition: Condition | None = None, crc32c: int | None = None
    ) -> str:
        """See `Put.put`."""
        headers = self._conditions(condition) | await self._checksums(body, crc32c, key)
        reply = await self._ask("PUT", key, headers=headers, body=body)
        self._look_at_echo(reply, crc32c, self._where(key))
        with self._understood(self._where(key)):
            return self._etag(reply.headers)

    async def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `List.list_objects`."""
        async for page in self._pages(prefix, {}):
            for found in page.iter("Contents"):
                with self._understood(self.url):
                    info = ObjectInfo(
                        key=self._own(text(found, "Key"), prefix),
                        size=int(text(found, "Size")),
                        etag=f'"{text(found, "Generation")}"',
                        modified=time_of(text(found, "LastModified")),
                    )
                yield info

    async def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """See `List.list_names`."""
        async for page in self._pages(prefix, {"delimiter": "/"}):
            for found in page.iter("CommonPrefixes"):
                with self._understood(self.url):
                    name = self._name(text(found, "Prefix"), prefix)
                yield name

    async def create_upload(self, key: str) -> Upload:
        """See `Multipart.create_upload`."""
        begun = await self._ask_xml("POST", key, {"uploads": ""})
        with self._understood(self._where(key)):
            return Upload(key=key, upload_id=text(begun, "UploadId"))

    async def put_part(self, upload: Upload, number: int, offset: int, body: Body, *, crc32c: int) -> Part:
        """See `Multipart.put_part`."""
        del offset
        query: dict[str, str | int] = {"partNumber": number, "uploadId": upload.upload_id}
        headers = await self._checksums(body, crc32c, upload.key)
        reply = await self._ask("PUT", upload.key, query=query, headers=headers, body=body)
        where = f"{self._where(upload.key)} (part {number})"
        self._look_at_echo(reply, crc32c, where)
        with self._understood(where):
            return Part(number=number, etag=reply.first("etag"), crc32c=crc32c)

    async def complete_upload(self, upload: Upload, parts: Sequence[Part], *, crc32c: int | None) -> str:
        """See `Multipart.complete_upload`. A second request tells the object's generation, as the first does not."""
        root = Element("CompleteMultipartUpload")
        for part in sorted(parts, key=lambda p: p.number):
            named = SubElement(root, "Part")
            SubElement(named, "PartNumber").text = str(part.number)
            SubElement(named, "ETag").text = part.etag
        body = [memoryview(tostring(root))]
        headers = {"Content-Type": "application/xml"}
        await self._ask("POST", upload.key, query={"uploadId": upload.upload_id}, headers=headers, body=body)
        there = await self._ask("HEAD", upload.key)
        where = self._where(upload.key)
        try:
            self._look_at_echo(there, crc32c, where)
        except ChecksumRefusedError as e:  # which would be asked again, and there is nothing to ask for any more
            msg = f"{where}: its parts were put together wrongly: {e}"
            raise StoreError(msg) from e
        with self._understood(where):
            return self._etag(there.headers)

    async def abort_upload(self, upload: Upload) -> None:
        """See `Multipart.abort_upload`."""
        await self._ask("DELETE", upload.key, query={"uploadId": upload.upload_id}, also={404})

    async def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """See `Multipart.list_uploads`."""
        marker: dict[str, str | int] | None = {}
        while marker is not None:
            asked = {"uploads": "", "prefix": self._prefix + prefix, **marker}
            page = await self._ask_xml("GET", None, asked)
            for found in page.iter("Upload"):
                with self._understood(self.url):
                    key = self._own(text(found, "Key"), prefix)
                    started = time_of(text(found, "Initiated"))
                    upload = Upload(key=key, upload_id=text(found, "UploadId"), started=started)
                yield upload
            with self._understood(self.url):
                following = text(page, "NextUploadIdMarker") if text(page, "IsTruncated") == "true" else None
                following = next_page(str(marker.get("upload-id-marker", "")), following, self.url)
                marker = (
                    {"key-marker": text(page, "NextKeyMarker"), "upload-id-marker": following} if following else None
                )

    async def _pages(self, prefix: str, more: dict[str, str]) -> AsyncIterator[Element]:
        token: str | None = ""
        while token is not None:
            query: dict[str, str | int] = {"list-type": 2, "prefix": self._prefix + prefix, **more}
            if token:
                query["continuation-token"] = token
            page = await self._ask_xml("GET", None, query)
            with self._understood(self.url):
                text(page, "Name")  # every listing has one; an empty answer must not pass for "no objects"
                following = text(page, "NextContinuationToken") if text(page, "IsTruncated") == "true" else None
            yield page
            token = next_page(token, following, self.url)

    def _look_at_echo(self, reply: Reply, crc32c: int | None, where: str) -> None:
        """GCS tells the checksum that it found, whether it was sent one or not."""
        found = dict(told.strip().split("=", 1) for told in reply.all("x-goog-hash").split(",") if "=" in told)
        if crc32c is not None and "crc32c" in found and found["crc32c"] != _base64(crc32c):
            msg = f"{where}: the body was damaged on its way: GCS found CRC32C {found['crc32c']}"
            raise ChecksumRefusedError(msg)

    async def _signed(self, method: str, url: str, headers: dict[str, str], body: Body) -> tuple[str, dict[str, str]]:
        del method, body
        token = await self._tokens.token() if self._tokens else ""
        if token:
            headers = headers | {"Authorization": f"Bearer {token}"}
        if self._project is not None:
            headers = headers | {"x-goog-user-project": self._project}
        return url, headers

    def _code(self, reply: Any, body: bytes) -> str:
        del reply
        try:
            return fromstring(body).findtext("Code") or ""  # noqa: S314 - see `_ask_xml`
        except ParseError:
            return ""

    def _meaning(self, code: str) -> Meaning | None:
        return _BY_CODE.get(code)

    def _etag(self, headers: Mapping[str, str]) -> str:
        return f'"{headers["x-goog-generation"]}"'

    def _conditions(self, condition: Condition | None) -> dict[str, str]:
        if condition is None:
            return {}
        if isinstance(condition, IfAbsent):
            return {"x-goog-if-generation-match": _ABSENT}
        generation = condition.etag.strip('"')
        is_one = generation.isdecimal() and int(generation) > 0
        return {"x-goog-if-generation-match": generation if is_one else _NOBODYS}

    async def _checksums(self, body: Body, crc32c: int | None, where: str) -> dict[str, str]:
        del body, where
        return {} if crc32c is None else {"x-goog-hash": f"crc32c={_base64(crc32c)}"}


def _base64(crc32c: int) -> str:
    return base64.b64encode(crc32c.to_bytes(4, "big")).decode()
