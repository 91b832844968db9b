"""The demo's story: train; train and die in a save; resume and compare; read ten rows.

Law: says what it does, and believes nothing that it can look up.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import click
import msgspec

import cloudckpt
from cloudckpt.array import Array
from cloudckpt.catalog import committed_steps, newest_step, step_url
from cloudckpt.cli.demo.events import Built, Event, Loaded, Saved, Saving, Staged, Stepped
from cloudckpt.cli.demo.findings import Death, Resumed, Rows, Undisturbed, findings_of
from cloudckpt.cli.demo.runs import RANKS, Settings, Training
from cloudckpt.cli.demo.screen import Screen
from cloudckpt.cli.demo.watch import Sighting, is_used, look, unfinished_uploads, wait_for_shard
from cloudckpt.errors import NotCommittedError
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions, check_url

_TENSOR = "embeddings.word_embeddings.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the demo saves, and how this process (``store``) and the ranks (``environ``) get there."""

    url: str
    store: StoreOptions
    environ: Mapping[str, str]


def run(settings: Settings, url: str | None, *, as_json: bool) -> None:
    """Plays the demo.

    Args:
        settings: of the training.
        url: the root to save under; None for a server in this process.
        as_json: print the findings as JSON.

    Raises:
        click.ClickException: a run failed, or what was found is not what was promised.
        CheckpointError: the store refused.
    """
    began = perf_counter()
    screen = Screen()
    with _place(url, screen) as place:
        calm, rough = f"{place.url}/undisturbed", f"{place.url}/killed"
        for root in (calm, rough):
            _refuse_used(root, place)
        before = _train(calm, settings, place, screen)
        death = _die(rough, settings, place, screen)
        _look_at_the_dead(rough, death, place, screen)
        resumed = _resume(rough, settings, place, screen)
        screen.curves(before.losses, death.losses, resumed.losses)
        rows = _read_rows(rough, settings, place, screen)
    found = findings_of(settings, before, death, resumed, rows, seconds=perf_counter() - began)
    if as_json:
        screen.json(msgspec.json.encode(found).decode())
    else:
        screen.summary(found.rows())
    if not found.are_as_promised:
        msg = f"steps that differ: {found.steps_that_differ or 'none'}; rows equal: {found.rows_are_equal}"
        raise click.ClickException(msg)


@contextmanager
def _place(url: str | None, screen: Screen) -> Iterator[Place]:
    if url is not None:
        yield Place(url=check_url(url), store=StoreOptions(), environ=os.environ)
        return
    from cloudckpt.testing import embedded_server

    with embedded_server("checkpoints") as server:
        screen.head("An S3 server in this process")
        screen.say(f"{server.endpoint_url}, bucket [bold]checkpoints[/bold]; its contents go when the demo ends")
        s3 = S3Options(
            endpoint_url=server.endpoint_url,
            region="us-east-1",
            access_key_id=server.access_key,
            secret_access_key=server.secret_key,
        )
        theirs = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environ = {**theirs, **server.environ}
        yield Place(url="s3://checkpoints/demo", store=StoreOptions(s3=s3), environ=environ)


def _refuse_used(root: str, place: Place) -> None:
    if is_used(root, place.store):
        msg = f"{root} holds objects already; give a fresh root"
        raise click.BadParameter(msg, param_hint="--url")


def _train(root: str, settings: Settings, place: Place, screen: Screen) -> Undisturbed:
    screen.head("1. An undisturbed run")
    screen.say(f"all-MiniLM-L6-v2 under FSDP2 on {RANKS} ranks, to {root}/step-N, each save behind training")
    found = Undisturbed(losses={}, saved_s=[], waited_s=[])
    with (
        Training(root, settings, place.environ) as training,
        screen.steps(settings.steps) as move,
    ):
        for event in training.events():
            _show(event, found.losses, screen, move)
            if isinstance(event, Staged):
                found.waited_s.append(event.seconds)
            if isinstance(event, Saved):
                found.saved_s.append(event.seconds)
    return found


def _die(root: str, settings: Settings, place: Place, screen: Screen) -> Death:
    screen.head("2. A second run, killed in the middle of a save")
    screen.say(f"the same training, to {root}/step-N")
    losses: dict[int, str] = {}
    death: Death | None = None
    saves = 0
    with (
        Training(root, settings, place.environ) as training,
        screen.steps(settings.steps) as move,
    ):
        for event in training.events():  # once killed, what it had told by then
            _show(event, losses, screen, move)
            saves += isinstance(event, Saving)
            if isinstance(event, Saving) and saves > 1 and death is None:
                seen = _kill_in_mid_save(training, step_url(root, event.step), place)
                death = None if seen is None else Death(step=event.step, seen=seen, losses=losses)
    if death is None:
        msg = "every save was over before it could be killed; a slower store, or more --steps, would show it"
        raise click.ClickException(msg)
    return death


