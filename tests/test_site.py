"""The pages as a site: every link leads somewhere, and the reference has a place for every public name."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from test_docs import PAGES, PROJECT

LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
PUBLIC = ["cloudckpt", "cloudckpt.catalog", "cloudckpt.dcp", "cloudckpt.extensions", "cloudckpt.testing"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The directory of the built site."""
    built = tmp_path_factory.mktemp("site")
    building = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", built],
        cwd=PROJECT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert building.returncode == 0, building.stderr
    return built


def test_the_site_builds_and_has_a_page_for_each_of_ours(site):
    for page in (PROJECT / "docs").rglob("*.md"):
        at = page.relative_to(PROJECT / "docs").with_suffix("")
        assert (site / (at.parent if at.name == "index" else at) / "index.html").is_file()


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_a_place_for_every_public_name(site, module):
    shown = (site / "api" / "index.html").read_text()
    names = importlib.import_module(module).__all__
    assert names
    places = {
        name: (f'id="{module}.{name}"', f'id="{module}.{name}.{name}"') for name in names
    }  # `sweep` of `sweep.py`
    assert [name for name, ids in places.items() if not any(place in shown for place in ids)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_a_page_links_to_what_is_there(page):
    """Also those that are read where they lie, and are no part of the site."""
    links = [link for link in LINK.findall(page.read_text()) if not re.match(r"\w+:", link)]
    assert [link for link in links if not Path(page.parent, link).exists()] == []


def test_the_house_on_the_page_has_the_floors_that_the_linter_holds():
    contracts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    house = re.search(r"```text\n(.*?)```", (PROJECT / "docs/architecture.md").read_text(), re.DOTALL)[1].splitlines()
    lines = [
        [at for at, line in enumerate(house) if re.search(rf"[ /]{room}(/|\.py)", line)]
        for floor in floors
        for room in re.findall(r"cloudckpt\.(\w+)", floor)
    ]
    assert all(lines), floors
    firsts = [at[0] for at in lines]
    assert firsts == sorted(firsts)
