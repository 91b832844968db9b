"""What is wrong with a place to save to, and what to do about it.

Law: everything that can be looked at is looked at, and what cannot be is said so. No secret is shown.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from secrets import token_hex
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from cloudckpt.catalog.finding import Finding, not_looked_at, ok, problem, warning
from cloudckpt.catalog.probing import CHECKS, probe, probe_reading
from cloudckpt.catalog.rights import RIGHTS, first_listed
from cloudckpt.engine import loop
from cloudckpt.engine.session import Session
from cloudckpt.errors import (
    BucketNotFoundError,
    CheckpointError,
    CredentialsError,
    MissingLibraryError,
    PermissionDeniedError,
    StoreUnavailableError,
    UsageError,
)
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, check_url, open_once

if TYPE_CHECKING:
    from cloudckpt.store.s3_reach import Reach

_URL, _CREDENTIALS, _ENDPOINT, _BUCKET, _CLOCK = "URL", "credentials", "endpoint", "bucket", "clock"
_ON_S3_ONLY = "it is looked at on S3 only"
_PATIENCE_S = 3
_CONNECT_S = 5
_READ_S = 20
"""Who waits for a doctor wants an answer, be it that there is none."""
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_NO_KEYS = "no request was sent: there are no credentials that could sign it"
_NAMES = {
    MissingLibraryError: _URL,
    UsageError: _URL,
    CredentialsError: _CREDENTIALS,
    StoreUnavailableError: _ENDPOINT,
    BucketNotFoundError: _BUCKET,
}
"""Of what is wrong, by what it is told by."""
_TOLD_SKEW = timedelta(seconds=1)
_BAD_SKEW = timedelta(minutes=5)
"""Servers refuse signatures that are older than so long, or longer: S3's own limit is a quarter of an hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found.

    Attributes:
        url: that was looked at.
        is_read_only: whether nothing was written.
        findings: in the order in which things are needed; what stands behind a problem may not have been looked at.
    """

    url: str
    is_read_only: bool
    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether no problem was found; there may be warnings."""
        return all(finding.verdict != "problem" for finding in self.findings)


def doctor(url: str, *, read_only: bool = False, store: StoreOptions | None = None) -> Diagnosis:
    """Looks at what a save to a URL, and a load from it, hang on.

    Objects are put right below the URL, named ``cloudckpt-doctor-<random>-...``, and removed again, also when this is
    interrupted; nothing else is written. Problems are findings, not errors, and no request is asked again for longer
    than 3 s.

    Args:
        url: of a checkpoint, or of what checkpoints lie below; nothing needs to be there.
        read_only: write nothing, and look at less.
        store: how to reach the store.

    Raises:
        UnsupportedUrlError: see `check_url`.
    """
    url, options = check_url(url), _impatient(store or StoreOptions())
    if url.startswith("s3://"):
        reach = _reach(url, options)
        findings = [_served(url), _credentials(reach), _endpoint(reach), _bucket(reach)]
        clock = _clock(reach)
    else:
        findings = _folder(url) if url.startswith("file://") else _first(url, options)
        clock = not_looked_at(_CLOCK, _ON_S3_ONLY)
    broken = [finding.name for finding in findings if finding.verdict == "problem"]
    if broken:
        names = [right.name for right in RIGHTS] + list(CHECKS)
        findings += [not_looked_at(name, f"see {broken[0]}") for name in names]
    else:
        findings += _probed(url, options, read_only=read_only)
    return Diagnosis(url=url, is_read_only=read_only, findings=(*findings, clock, *_versions()))


def _impatient(options: StoreOptions) -> StoreOptions:
    s3, retry = options.s3, options.retry
    s3 = replace(
        s3,
        connect_timeout_s=min(s3.connect_timeout_s, _CONNECT_S),
        read_timeout_s=min(s3.read_timeout_s, _READ_S),
    )
    retry = replace(retry, retry_deadline_s=min(retry.retry_deadline_s, _PATIENCE_S))
    return replace(options, s3=s3, retry=retry)


def _reach(url: str, options: StoreOptions) -> "Reach":
    from cloudckpt.store.s3_reach import reach_s3

    parts = urlsplit(url)
    prefix = f"{parts.path.strip('/')}/".lstrip("/")
    return loop.run(lambda: reach_s3(parts.netloc, prefix, options.s3))


def _credentials(reach: "Reach") -> Finding:
    if isinstance(reach.refusal, CredentialsError):
        source = f"; they are from {reach.source}" if reach.source else ""
        return problem(_CREDENTIALS, f"{reach.refusal}{source}", "")
    if not reach.endpoint_url:
        return not_looked_at(_CREDENTIALS, f"see {_ENDPOINT}")
    if reach.source is None:
        return ok(_CREDENTIALS, "none are used, as was asked for")
    until = f", until {reach.expires_at:%Y-%m-%d %H:%M} UTC" if reach.expires_at else ""
    if reach.refusal is None or isinstance(reach.refusal, BucketNotFoundError):
        return ok(_CREDENTIALS, f"from {reach.source}{until}; the server takes them")
    return ok(_CREDENTIALS, f"from {reach.source}{until}")


