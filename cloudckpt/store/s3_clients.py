"""S3 clients, which cost as much CPU to make as twenty requests: shared, and kept for the next.

Law: a client is used on the event loop it was made on. Who keeps clients closes them before the loop ends.
"""

import asyncio
import ctypes
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore import UNSIGNED
from botocore.exceptions import BotoCoreError
from botocore.loaders import Loader

from cloudckpt.errors import CheckpointError, UsageError
from cloudckpt.store.s3_credentials import FoundCredentials, ProvidedCredentials
from cloudckpt.store.s3_http import OneAttemptSession
from cloudckpt.store.s3_options import S3Options, check_endpoint
from cloudckpt.store.s3_parsing import CarefulParsers

_ALSO_READ = {"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE"}
"""Variables beside AWS's own that its SDK reads."""

_MOST_KEPT = 8
"""Clients without a user, on one loop."""


class _Shared:
    """A client and how many use it."""

    def __init__(self, client: Any, stack: AsyncExitStack) -> None:
        self.client = client
        self.users = 0
        self._stack = stack

    async def close(self) -> None:
        await self._stack.aclose()


_Kept = dict[object, _Shared]
_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, _Kept] = WeakKeyDictionary()


def _leave_to_parent() -> None:
    """In a forked process: never frees the parent's clients, for that would close sockets that the parent uses."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(list(_clients.items())))
    _clients.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


@asynccontextmanager
async def s3_client(options: S3Options, *, is_kept: bool) -> AsyncIterator[Any]:
    """A client made of the options and of AWS's environment and files as they are now.

    Args:
        options: how to reach S3.
        is_kept: leave it open for the next user on this loop; `close_kept` closes it then.
    """
    kept = _clients.setdefault(asyncio.get_running_loop(), {})
    key = options, _surroundings()
    shared = kept.get(key)
    if shared is None:
        made = await _make(options)
        shared = kept.setdefault(key, made) if is_kept else made
        if shared is not made:  # another was made meanwhile
            await made.close()
    shared.users += 1
    try:
        yield shared.client
    finally:
        shared.users -= 1
        if not shared.users and kept.get(key) is not shared:
            await shared.close()
        unused = [k for k, other in kept.items() if not other.users]
        for old in unused[: max(0, len(unused) - _MOST_KEPT)]:
            await kept.pop(old).close()


async def close_kept() -> None:
    """Closes the clients that are kept on this loop and that nobody uses."""
    kept = _clients.get(asyncio.get_running_loop(), {})
    for key in [key for key, shared in kept.items() if not shared.users]:
        await kept.pop(key).close()


async def _make(options: S3Options) -> _Shared:
    o = options
    session = AioSession(profile=o.profile)
    session.register_component("data_loader", _service_models())
    session.register_component("response_parser_factory", CarefulParsers())
    found = FoundCredentials(session._create_credential_resolver)
    session.register_component("credential_provider", ProvidedCredentials(o) if o.credentials else found)
    creating = session.create_client(
        "s3",
        region_name=o.region or (session.get_config_variable("region") or "us-east-1"),
        endpoint_url=o.endpoint_url,
        aws_access_key_id=o.access_key_id,
        aws_secret_access_key=o.secret_access_key,
        aws_session_token=o.session_token,
        verify=o.ca_bundle,
        config=_config(o),
    )
    stack = AsyncExitStack()
    try:
        client = await stack.enter_async_context(creating)
    except (BotoCoreError, CheckpointError):
        raise
    except ValueError:
        client = None  # botocore's shows the endpoint, which may hold a password
    try:
        check_endpoint(client.meta.endpoint_url if client else "")  # it may come from the environment
    except UsageError:
        await stack.aclose()
        raise
    return _Shared(client, stack)


def _surroundings() -> object:
    """What AWS's SDK reads beside the options: a client made of other credentials is another client."""
    variables = {name: value for name, value in os.environ.items() if _is_read(name)}
    home = Path("~/.aws").expanduser()
    files = (
        variables.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"),
        variables.get("AWS_CONFIG_FILE", home / "config"),
    )
    return tuple(sorted(variables.items())), tuple(_changed(Path(file)) for file in files)


def _is_read(name: str) -> bool:
    return name.startswith("AWS_") or name.upper() in _ALSO_READ


def _changed(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


@cache
def _service_models() -> Loader:
    """The parsed description of S3, read once: making a client costs 0.3 s of CPU without."""
    return Loader()


def _config(o: S3Options) -> AioConfig:
    return AioConfig(
        signature_version=UNSIGNED if o.is_anonymous else None,
        connect_timeout=o.connect_timeout_s,
        read_timeout=o.read_timeout_s,
        max_pool_connections=o.max_connections,
        retries={"total_max_attempts": 1, "mode": "standard"},
        # Bodies carry their CRC32C, so hashing them with SHA-256 for the signature proves nothing more.
        s3={"addressing_style": o.addressing_style, "payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        http_session_cls=OneAttemptSession,
    )
