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
from cloudckpt.store.protocols import Moves, Store
from cloudckpt.store.retry import RetryingStore, RetryOptions
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.traffic import Traffic, TrafficOptions

T = TypeVar("T")
SCHEMES = ("s3", "file", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """How to reach a store, whichever it turns out to be."""

    s3: S3Options = field(default_factory=S3Options)
    retry: RetryOptions = field(default_factory=RetryOptions)
    traffic: TrafficOptions = field(default_factory=TrafficOptions)


def with_overrides(options: T, store: StoreOptions | None, overrides: dict[str, Any]) -> tuple[T, StoreOptions]:
    """Applies keyword arguments to the options whose fields they name.

    Args:
        options: of reading or writing.
        store: how to reach the store.
        overrides: fields of ``options``, `S3Options`, `RetryOptions` or `TrafficOptions`, by name; emptied.

    Raises:
        UsageError: one that is no field of any.
    """
    store = store or StoreOptions()
    options = overridden(options, overrides)
    store = StoreOptions(
        s3=overridden(store.s3, overrides),
        retry=overridden(store.retry, overrides),
        traffic=overridden(store.traffic, overrides),
    )
    refuse_unknown(overrides, options, store.s3, store.retry, store.traffic)
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
    if parts.scheme not in SCHEMES:
        msg = f"no store serves {shown!r}; give a URL that begins with one of {known}"
        raise UnsupportedUrlError(msg)
    if "@" in parts.netloc:
        msg = f"{shown!r} has credentials before its bucket; give them as options, or in AWS's environment variables"
        raise UnsupportedUrlError(msg)
    if parts.query or parts.fragment:
        msg = f"{shown!r} has a '?' or '#' behind it, which keys of checkpoints cannot have"
        raise UnsupportedUrlError(msg)
    if not (parts.path.strip("/") if parts.scheme == "file" else parts.netloc):
        msg = f"{shown!r} names no {'directory' if parts.scheme == 'file' else 'bucket'}"
        raise UnsupportedUrlError(msg)
    if any(segment in {".", ".."} for segment in parts.path.split("/")):
        msg = f"{shown!r} has a '.' or '..' segment; spell the place out"
        raise UnsupportedUrlError(msg)
    return url.rstrip("/")


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
        CredentialsError: AWS's configuration names a profile that does not exist.
    """
    options = options or StoreOptions()
    async with open_once(url, options, keeps_client=keeps_client) as store:
        most = options.s3.max_connections
        of_loop = _traffic.setdefault(asyncio.get_running_loop(), {})
        how = options.traffic if url.startswith("s3://") else replace(options.traffic, late_factor=math.inf)
        key = store.identity, how, most
        if key not in of_loop:
            of_loop[key] = Traffic(how, most=most)
        yield RetryingStore(store, options.retry, of_loop[key], others)


@asynccontextmanager
async def open_once(url: str, options: StoreOptions, *, keeps_client: bool) -> AsyncIterator[Store]:
    """As `open_store`, but what is asked of it is asked once."""
    parts = urlsplit(check_url(url))
    prefix = parts.path.strip("/")
    prefix += "/" if prefix else ""
    if parts.scheme == "s3":
        from cloudckpt.store.s3 import S3Store

        async with S3Store(parts.netloc, prefix, options.s3, keeps_client=keeps_client) as store:
            yield store
    elif parts.scheme == "file":
        from cloudckpt.store.fsspec import LocalStore

        yield LocalStore(unquote(parts.path))
    else:
        from cloudckpt.store.memory import MemoryStore

        yield MemoryStore(parts.netloc, prefix)


_traffic: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[object, Traffic]] = WeakKeyDictionary()
"""What was learnt of each server, on each loop: the next save begins where the last one ended."""


async def close_kept_clients() -> None:
    """Closes what stores that were opened with ``keeps_client`` left on this event loop."""
    clients = sys.modules.get("cloudckpt.store.s3_clients")  # where none was imported, none is kept
    if clients is not None:
        await clients.close_kept()
