"""From a URL to an open store.

Law: the only place that knows which store serves which scheme; imports a store's library when it is asked for.
"""

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit
from weakref import WeakKeyDictionary

from cloudckpt.errors import UnsupportedUrlError
from cloudckpt.options import overridden, refuse_unknown
from cloudckpt.store.cloud_options import AzureOptions, GcsOptions
from cloudckpt.store.protocols import Moves, Store
from cloudckpt.store.retry import RetryingStore, RetryOptions
from cloudckpt.store.s3_options import S3Options, is_directory_bucket
from cloudckpt.store.traffic import Traffic, TrafficOptions
from cloudckpt.threads import in_thread

T = TypeVar("T")
SCHEMES = ("s3", "gs", "az", "file", "memory")
"""With stores of their own here; fsspec's others are served by its file systems."""
_MEANT = {"gcs": "gs", "abfs": "az", "abfss": "az", "azure": "az", "adl": "az", "s3a": "s3", "s3n": "s3"}
"""What others call these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """How to reach a store, whichever it turns out to be.

    Attributes:
        s3: of ``s3://``; timeouts, connections, authorities, ``is_anonymous`` and ``checksum`` hold for ``gs://`` and
            ``az://`` too.
        gcs, azure: of ``gs://`` and ``az://``.
        retry: how long it is asked again.
        traffic: how many requests are under way at a time.
        filesystem: an fsspec file system, which then serves the URL, whatever its scheme. To be used in other
            processes it must pickle, as those of fsspec do.
    """

    s3: S3Options = field(default_factory=S3Options)
    gcs: GcsOptions = field(default_factory=GcsOptions)
    azure: AzureOptions = field(default_factory=AzureOptions)
    retry: RetryOptions = field(default_factory=RetryOptions)
    traffic: TrafficOptions = field(default_factory=TrafficOptions)
    filesystem: Any = field(default=None, hash=False)


def with_overrides(options: T, store: StoreOptions | None, overrides: dict[str, Any]) -> tuple[T, StoreOptions]:
    """Applies keyword arguments to the options whose fields they name.

    Args:
        options: of reading or writing.
        store: how to reach the store.
        overrides: fields of ``options`` or of what `StoreOptions` holds, by name, and ``filesystem``; emptied.

    Raises:
        UsageError: one that is no field of any.
    """
    store = store or StoreOptions()
    options = overridden(options, overrides)
    store = StoreOptions(
        s3=overridden(store.s3, overrides),
        gcs=overridden(store.gcs, overrides),
        azure=overridden(store.azure, overrides),
        retry=overridden(store.retry, overrides),
        traffic=overridden(store.traffic, overrides),
        filesystem=overrides.pop("filesystem", store.filesystem),
    )
    refuse_unknown(overrides, options, store.s3, store.gcs, store.azure, store.retry, store.traffic)
    return options, store


def check_url(url: str) -> str:
    """Returns ``url`` without slashes at its end.

    Raises:
        UnsupportedUrlError: no store serves it, or it names no bucket or directory.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = None  # its error shows the host, and what stands before it
    if parts is None or (parts.scheme in SCHEMES and ":" in parts.netloc.rpartition("@")[2]):
        msg = "what stands behind :// is no bucket or directory; it is not shown, for it may hold a password"
        raise UnsupportedUrlError(msg)
    known = ", ".join(f"{s}://" for s in SCHEMES)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # the rest may be a secret
    if parts.scheme in _MEANT:
        msg = f"{shown!r} is spelled {_MEANT[parts.scheme]}://bucket/path here (docs/stores.md)"
        raise UnsupportedUrlError(msg)
    if parts.scheme not in SCHEMES and not _knows_fsspec(parts.scheme):
        msg = f"no store serves {shown!r}; give a URL that begins with one of {known}"
        raise UnsupportedUrlError(msg)
    if "@" in parts.netloc:
        msg = f"{shown!r} has credentials before its bucket; give them as options, or in environment variables"
        raise UnsupportedUrlError(msg)
    if parts.query or parts.fragment:
        msg = f"{shown!r} has a '?' or '#' behind it, which keys of checkpoints cannot have"
        raise UnsupportedUrlError(msg)
    if not (parts.path.strip("/") if parts.scheme == "file" else parts.netloc or parts.scheme not in SCHEMES):
        msg = f"{shown!r} names no {'directory' if parts.scheme == 'file' else 'bucket'}"
        raise UnsupportedUrlError(msg)
    if any(segment in {".", ".."} for segment in parts.path.split("/")):
        msg = f"{shown!r} has a '.' or '..' segment; spell the place out"
        raise UnsupportedUrlError(msg)
    return url.rstrip("/")


