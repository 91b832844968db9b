"""What people get wrong, and where they print to: each command says so, and none falls over."""

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cloudckpt.cli.failure import status_of
from cloudckpt.cli.main import _COMMANDS, main
from cloudckpt.cli.tables import Column, show_table
from cloudckpt.errors import CredentialsError, StoreError, UsageError
from cloudckpt.testing import fault_proxy, faults

COMMAND = str(Path(sys.executable).parent / "cloudckpt")
GOLDEN = Path(__file__).resolve().parent / "golden"
SECRET = "top-secret"

ARGUMENTS = {
    "cp": lambda url: [url, "memory://elsewhere/copy"],
    "diff": lambda url: [url, url],
    "doctor": lambda url: [url],
    "export": lambda url: [url, "memory://elsewhere/out", "--to", "dcp"],
    "inspect": lambda url: [url],
    "ls": lambda url: [url],
    "pin": lambda url: [url, "1"],
    "prune": lambda url: [url, "--keep-last", "1"],
    "rebuild": lambda url: [url],
    "report": lambda url: [url, "-o", "-"],
    "sweep": lambda url: [url],
    "unpin": lambda url: [url, "1"],
    "verify": lambda url: [url],
}
"""By command, what to call it with."""
TAKE_NO_URL = {"bench", "bench-async", "completion", "demo"}
DO_WITHOUT = {"doctor", "ls", "prune", "sweep", "unpin"}
"""Those to which it is no failure that nothing is there."""
COMMANDS = sorted(_COMMANDS.keys() & ARGUMENTS.keys())


def test_every_command_is_called_here():
    assert _COMMANDS.keys() <= ARGUMENTS.keys() | TAKE_NO_URL


def status(*args):
    """What the command line exits with, run in this process."""
    with pytest.raises(SystemExit) as ended:
        main(args)
        raise SystemExit(0)
    return ended.value.code or 0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two steps below a root."""
    folder = tmp_path_factory.mktemp("run")
    for step, name in {1: "v1", 2: "v1-zstd"}.items():
        shutil.copytree(GOLDEN / name, folder / f"step-{step}")
    return f"file://{folder}"


OF_A_ROOT = {"doctor", "ls", "pin", "prune", "sweep", "unpin"}


def good(name, root):
    """Arguments of a command that has something to show."""
    if name == "diff":
        return [name, f"{root}/step-1", f"{root}/step-2"]
    return [name, *ARGUMENTS[name](root if name in OF_A_ROOT else f"{root}/step-1")]


# What is given.

WRONG = {
    "no scheme": "some/folder",
    "another scheme": "nope://bucket/run",
    "no bucket": "s3://",
    "a password": f"s3://user:{SECRET}@bucket/run",
    "a query": f"s3://bucket/run?signature={SECRET}",
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_url_is_misuse_and_is_told(name, wrong, capsys):
    assert status(name, *ARGUMENTS[name](WRONG[wrong])) == 2
    printed, said = capsys.readouterr()
    assert printed == ""
    assert re.search(r"store serves|bucket|credentials|password", said)
    assert SECRET not in said


@pytest.mark.parametrize("name", COMMANDS)
def test_where_nothing_is_that_is_told(name, tmp_path, capsys):
    url = f"file://{tmp_path}/none"
    assert status(name, *ARGUMENTS[name](url)) == (0 if name in DO_WITHOUT else 1)
    _, said = capsys.readouterr()
    assert name in DO_WITHOUT or url in said
    assert "Traceback" not in said


REFUSED = {
    "no such bucket": (404, "NoSuchBucket", "s3://bucket/run.*: no such bucket; create it"),
    "no rights": (403, "AccessDenied", "s3://bucket/run.*: the credentials do not allow this request"),
    "keys that are not known": (403, "InvalidAccessKeyId", "refused the credentials|key is not known to the server"),
    "keys that do not fit": (403, "SignatureDoesNotMatch", "the secret key does not belong to the access key"),
}


@pytest.fixture(scope="module")
def refusing():
    """A proxy with nothing behind it."""
    with fault_proxy("http://127.0.0.1:9") as proxy:
        yield proxy


@pytest.mark.usefixtures("nothing_from_outside")
@pytest.mark.parametrize("refusal", REFUSED)
@pytest.mark.parametrize("name", COMMANDS)
def test_what_the_server_refuses_is_told(name, refusal, refusing, monkeypatch, capsys):
    code, s3_code, meaning = REFUSED[refusal]
    refusing.clear()
    refusing.each(lambda _: faults.answer(code, s3_code))
    environ = {"ENDPOINT_URL": refusing.url, "ACCESS_KEY_ID": s3_code, "SECRET_ACCESS_KEY": SECRET}
    for variable, value in {**environ, "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{variable}", value)
    assert status(name, *ARGUMENTS[name]("s3://bucket/run")) == 1
    assert refusing.requests or "KeyId" in s3_code  # which is not asked with twice
    told = "".join(capsys.readouterr())
    assert re.search(meaning, told)
    assert "Traceback" not in told
    assert SECRET not in told


@pytest.mark.usefixtures("nothing_from_outside")
def test_a_refusal_is_told_once_and_without_what_libraries_log(refusing):
    refusing.clear()
    refusing.each(lambda _: faults.answer(403, "InvalidAccessKeyId"))
    environ = {"AWS_ENDPOINT_URL": refusing.url, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": SECRET}
    _, said = run("verify", "s3://bucket/run", env=os.environ | environ).communicate(timeout=60)
    assert "cloudckpt: the server refused the credentials (env)" in said
    assert "Traceback" not in said


# Where it is printed.

CONTROLLED = "a\tb\n\x1b]0;title\x07\u202ec"


@pytest.mark.parametrize("is_terminal", [False, True], ids=["pipe", "terminal"])
def test_what_a_terminal_would_obey_is_spelled_out(is_terminal, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Terminal(is_terminal=is_terminal))
        show_table([Column("key"), Column(CONTROLLED)], [["x", CONTROLLED]])
        shown = ESCAPE.sub("", sys.stdout.shown())
    spelled = r"a\tb\n\x1b]0;title\x07\u202ec"
    assert shown.count(spelled) == (2 if is_terminal else 1)
    assert "\x07" not in shown


def test_an_error_is_one_line_whatever_it_is_of(capsys):
    status_of(StoreError(f"{CONTROLLED}: refused"), "verify")
    assert capsys.readouterr().err == "cloudckpt: a\\tb\\n\\x1b]0;title\\x07\\u202ec: refused\n"


@pytest.mark.parametrize("is_terminal", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_spelled_out(encoding, is_terminal, tmp_path, monkeypatch):
    (tmp_path / "運").mkdir()
    shutil.copytree(GOLDEN / "v1", tmp_path / "運" / "ж")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", Terminal(encoding, is_terminal=is_terminal))
        assert status("ls", f"file://{tmp_path}/運") == 0
        sys.stdout.flush()
        shown = sys.stdout.buffer.getvalue()
    assert b"\\u0436" in shown or "ж".encode() in shown


ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[0-9;]*)?m")
TABLES = sorted({"diff", "doctor", "inspect", "ls"} & set(COMMANDS))


class Terminal(io.TextIOWrapper):
    """Text that says of itself that it is a terminal."""

    def __init__(self, encoding="utf-8", *, is_terminal=True):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self._is_terminal = is_terminal

    def isatty(self):
        return self._is_terminal

    def shown(self):
        return self.buffer.getvalue().decode()


def seen(monkeypatch, *args):
    """What a command shows on a terminal of 40 columns: on stdout, and on stderr."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with monkeypatch.context() as patched:
        for stream in ("stdout", "stderr"):
            patched.setattr(sys, stream, Terminal())
        assert status(*args) in {0, 1}
        return sys.stdout.shown(), sys.stderr.shown()


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_as_narrow_as_its_terminal(name, root, monkeypatch):
    shown, _ = seen(monkeypatch, *good(name, root))
    lines = ESCAPE.sub("", shown).splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 40


