"""Bearer tokens for Google's and Azure's clouds, from the clouds' own libraries.

Law: secrets pass through and are never shown. A token is asked for in a thread, by one at a time, and kept as long as
it holds.
"""

import os
import threading
import time
from collections.abc import Callable
from datetime import UTC
from typing import Any

from cloudckpt.errors import CredentialsError, MissingLibraryError, StoreUnavailableError
from cloudckpt.store.addresses import shown
from cloudckpt.threads import in_thread

_GOOGLE_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_AZURE_SCOPE = "https://storage.azure.com/.default"
_EARLY_S = 300
"""Before it ends, a token is replaced: a request may take its time."""

Fetch = Callable[[], tuple[str, float]]
"""Gives a token and when it ends, in seconds since 1970."""


class Tokens:
    """Tokens of one identity, shared by the stores of the process."""

    def __init__(self, fetch: Fetch) -> None:
        """Asks for nothing yet."""
        self._fetch = fetch
        self._one_at_a_time = threading.Lock()
        self._token = ""
        self._ends = 0.0

    async def token(self) -> str:
        """One that holds for a while; empty where the credentials are anonymous.

        Raises:
            CredentialsError: there is none to be had.
            StoreUnavailableError: who gives them does not answer.
        """
        if time.time() > self._ends - _EARLY_S:
            await in_thread(self._renew)
        return self._token

    def _renew(self) -> None:
        with self._one_at_a_time:
            if time.time() > self._ends - _EARLY_S:
                self._token, self._ends = self._fetch()


_shared: dict[object, Tokens] = {}
"""Of the identities that the environment gives."""
os.register_at_fork(after_in_child=_shared.clear)  # a lock may be held by a thread that is not there


def google_tokens(credentials: Any) -> Tokens:
    """Tokens of these credentials, or of Google's application default ones.

    Raises:
        MissingLibraryError: google-auth is not installed.
    """
    try:
        import google.auth  # noqa: F401 - now, and not in a thread at the first request
    except ImportError as e:
        msg = "gs:// needs a library: pip install 'cloudckpt[gcs]' (google-auth)"
        raise MissingLibraryError(msg) from e
    if credentials is not None:
        return Tokens(lambda: _of_google(credentials))
    found: list[Any] = []

    def fetch() -> tuple[str, float]:
        if not found:
            found.append(_found_by_google())
        return _of_google(found[0])

    key = "google", os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"), os.environ.get("CLOUDSDK_CONFIG")
    return _shared.setdefault(key, Tokens(fetch))


def _found_by_google() -> Any:
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    try:
        return google.auth.default(scopes=[_GOOGLE_SCOPE])[0]
    except DefaultCredentialsError as e:
        msg = (
            "no usable Google credentials: set GOOGLE_APPLICATION_CREDENTIALS, run gcloud auth application-default "
            "login, give the machine a service account, or pass gcs_credentials= (is_anonymous=True for a public "
            f"bucket): {shown(e)}"
        )
        raise CredentialsError(msg) from None


def _of_google(credentials: Any) -> tuple[str, float]:
    import urllib3
    from google.auth.exceptions import GoogleAuthError, TransportError
    from google.auth.transport.urllib3 import Request

    try:
        if not credentials.valid:
            credentials.refresh(Request(urllib3.PoolManager()))  # type: ignore[no-untyped-call]
    except TransportError as e:
        msg = f"no answer from where Google's tokens come from: {shown(e)}"
        raise StoreUnavailableError(msg) from None
    except GoogleAuthError as e:
        msg = f"Google gives no token for these credentials: {shown(e)}"
        raise CredentialsError(msg) from None
    ends = credentials.expiry  # in UTC, without saying so
    return credentials.token or "", float("inf") if ends is None else ends.replace(tzinfo=UTC).timestamp()


def azure_tokens(credential: Any) -> Tokens:
    """Tokens of this credential, or of azure-identity's ``DefaultAzureCredential``.

    Raises:
        MissingLibraryError: azure-identity is not installed.
    """
    if credential is not None:
        return Tokens(lambda: _of_azure(credential))
    try:
        from azure.identity import DefaultAzureCredential
    except ImportError as e:
        msg = (
            "az:// without a key or a signature needs a library: pip install 'cloudckpt[azure]' (azure-identity); or "
            "give azure_key= or azure_sas_token=, or set AZURE_STORAGE_KEY or AZURE_STORAGE_SAS_TOKEN"
        )
        raise MissingLibraryError(msg) from e
    if "azure" not in _shared:
        found = DefaultAzureCredential()
        _shared["azure"] = Tokens(lambda: _of_azure(found))
    return _shared["azure"]


def _of_azure(credential: Any) -> tuple[str, float]:
    try:
        given = credential.get_token(_AZURE_SCOPE)
    except Exception as e:  # azure-core's errors, which need not be installed
        msg = f"Azure gives no token: {type(e).__name__}: {shown(e)}"
        raise CredentialsError(msg) from None
    return given.token, float(given.expires_on)
