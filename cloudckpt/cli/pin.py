"""``cloudckpt pin``: steps that no policy removes.

Law: parses and shows; the catalog decides.
"""

import json

import click

from cloudckpt.cli.place import Url


@click.command()
@click.argument("root", type=Url())
@click.argument("steps", type=click.IntRange(min=0), nargs=-1, metavar="[STEP]...")
@click.option("--json", "is_json", is_flag=True, help="Print the pinned steps as JSON.")
def command(*, root: str, steps: tuple[int, ...], is_json: bool) -> None:
    """Keeps committed steps below ROOT until they are unpinned, whatever `cloudckpt prune` is told.

    Shows the steps that are pinned then; without a STEP only that.
    """
    from cloudckpt.catalog import pin

    for step in steps:
        pin(root, step)
    show_pins(root, is_json=is_json)


def show_pins(root: str, *, is_json: bool) -> None:
    """Prints the steps that are pinned."""
    from cloudckpt.catalog import pins

    pinned = pins(root)
    if is_json:
        click.echo(json.dumps({"root": root, "pinned": pinned}, indent=2))
        return
    for step in pinned:
        click.echo(f"pinned step {step}")
    if not pinned:
        click.echo("no step is pinned", err=True)
