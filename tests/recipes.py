"""The recipes of the page about frameworks, and trainings that are lost on their way."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from torch.optim.optimizer import register_optimizer_step_post_hook

from cloudckpt.testing import EmbeddedServer
from pages import blocks_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "frameworks.md"


class Lost(Exception):  # noqa: N818 - no error: what happens
    """A training came to its end before it should."""


def recipe(heading, bucket="s3://bucket/"):
    """What the Python below a heading of the page defines, and the calls at its end, which are left to the test.

    Args:
        heading: on the page.
        bucket: in place of the page's.
    """
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = [block for block in blocks_of(PAGE.name, section) if block.language == "python"]
    defines, _, calls = block.text.replace("s3://bucket/", bucket).rpartition("\n\n\n")
    names = {"__name__": "docs"}
    exec(compile(defines or calls, PAGE.name, "exec"), names)
    return names, calls if defines else ""


@contextmanager
def after(steps, happens):
    """Something happens in this process after the optimizer's step of that number."""
    made = count(1)

    def look(*_):
        if next(made) == steps:
            happens()

    handle = register_optimizer_step_post_hook(look)
    try:
        yield
    finally:
        handle.remove()


def lost_after(steps):
    """The optimizer's step of that number is the last that this process makes."""

    def lose():
        raise Lost

    return after(steps, lose)


def told_by_ranks(count, script, *args):
    """What a script of this directory told in JSON behind ``TOLD``, on the first of so many ranks."""
    path = Path(__file__).with_name(script)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), str(path), *args]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=270, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    return json.loads(line.removeprefix("TOLD "))


def lead_to(server, monkeypatch):
    """Has AWS's environment variables lead here and in other processes to a server; returns them."""
    known = EmbeddedServer(
        endpoint_url=server.endpoint_url, access_key=server.access_key, secret_key=server.secret_key
    )
    for name, value in known.environ.items():
        monkeypatch.setenv(name, value)
    return known.environ
