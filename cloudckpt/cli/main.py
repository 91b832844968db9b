"""``cloudckpt``: its commands by name, and how an error of ours looks to a person."""

import sys
from importlib import import_module

import click

_COMMANDS = {
    "demo": ("cloudckpt.cli.demo", "Fine-tune a real model, kill it in mid-save, resume from S3."),
    "bench": ("cloudckpt.cli.bench", "Measure saves and loads beside PyTorch's own, on any S3 server."),
    "bench-async": ("cloudckpt.cli.bench.async_command", "Measure what saves behind training take of it."),
    "pin": ("cloudckpt.cli.pin", "Keep steps until they are unpinned, or show those that are."),
    "prune": ("cloudckpt.cli.prune", "Remove old steps by policy."),
    "rebuild": ("cloudckpt.cli.rebuild", "Make a new manifest for plain shards that lost theirs."),
    "sweep": ("cloudckpt.cli.sweep", "Remove what saves that never committed left behind."),
    "unpin": ("cloudckpt.cli.unpin", "Leave pinned steps to `prune` again."),
    "verify": ("cloudckpt.cli.verify", "Tell whether a checkpoint is whole."),
}


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        del ctx
        if name not in _COMMANDS:
            return None
        module: click.Command = import_module(_COMMANDS[name][0]).command
        return module

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(_COMMANDS.items())])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cloudckpt")
def cli() -> None:
    """Object-storage-first checkpoints for PyTorch."""


def main() -> None:
    """Runs the command line; an error of ours is told on stderr, with status 1, or 2 for misuse."""
    try:
        cli()
    except Exception as e:
        from cloudckpt.errors import CheckpointError, UsageError

        if not isinstance(e, CheckpointError):
            raise
        click.echo(f"cloudckpt: {e}", err=True)
        for note in getattr(e, "__notes__", ()):
            click.echo(f"  {note}", err=True)
        sys.exit(2 if isinstance(e, UsageError) else 1)
