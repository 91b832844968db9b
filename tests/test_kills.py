"""Kill -9 at a random moment of the demo's training, again and again: it always goes on as if nothing had happened.

``KILLS`` says how many runs are killed, over all servers, and ``FAULT_SEED`` whom and when; ``make kills`` kills 50.
"""

import os
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from secrets import token_hex

import pytest

from cloudckpt.catalog import committed_steps, newest_step, step_url, sweep, verify
from cloudckpt.cli.demo.events import Built, Event, Loaded, Ready, Saved, Saving, Staged, Stepped, Uploaded
from cloudckpt.cli.demo.runs import KEPT, RANKS, Settings, Training
from cloudckpt.testing import EmbeddedServer, embedded_server
from conftest import BUCKET
from servers import chosen
from test_endurance import everything

KILLS = int(os.environ.get("KILLS", "1"))
SEED = int(os.environ.get("FAULT_SEED", "1"))
SETTINGS = Settings(steps=20, save_every=2, seed=7)
AGAIN = 1 / 3
"""Chance that a run which goes on after a kill is killed too."""

LOAD, STAGING, UPLOAD, COMMIT = "while starting", "in staging", "in upload", "in commit"
BEFORE, BETWEEN, AFTER = "before the first save", "between saves", "after the last save"
PHASES = LOAD, BEFORE, STAGING, UPLOAD, COMMIT, BETWEEN, AFTER


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """SIGKILL to a rank, or to all and torchrun (None), so long after the n-th event of a kind."""

    rank: int | None
    after: type[Event]
    nth: int
    delay_s: float


@dataclass(slots=True)
class Told:
    """What a run told, how much of it when it was killed, and what it wrote to stderr."""

    events: list[Event] = field(default_factory=list)
    killed_at: int | None = None
    printed: str = ""

    def steps_of(self, kind):
        return [event.step for event in self.events if isinstance(event, kind)]

    @property
    def losses(self):
        return {event.step: event.loss for event in self.events if isinstance(event, Stepped)}

    def phase(self):
        """Where the kill struck."""
        before = Told(self.events[: self.killed_at])
        saving, staged, uploaded, saved = map(before.steps_of, (Saving, Staged, Uploaded, Saved))
        under_way = set(staged) - set(saved)
        if under_way:
            return COMMIT if under_way & set(uploaded) else UPLOAD
        if len(saving) > len(staged):
            return STAGING
        if not before.losses:
            return LOAD
        if SETTINGS.steps in saved:
            return AFTER
        return BETWEEN if saved else BEFORE


def run(root, environ, kill=None):
    """Runs the training, or has it go on, until its end or until it is killed."""
    told = Told()
    seen, timers = Counter(), []
    with Training(root, SETTINGS, environ, is_resumed=True, module="killed_training") as training:

        def strike():
            if not training.is_running():
                return
            told.killed_at = len(told.events)
            if kill.rank is None:
                training.kill()
            else:
                training.kill_rank(kill.rank)

        for event in training.events():
            told.events.append(event)
            seen[type(event)] += 1
            is_due = kill is not None and seen[Ready] == RANKS and seen[Built] and seen[kill.after] >= kill.nth
            if is_due and not timers:
                timers.append(threading.Timer(kill.delay_s, strike))
                timers[0].start()
        for timer in timers:
            timer.cancel()
            timer.join()
        told.printed = training.tail()
    return told


def environ_of(server):
    known = EmbeddedServer(
        endpoint_url=server.endpoint_url, access_key=server.access_key, secret_key=server.secret_key
    )
    here = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    return {**here, **known.environ, "PYTHONPATH": str(Path(__file__).parent), "RES_OPTIONS": "timeout:1"}


@cache
def undisturbed():
    """The losses of a run that nobody killed."""
    with embedded_server(BUCKET) as server:
        return run(f"s3://{BUCKET}/undisturbed", environ_of(server)).losses