@pytest.mark.parametrize("name", COMMANDS)
def test_no_colour_is_shown_where_none_is_wanted(name, root, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.search("".join(seen(monkeypatch, *good(name, root))))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_terminal_is_sent_no_escape_codes(name, root, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert status(*good(name, root)) in {0, 1}
    printed, said = capsys.readouterr()
    assert printed or said
    assert "\x1b" not in printed + said


def run(*args, **options):
    return subprocess.Popen([COMMAND, *args], stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("args", [["ls"], ["report"], ["--help"]], ids=" ".join)
def test_who_stops_reading_is_told_nothing(args, root):
    reading, writing = os.pipe()
    os.close(reading)
    running = run(*args, *([] if args == ["--help"] else good(args[0], root)[1:]), stdout=writing)
    os.close(writing)
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (141, "")


def test_a_full_disk_is_told():
    with open("/dev/full", "w") as full:
        running = run("doctor", "memory://any/place", "--json", stdout=full)
    _, said = running.communicate(timeout=60)
    no_space = os.strerror(errno.ENOSPC)
    assert (running.returncode, said) == (1, f"cloudckpt: the output cannot be written: {no_space}\n")


# What ends it.


def test_an_interrupted_command_says_what_stands(nothing_from_outside):
    started = []
    interrupted = replace(faults.stall(), is_passed_on=False, first=lambda: started[0].send_signal(signal.SIGINT))
    with fault_proxy("http://127.0.0.1:9") as proxy:
        proxy.each(lambda _: interrupted)
        environ = {"ENDPOINT_URL": proxy.url, "ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any"}
        asked = ["prune", "s3://bucket/run", "--keep-last", "1"]
        started.append(run(*asked, env=os.environ | {f"AWS_{name}": value for name, value in environ.items()}))
        _, said = started[0].communicate(timeout=60)
    assert started[0].returncode == 130
    assert said.startswith("cloudckpt: interrupted: steps that it had removed by then are gone")


ENDS = {
    "an error of ours": (StoreError("refused"), 1),
    "misuse": (UsageError("both"), 2),
    "several at once": (ExceptionGroup("several", [UsageError("both"), CredentialsError("refused")]), 1),
    "one that is not ours": (ValueError("a bug"), None),
    "one that is not ours beside another": (ExceptionGroup("several", [StoreError("x"), KeyError("a bug")]), None),
    "an interruption": (KeyboardInterrupt(), 130),
    "an interruption in a group": (BaseExceptionGroup("several", [KeyboardInterrupt()]), 130),
    "a pipe of somebody else's": (BrokenPipeError(errno.EPIPE, "Broken pipe"), None),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/full/report.html"), 1),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_error_ends_in_its_status_and_what_is_not_ours_is_raised(end, capsys):
    error, expected = ENDS[end]
    if isinstance(error, StoreError):
        error.add_note("of the second attempt")
    assert status_of(error, "verify") == expected
    said = capsys.readouterr().err
    assert bool(said) == (expected is not None)
    for one in getattr(error, "exceptions", [error]) if expected in {1, 2} else ():
        assert (one.filename if isinstance(one, OSError) else str(one)) in said
    assert ("of the second attempt" in said) == isinstance(error, StoreError)
