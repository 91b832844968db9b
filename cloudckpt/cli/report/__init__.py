"""``cloudckpt report``: a checkpoint as a page to look at.

Law: parses, gathers and writes. The page asks for nothing, so that it can be sent to anyone and kept.
"""

import click

from cloudckpt.cli.place import Url


@click.command()
@click.argument("url", type=Url())
@click.option("-o", "--output", metavar="FILE", help="Where to write the page; - is stdout. A file is replaced.")
@click.option("--since", type=Url(), metavar="URL", help="Compare with this checkpoint, not with the step before.")
@click.option(
    "--trace", type=Url(), metavar="PLACE", help="Where saves and loads left traces: draw how long each part took."
)
@click.option("--perfetto", metavar="FILE", help="Also write these traces, joined, for Perfetto or chrome://tracing.")
@click.option("--json", "is_json", is_flag=True, help="Print what the page tells as JSON.")
def command(
    *, url: str, output: str | None, since: str | None, trace: str | None, perfetto: str | None, is_json: bool
) -> None:
    """Draws the checkpoint at URL as one HTML page: what it is made of, how it was saved, and what changed.

    Reads its manifest, that of the step before, and traces, but no shard. The page loads nothing from anywhere.
    """
    if output is None and not is_json:
        msg = "say where to write the page: -o report.html, or -o - for stdout; or --json"
        raise click.UsageError(msg)
    if perfetto is not None and trace is None:
        msg = "--perfetto joins traces: say with --trace where they lie"
        raise click.UsageError(msg)
    if [output, perfetto, "-" if is_json else None].count("-") > 1:
        msg = "only one thing fits on stdout: the page, the joined traces, or --json"
        raise click.UsageError(msg)
    from cloudckpt.catalog.traces import joined
    from cloudckpt.cli.report.files import write_file
    from cloudckpt.cli.report.gathering import look
    from cloudckpt.cli.report.page import as_json, render

    report, traces = look(url, since=since, place=trace)
    for note in report.notes:
        click.echo(f"left out: {note}", err=True)
    if perfetto is not None and traces is not None:
        write_file(perfetto, joined(traces.found))
    if output is not None:
        write_file(output, render(report))
    if is_json:
        import msgspec

        click.echo(msgspec.json.format(as_json(report), indent=2))
