"""``cloudckpt verify``: whether a checkpoint is whole.

Law: parses and shows; the catalog decides.
"""

import click

from cloudckpt.cli.output import show_json, show_size
from cloudckpt.cli.place import Url


@click.command()
@click.argument("url", type=Url())
@click.option("--deep", is_flag=True, help="Read every byte and hold it against its checksums.")
@click.option("--json", "is_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def command(ctx: click.Context, url: str, *, deep: bool, is_json: bool) -> None:
    """Holds what the manifest of the checkpoint at URL says against what lies in storage.

    Without --deep: one listing, whether all shards are there with their sizes and the manifest does not contradict
    itself. Exits with 1 if there are problems.
    """
    from cloudckpt.catalog import verify

    found = verify(url, deep=deep)
    if is_json:
        show_json(found, is_sound=found.is_sound)
    else:
        for problem in found.problems:
            click.echo(problem)
        seen = f"{found.shard_count} shards, {show_size(found.nbytes)}"
        how = "all of it read" if deep else "sizes looked at; --deep reads every byte"
        verdict = "sound" if found.is_sound else f"{len(found.problems)} problem(s)"
        click.echo(f"{found.url}: {verdict} ({seen}; {how})", err=not found.is_sound)
    ctx.exit(0 if found.is_sound else 1)
