"""``cloudckpt cp``: a checkpoint to another place.

Law: parses and shows; `transfer.copy` decides.
"""

import click

from cloudckpt.cli.output import show_json, show_size
from cloudckpt.cli.place import Url
from cloudckpt.cli.progress import progress


@click.command()
@click.argument("url", type=Url())
@click.argument("to_url", type=Url())
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that is there.")
@click.option("--no-server-side", is_flag=True, help="Do not let the server copy: send all bytes from here.")
@click.option("--to-endpoint", metavar="URL", help="Of the server of TO_URL, if it is another S3 server.")
@click.option("--to-profile", metavar="NAME", help="Of AWS's configuration, for TO_URL.")
@click.option("--dry-run", is_flag=True, help="Only show what would be copied.")
@click.option("--json", "is_json", is_flag=True, help="Print what was copied as JSON.")
def command(
    *,
    url: str,
    to_url: str,
    overwrite: bool,
    no_server_side: bool,
    to_endpoint: str | None,
    to_profile: str | None,
    dry_run: bool,
    is_json: bool,
) -> None:
    """Copies the checkpoint at URL, as it is, to TO_URL, on the same store or another.

    The server copies what it can by itself; the rest passes through here. It is committed there when all of it is
    there. A copy that was broken off goes on where it was when the command is given again.
    """
    from cloudckpt.store.s3_options import S3Options
    from cloudckpt.store.url import StoreOptions
    from cloudckpt.transfer.copy import CopyPlan

    to_store = None
    if to_endpoint is not None or to_profile is not None:
        to_store = StoreOptions(s3=S3Options(endpoint_url=to_endpoint, profile=to_profile))
    with CopyPlan(url, to_url, to_store=to_store) as plan:
        if dry_run:
            if is_json:
                show_json({"url": plan.url, "objects": plan.sizes})
            else:
                click.echo(f"would copy {len(plan.sizes)} objects ({show_size(plan.nbytes)}) to {plan.url}")
            return
        with progress("copy", plan.nbytes) as advance:
            done = plan.run(overwrite=overwrite, server_side=not no_server_side, advance=advance)
    if is_json:
        show_json(done)
        return
    click.echo(
        f"{done.url}: {done.object_count} objects, {show_size(done.nbytes)}; {show_size(done.there_nbytes)} were "
        f"there, {show_size(done.sent_nbytes)} sent through here, {show_size(done.copied_nbytes)} copied by the "
        "server"
    )
