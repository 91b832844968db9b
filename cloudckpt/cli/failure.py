"""How a command's end looks to a person and to a shell, where it is not success.

Law: tells on stderr. What nobody foresaw is left to be raised, with its traceback.
"""

import errno
import select

import click

from cloudckpt.cli.output import printable
from cloudckpt.errors import CheckpointError, UsageError, leaves

_INTERRUPTED = 130
_NOT_READ = 141
"""What a shell makes of a command that SIGINT or SIGPIPE ended: 128 and the signal's number."""
_STANDS = {
    "cp": "the copy is committed as a whole or not at all; run it again to go on",
    "export": "what it had written was removed",
    "pin": "what it had shown or pinned by then stands; `cloudckpt pin ROOT` shows what is pinned",
    "prune": "steps that it had removed by then are gone, the others whole; run it again to go on",
    "rebuild": "the checkpoint is committed as a whole or not at all; `cloudckpt verify` tells",
    "report": "its page was written as a whole or not at all",
    "sweep": "what it had removed by then is gone; run it again to go on",
    "unpin": "what it had unpinned by then is; `cloudckpt pin ROOT` shows what is pinned",
}
"""What became of what a command was doing, by its name, when it was interrupted."""
_READS = {"diff", "doctor", "inspect", "ls", "verify"}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def status_of(error: BaseException, command: str | None) -> int | None:
    """Tells of an error of a command, and returns the status to exit with; None where it is to be raised."""
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    errors = list(leaves(error))
    if any(isinstance(one, KeyboardInterrupt | click.Abort) for one in errors):
        stands = "nothing was changed" if command in _READS else _STANDS.get(command or "")
        _tell("interrupted" + (f": {stands}" if stands else ""), *_notes(error))
        return _INTERRUPTED
    if isinstance(error, BrokenPipeError) and _is_unread():
        return _NOT_READ
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        _tell(f"{error.filename or 'the output'} cannot be written: {error.strerror}")
        return 1
    if not all(isinstance(one, CheckpointError) for one in errors):
        return None
    for one in errors:
        _tell(str(one), *_notes(one))
    return 2 if all(isinstance(one, UsageError) for one in errors) else 1


def _tell(what: str, *notes: str) -> None:
    click.echo(f"cloudckpt: {printable(what)}", err=True)
    for note in notes:
        click.echo(f"  {printable(note)}", err=True)


def _notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", ()))


def _is_unread() -> bool:
    """Whether whoever read what is printed has gone; another broken pipe is another failure."""
    asked = select.poll()
    for stream in (1, 2):
        asked.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
