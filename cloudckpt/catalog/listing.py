"""The checkpoints below a root, by the beginnings of their manifests.

Law: looks, and touches nothing. A page of a listing for each 1,000 names, and one request of 4 KiB for each of them.
"""

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from cloudckpt.catalog.pins import pinned_in
from cloudckpt.catalog.verify import verify
from cloudckpt.convert import safetensors, stock_dcp, torch_file
from cloudckpt.engine.session import Session
from cloudckpt.errors import (
    CheckpointChangedError,
    CheckpointNotFoundError,
    ManifestError,
    NotCommittedError,
    ObjectNotFoundError,
    UnsupportedVersionError,
    UsageError,
)
from cloudckpt.layout import MANIFEST, PINS, SHARDS, step_of
from cloudckpt.manifest import SUMMARY_NBYTES, parse_summary
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, check_url

State = Literal[
    "committed", "swept", "no manifest", "unreadable", "not committed", "damaged", "dcp", "safetensors", "torch.save"
]
Order = Literal["newest", "name"]

_CONCURRENCY = 32
"""Manifests that are looked at at a time."""

_CHECKED = 4
"""Checkpoints that are verified at a time."""

_LISTED = 1000
"""Files that are looked at where nothing else is: a page of a listing."""

_OURS = {name.rstrip("/") for name in (SHARDS, PINS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A place where a checkpoint is, was, or may be.

    Attributes:
        name: below the root; empty for the root itself.
        url: of it.
        state: ``committed``; ``swept``: a tombstone lies there, and no checkpoint is; ``no manifest``: nothing is
            committed there, or it is of others, or what is meant lies deeper; ``unreadable``: its manifest is. A root
            whose files tell it is ``dcp``, ``safetensors`` or ``torch.save``. Only a check tells that one is
            ``damaged``, or that shards without a manifest are ``not committed``.
        step: by its manifest, else by its name.
        created: when it was committed, by the clock of who did.
        writer: the program that wrote it.
        nbytes, stored_nbytes: of what it holds, as the user knows it and as it is stored.
        shard_count, entry_count: of shards, and of state-dict keys.
        metrics: what the step measured.
        is_pinned: no policy removes it.
        problems: why it is unreadable, or what is damaged.
    """

    name: str
    url: str
    state: State
    step: int | None = None
    created: datetime | None = None
    writer: str | None = None
    nbytes: int | None = None
    stored_nbytes: int | None = None
    shard_count: int | None = None
    entry_count: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    is_pinned: bool = False
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """What lies below a root.

    Attributes:
        root: its URL.
        checkpoints: in the order that was asked for.
    """

    root: str
    checkpoints: tuple[Listed, ...]


def list_checkpoints(
    root: str, *, order: Order = "newest", check: bool = False, store: StoreOptions | None = None
) -> Listing:
    """Lists the checkpoints right below ``root``, whatever their names, and ``root`` itself where it is one.

    One listing (a request for each 1,000 names, and one more where steps are pinned), and one request for the first
    4 KiB of each one's manifest. With ``check`` each is verified besides, as `verify` does without ``deep``: two
    requests more, and the whole manifest.

    Args:
        root: of a run, of several, or of a checkpoint.
        order: the newest first, and what is not committed last; or by name, numbers by their value.
        check: look further than the manifests' beginnings.
        store: how to reach the store.

    Raises:
        StoreError: the store refused.
    """
    root = check_url(root)
    with Session(root, store or StoreOptions()) as session:
        found = session.run(_list)
    if check:
        with ThreadPoolExecutor(_CHECKED) as pool:
            found = list(pool.map(lambda listed: _checked(listed, store), found))
    return Listing(root=root, checkpoints=tuple(sorted(found, key=_by_age if order == "newest" else _by_name)))


async def _list(store: Store) -> list[Listed]:
    names = [name async for name in store.list_names()]
    below = [name for name in names if name not in _OURS]
    if not names or SHARDS.rstrip("/") in names:
        below.append("")
    pinned = await pinned_in(store) if PINS.rstrip("/") in names else frozenset()
    slots = asyncio.Semaphore(_CONCURRENCY)

    async def look(name: str) -> Listed:
        async with slots:
            listed = await _look(store, name)
        return replace(listed, is_pinned=step_of(name) in pinned)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(look(name)) for name in below]
    found = [task.result() for task in tasks]
    if names or found[0].state != "no manifest":
        return found
    state = await _state_of_files(store)
    return [] if state is None else [replace(found[0], state=state)]


async def _look(store: Store, name: str) -> Listed:
    key, url = (f"{name}/{MANIFEST}", f"{store.url}/{name}") if name else (MANIFEST, store.url)
    listed = Listed(name=name, url=url, state="no manifest", step=step_of(name))
    try:
        summary = parse_summary(await store.get_first(key, SUMMARY_NBYTES), f"{store.url}/{key}")
    except ObjectNotFoundError:
        return listed
    except ManifestError as e:
        return replace(listed, state="unreadable", problems=(str(e),))
    if summary.is_tombstone:
        return replace(listed, state="swept", created=summary.created, writer=summary.writer)
    return replace(
        listed,
        state="committed",
        step=listed.step if summary.step is None else summary.step,
        created=summary.created,
        writer=summary.writer,
        nbytes=summary.nbytes,
        stored_nbytes=summary.stored_nbytes,
        shard_count=summary.shard_count,
        entry_count=summary.entry_count,
        metrics=summary.metrics,
    )


async def _state_of_files(store: Store) -> State | None:
    """What the names of a root's own files tell of it."""
    count = 0
    async for found in store.list_objects():
        count += 1
        if found.key == stock_dcp.METADATA:
            return "dcp"
        if found.key.endswith(safetensors.SUFFIX):
            return "safetensors"
        if found.key.endswith(torch_file.SUFFIXES):
            return "torch.save"
        if count == _LISTED:
            break
    return None


def _checked(listed: Listed, store: StoreOptions | None) -> Listed:
    """What a closer look tells."""
    if listed.state not in {"committed", "unreadable", "no manifest"}:
        return listed
    try:
        problems: Sequence[str] = verify(listed.url, store=store).problems
    except NotCommittedError:
        return replace(listed, state="not committed")
    except (CheckpointNotFoundError, UsageError):  # removed since, or of others
        return replace(listed, state="no manifest")
    except (CheckpointChangedError, UnsupportedVersionError):
        return listed
    except ManifestError as e:
        problems = [str(e)]
    return replace(listed, state="damaged", problems=tuple(problems)) if problems else listed


def _by_age(listed: Listed) -> tuple[object, ...]:
    is_committed = listed.state in {"committed", "damaged"} and listed.created is not None
    created = listed.created.timestamp() if listed.created is not None else 0.0
    return not is_committed, -created, -(listed.step or 0), _by_name(listed)


def _by_name(listed: Listed) -> tuple[tuple[str, int, str], ...]:
    """Numbers in it by their value; of two alike, the name as it is."""
    parts = re.split(r"([0-9]+)", listed.name)
    return tuple((part, 0, "") if i % 2 == 0 else ("", int(part), part) for i, part in enumerate(parts))
