"""``cloudckpt completion``: what makes a shell complete commands, options and URLs.

Law: imports neither torch nor a client, unless a URL of theirs is being completed.
"""

import os
import sys

import click
from click.shell_completion import BashComplete, add_completion_class, get_completion_class, shell_complete
from click.shell_completion import split_arg_string as split

VARIABLE = "_CLOUDCKPT_COMPLETE"
"""By it a shell asks ``cloudckpt`` itself, as click spells it."""
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' line="${COMP_LINE:0:COMP_POINT}" reply type value
    local word="${line##*[[:space:]]}" shown=""
    if [[ $COMP_WORDBREAKS == *:* ]]; then shown="${word%%"${word##*:}"}"; fi
    COMPREPLY=()
    for reply in $(env COMP_LINE="$line" %(complete_var)s=bash_complete "$1" 2>/dev/null); do
        IFS=',' read -r type value <<< "$reply"
        case $type in
            dir) compopt -o dirnames 2>/dev/null ;;
            file) compopt -o default 2>/dev/null ;;
            plain)
                COMPREPLY+=("${value#"$shown"}")
                if [[ $value == */ ]]; then compopt -o nospace 2>/dev/null; fi ;;
        esac
    done
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    """As click's own, for words that bash breaks at their colons, as all URLs are."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split(line)[1:]
        return (words, "") if line[-1:].isspace() else (words[:-1], words[-1] if words else "")


def answer(cli: click.Command) -> None:
    """Answers a shell, if one asks by `VARIABLE`, and exits."""
    add_completion_class(_Bash)
    sys.exit(shell_complete(cli, {}, "cloudckpt", VARIABLE, os.environ[VARIABLE]))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    r"""Prints a script for SHELL to read: it completes commands, options and URLs.

    \b
    bash: eval "$(cloudckpt completion bash)"                in ~/.bashrc
    zsh:  eval "$(cloudckpt completion zsh)"                 in ~/.zshrc
    fish: cloudckpt completion fish > ~/.config/fish/completions/cloudckpt.fish
    """
    made = _Bash if shell == "bash" else get_completion_class(shell)
    assert made is not None  # noqa: S101 - for the type checker: click knows these
    click.echo(made(ctx.find_root().command, {}, "cloudckpt", VARIABLE).source())
