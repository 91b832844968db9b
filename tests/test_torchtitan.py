"""torchtitan's parts with our checkpoint manager, by the recipe of the page about frameworks.

``tests/frameworks.sh`` installs the package, whose own requirements do not fit ours.
"""

from secrets import token_hex

import pytest

from cloudckpt.catalog import committed_steps
from conftest import BUCKET
from recipes import lead_to, told_by_ranks

pytest.importorskip("torchtitan", reason="tests/frameworks.sh installs it")


@pytest.fixture(scope="module")
def server(one_server):
    return one_server


@pytest.fixture
def aws(server, monkeypatch):
    return lead_to(server, monkeypatch)


def test_a_job_that_was_lost_goes_on_to_the_same_losses_on_two_ranks(aws, store_options, tmp_path):
    root = f"s3://{BUCKET}/{token_hex(6)}"
    told = told_by_ranks(2, "torchtitan_ranks.py", root, str(tmp_path))
    undisturbed = told["undisturbed"]
    assert told["resumed"] == {step: undisturbed[step] for step in map(str, range(9, 13))}
    assert told["begun"] == {step: undisturbed[step] for step in map(str, range(5, 13))}
    assert committed_steps(f"{root}/lost", store_options)[-2:] == [8, 12]
