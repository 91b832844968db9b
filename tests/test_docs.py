"""Every block of every page runs as it stands: see `pages` for what runs how."""

import os
import re
import socket
import sys
from json import JSONDecodeError
from pathlib import Path
from subprocess import CalledProcessError

import pytest

from cloudckpt.testing import embedded_server, remove_all
from pages import BESIDE, NOT_RUN, Reader, blocks_of
from servers import available, find_free_ports

PROJECT = Path(__file__).resolve().parent.parent
PAGES = [PROJECT / "README.md", PROJECT / "localstack/README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(PROJECT)) for page in PAGES]
WITH_BLOCKS = [name for name in NAMES if "```" in (PROJECT / name).read_text()]
ELSEWHERE = {"docs/stores.md": "test_clouds.py"}
"""Pages that another test runs, for it takes servers of its own."""


@pytest.fixture(scope="module")
def server():
    with embedded_server("bucket") as running:
        yield running


@pytest.fixture
def reader(server, monkeypatch, tmp_path):
    """Somebody on a machine whose AWS settings lead to a server with an empty bucket named `bucket`."""
    directory = tmp_path / "home"
    directory.mkdir()
    (directory / "localstack").symlink_to(PROJECT / "localstack")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)  # it would come before what a page exports
    settings = {
        "AWS_ENDPOINT_URL": server.endpoint_url,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_REGION": "us-east-1",
        "S3_DIR": str(tmp_path / "server"),
        "S3_PORT": str(find_free_ports(8)),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TERM": "dumb",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(directory)
    remove_all("s3://bucket")
    reading = Reader(monkeypatch, tmp_path)
    yield reading
    reading.close()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft
@pytest.mark.parametrize("name", [name for name in WITH_BLOCKS if name not in ELSEWHERE])
def test_every_block_of_a_page_runs_from_top_to_bottom(name, reader):
    text = (PROJECT / name).read_text().replace("127.0.0.1:8333", f"127.0.0.1:{os.environ['S3_PORT']}")
    blocks = blocks_of(name, text)
    missing = available("seaweedfs")
    if missing and any(block.title == BESIDE for block in blocks):
        pytest.skip(f"the page starts a server of its own: {missing}")
    reader.read(blocks)
    reader.close()
    with socket.create_server(("127.0.0.1", int(os.environ["S3_PORT"]))):
        pass  # the port is free again: what was started has ended


def test_what_a_page_says_that_a_test_runs_is_run():
    tests = "".join(file.read_text() for file in (PROJECT / "tests").glob("*.py"))
    said = [(name, block) for name in WITH_BLOCKS for block in blocks_of(name, (PROJECT / name).read_text())]
    said = [(name, block) for name, block in said if re.match(f"{NOT_RUN}tests/.* runs it", block.title)]
    for name, block in said:
        above = (PROJECT / name).read_text().splitlines()[: block.line]
        heading = [line for line in above if line.startswith("## ")][-1].removeprefix("## ")
        assert f'recipe("{heading}"' in tests, block
        assert (PROJECT / block.title.removeprefix(NOT_RUN).split()[0]).is_file(), block
    assert said
    for name, test in ELSEWHERE.items():
        assert f'"{Path(name).name}"' in (PROJECT / "tests" / test).read_text()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("```\ncloudckpt ls\n```\n", id="no language"),
        pytest.param("```ruby\nputs 1\n```\n", id="an unknown language"),
        pytest.param("```python run=no\n1\n```\n", id="an unknown remark"),
        pytest.param("```python\n1\n", id="no end"),
        pytest.param("~~~\ncloudckpt ls\n~~~\n", id="another fence"),
        pytest.param("````python\n1\n````\n", id="a longer fence"),
        pytest.param("```python\n1\n   ```\n", id="an end that is set in"),
    ],
)
def test_a_block_that_would_escape_is_refused(text):
    with pytest.raises(ValueError, match=r"^page\.md"):
        blocks_of("page.md", text)


FAILED = pytest.fail.Exception


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("```python\nassert 1 == 2\n```\n", AssertionError, id="python"),
        pytest.param("```pycon\n>>> 1\n2\n```\n", AssertionError, id="a session that shows something else"),
        pytest.param("```pycon\nx = 1\n```\n", AssertionError, id="a session without a prompt"),
        pytest.param(
            "```console\n$ echo here\nthere\n```\n", AssertionError, id="a command that prints something else"
        ),
        pytest.param("```console\n$ echo here\n```\n", AssertionError, id="a command that prints more than is shown"),
        pytest.param("```console\n$ false\n```\n", AssertionError, id="a command that fails"),
        pytest.param("```console\nls\n```\n", ValueError, id="no command"),
        pytest.param("```bash\nfalse\ntrue\n```\n", AssertionError, id="a script that fails in its midst"),
        pytest.param("```json\n{1: 2}\n```\n", JSONDecodeError, id="json"),
        pytest.param(
            f'```console title="{BESIDE}"\n$ true\nup\n```\n', FAILED, id="one beside that ends before it is up"
        ),
        pytest.param('```python title="a.py"\n1\n```\n', AssertionError, id="a file that nothing is done with"),
        pytest.param('```python title="a.py"\n1 +\n```\n', SyntaxError, id="a file of broken code"),
        pytest.param(f'```python title="{NOT_RUN}why"\n1 +\n```\n', SyntaxError, id="not run, and broken"),
        pytest.param(
            f'```bash title="{NOT_RUN}why"\nif x\n```\n', CalledProcessError, id="a script not run, and broken"
        ),
    ],
)
def test_a_page_that_is_wrong_is_found_out(text, error, reader):
    with pytest.raises(error):
        reader.read(blocks_of("page.md", text))


def test_what_a_page_exports_and_where_it_goes_holds_for_what_follows(reader):
    text = (
        '```python title="there.py"\nimport os\n\nprint(os.environ["WHO"])\n```\n'
        "```console\n$ export WHO=me\n$ python there.py\nme\n$ mkdir below; cd below; ls\n```\n"
        "```console\n$ echo $WHO; echo talk >&2\nme\n$ echo one two; echo talk >&2\n...   two\ntalk\n```\n"
        "```pycon\n>>> import os\n>>> os.environ[\"WHO\"], os.path.basename(os.getcwd())\n('me', 'below')\n```\n"
    )
    reader.read(blocks_of("page.md", text))
