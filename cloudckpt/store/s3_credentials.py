"""Credentials that are asked for again: before they expire, and when a server says that they have.

Law: secrets pass through and are never shown. One set of credentials is asked for once, however many requests wait.
"""

import os
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from aiobotocore.credentials import AioCredentials, AioDeferredRefreshableCredentials, AioRefreshableCredentials
from botocore.credentials import CachedCredentialFetcher, ReadOnlyCredentials

from cloudckpt.errors import CredentialsError
from cloudckpt.store.s3_options import Credentials, S3Options
from cloudckpt.threads import in_thread

_ADVISORY_S = 15 * 60
_MANDATORY_S = 10 * 60
"""Before they expire; botocore's own numbers (botocore.credentials)."""
_NEVER = datetime.max.replace(tzinfo=UTC)
_LONG_AGO = datetime.min.replace(tzinfo=UTC) + timedelta(days=2)  # which every timezone can show


class ProvidedCredentials:
    """Stands where botocore looks for credentials, and finds those that `S3Options.credentials` gives."""

    def __init__(self, options: S3Options) -> None:
        """Asks for nothing yet."""
        self._options = options

    async def load_credentials(self) -> AioRefreshableCredentials:
        """Called once for each client."""
        source = _sources.get(self._options)
        if source is None:
            assert self._options.credentials is not None  # noqa: S101 - for the type checker
            source = _sources.setdefault(self._options, _Source(self._options.credentials))
        return _Renewable(lambda refused: in_thread(source.fetch, refused), "credentials=")


class FoundCredentials:
    """Stands there too, and renews what was found in the environment or in a file, when a server refuses it."""

    def __init__(self, make_resolver: Callable[[], Any]) -> None:
        """Takes what makes botocore's own: only once the client's region is known, for roles are assumed in it."""
        self._make_resolver = make_resolver
        self._resolver: Any = None

    async def load_credentials(self) -> Any:
        """Called once for each client."""
        self._resolver = self._make_resolver()
        found = await self._resolver.load_credentials()
        if type(found) is not AioCredentials and not _are_of_environment(found):
            return found
        renewable = _Renewable(self._look_again, found.method)
        renewable.use(await _as_found(found))
        return renewable

    async def _look_again(self, refused: ReadOnlyCredentials | None) -> Credentials:
        found = await self._resolver.load_credentials()
        if found is None:
            msg = "the credentials have expired, and there are none any more where they were found"
            raise CredentialsError(msg)
        credentials = await _as_found(found)
        if _frozen(credentials) == refused:
            msg = (
                f"the server refused the credentials ({found.method}) as expired or not known, and there are no "
                "others yet; renew them where they were found, or pass credentials=, a function that gives fresh ones"
            )
            raise CredentialsError(msg)
        return credentials


def _are_of_environment(found: Any) -> bool:
    """Whether botocore would renew them from the variables that they are from, and raise RuntimeError."""
    return isinstance(found, AioRefreshableCredentials) and found.method == "env"


async def _as_found(found: Any) -> Credentials:
    if _are_of_environment(found):  # if they expire in use, the server tells
        expires_at: datetime = found._expiry_time.astimezone(UTC)
        if expires_at <= datetime.now(UTC):
            msg = f"the credentials in the environment expired at {expires_at:%Y-%m-%d %H:%M:%S} UTC; renew them"
            raise CredentialsError(msg)
        return _of(ReadOnlyCredentials(found._access_key, found._secret_key, found._token, None))
    return _of(await found.get_frozen_credentials())


def used_by(credentials: Any) -> ReadOnlyCredentials | None:
    """What a request is signed with that is sent now, if credentials are of a kind that can be renewed."""
    used: ReadOnlyCredentials | None = getattr(credentials, "_frozen_credentials", None)
    return used


def renews(credentials: Any, used: ReadOnlyCredentials | None) -> bool:
    """Whether the next request will be signed with other credentials, now that a server called some expired.

    Args:
        credentials: the client's.
        used: from `used_by`, before the request was sent.
    """
    if not isinstance(credentials, AioRefreshableCredentials):
        return False
    if used is None or used_by(credentials) is not used:
        return True  # they were renewed meanwhile
    before = _refused.get(credentials)
    if before is not used:
        if before == used:
            return False  # they were renewed, and came out the same
        _refused[credentials] = used
        credentials._expiry_time = _LONG_AGO
        _forget_cached(credentials)
    return True


