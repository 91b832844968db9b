"""The committed steps below a root, by the summaries of their manifests.

Law: looks, and touches nothing. What is remembered is asked for again as soon as it may have changed.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from cloudckpt.catalog.asking import Server, ask_server
from cloudckpt.catalog.policies import CommittedStep
from cloudckpt.catalog.summaries import read_summary
from cloudckpt.errors import ManifestError, ObjectNotFoundError
from cloudckpt.layout import MANIFEST, step_name, step_of
from cloudckpt.store.protocols import Get, Store

_CONCURRENCY = 16
"""Manifests that are looked at at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A manifest as it was seen.

    Attributes:
        found: the step, and its summary.
        etag: of the object.
        modified: when it was put, by the server's clock.
    """

    found: CommittedStep
    etag: str
    modified: datetime


class Known:
    """What prunes of one root learnt: whoever prunes it again and again gives the same one to each.

    A summary is read again only if its manifest's ETag changed; what the store honours, and its clock, is asked once.
    One prune at a time may use it.
    """

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._seen: dict[int, Seen] = {}
        self._server: Server | None = None
        self._asked_at = 0.0

    def remember(self, seen: Iterable[Seen]) -> None:
        """Keeps these, and forgets all others."""
        self._seen = {one.found.step: one for one in seen}

    def recall(self, step: int, etag: str) -> CommittedStep | None:
        """The step as it was seen before; None where its manifest is another since."""
        seen = self._seen.get(step)
        return seen.found if seen is not None and seen.etag == etag else None

    async def server(self, store: Store) -> Server:
        """What the store honours, and the time by its clock: now, or a moment ago.

        Raises:
            StoreError: see `ask_server`.
        """
        if self._server is None:
            self._server = await ask_server(store)
            self._asked_at = time.monotonic()  # after, so that its clock is never taken to be ahead
        passed = timedelta(seconds=time.monotonic() - self._asked_at)
        return replace(self._server, now=self._server.now + passed)


def manifest_key(step: int) -> str:
    """The key of a step's manifest, relative to the root."""
    return f"{step_name(step)}/{MANIFEST}"


def steps_among(names: Iterable[str]) -> set[int]:
    """The steps whose checkpoints have these names; of other names none."""
    return {step for name in names if (step := step_of(name)) is not None}


async def committed_in(
    store: Get, where: str, steps: Iterable[int], known: Known, passed_over: dict[int, str]
) -> list[Seen]:
    """Those of the steps that are committed, newest first: one request for each that is known, two for others.

    Args:
        store: rooted at the root.
        where: it is rooted, for messages.
        steps: whose manifests to look at.
        known: from before; learns.
        passed_over: is told why others cannot be judged.

    Raises:
        StoreError: the store refused.
    """
    slots = asyncio.Semaphore(_CONCURRENCY)
    seen: list[Seen] = []

    async def look(step: int) -> None:
        key = manifest_key(step)
        async with slots:
            try:
                info = await store.head(key)
                found = known.recall(step, info.etag)
                if found is None:
                    found = CommittedStep(
                        step=step, summary=await read_summary(store, key, info.size, f"{where}/{key}")
                    )
            except ObjectNotFoundError:
                return
            except ManifestError as e:
                passed_over[step] = f"its manifest cannot be read: {e}"
                return
        seen.append(Seen(found=found, etag=info.etag, modified=info.modified))

    async with asyncio.TaskGroup() as group:
        for step in steps:
            group.create_task(look(step))
    known.remember(seen)
    committed = [one for one in seen if not one.found.summary.is_tombstone]
    return sorted(committed, key=lambda one: -one.found.step)
