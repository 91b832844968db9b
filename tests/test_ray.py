"""Ray Train on this machine, by the recipe of the page about frameworks.

``tests/frameworks.sh`` installs the package, and runs this: it takes minutes where processors are few.
"""

import os
from pathlib import Path
from secrets import token_hex

import pytest

from cloudckpt.catalog import committed_steps
from conftest import BUCKET
from recipes import lead_to, recipe

ray = pytest.importorskip("ray", reason="tests/frameworks.sh installs it")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def server(one_server):
    return one_server


@pytest.fixture
def aws(server, monkeypatch):
    return lead_to(server, monkeypatch)


@pytest.fixture
def cluster(aws, monkeypatch):
    """Ray with two processors, whose workers find the server."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # it would tell the makers of Ray
    ray.init(num_cpus=2, runtime_env={"env_vars": aws}, object_store_memory=80 << 20)
    yield
    ray.shutdown()


@pytest.mark.timeout(900)
def test_a_worker_that_is_killed_costs_the_steps_since_the_last_save(cluster, store_options, tmp_path):
    root = f"{BUCKET}/{token_hex(6)}"
    names, _ = recipe("Ray Train", f"s3://{root}/")
    work, marks = names["work"], tmp_path

    def killed_once(config):
        from torch.optim.optimizer import register_optimizer_step_post_hook

        made = []

        def kill(*_):
            made.append(None)
            is_first = len(made) == 13 and os.environ["RANK"] == "1" and not Path(marks, "killed").exists()
            if is_first:
                Path(marks, "killed").touch()
                os._exit(1)

        register_optimizer_step_post_hook(kill)
        work(config)

    killed = names["fit"](killed_once, "killed")
    undisturbed = names["fit"](work, "undisturbed")
    assert Path(marks, "killed").exists()
    assert killed.metrics == undisturbed.metrics
    assert killed.checkpoint.path == f"{root}/ray/killed/step-20"
    assert committed_steps(f"s3://{root}/ray/killed", store_options)[-2:] == [15, 20]
