"""Files that are whole or not there.

Law: a file that stood there is replaced at once, or stays as it was.
"""

import os
from contextlib import suppress
from secrets import token_hex

import click


def write_file(path: str, data: bytes) -> None:
    """Writes ``data`` to the file ``path``, or to stdout where that is ``-``.

    What is no plain file, such as a pipe, is written to as it is.

    Raises:
        click.ClickException: it cannot be written; what stood there stays.
    """
    if path == "-":
        with click.open_file("-", "wb") as out:
            out.write(data)
        return
    try:
        _replace(os.path.realpath(path), data)
    except OSError as e:
        msg = f"cannot write {path}: {e.strerror or e}"
        raise click.ClickException(msg) from e


def _replace(path: str, data: bytes) -> None:
    if os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as out:
            out.write(data)
        return
    begun = os.path.join(os.path.dirname(path), f".{token_hex(8)}.part")
    try:
        with open(begun, "xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(begun, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(begun)
        raise