def _knows_fsspec(scheme: str) -> bool:
    from fsspec import available_protocols
    from fsspec.registry import registry  # of those that the user registered

    return scheme in available_protocols() or scheme in registry


@asynccontextmanager
async def open_store(
    url: str,
    options: StoreOptions | None = None,
    *,
    keeps_client: bool = False,
    others: Sequence[Moves] = (),
) -> AsyncIterator[Store]:
    """Opens the store rooted at ``url``, with retries, for as long as the context lasts.

    Args:
        url: where.
        options: how to reach it.
        keeps_client: leave what took long to make for the next store that is opened alike on this event loop;
            `close_kept_clients` must come before the loop ends.
        others: ways to the same store, for moving bytes.

    Raises:
        UnsupportedUrlError: see `check_url`.
        CredentialsError: AWS's configuration names a profile that does not exist, or no storage account is named.
        MissingLibraryError: the store needs a library that is not installed.
    """
    options = options or StoreOptions()
    async with open_once(url, options, keeps_client=keeps_client) as store:
        most = options.s3.max_connections
        of_loop = _traffic.setdefault(asyncio.get_running_loop(), {})
        how = options.traffic if _sends_again(url, options) else replace(options.traffic, late_factor=math.inf)
        key = store.identity, how, most
        if key not in of_loop:
            of_loop[key] = Traffic(how, most=most)
        yield RetryingStore(store, options.retry, of_loop[key], others)


def _sends_again(url: str, options: StoreOptions) -> bool:
    """Whether a late request may be sent a second time: where an object that is put twice keeps its ETag."""
    parts = urlsplit(url)
    return parts.scheme == "s3" and options.filesystem is None and not is_directory_bucket(parts.netloc)


@asynccontextmanager
async def open_once(url: str, options: StoreOptions, *, keeps_client: bool) -> AsyncIterator[Store]:
    """As `open_store`, but what is asked of it is asked once."""
    parts = urlsplit(check_url(url))
    prefix = parts.path.strip("/")
    prefix += "/" if prefix else ""
    if options.filesystem is not None or parts.scheme not in SCHEMES:
        from cloudckpt.store.fsspec import fsspec_store

        yield await in_thread(lambda: fsspec_store(url, options.filesystem))
    elif parts.scheme == "s3":
        from cloudckpt.store.s3 import S3Store
        from cloudckpt.store.s3_express import DirectoryBucketStore

        kind = DirectoryBucketStore if is_directory_bucket(parts.netloc) else S3Store
        async with kind(parts.netloc, prefix, options.s3, keeps_client=keeps_client) as store:
            yield store
    elif parts.scheme == "gs":
        from cloudckpt.store.gcs import gcs_store

        async with gcs_store(parts.netloc, prefix, options.gcs, options.s3, keeps_client=keeps_client) as gcs:
            yield gcs
    elif parts.scheme == "az":
        from cloudckpt.store.azure import azure_store

        async with azure_store(parts.netloc, prefix, options.azure, options.s3, keeps_client=keeps_client) as azure:
            yield azure
    elif parts.scheme == "file":
        from cloudckpt.store.local import LocalStore

        yield LocalStore(unquote(parts.path))
    else:
        from cloudckpt.store.memory import MemoryStore

        yield MemoryStore(parts.netloc, prefix)


_traffic: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[object, Traffic]] = WeakKeyDictionary()
"""What was learnt of each server, on each loop: the next save begins where the last one ended."""


async def close_kept_clients() -> None:
    """Closes what stores that were opened with ``keeps_client`` left on this event loop."""
    for room in ("s3_clients", "rest"):
        clients = sys.modules.get(f"cloudckpt.store.{room}")  # where none was imported, none is kept
        if clients is not None:
            await clients.close_kept()
