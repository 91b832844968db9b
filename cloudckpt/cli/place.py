"""A URL on the command line: where a checkpoint is, or checkpoints lie below.

Law: parses. What it completes is a hint: where nothing can be learnt soon, nothing is said.
"""

import os
import re
from typing import Any
from urllib.parse import quote, unquote

import click
from click.shell_completion import CompletionItem

_PATIENCE_S = 2
_MOST = 1000
"""Names that are suggested: a page of a listing."""


class Url(click.ParamType[str]):
    """A URL that a store serves, without slashes at its end."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """See `click.ParamType.convert`."""
        from cloudckpt.errors import UnsupportedUrlError
        from cloudckpt.store.url import check_url

        try:
            return check_url(str(value))
        except UnsupportedUrlError as e:
            self.fail(str(e), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """The places below which something lies, whose URLs begin as this one."""
        del ctx, param
        try:
            return [CompletionItem(url) for url in _beginning_with(incomplete)]
        except Exception:
            return []


def _beginning_with(url: str) -> list[str]:
    if url.startswith("file:///"):
        folder, _, name = url.rpartition("/")
        names = (entry.name for entry in os.scandir(unquote(folder[len("file://") :]) or "/") if entry.is_dir())
        return [f"{folder}/{_spelled(found)}/" for found in sorted(names) if found.startswith(unquote(name))]
    if "://" in url:
        return _listed(url)
    from cloudckpt.store.url import SCHEMES

    schemes = [f"{scheme}://" for scheme in SCHEMES]
    return [scheme for scheme in schemes if scheme.startswith(url)]


def _spelled(name: str) -> str:
    """A directory's name in a URL, in characters that mean nothing to a shell."""
    return re.sub(r"[^\w.,:@+=-]", lambda found: quote(found[0]), name)


def _listed(url: str) -> list[str]:
    """By a listing of the part of the URL that is whole."""
    import asyncio

    from cloudckpt.engine import loop
    from cloudckpt.store.url import StoreOptions, open_once

    folder, _, name = url.rpartition("/")

    async def look() -> list[str]:
        found: list[str] = []
        async with asyncio.timeout(_PATIENCE_S), open_once(folder, StoreOptions(), keeps_client=False) as store:
            async for rest in store.list_names(name):
                found.append(f"{url}{rest}/")
                if len(found) == _MOST:
                    break
        return found

    return loop.run(look)
