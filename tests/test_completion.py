"""Completion: a real bash reads the script, and is told commands, options and URLs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from cloudckpt.cli.main import cli
from cloudckpt.cli.place import Url
from conftest import BUCKET

COMMANDS = Path(sys.executable).parent
COMPLETES = """
source <(cloudckpt completion bash)
COMP_LINE=$1 COMP_POINT=${#1}
_cloudckpt_completion cloudckpt
printf '%s\\n' "${COMPREPLY[@]}"
"""
HEAVY = {"torch", "numpy", "aiobotocore", "botocore", "fsspec", "asyncio"}


@pytest.fixture(scope="module")
def server(one_server):
    return one_server


def completed(line, **environ):
    """What bash puts in the place of the last word, of which it takes what stands behind a colon."""
    path = f"{COMMANDS}{os.pathsep}{os.environ['PATH']}"
    asked = ["bash", "--norc", "-c", COMPLETES, "bash", line]
    done = subprocess.run(
        asked, env={**os.environ, "PATH": path, **environ}, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_and_options():
    assert completed("cloudckpt ver") == ["verify"]
    assert completed("cloudckpt doctor --re") == ["--read-only"]


def test_bash_completes_urls_of_directories(tmp_path):
    for name in ("step-7", "step-8", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-file").touch()
    assert completed("cloudckpt doctor fi") == ["file://"]
    found = completed(f"cloudckpt doctor file://{tmp_path}/st")
    assert found == [f"//{tmp_path}/step-7/", f"//{tmp_path}/step-8/"]


def test_a_directorys_name_is_spelled_as_its_url_is(tmp_path):
    (tmp_path / "50% of a?" / "step-1").mkdir(parents=True)
    (found,) = completed(f"cloudckpt doctor file://{tmp_path}/50")
    assert found == f"//{tmp_path}/50%25%20of%20a%3F/"
    assert completed(f"cloudckpt doctor file:{found}st") == [f"{found}step-1/"]


def test_bash_completes_urls_by_what_lies_in_a_bucket(server, client, root):
    prefix = root.removeprefix(f"s3://{BUCKET}/")
    for name in ("step-7/manifest.json", "step-80/manifest.json", "step-file", "other/manifest.json"):
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b"x")
    environ = {
        "AWS_ENDPOINT_URL": server.endpoint_url,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
    }
    found = completed(f"cloudckpt doctor --read-only {root}/step", **environ)
    assert found == [f"{root.removeprefix('s3:')}/step-7/", f"{root.removeprefix('s3:')}/step-80/"]


@pytest.fixture
def deaf(nothing_from_outside, monkeypatch):
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        yield


def suggested(url):
    parameter = click.Argument(["url"], type=Url())
    return [item.value for item in parameter.type.shell_complete(click.Context(cli), parameter, url)]


@pytest.mark.timeout(30)  # a request is given up after a minute
def test_what_cannot_be_listed_soon_is_not_suggested_and_nothing_is_said_of_it(deaf, capfd):
    assert suggested("s3://bucket/run/st") == []
    assert suggested("s3://") == []
    assert suggested("nope://x") == []
    assert suggested("file:///no/such/folder/") == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("words", ["cloudckpt b", "cloudckpt bench --", "cloudckpt doctor file:///"])
def test_what_is_asked_for_while_typing_imports_neither_torch_nor_a_client(words):
    script = (
        "import sys\nfrom cloudckpt.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        f"assert not {HEAVY} & set(sys.modules), {HEAVY} & set(sys.modules)\n"
    )
    environ = {"_CLOUDCKPT_COMPLETE": "zsh_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    asked = [sys.executable, "-c", script]
    done = subprocess.run(asked, env={**os.environ, **environ}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("plain\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_for_each_shell(shell):
    shown = CliRunner().invoke(cli, ["completion", shell])
    assert shown.exit_code == 0
    assert f"_CLOUDCKPT_COMPLETE={shell}_complete" in shown.stdout
