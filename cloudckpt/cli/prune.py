"""``cloudckpt prune``: old steps removed by policy.

Law: parses and shows; the catalog decides. Nothing is removed without ``--yes``.
"""

from typing import TYPE_CHECKING

import click

from cloudckpt.cli.output import show_json, show_size, tell_dry
from cloudckpt.cli.place import Url
from cloudckpt.cli.span import Span

if TYPE_CHECKING:
    from cloudckpt.catalog import AnyOf, Pruned

_Best = tuple[tuple[str, int], ...]
_METRIC = (str, click.IntRange(min=1))


@click.command()
@click.argument("root", type=Url())
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the newest N steps.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="N", help="Keep steps that are multiples of N.")
@click.option("--keep-each", type=Span(), help="Keep the first step of each so long, such as 1h.")
@click.option("--keep-lowest", type=_METRIC, multiple=True, metavar="METRIC N", help="Keep the N of lowest METRIC.")
@click.option("--keep-highest", type=_METRIC, multiple=True, metavar="METRIC N", help="Keep the N of highest METRIC.")
@click.option(
    "--grace",
    default="10m",
    show_default=True,
    type=Span(),
    help="Keep what was the newest within this time: somebody may be loading it.",
)
@click.option("--yes", is_flag=True, help="Remove them; without it only the plan is shown.")
@click.option("--json", "is_json", is_flag=True, help="Print what was removed and kept as JSON.")
def command(
    *,
    root: str,
    keep_last: int | None,
    keep_every: int | None,
    keep_each: float | None,
    keep_lowest: _Best,
    keep_highest: _Best,
    grace: float,
    yes: bool,
    is_json: bool,
) -> None:
    """Removes the committed steps below ROOT that no --keep option keeps and no pin, and never the newest.

    Without --yes only shows what would be removed.
    """
    policy = _policy(keep_last, keep_every, keep_each, keep_lowest, keep_highest)
    from cloudckpt.catalog import prune

    done = prune(root, policy, dry_run=not yes, grace_s=grace)
    if is_json:
        show_json(done)
    else:
        _show(done)
    if done.is_dry_run and done.removed:
        tell_dry()


def _policy(last: int | None, every: int | None, each: float | None, lowest: _Best, highest: _Best) -> "AnyOf":
    from cloudckpt.catalog import AnyOf, KeepBest, KeepEvery, KeepLast, Policy

    policies: list[Policy] = [KeepBest(metric, n, "min") for metric, n in lowest]
    policies += [KeepBest(metric, n, "max") for metric, n in highest]
    if last is not None:
        policies.append(KeepLast(last))
    if every is not None:
        policies.append(KeepEvery(steps=every))
    if each is not None:
        policies.append(KeepEvery(seconds=each))
    if not policies:
        msg = "say what to keep: --keep-last N, --keep-every N, or another --keep option, or several"
        raise click.UsageError(msg)
    return AnyOf(tuple(policies))


def _show(done: "Pruned") -> None:
    for removed in done.removed:
        verb = "would remove" if done.is_dry_run else "removed"
        click.echo(f"{verb} step {removed.step} ({show_size(removed.nbytes)})")
    kept = "would keep" if done.is_dry_run else "kept"
    for step in done.pinned:
        click.echo(f"{kept} step {step}: it is pinned")
    for step in done.in_grace:
        click.echo(f"{kept} step {step}: it was the newest within the grace, and somebody may be loading it")
    for step, why in done.passed_over.items():
        click.echo(f"left alone step {step}: {why}")
    click.echo(f"{kept} {len(done.kept)} steps", err=True)