def _kill_in_mid_save(training: Training, url: str, place: Place) -> Sighting | None:
    """Kills the run while some of its ranks' shards are up; None where the save was over too soon.

    What is seen of a running save may be past when the signal lands. So the run is frozen first, and looked at
    again: a frozen rank whose shard is missing cannot let the save commit.
    """
    wait_for_shard(url, place.store, is_running=training.is_running)
    training.freeze()
    seen = look(url, place.store)
    if not seen.is_mid_save(RANKS):
        training.thaw()
        return None
    training.kill()
    return seen


def _look_at_the_dead(root: str, death: Death, place: Place, screen: Screen) -> None:
    url = step_url(root, death.step)
    seen = look(url, place.store)
    uploads = unfinished_uploads(url, place.store)
    open_uploads = "" if uploads is None else f", {uploads} multipart upload(s) open"
    screen.say(f"[bold red]SIGKILL[/bold red] to torchrun and {RANKS} ranks in the save of step {death.step}")
    screen.say(f"the listing: {seen.shards} of {RANKS} shards ({_mib(seen.nbytes)}){open_uploads}, no manifest.json")
    try:
        cloudckpt.open(url, store=place.store)
    except NotCommittedError as e:
        screen.say(f"cloudckpt.open: [bold]NotCommittedError[/bold]: {e}")
        return
    msg = f"{url} can be opened although its save was killed"
    raise click.ClickException(msg)


def _resume(root: str, settings: Settings, place: Place, screen: Screen) -> Resumed:
    screen.head("3. The resume")
    screen.say(f"newest committed step under {root}: [bold]{newest_step(root, place.store)}[/bold]")
    losses: dict[int, str] = {}
    loaded: Loaded | None = None
    with (
        Training(root, settings, place.environ, is_resumed=True) as training,
        screen.steps(settings.steps) as move,
    ):
        for event in training.events():
            _show(event, losses, screen, move)
            loaded = event if isinstance(event, Loaded) else loaded
    if loaded is None:
        msg = "the resumed run told of no load"
        raise click.ClickException(msg)
    return Resumed(loaded=loaded, losses=losses, steps=committed_steps(root, place.store))


def _read_rows(root: str, settings: Settings, place: Place, screen: Screen) -> Rows:
    from safetensors import safe_open

    step = newest_step(root, place.store) or 0
    screen.head("4. Ten rows of one tensor")
    screen.say(f'cloudckpt.open("{step_url(root, step)}")["model.{_TENSOR}"][0:10]')
    ckpt = cloudckpt.open(step_url(root, step), store=place.store)
    tensor = ckpt[f"model.{_TENSOR}"]
    if not isinstance(tensor, Array):
        msg = f"model.{_TENSOR} is no tensor in {ckpt!r}"
        raise click.ClickException(msg)
    rows = tensor[0:10]
    with safe_open(Path(settings.model) / "model.safetensors", framework="np") as original:
        expected = original.get_slice(_TENSOR)[0:10]  # the embeddings were frozen in training
    is_equal = rows.dtype == expected.dtype and rows.tobytes() == expected.tobytes()
    stats = ckpt.stats
    screen.say(
        f"{stats.bytes_fetched:,} bytes in {stats.requests} request(s), of a tensor of {tensor.nbytes:,}; "
        f"{'equal to' if is_equal else 'NOT'} those of the model as it was published"
    )
    return Rows(fetched_nbytes=stats.bytes_fetched, tensor_nbytes=tensor.nbytes, is_equal=is_equal)


def _show(event: Event, losses: dict[int, str], screen: Screen, move: Callable[[int, str], None]) -> None:
    """Keeps the loss and tells the person."""
    match event:
        case Built():
            trained, frozen = event.trained / 1e6, (event.parameters - event.trained) / 1e6
            move(0, f"{trained:.1f} M parameters to train, {frozen:.1f} M frozen")
        case Loaded():
            screen.say(f"loaded step {event.step} in {event.seconds:.1f} s")
            move(event.step, "loaded")
        case Stepped():
            losses[event.step] = event.loss
            move(event.step, f"loss {float.fromhex(event.loss):.4f}")
        case Saving():
            move(event.step, f"saving step {event.step}")
        case Saved():
            screen.say(f"saved step {event.step} in {event.seconds:.1f} s")
        case Staged():
            move(event.step, f"step {event.step} copied, training goes on")
        case _:
            pass


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.0f} MiB"