def _endpoint(reach: "Reach") -> Finding:
    if isinstance(reach.refusal, CredentialsError):
        is_asked = reach.clock is not None
        return ok(_ENDPOINT, f"{reach.endpoint_url} answers") if is_asked else not_looked_at(_ENDPOINT, _NO_KEYS)
    if isinstance(reach.refusal, UsageError) and reach.endpoint_url:
        return not_looked_at(_ENDPOINT, f"see {_BUCKET}")
    if reach.refusal is not None and not isinstance(reach.refusal, (BucketNotFoundError, PermissionDeniedError)):
        advice = "check AWS_ENDPOINT_URL, whether the server runs, and HTTP_PROXY, HTTPS_PROXY and NO_PROXY"
        return problem(_ENDPOINT, str(reach.refusal), advice)
    if reach.bucket_region not in {None, reach.region}:
        what = f"{reach.endpoint_url} signs for {reach.region}; the bucket is in {reach.bucket_region}"
        return warning(_ENDPOINT, what, f"set AWS_REGION={reach.bucket_region}: requests take a detour without")
    parts = urlsplit(reach.endpoint_url)
    if parts.scheme == "https":
        return ok(_ENDPOINT, f"{reach.endpoint_url} answers, over TLS; region {reach.region}")
    what = f"{reach.endpoint_url} answers, without TLS; region {reach.region}"
    if parts.hostname in _LOOPBACK:
        return ok(_ENDPOINT, what)
    return warning(_ENDPOINT, what, "use https://: who sits on the network can read and change what is sent")


def _bucket(reach: "Reach") -> Finding:
    if isinstance(reach.refusal, BucketNotFoundError) or (
        isinstance(reach.refusal, UsageError) and reach.endpoint_url
    ):
        return problem(_BUCKET, str(reach.refusal), "")
    if isinstance(reach.refusal, PermissionDeniedError):
        return not_looked_at(_BUCKET, "who may not list it is not told whether it exists")
    if reach.refusal is not None:
        return not_looked_at(_BUCKET, "the server did not say")
    return ok(_BUCKET, "exists")


def _served(url: str) -> Finding:
    return ok(_URL, f"a place that a store serves: {url}")


def _first(url: str, options: StoreOptions) -> list[Finding]:
    """What the first request to another store than S3 fails of, under the name of what is wrong."""
    found = {_URL: _served(url)}
    found |= {name: not_looked_at(name, _ON_S3_ONLY) for name in (_CREDENTIALS, _ENDPOINT, _BUCKET)}
    refusal = _refusal(url, options)
    for kind, name in _NAMES.items():
        if isinstance(refusal, kind):
            found[name] = problem(name, str(refusal), "")
    return list(found.values())


def _refusal(url: str, options: StoreOptions) -> CheckpointError | None:
    try:
        with Session(url, options) as session:
            session.run(first_listed)
    except CheckpointError as e:
        return e
    return None


def _folder(url: str) -> list[Finding]:
    others = [not_looked_at(name, _ON_S3_ONLY) for name in (_CREDENTIALS, _ENDPOINT)]
    return [_served(url), *others, _directory(url)]


def _directory(url: str) -> Finding:
    """What stands for a bucket where objects are files."""
    folder = unquote(urlsplit(url).path)
    if os.path.isdir(folder):
        return ok(_BUCKET, "the directory exists")
    there = next(above for above in _above(folder) if os.path.lexists(above))
    if os.path.isdir(there):
        return ok(_BUCKET, f"the first save makes the directory, in {there}")
    return problem(_BUCKET, f"{there} is no directory", "give another URL, or move the file away")


def _above(path: str) -> Iterator[str]:
    """The path, and those of the directories above it, up to the root."""
    yield path
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        yield path


def _clock(reach: "Reach") -> Finding:
    if reach.clock is None:
        return not_looked_at(_CLOCK, "the server told no time")
    least, most = reach.clock
    skew = max(least, -most, timedelta(0))
    if skew <= _TOLD_SKEW:
        return ok(_CLOCK, "as the server's, to a second or two")
    where = "ahead of" if least > timedelta(0) else "behind"
    what = f"this machine's clock is {skew.total_seconds():.0f} s {where} the server's"
    told = problem if skew > _BAD_SKEW else warning
    return told(_CLOCK, what, "set it by NTP: signatures are refused by the time in them, some after five minutes")


def _probed(url: str, options: StoreOptions, *, read_only: bool) -> list[Finding]:
    if read_only:
        with Session(url, options) as session:
            return session.run(probe_reading)

    async def look(store: Store) -> list[Finding]:
        async with open_once(url, options, keeps_client=True) as once:
            return await probe(store, once, f"cloudckpt-doctor-{token_hex(8)}")

    with _without_folders(url), Session(url, options) as session:
        return session.run(look)


@contextmanager
def _without_folders(url: str) -> Iterator[None]:
    """Removes the directories that come to be in this context: a store of files leaves them."""
    if not url.startswith("file://"):
        yield
        return
    missing = [folder for folder in _above(unquote(urlsplit(url).path)) if not os.path.lexists(folder)]
    try:
        yield
    finally:
        with suppress(OSError):  # somebody else writes there meanwhile
            for folder in missing:
                os.rmdir(folder)


def _versions() -> list[Finding]:
    found = []
    for name in ("cloudckpt", "torch", "aiobotocore"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    found.append(f"Python {sys.version.partition(' ')[0]}")
    return [ok("versions", ", ".join(found))]
