"""How to reach S3.

Law: no client here, so that options can be named, pickled and shown without importing one.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal
from urllib.parse import urlsplit

from cloudckpt.errors import UsageError

_NOT_IN_ADDRESSES = re.compile(r"[@?#\s]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What requests are signed with, as `S3Options.credentials` gives it.

    Attributes:
        access_key_id, secret_access_key, session_token: as in AWS's config files; long-lived ones have no token.
        expires_at: with a timezone; None where it is not known, and then they are used until the server refuses them.
    """

    access_key_id: str = field(repr=False)
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        if self.expires_at is not None and self.expires_at.tzinfo is None:
            msg = f"expires_at={self.expires_at} has no timezone; give one, such as datetime.now(UTC) has"
            raise UsageError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """How to reach S3. What is None comes from AWS's environment variables and config files, as in boto3.

    Attributes:
        endpoint_url: of a server that is not AWS.
        region: of the bucket.
        profile: in AWS's config files.
        access_key_id, secret_access_key, session_token: credentials given by hand; they are never renewed.
        credentials: gives credentials that change with time. It is called in a worker thread, so it may wait; again
            a quarter of an hour before they expire (or when half of their time has passed, if that is later), and
            again when the server says that they have expired, but never by two threads at a time. To be used in other
            processes too it must pickle: a function of a module, or an object with a ``__call__``.
        is_anonymous: send requests unsigned, to public buckets.
        addressing_style: ``path`` for servers without wildcard DNS.
        checksum: the CRC32C of every body, for the server to verify. ``when_supported`` sends it to servers that do
            not refuse it: one that does is asked again without, and remembered. ``always`` insists: what is refused
            fails. None never sends one. The manifest's checksums do not depend on it.
        server_side_encryption: ``AES256``, ``aws:kms`` or ``aws:kms:dsse``.
        sse_kms_key_id: the key for the latter two.
        ca_bundle: file with the certificate authorities to trust.
        max_connections: sockets kept to the endpoint, and requests that move bytes under way at a time, at most.
        connect_timeout_s, read_timeout_s: without a sign of the server.
    """

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    # Not shown, for a partial function shows its arguments; not hashed, for an object may not be.
    credentials: Callable[[], Credentials] | None = field(default=None, repr=False, hash=False)
    is_anonymous: bool = False
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    checksum: Literal["when_supported", "always"] | None = "when_supported"
    server_side_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    sse_kms_key_id: str | None = None
    ca_bundle: str | None = None
    max_connections: int = 64
    connect_timeout_s: float = 10
    read_timeout_s: float = 60

    def __post_init__(self) -> None:
        if (self.access_key_id is None) != (self.secret_access_key is None):
            msg = "give both access_key_id and secret_access_key, or neither"
            raise UsageError(msg)
        if self.credentials is not None and (self.access_key_id is not None or self.profile or self.is_anonymous):
            msg = "give one of credentials=, access_key_id= and secret_access_key=, profile=, is_anonymous="
            raise UsageError(msg)
        if self.checksum not in {"when_supported", "always", None}:
            msg = f"checksum={self.checksum!r} must be 'when_supported', 'always' or None"
            raise UsageError(msg)
        if self.endpoint_url is not None:
            check_endpoint(self.endpoint_url)
        if self.ca_bundle is not None and not self.ca_bundle:
            msg = "ca_bundle= is a file of certificate authorities; verification cannot be turned off"
            raise UsageError(msg)
        if self.max_connections < 1:
            msg = f"max_connections={self.max_connections} must be at least 1"
            raise UsageError(msg)


def is_directory_bucket(bucket: str) -> bool:
    """Of S3 Express: docs.aws.amazon.com/AmazonS3/latest/userguide/directory-bucket-naming-rules.html."""
    return bucket.endswith("--x-s3")


def check_endpoint(url: str) -> None:
    """Refuses what is no server's address, or holds more; without showing it, for that may be a secret.

    Raises:
        UsageError: it is not ``http://host:port`` or ``https://host:port``, with a path or without.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or _NOT_IN_ADDRESSES.search(url):
        msg = (
            "endpoint_url (or AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3) must be http://host:port or https://host:port, "
            "without a user, a password or a query: credentials go into access_key_id= and secret_access_key=, or "
            "into AWS's own environment variables and files"
        )
        raise UsageError(msg)
