"""``cloudckpt sweep``: leftovers of saves that never committed.

Law: parses and shows; the catalog decides. Nothing is removed without ``--yes``.
"""

import click

from cloudckpt.cli.output import show_json, show_size, tell_dry
from cloudckpt.cli.place import Url
from cloudckpt.cli.span import Span


@click.command()
@click.argument("root", type=Url())
@click.option("--grace", default="24h", show_default=True, type=Span(), help="What is younger stays.")
@click.option("--include-whole", is_flag=True, help="Remove also what `cloudckpt rebuild` might rescue.")
@click.option("--name", "names", multiple=True, help="Of a place below ROOT to sweep, and no others; repeatable.")
@click.option("--yes", is_flag=True, help="Remove it; without it only the plan is shown.")
@click.option("--json", "is_json", is_flag=True, help="Print what was removed and kept as JSON.")
def command(
    *, root: str, grace: float, include_whole: bool, names: tuple[str, ...], yes: bool, is_json: bool
) -> None:
    """Removes what saves that never committed left below ROOT, a run's URL or a checkpoint's own.

    Without --yes only shows what would be removed. What is committed, what is younger than the grace, and whatever
    is not cloudckpt's, stays.
    """
    from cloudckpt.catalog import sweep

    done = sweep(root, grace_s=grace, dry_run=not yes, include_whole=include_whole, names=names)
    if is_json:
        show_json(done)
    else:
        verb = "would remove" if done.is_dry_run else "removed"
        for left in done.removed:
            what = f"{len(left.keys)} objects ({show_size(left.nbytes)}), {len(left.uploads)} uploads"
            click.echo(f"{verb} {left.prefix or '.'}: {what}: {left.why}")
        for kept in done.kept:
            what = f"{len(kept.keys)} objects ({show_size(kept.nbytes)}), {len(kept.uploads)} uploads"
            click.echo(f"{'would keep' if done.is_dry_run else 'kept'} {kept.prefix or '.'}: {what}: {kept.why}")
        if not done.removed:
            click.echo("nothing to sweep", err=True)
    if done.is_dry_run and done.removed:
        tell_dry()
