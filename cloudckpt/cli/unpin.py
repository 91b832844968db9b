"""``cloudckpt unpin``: pinned steps left to the policies again.

Law: parses and shows; the catalog decides.
"""

import click

from cloudckpt.cli.pin import show_pins
from cloudckpt.cli.place import Url


@click.command()
@click.argument("root", type=Url())
@click.argument("steps", type=click.IntRange(min=0), nargs=-1, required=True, metavar="STEP...")
@click.option("--json", "is_json", is_flag=True, help="Print the steps that are still pinned as JSON.")
def command(*, root: str, steps: tuple[int, ...], is_json: bool) -> None:
    """Leaves pinned steps below ROOT to `cloudckpt prune` again, and shows those that are still pinned.

    No checkpoint is removed by it.
    """
    from cloudckpt.catalog import unpin

    for step in steps:
        unpin(root, step)
    show_pins(root, is_json=is_json)
