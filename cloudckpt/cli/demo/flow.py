"""The demo's story: train, train and die in a save, resume, compare, read ten rows.

Law: tells what it does before it does it, and believes nothing that it can look up.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter

import click
import msgspec
import numpy as np

import cloudckpt
from cloudckpt.catalog import newest_step, step_url
from cloudckpt.cli.demo.events import Built, Event, Loaded, Saved, Saving, Stepped
from cloudckpt.cli.demo.runs import RANKS, Settings, Training
from cloudckpt.cli.demo.screen import Screen
from cloudckpt.cli.demo.watch import Sighting, look, unfinished_uploads, wait_for_shard
from cloudckpt.errors import NotCommittedError
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions, check_url

_KEY = "embeddings.word_embeddings.weight"
_ROWS = 10
_WATCH_S = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the demo saves, and how this process and the ranks get there."""

    url: str
    store: StoreOptions
    environ: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A run that was killed: the step whose save it died in, what was there then, the losses it told."""

    step: int
    seen: Sighting
    losses: dict[int, str]


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What the demo found out; ``--json`` prints it."""

    steps: int
    killed_at: int
    shards_at_death: int
    resumed_from: int
    load_seconds: float
    first_loss: float
    last_loss: float
    resumed_steps: int
    steps_that_differ: list[int]
    slice_bytes_fetched: int
    slice_bytes_needed: int
    tensor_bytes: int
    slice_is_equal: bool
    seconds: float


def run(settings: Settings, url: str | None, *, as_json: bool) -> None:
    """Plays the demo.

    Args:
        settings: of the training.
        url: the root to save under; None for a server in this process.
        as_json: print the findings as JSON.

    Raises:
        click.ClickException: a run failed, or what was found is not what was promised.
    """
    began = perf_counter()
    screen = Screen()
    with _place(url, screen) as place:
        undisturbed, killed = f"{place.url}/undisturbed", f"{place.url}/killed"
        for root in (undisturbed, killed):
            _refuse_used(root, place)
        before = _train(undisturbed, settings, place, screen)
        death = _die(killed, settings, place, screen)
        resumed_from = _look_at_the_dead(killed, death, place, screen)
        after, loaded = _resume(killed, settings, resumed_from, place, screen)
        screen.curves(before, {**death.losses, **after}, death.step)
        findings = _read_rows(
            killed,
            place,
            screen,
            Findings(
                steps=settings.steps,
                killed_at=death.step,
                shards_at_death=death.seen.shards,
                resumed_from=resumed_from,
                load_seconds=loaded.seconds,
                first_loss=float.fromhex(before[1]),
                last_loss=float.fromhex(after[settings.steps]),
                resumed_steps=len(after),
                steps_that_differ=[s for s in before if before[s] not in {after.get(s)} and s in after],
                slice_bytes_fetched=0,
                slice_bytes_needed=0,
                tensor_bytes=0,
                slice_is_equal=False,
                seconds=0.0,
            ),
        )
