"""Lightning, with the recipe of the page about frameworks and the real package."""

from secrets import token_hex

import pytest
import s3fs
import torch

import cloudckpt
from cloudckpt.errors import CheckpointError, CheckpointNotFoundError, UnsafePickleError
from cloudckpt.frameworks.lightning import CloudCheckpointIO
from conftest import BUCKET
from recipes import Lost, lead_to, lost_after, recipe, told_by_ranks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def server(one_server):
    return one_server


@pytest.fixture
def aws(server, monkeypatch):
    return lead_to(server, monkeypatch)


@pytest.fixture
def files(aws):
    """What lies on the server, as s3fs sees it; AWS's variables lead there."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    s3fs.S3FileSystem.clear_instance_cache()


def checkpoints(files, url):
    """The places of all objects below a URL."""
    return {path.split("/")[2] for path in files.find(url)}


def test_a_run_that_was_lost_goes_on_from_its_last_checkpoint_to_the_same_losses(files):
    bucket = f"s3://{BUCKET}/{token_hex(6)}-"
    names, _ = recipe("Lightning", bucket)
    with pytest.raises(Lost), lost_after(18):
        names["fit"](f"{bucket}lost")
    assert checkpoints(files, f"{bucket}lost") == {"epoch=1-step=15.ckpt", "last.ckpt"}
    undisturbed = names["fit"](f"{bucket}undisturbed")
    resumed = names["fit"](f"{bucket}lost", f"{bucket}lost/last.ckpt")
    assert list(resumed) == list(range(15, 24))
    assert resumed == {step: undisturbed[step] for step in resumed}
    with cloudckpt.open(f"{bucket}lost/last.ckpt") as last:
        assert last["global_step"] == 20
        assert set(last.match("state_dict.*")) == {
            f"state_dict.net.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")
        }
    assert checkpoints(files, f"{bucket}lost") == {"epoch=2-step=20.ckpt", "last.ckpt"}, "nothing is left of others"


def test_a_checkpoint_comes_back_as_lightning_gave_it():
    url, io = f"memory://{token_hex(6)}/one.ckpt", CloudCheckpointIO()
    given = {
        "epoch": 3,
        "state_dict": {"w": torch.randn(3, 2), "b": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"betas": (0.9, 0.99), "params": [0]}]}
        ],
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best.score": None, "kth": {}}},
        "lr_schedulers": [],
    }
    io.save_checkpoint(given, url)
    assert repr(io.load_checkpoint(url)) == repr(given)
    io.save_checkpoint({"epoch": 4}, url)
    assert io.load_checkpoint(url) == {"epoch": 4}, "the new one stands in the old one's place"
    io.remove_checkpoint(url)
    io.remove_checkpoint(url)
    with pytest.raises(CheckpointNotFoundError):
        io.load_checkpoint(url)


def test_what_could_run_code_is_unpickled_only_where_lightning_is_told_to():
    url, io = f"memory://{token_hex(6)}/one.ckpt", CloudCheckpointIO()
    io.save_checkpoint({"hyper_parameters": {"random": torch.nn.Linear(1, 1)}}, url)
    with pytest.raises(UnsafePickleError, match="Linear"):
        io.load_checkpoint(url)
    assert isinstance(io.load_checkpoint(url, weights_only=False)["hyper_parameters"]["random"], torch.nn.Linear)


def test_a_save_behind_training_that_fails_is_raised_to_who_trains(files):
    names, _ = recipe("Lightning")
    with pytest.raises(CheckpointError, match="no-such-bucket"):
        names["fit"]("s3://no-such-bucket/run")


def test_two_ranks_go_on_with_their_shards_which_one_process_reads_whole(files):
    root = f"s3://{BUCKET}/{token_hex(6)}"
    told = told_by_ranks(2, "lightning_ranks.py", root)
    assert told["resumed"] == {step: told["undisturbed"][step] for step in map(str, range(6, 12))}
    assert "no checkpoint" in told["missing"]
    url = f"{root}/lost/last.ckpt"
    with cloudckpt.open(url) as last:
        assert last.summary.shard_count == 2
    whole = CloudCheckpointIO().load_checkpoint(url)
    assert whole["state_dict"]["net.0.weight"].tolist() == told["weight"]
    assert set(whole["optimizer_states"][0]["state"]) == set(whole["state_dict"])
