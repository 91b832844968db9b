"""``cloudckpt rebuild``: a new manifest for plain shards that lost theirs.

Law: parses and shows; the catalog decides. Nothing is written without ``--yes``.
"""

import click

from cloudckpt.cli.output import show_json, show_size, tell_dry
from cloudckpt.cli.place import Url


@click.command()
@click.argument("url", type=Url())
@click.option("--shard", "shards", multiple=True, metavar="KEY", help="Take this shard, and no others; repeatable.")
@click.option("--yes", is_flag=True, help="Read all shards and commit; without it only the plan is shown.")
@click.option("--json", "is_json", is_flag=True, help="Print what was rebuilt as JSON.")
def command(*, url: str, shards: tuple[str, ...], yes: bool, is_json: bool) -> None:
    """Makes and commits a manifest for the shards at URL, if they are whole.

    Without --yes only shows what it would be made of. The save that wrote the shards must have ended. Where several
    saves left shards, name those to take with --shard.
    """
    from cloudckpt.catalog import rebuild

    done = rebuild(url, shards=shards or None, dry_run=not yes)
    if is_json:
        show_json(done)
    else:
        for shard in done.shards:
            written = shard.modified.isoformat(timespec="seconds")
            click.echo(f"rank {shard.rank}, written {written}, {show_size(shard.size)}: {shard.key}")
        verb = "would make" if done.is_dry_run else "made"
        click.echo(f"{verb} a checkpoint of {done.entry_count} entries, {show_size(done.nbytes)}")
        click.echo("lost with the manifest: " + "; ".join(done.lost), err=True)
    if done.is_dry_run:
        tell_dry()