_refused: "WeakKeyDictionary[Any, ReadOnlyCredentials]" = WeakKeyDictionary()
"""What of each client's credentials a server refused last."""


def _forget_cached(credentials: AioRefreshableCredentials) -> None:
    """An assumed role's and SSO's credentials are kept by what fetches them too, by their expiry alone."""
    fetcher = getattr(credentials._refresh_using, "__self__", None)
    if isinstance(fetcher, CachedCredentialFetcher):
        fetcher._cache.pop(fetcher._cache_key, None)


class _Renewable(AioDeferredRefreshableCredentials):  # type: ignore[misc]
    """Credentials that botocore's signer has renewed when they are due, by one request for all that wait."""

    def __init__(self, fetch: Callable[[ReadOnlyCredentials | None], Awaitable[Credentials]], method: str) -> None:
        """Fetches at first use; ``fetch`` is told what a server refused last."""
        super().__init__(lambda: fetch(_refused.get(self)), method)

    def use(self, credentials: Credentials) -> None:
        """Takes these."""
        self._set_from_data(credentials)
        self._publish_refresh()

    def _set_from_data(self, data: Credentials) -> None:
        frozen = _frozen(data)
        self._access_key, self._secret_key, self._token = frozen.access_key, frozen.secret_key, frozen.token
        self._staged_expiry_time = data.expires_at or _NEVER
        self._advisory_refresh_timeout, self._mandatory_refresh_timeout = _windows(data)


class _Source:
    """A provider of the caller's, which the clients of all event loops share."""

    def __init__(self, provider: Callable[[], Credentials]) -> None:
        self._provider = provider
        self._one_at_a_time = threading.Lock()
        self._last: Credentials | None = None
        self._due = _LONG_AGO

    def fetch(self, refused: ReadOnlyCredentials | None) -> Credentials:
        """Those that were given last, unless they are due or were refused."""
        with self._one_at_a_time:
            last = self._last
            if last is None or datetime.now(UTC) >= self._due or _frozen(last) == refused:
                last = self._ask(refused)
                self._due = (last.expires_at or _NEVER) - timedelta(seconds=_windows(last)[0])
                self._last = last
            return last

    def _ask(self, refused: ReadOnlyCredentials | None) -> Credentials:
        try:
            given: object = self._provider()
        except Exception as e:
            msg = f"credentials= raised {type(e).__name__}: {e}"
            raise CredentialsError(msg) from e
        if not isinstance(given, Credentials):
            msg = f"credentials= gave a {type(given).__name__}; it must give Credentials"
            raise CredentialsError(msg)
        if given.expires_at is not None and given.expires_at <= datetime.now(UTC):
            msg = f"credentials= gave some that expired at {given.expires_at}; it must give fresh ones"
            raise CredentialsError(msg)
        if _frozen(given) == refused:
            msg = (
                "the server calls the credentials expired, and credentials= gave the same again; it must give others"
            )
            raise CredentialsError(msg)
        return given


_sources: "WeakValueDictionary[S3Options, _Source]" = WeakValueDictionary()
"""As long as a client uses them."""


def _leave_to_parent() -> None:
    """In a forked process: a lock may be held by a thread that is not there."""
    _sources.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _windows(credentials: Credentials) -> tuple[float, float]:
    """How long before they expire they are renewed if that can be done meanwhile, and before anything else is."""
    left_s = ((credentials.expires_at or _NEVER) - datetime.now(UTC)).total_seconds()
    return min(_ADVISORY_S, left_s / 2), min(_MANDATORY_S, left_s / 4)


def _of(frozen: ReadOnlyCredentials) -> Credentials:
    return Credentials(
        access_key_id=frozen.access_key, secret_access_key=frozen.secret_key, session_token=frozen.token
    )


def _frozen(credentials: Credentials) -> ReadOnlyCredentials:
    c = credentials
    return ReadOnlyCredentials(c.access_key_id, c.secret_access_key, c.session_token, None)
