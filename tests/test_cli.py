"""The command line, as a stranger types it."""

import subprocess
import sys
from pathlib import Path

COMMAND = str(Path(sys.executable).parent / "cloudckpt")


def run(*args):
    return subprocess.run([COMMAND, *args], capture_output=True, text=True, check=False)


def test_help_names_the_commands_and_imports_neither_torch_nor_a_client():
    shown = run("--help")
    assert shown.returncode == 0
    assert "demo" in shown.stdout
    script = (
        "import sys\nimport cloudckpt.cli.main as m\n"
        "try:\n    m.cli(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'aiobotocore', 'botocore'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_version_is_shown():
    assert "0.1.0" in run("--version").stdout


def test_an_unknown_command_is_misuse():
    misused = run("no-such-command")
    assert misused.returncode == 2
    assert "No such command" in misused.stderr


def test_importing_the_package_imports_no_torch():
    script = "import cloudckpt, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