def drawn(random):
    """Half of the kills at any moment of a run; half in a save, of which some phases are short."""
    rank = random.choice([*range(RANKS), None, None])
    if random.random() < 0.5:
        return Kill(rank=rank, after=Built, nth=1, delay_s=random.uniform(0, 3.5))
    kind = random.choice((Saving, Staged, Uploaded, Saved))
    saves = SETTINGS.steps // SETTINGS.save_every
    return Kill(rank=rank, after=kind, nth=random.randint(1, saves), delay_s=random.uniform(0, 0.03))


def share_of(name):
    """How many of the kills one of the servers gets."""
    names = chosen()
    return len(range(names.index(name), KILLS, len(names)))


@dataclass(slots=True)
class Tally:
    """What was struck, and what was left."""

    phases: Counter = field(default_factory=Counter)
    victims: Counter = field(default_factory=Counter)
    kills: int = 0
    before_the_first_commit: int = 0
    attempts: int = 0
    objects: int = 0
    uploads: int = 0
    verified: int = 0
    too_late: int = 0

    def add(self, kill, told, swept):
        self.kills += 1
        self.phases[told.phase()] += 1
        self.victims["all" if kill.rank is None else f"rank {kill.rank}"] += 1
        self.attempts += len(swept.removed)
        self.objects += sum(len(place.keys) for place in swept.removed)
        self.uploads += sum(len(place.uploads) for place in swept.removed)

    def __str__(self):
        phases = ", ".join(f"{self.phases[phase]} {phase}" for phase in PHASES)
        return (
            f"{self.kills} kills ({dict(sorted(self.victims.items()))}; {self.too_late} more came too late): "
            f"{phases}; {self.before_the_first_commit} before the first commit. {self.verified} checkpoints "
            f"verified; sweeps found {self.objects} objects and {self.uploads} uploads at {self.attempts} places"
        )


def goes_on_after(random, root, environ, store, tally):
    """Kills a run, has it go on, perhaps kills that too, and holds all that it told against the undisturbed run."""
    kill, told_losses, newest = drawn(random), {}, None
    while True:
        told = run(root, environ, kill)
        loaded = told.steps_of(Loaded)
        if told.losses or told.killed_at is None:
            assert (loaded[0] if loaded else None) == newest, "the newest that was committed is what is loaded"
        differ = {step for step, loss in told.losses.items() if loss != undisturbed()[step]}
        assert not differ, f"{kill}: steps {sorted(differ)} have other losses"
        told_losses |= told.losses
        if told.killed_at is None:
            tally.too_late += kill is not None
            break
        swept = sweep(root, grace_s=0, include_whole=True, store=store)  # looks, and removes nothing
        tally.add(kill, told, swept)
        newest = newest_step(root, store)
        assert (newest or 0) >= max(told.steps_of(Saved), default=0), "what was told as saved is there"
        tally.before_the_first_commit += newest is None
        for step in committed_steps(root, store):
            assert verify(step_url(root, step), deep=True, store=store).problems == ()
            tally.verified += 1
        kill = drawn(random) if random.random() < AGAIN else None
    assert told_losses == undisturbed()
    kept = list(range(SETTINGS.save_every, SETTINGS.steps + 1, SETTINGS.save_every))[-KEPT:]
    if told.steps_of(Saved):  # what a kill kept from being removed goes after the next commit
        assert committed_steps(root, store) == kept, told.printed


@pytest.mark.timeout(7200)
def test_a_training_that_is_killed_at_any_moment_goes_on_to_the_same_losses(server, store_options, capsys):
    if not share_of(server.name):
        pytest.skip(f"KILLS={KILLS} go to the servers before it")
    tally = Tally()
    for number in range(share_of(server.name)):
        random, kills = Random(f"{SEED} {server.name} {number}"), tally.kills
        while tally.kills == kills:  # or the run was over before its kill
            root = f"s3://{BUCKET}/{token_hex(6)}"
            goes_on_after(random, root, environ_of(server), store_options, tally)
        with capsys.disabled():
            print(f"\n{server.name}, FAULT_SEED={SEED}, run {number}: {tally}", end="")
        for _ in range(2):  # the second takes the tombstones of the first, where deletes know conditions
            sweep(root, grace_s=0, dry_run=False, include_whole=True, store=store_options)
        objects, uploads, named = everything(root, store_options)
        assert objects == named
        assert uploads == []
