"""The Python in the page about training, run as it stands."""

import re
import textwrap
from pathlib import Path
from secrets import token_hex

import pytest

import cloudckpt

DOCS = Path(cloudckpt.__file__).parents[1] / "docs"
PAGES = ["training.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    text = (DOCS / page).read_text().replace("s3://bucket/", f"memory://{token_hex(6)}/")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    names = {"__name__": "docs"}
    for block in blocks:
        exec(compile(textwrap.dedent(block), page, "exec"), names)
