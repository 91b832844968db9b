"""How to reach Google Cloud Storage and Azure.

Law: no client here, so that options can be named, pickled and shown without importing one.
"""

from dataclasses import dataclass, field
from typing import Any

from cloudckpt.errors import UsageError
from cloudckpt.store.s3_options import check_endpoint

GCS_NAMES = "gcs_endpoint_url (or STORAGE_EMULATOR_HOST)"
AZURE_NAMES = "azure_endpoint_url (or BlobEndpoint in AZURE_STORAGE_CONNECTION_STRING)"
"""Where an endpoint may come from."""


def check_address(url: str, names: str) -> None:
    """As `check_endpoint`, of what has other names.

    Raises:
        UsageError: it is no address of a server, or holds more.
    """
    try:
        check_endpoint(url)
    except UsageError:
        msg = f"{names} must be http://host:port or https://host:port, without a user, a password or a query"
        raise UsageError(msg) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class GcsOptions:
    """How to reach ``gs://``. Timeouts, connections, authorities and ``is_anonymous`` are those of `S3Options`.

    Attributes:
        gcs_endpoint_url: of a server that is not Google's; None takes ``STORAGE_EMULATOR_HOST``, else Google's.
        gcs_credentials: of `google.auth.credentials.Credentials`; None finds Google's application default ones.
        gcs_project: is billed, where a bucket makes who asks pay.
    """

    gcs_endpoint_url: str | None = None
    gcs_credentials: Any = field(default=None, repr=False, hash=False)
    gcs_project: str | None = None

    def __post_init__(self) -> None:
        if self.gcs_endpoint_url is not None:
            check_address(self.gcs_endpoint_url, GCS_NAMES)


@dataclass(frozen=True, slots=True, kw_only=True)
class AzureOptions:
    """How to reach ``az://``. Timeouts, connections, authorities and ``is_anonymous`` are those of `S3Options`.

    What is None comes from the variables that Azure's own tools read: AZURE_STORAGE_CONNECTION_STRING, or
    AZURE_STORAGE_ACCOUNT (or _ACCOUNT_NAME) and AZURE_STORAGE_KEY (or _ACCOUNT_KEY) or AZURE_STORAGE_SAS_TOKEN.

    Attributes:
        azure_account: the storage account's name.
        azure_key: one of its access keys.
        azure_sas_token: a shared access signature, instead of a key.
        azure_credential: an object with ``get_token``, as those of azure-identity; where neither key nor signature is
            given, None makes its ``DefaultAzureCredential``.
        azure_endpoint_url: of the blob service; None is ``https://ACCOUNT.blob.core.windows.net``.
    """

    azure_account: str | None = None
    azure_key: str | None = field(default=None, repr=False)
    azure_sas_token: str | None = field(default=None, repr=False)
    azure_credential: Any = field(default=None, repr=False, hash=False)
    azure_endpoint_url: str | None = None

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.azure_key, self.azure_sas_token, self.azure_credential)) > 1:
            msg = "give one of azure_key=, azure_sas_token=, azure_credential="
            raise UsageError(msg)
        if self.azure_endpoint_url is not None:
            check_address(self.azure_endpoint_url, AZURE_NAMES)
