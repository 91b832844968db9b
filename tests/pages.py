"""The fenced blocks of a page, and somebody who reads it from top to bottom and does what it says.

Law: no block escapes. What cannot run here says why in its title, which readers see, and is parsed all the same.

=================  ===================================================================================================
``python``         runs; the page's blocks share their names
``pycon``          a session of Python: what it shows is compared
``console``        what follows ``$`` runs in a shell, on a terminal of 80 columns; what it prints is compared
``bash``           a script that runs
``json``           is parsed
``text``           is looked at by people
=================  ===================================================================================================

``...`` stands for any output, and a space for any white space. What goes to stderr may be shown, after the rest, or
left out. The variables that a shell exports, and the directory that it goes to, hold for the blocks below. A block
with a title of its own is

- ``not run here: WHY``: parsed only;
- ``in another terminal``: of one command, which goes on beside what follows and is interrupted at the end;
- the name of a file: written to it, for a command below.

What readers need not see stands in a comment around a block.
"""

import doctest
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import textwrap
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

LANGUAGES = ("python", "pycon", "console", "bash", "json", "text")
NOT_RUN = "not run here: "
BESIDE = "in another terminal"

_FENCE = re.compile(r"^ *(?:`{3,}|~{3,})", re.MULTILINE)
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_INFO = re.compile(r'(?P<language>\w+)(?: title="(?P<title>[^"]+)")?')
_OF_SHELLS = {"_", "SHLVL", "PWD", "OLDPWD"}
_compare = doctest.OutputChecker().check_output
_LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block: ``line`` is that of its first line of text, from 1."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def is_file(self) -> bool:
        """Whether it is to be written to a file of its title."""
        return bool(self.title) and self.title != BESIDE and not self.title.startswith(NOT_RUN)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    """All of a page's, in order. Raises ValueError for what would escape: a fence or a language that is not known."""
    blocks = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        info = _INFO.fullmatch(match["info"].strip())
        if info is None or info["language"] not in LANGUAGES:
            raise ValueError(f"{page}:{line}: {match['info']!r} is none of {LANGUAGES}, with a title or without")
        body = textwrap.dedent(match["text"])
        blocks.append(Block(page=page, line=line, language=info["language"], title=info["title"] or "", text=body))
    if len(_FENCE.findall(text)) != 2 * len(blocks):
        raise ValueError(f"{page}: {len(_FENCE.findall(text))} fences do not make {len(blocks)} blocks")
    return blocks


def commands_of(text: str) -> list[tuple[str, str]]:
    """The commands of a ``console`` block, each with what it prints. A backslash continues a command."""
    commands: list[tuple[str, str]] = []
    for line in text.splitlines(keepends=True):
        if line.startswith("$ "):
            commands.append((line[2:], ""))
            continue
        if not commands:
            raise ValueError(f"no command before {line!r}")
        command, shown = commands[-1]
        is_continued = command.endswith("\\\n") and not shown
        commands[-1] = (command + line, "") if is_continued else (command, shown + line)
    return commands


