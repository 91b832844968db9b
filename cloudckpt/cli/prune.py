"""``cloudckpt prune``: old steps removed by policy.

Law: parses and shows; the catalog decides. Nothing is removed without ``--yes``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cloudckpt.cli.report import show_json, show_size, tell_dry

if TYPE_CHECKING:
    from cloudckpt.catalog.policies import CommittedStep


class _Either:
    """Keeps what either option keeps."""

    def __init__(self, last: int | None, every: int | None) -> None:
        self._last = last
        self._every = every

    def keep(self, steps: "Sequence[CommittedStep]") -> "list[CommittedStep]":
        """See `catalog.policies.Policy.keep`."""
        from cloudckpt.catalog.policies import KeepEvery, KeepLast

        kept = list(KeepLast(self._last).keep(steps)) if self._last is not None else []
        return kept + (list(KeepEvery(steps=self._every).keep(steps)) if self._every is not None else [])


@click.command()
@click.argument("root")
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the newest N steps.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="N", help="Keep steps that are multiples of N.")
@click.option("--yes", is_flag=True, help="Remove them; without it only the plan is shown.")
@click.option("--json", "is_json", is_flag=True, help="Print what was removed and kept as JSON.")
def command(*, root: str, keep_last: int | None, keep_every: int | None, yes: bool, is_json: bool) -> None:
    """Removes the committed steps below ROOT that no --keep option keeps, and never the newest.

    Without --yes only shows what would be removed.
    """
    if keep_last is None and keep_every is None:
        msg = "say what to keep: --keep-last N, --keep-every N, or both"
        raise click.UsageError(msg)
    from cloudckpt.catalog import prune

    done = prune(root, _Either(keep_last, keep_every), dry_run=not yes)
    if is_json:
        show_json(done)
    else:
        for removed in done.removed:
            verb = "would remove" if done.is_dry_run else "removed"
            click.echo(f"{verb} step {removed.step} ({show_size(removed.nbytes)})")
        for step, why in done.passed_over.items():
            click.echo(f"left alone step {step}: {why}")
        click.echo(f"{'would keep' if done.is_dry_run else 'kept'} {len(done.kept)} steps", err=True)
    if done.is_dry_run and done.removed:
        tell_dry()
