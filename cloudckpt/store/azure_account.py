"""An account of Azure's, and how requests to it show who asks.

Law: secrets pass through and are never shown.
"""

import base64
import binascii
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from urllib.parse import parse_qsl, urlsplit

from cloudckpt.errors import CredentialsError
from cloudckpt.store.cloud_credentials import Tokens, azure_tokens
from cloudckpt.store.cloud_options import AZURE_NAMES, AzureOptions, check_address

VERSION = "2022-11-02"
"""Of the interface; blocks may have up to 4,000 MiB, and uncommitted ones are listed."""
_SIGNED_HEADERS = (
    "Content-Encoding",
    "Content-Language",
    "Content-Length",
    "Content-MD5",
    "Content-Type",
    "Date",
    "If-Modified-Since",
    "If-Match",
    "If-None-Match",
    "If-Unmodified-Since",
    "Range",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Where an account's blobs are, and one way to show who asks; none for public containers.

    Attributes:
        endpoint_url: of its blob service.
        name: is signed too.
        key: an access key, decoded.
        sas_token: without a ``?``.
        tokens: of an identity.
    """

    endpoint_url: str
    name: str
    key: bytes | None = field(default=None, repr=False)
    sas_token: str = field(default="", repr=False)
    tokens: Tokens | None = field(default=None, repr=False)

    async def signed(self, method: str, url: str, headers: dict[str, str]) -> tuple[str, dict[str, str]]:
        """The URL and the headers to send."""
        now = format_datetime(datetime.now(UTC), usegmt=True)
        headers = headers | {"x-ms-version": VERSION, "x-ms-date": now}
        if self.sas_token:
            return f"{url}{'&' if '?' in url else '?'}{self.sas_token}", headers
        if self.key is not None:
            signature = hmac.digest(self.key, _to_sign(method, url, headers, self.name).encode(), "sha256")
            shown_as = base64.b64encode(signature).decode()
            return url, headers | {"Authorization": f"SharedKey {self.name}:{shown_as}"}
        if self.tokens is not None:
            return url, headers | {"Authorization": f"Bearer {await self.tokens.token()}"}
        return url, headers


def account_of(options: AzureOptions, *, is_anonymous: bool) -> Account:
    """The account that the options name, or the environment.

    Raises:
        CredentialsError: neither names one, or the key is none.
        MissingLibraryError: see `azure_tokens`.
    """
    told = _connection(os.environ.get("AZURE_STORAGE_CONNECTION_STRING", ""))
    if "BlobEndpoint" in told:
        check_address(told["BlobEndpoint"], AZURE_NAMES)
    named = _variable("ACCOUNT", "ACCOUNT_NAME")
    own = told.get("AccountName") or _account_at(told.get("BlobEndpoint"))
    name = options.azure_account or named or own
    if own != name and (own or options.azure_account):
        told = {}  # it is another's
    endpoint_url = options.azure_endpoint_url or told.get("BlobEndpoint")
    if name is None:
        msg = (
            "az:// needs the name of a storage account: give azure_account=, or set AZURE_STORAGE_ACCOUNT or "
            "AZURE_STORAGE_CONNECTION_STRING"
        )
        raise CredentialsError(msg)
    if endpoint_url is None:
        protocol, suffix = (
            told.get("DefaultEndpointsProtocol", "https"),
            told.get("EndpointSuffix", "core.windows.net"),
        )
        endpoint_url = f"{protocol}://{name}.blob.{suffix}"
    check_address(endpoint_url, AZURE_NAMES)
    account = Account(endpoint_url=endpoint_url, name=name)
    if is_anonymous:
        return account
    is_given = options.azure_key or options.azure_sas_token or options.azure_credential is not None
    key, sas = options.azure_key, options.azure_sas_token
    if not is_given:
        is_its = named in {None, name}
        key = (_variable("KEY", "ACCOUNT_KEY") if is_its else None) or told.get("AccountKey")
        sas = (_variable("SAS_TOKEN") if is_its else None) or told.get("SharedAccessSignature")
    if key:
        return Account(endpoint_url=endpoint_url, name=name, key=_decoded(key))
    if sas:
        return Account(endpoint_url=endpoint_url, name=name, sas_token=sas.lstrip("?"))
    return Account(endpoint_url=endpoint_url, name=name, tokens=azure_tokens(options.azure_credential))


def _variable(*names: str) -> str | None:
    return next((value for name in names if (value := os.environ.get(f"AZURE_STORAGE_{name}"))), None)


def _connection(told: str) -> dict[str, str]:
    return {name: value for name, _, value in (piece.partition("=") for piece in told.split(";")) if value}


def _account_at(endpoint_url: str | None) -> str | None:
    """The account whose endpoint that is: a connection string with a signature names it nowhere else."""
    host = urlsplit(endpoint_url or "").hostname or ""
    name, _, rest = host.partition(".")
    return name if rest.startswith("blob.") else None


def _decoded(key: str) -> bytes:
    try:
        return base64.b64decode(key, validate=True)
    except binascii.Error:
        msg = "azure_key (or AZURE_STORAGE_KEY) is no access key of a storage account: those are base64"
        raise CredentialsError(msg) from None


def _to_sign(method: str, url: str, headers: Mapping[str, str], account: str) -> str:
    """learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key, for version 2015-02-21 and later."""
    parts = urlsplit(url)
    given = {name.lower(): value for name, value in headers.items()}
    values = [given.get(name.lower(), "") for name in _SIGNED_HEADERS]
    values[2] = "" if values[2] == "0" else values[2]
    own = sorted((name, value) for name, value in given.items() if name.startswith("x-ms-"))
    asked = sorted((name.lower(), value) for name, value in parse_qsl(parts.query, keep_blank_values=True))
    return "\n".join(
        [
            method,
            *values,
            *(f"{name}:{value}" for name, value in own),
            f"/{account}{parts.path}",
            *(f"{name}:{value}" for name, value in asked),
        ]
    )