class Reader:
    """Reads one page; `close` ends what it started."""

    def __init__(self, patch: pytest.MonkeyPatch, directory: Path) -> None:
        self._patch = patch
        self._names: dict[str, object] = {"__name__": "docs"}
        self._files: set[str] = set()
        self._running = ExitStack()
        self._errors = directory / ".stderr"
        self._left = directory / ".left"

    def close(self) -> None:
        """Interrupts what runs beside, and waits for it."""
        self._running.close()

    def read(self, blocks: list[Block]) -> None:
        """Does what they say. A file that no command names after it was written would escape."""
        for block in blocks:
            self.do(block)
        assert not self._files, f"nothing is done with {self._files}"

    def do(self, block: Block) -> None:
        """Does what a block says, or only parses it where it says that it does not run here."""
        if block.is_file:
            self._parse(block)
            Path(block.title).write_text(block.text)
            self._files.add(block.title)
        elif block.title.startswith(NOT_RUN):
            self._parse(block)
        elif block.language == "python":
            exec(_compiled(block), self._names)
        elif block.language == "pycon":
            self._converse(block)
        elif block.language == "console":
            for command, shown in commands_of(block.text):
                self._type(block, command, shown)
        elif block.language == "bash":
            self._shell(block, f"set -euo pipefail\n{block.text}")
        else:
            self._parse(block)

    def _parse(self, block: Block) -> None:
        if block.language == "python":
            _compiled(block)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language in ("bash", "console"):
            is_script = block.language == "bash"
            text = block.text if is_script else "".join(command for command, _ in commands_of(block.text))
            subprocess.run(["bash", "-n"], input=text, text=True, check=True)

    def _converse(self, block: Block) -> None:
        parsed = doctest.DocTestParser().get_doctest(block.text, self._names, str(block), block.page, block.line - 1)
        runner = doctest.DocTestRunner(optionflags=_LENIENT, verbose=False)
        said: list[str] = []
        runner.run(parsed, out=said.append, clear_globs=False)
        self._names.update(parsed.globs)
        assert parsed.examples, block
        assert not runner.failures, "".join(said)

    def _type(self, block: Block, command: str, shown: str) -> None:
        if block.title == BESIDE:
            self._start(block, command, shown)
            return
        printed, told = self._shell(block, command)
        is_shown = any(_compare(shown, got, _LENIENT) for got in (printed, printed + told))
        assert is_shown, f"{block}: $ {command}{printed}{told}\ninstead of\n{shown}"

    def _shell(self, block: Block, command: str) -> tuple[str, str]:
        """Runs it to its end, and takes over what it exported. Returns what it printed to stdout, and to stderr."""
        self._files = {name for name in self._files if name not in command}
        script = f"trap 'status=$?; env -0 >{shlex.quote(str(self._left))}; exit $status' EXIT\n{command}"
        master, slave = os.openpty()
        with open(self._errors, "w+b") as errors:
            process = subprocess.Popen(["bash", "-c", script], stdin=subprocess.DEVNULL, stdout=slave, stderr=errors)
            os.close(slave)
            shown = b"".join(iter(partial(_read_on, master), b""))
            os.close(master)
            status = process.wait()
        printed, told = shown.replace(b"\r\n", b"\n").decode(), self._errors.read_text()
        assert status == 0, f"{block}: status {status} of\n{command}\n{printed}{told}"
        self._take_over()
        return printed, told

    def _take_over(self) -> None:
        left = dict(pair.split("=", 1) for pair in self._left.read_text().split("\0") if pair)
        for name, value in left.items():
            if name not in _OF_SHELLS and os.environ.get(name) != value:
                self._patch.setenv(name, value)
        self._patch.chdir(left["PWD"])

    def _start(self, block: Block, command: str, shown: str) -> None:
        """Starts it, and returns when it has printed what the page shows."""
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
            self._running.callback(_interrupt, process)
            got = ""
            assert process.stdout is not None
            while not _compare(shown, got, _LENIENT):
                line = process.stdout.readline()
                if not line:
                    errors.seek(0)
                    pytest.fail(f"{block}: $ {command}{got}{errors.read().decode()}\ninstead of\n{shown}")
                got += line


def _compiled(block: Block) -> object:
    return compile("\n" * (block.line - 1) + block.text, block.page, "exec")


def _read_on(master: int) -> bytes:
    try:
        return os.read(master, 1 << 16)
    except OSError:  # EIO: nobody holds the other end any more
        return b""


def _interrupt(process: "subprocess.Popen[str]") -> None:
    """Ctrl-C in its terminal; returns when it has ended."""
    os.killpg(process.pid, signal.SIGINT)
    status = process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert status in (0, 128 + signal.SIGINT, -signal.SIGINT), status
