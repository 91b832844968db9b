"""How S3 is reached, and what its first answer says of the way there.

Law: one request. Where credentials come from is told, and nothing of them.
"""

from dataclasses import dataclass
from datetime import MAXYEAR, MINYEAR, UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.exceptions import ClientError

from cloudckpt.errors import CheckpointError
from cloudckpt.store.s3_clients import s3_client
from cloudckpt.store.s3_errors import translated
from cloudckpt.store.s3_options import S3Options

_SOURCES = {
    "explicit": "options",
    "env": "the environment (AWS_ACCESS_KEY_ID)",
    "shared-credentials-file": "AWS's credentials file",
    "config-file": "AWS's config file",
    "custom-process": "the credential_process of AWS's config file",
    "assume-role": "a role that is assumed",
    "assume-role-with-web-identity": "a role that is assumed by a web identity",
    "container-role": "the container's role",
    "iam-role": "the machine's role",
    "sso": "single sign-on",
}
"""By botocore's names of what found them (botocore.credentials)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What one request showed.

    Attributes:
        source: where credentials were found, in words; None where none were.
        expires_at: when they expire; None where nobody knows.
        endpoint_url: that was asked; empty where there is none to ask.
        region: that requests are signed for.
        bucket_region: that the bucket is in; None where the server does not say.
        clock: by how much this machine's clock is ahead of the server's, from and to; None where nothing tells.
        refusal: what the request failed of.
    """

    source: str | None = None
    expires_at: datetime | None = None
    endpoint_url: str = ""
    region: str = ""
    bucket_region: str | None = None
    clock: tuple[timedelta, timedelta] | None = None
    refusal: CheckpointError | None = None


async def reach_s3(bucket: str, prefix: str, options: S3Options) -> Reach:
    """Asks for a listing of ``prefix``, of one key; whatever fails is told and not raised."""
    where = f"s3://{bucket}/{prefix}".rstrip("/")
    try:
        with translated(where):
            async with s3_client(options, is_kept=True) as client:
                return await _ask(client, bucket, prefix, where)
    except CheckpointError as e:
        return Reach(refusal=e)


async def _ask(client: Any, bucket: str, prefix: str, where: str) -> Reach:
    credentials = client._get_credentials()
    headers: dict[str, str] = {}
    refusal: CheckpointError | None = None
    before = datetime.now(UTC)
    try:
        with translated(where):
            await _list(client, bucket, prefix, headers)
    except CheckpointError as e:
        refusal = e
    return Reach(
        source=_source_of(credentials),
        expires_at=_expiry_of(credentials),
        endpoint_url=client.meta.endpoint_url,
        region=client.meta.region_name,
        bucket_region=headers.get("x-amz-bucket-region"),
        clock=_ahead(headers.get("date", ""), before, datetime.now(UTC)),
        refusal=refusal,
    )


async def _list(client: Any, bucket: str, prefix: str, headers: dict[str, str]) -> None:
    """Asks, and keeps the headers of the answer, be it an error."""
    try:
        reply = await client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
    except ClientError as e:
        headers.update(e.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}))
        raise
    headers.update(reply["ResponseMetadata"]["HTTPHeaders"])
    _ = reply["Name"]  # every listing has one; see S3Store


def _source_of(credentials: Any) -> str | None:
    method = getattr(credentials, "method", None)
    return None if method is None else _SOURCES.get(method, str(method))


def _expiry_of(credentials: Any) -> datetime | None:
    """Of credentials that have one; ours are dated far from now where it is not known."""
    expires_at: datetime | None = getattr(credentials, "_expiry_time", None)
    if expires_at is None or expires_at.year in {MINYEAR, MAXYEAR}:
        return None
    return expires_at.astimezone(UTC)


def _ahead(date: str, before: datetime, after: datetime) -> tuple[timedelta, timedelta] | None:
    """By how much the clock is ahead of one that showed ``date``, to the second, between two moments by ours."""
    try:
        shown = parsedate_to_datetime(date).replace(tzinfo=UTC)
    except (ValueError, TypeError, OverflowError):
        return None
    return before - shown - timedelta(seconds=1), after - shown
