"""``cloudckpt``: its commands by name."""

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_COMMANDS = {
    "demo": ("cloudckpt.cli.demo", "Fine-tune a real model, kill it in mid-save, resume from S3."),
    "bench": ("cloudckpt.cli.bench", "Measure saves and loads beside PyTorch's own, on any S3 server."),
    "bench-async": ("cloudckpt.cli.bench.async_command", "Measure what saves behind training take of it."),
    "completion": ("cloudckpt.cli.completion", "Print what makes a shell complete commands and URLs."),
    "diff": ("cloudckpt.cli.diff", "Tell what differs between two checkpoints."),
    "cp": ("cloudckpt.cli.cp", "Copy a checkpoint to another place."),
    "doctor": ("cloudckpt.cli.doctor", "Tell what is wrong with a place to save to, and what to do about it."),
    "inspect": ("cloudckpt.cli.inspect", "Show what is in a checkpoint, and what its tensors are like."),
    "ls": ("cloudckpt.cli.ls", "Show the checkpoints below a root."),
    "export": ("cloudckpt.cli.export", "Write a checkpoint in another format."),
    "pin": ("cloudckpt.cli.pin", "Keep steps until they are unpinned, or show those that are."),
    "prune": ("cloudckpt.cli.prune", "Remove old steps by policy."),
    "rebuild": ("cloudckpt.cli.rebuild", "Make a new manifest for plain shards that lost theirs."),
    "report": ("cloudckpt.cli.report", "Draw a checkpoint as a page to look at."),
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

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem[str]]":
        """Options and commands, of which none is imported."""
        from click.shell_completion import CompletionItem

        found = [(name, text) for name, (_, text) in sorted(_COMMANDS.items()) if name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [CompletionItem(name, help=text) for name, text in found] + options

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(_COMMANDS.items())])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cloudckpt")
def cli() -> None:
    """Object-storage-first checkpoints for PyTorch."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    With status 0, 1 where it failed, 2 where it was misused, 130 where it was interrupted, and 141 where nobody reads
    its output any more, as a shell says of a command that a signal ended. A failure that nobody foresaw is raised.
    """
    if "_CLOUDCKPT_COMPLETE" in os.environ:
        from cloudckpt.cli.completion import answer

        answer(cli)
    context: click.Context | None = None
    _silence_others()
    _spell_what_is_not_encoded()
    try:
        context = cli.make_context("cloudckpt", list(sys.argv[1:] if args is None else args))
        with context:
            cli.invoke(context)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except BaseException as e:
        from cloudckpt.cli.failure import status_of

        status = status_of(e, context.invoked_subcommand if context else None)
        if status is None:
            raise
        sys.exit(status)


def _silence_others() -> None:
    """Keeps what a client's library logs off stderr, tracebacks among it: what matters is an error of ours."""
    import logging

    for name in ("aiobotocore", "botocore"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())


def _spell_what_is_not_encoded() -> None:
    """Not every terminal knows all characters that a key may have; stderr does so anyway."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
