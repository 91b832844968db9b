"""``cloudckpt export``: a checkpoint in another format.

Law: parses and shows; `transfer.export` decides.
"""

from typing import TYPE_CHECKING

import click

from cloudckpt.cli.output import show_json, show_size
from cloudckpt.cli.place import Url
from cloudckpt.cli.progress import progress
from cloudckpt.cli.sizes import SIZE

if TYPE_CHECKING:
    from cloudckpt.transfer.export import ExportPlan, Format


@click.command()
@click.argument("url", type=Url())
@click.argument("to_url", type=Url())
@click.option(
    "--to",
    "to",
    type=click.Choice(["safetensors", "torch", "dcp"]),
    required=True,
    help="The format: Hugging Face's safetensors, torch.save, or torch's own DCP.",
)
@click.option("--only", "patterns", multiple=True, metavar="PATTERN", help="Of keys to write; repeatable.")
@click.option("--tensors-only", is_flag=True, help="Leave out all that is no tensor.")
@click.option(
    "--max-file-size", type=SIZE, default="5GB", show_default=True, help="Of a file of safetensors in a directory."
)
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@click.option("--no-server-side", is_flag=True, help="Do not let the server copy: send all bytes from here.")
@click.option("--dry-run", is_flag=True, help="Only show which files would be written.")
@click.option("--json", "is_json", is_flag=True, help="Print what was written as JSON.")
def command(
    *,
    url: str,
    to_url: str,
    to: "Format",
    patterns: tuple[str, ...],
    tensors_only: bool,
    max_file_size: int,
    overwrite: bool,
    no_server_side: bool,
    dry_run: bool,
    is_json: bool,
) -> None:
    """Writes the checkpoint at URL, of any format, to TO_URL in another, object to object.

    TO_URL names a file (.safetensors; .pt, .pth, .bin, .ckpt) or a directory (safetensors, as Hugging Face lays it
    out; dcp). Bytes that lie in runs of 5 MiB and more are copied by the server where it can; nothing is
    kept on disk here. If it fails, or Ctrl-C ends it, what it had written is removed.
    """
    from cloudckpt.transfer.export import ExportPlan

    with ExportPlan(
        url,
        to_url,
        to=to,
        patterns=patterns or "*",
        tensors_only=tensors_only,
        max_file_nbytes=max_file_size,
    ) as plan:
        if dry_run:
            _show_plan(plan, is_json=is_json)
            return
        with progress("export", plan.nbytes) as advance:
            done = plan.run(overwrite=overwrite, server_side=not no_server_side, advance=advance)
    if is_json:
        show_json(done)
        return
    for name, nbytes in done.files.items():
        click.echo(f"{name}\t{show_size(nbytes)}")
    click.echo(
        f"{done.url}: {done.entry_count} entries; {show_size(done.fetched_nbytes)} fetched and "
        f"{show_size(done.sent_nbytes)} sent through here, {show_size(done.copied_nbytes)} copied by the server",
        err=True,
    )


def _show_plan(plan: "ExportPlan", *, is_json: bool) -> None:
    if is_json:
        show_json({"url": plan.url, "format": plan.format, "files": plan.files, "left_out": plan.left_out})
        return
    for name, nbytes in plan.files.items():
        click.echo(f"{name}\t{show_size(nbytes)}")
    click.echo(f"would write {show_size(plan.nbytes)}; {len(plan.left_out)} entries are left out", err=True)
