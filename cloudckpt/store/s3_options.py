"""How to reach S3.

Law: no client here, so that options can be named, pickled and shown without importing one.
"""

from dataclasses import dataclass, field
from typing import Literal

from cloudckpt.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """How to reach S3. What is None comes from AWS's environment variables and config files, as in boto3.

    Attributes:
        endpoint_url: of a server that is not AWS.
        region: of the bucket.
        profile: in AWS's config files.
        access_key_id, secret_access_key, session_token: credentials given by hand.
        is_anonymous: send requests unsigned, to public buckets.
        addressing_style: ``path`` for servers without wildcard DNS.
        checksum: send the CRC32C of every body for the server to verify; None for servers that refuse it.
        server_side_encryption: ``AES256``, ``aws:kms`` or ``aws:kms:dsse``.
        sse_kms_key_id: the key for the latter two.
        ca_bundle: file with the certificate authorities to trust.
        max_connections: sockets kept to the endpoint, and requests that move bytes under way at a time, at most.
        connect_timeout_s, read_timeout_s: without a sign of the server.
    """

    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    is_anonymous: bool = False
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    checksum: Literal["crc32c"] | None = "crc32c"
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
        if self.max_connections < 1:
            msg = f"max_connections={self.max_connections} must be at least 1"
            raise UsageError(msg)
