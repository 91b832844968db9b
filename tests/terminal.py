"""A command on a terminal, as a person sees it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

COMMAND = str(Path(sys.executable).parent / "cloudckpt")


def seen(*args, columns, **environ):
    """What ``cloudckpt`` wrote to a terminal of so many columns; stderr goes nowhere."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}
    with subprocess.Popen(
        [COMMAND, *args],
        stdin=its,
        stdout=its,
        stderr=subprocess.DEVNULL,
        env={**inherited, "TERM": "xterm", **environ},
    ):
        os.close(its)
        text = b""
        while data := _read(ours):
            text += data
    os.close(ours)
    return text.decode()


def _read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # nobody writes to it any more
        return b""


def width(text):
    """Of its longest line, without what only moves and paints."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return max(len(line.rstrip()) for line in plain.splitlines())


def is_coloured(text):
    """Whether it sets a colour: of the text, or behind it."""
    return re.search(r"\x1b\[([0-9]+;)*[349][0-9]", text) is not None
