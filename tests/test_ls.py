"""Listing checkpoints: what lies below a root, at the cost that is promised."""

import json
import subprocess
import sys
from datetime import timedelta
from secrets import token_hex

import numpy as np
import pytest
from click.testing import CliRunner
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID

from cloudckpt.catalog import list_checkpoints, pin
from cloudckpt.cli.bench.counter import counting
from cloudckpt.cli.main import cli
from cloudckpt.errors import BucketNotFoundError
from cloudckpt.layout import SAFETENSORS, shard_key
from cloudckpt.manifest import SUMMARY_NBYTES, Manifest, encode
from cloudckpt.store.s3 import S3Store
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions
from cloudckpt.tombstone import encode_tombstone
from conftest import BUCKET
from rude_server import RudeServer, head, saying
from sharded import put_checkpoint, put_object, summary_of
from terminal import is_coloured, seen, width

STATE = {"w": np.arange(6.0)}


@pytest.fixture(scope="module")
def server(one_server):
    return one_server


def fresh():
    return f"memory://{token_hex(6)}"


def manifest_of(step, *, nbytes=0, **more):
    """Bytes of a manifest, of so many at least."""
    summary = summary_of(step=step, nbytes=step * 1000, stored_nbytes=step * 900, **more)
    filling = {"notes": "x" * nbytes}
    return encode(Manifest(summary=summary, metadata=filling, planner_paths=None, shards=(), entries={}))


def states(listing):
    return {listed.name: listed.state for listed in listing.checkpoints}


def names(listing):
    return [listed.name for listed in listing.checkpoints]


def test_a_thousand_checkpoints_cost_two_lists_and_the_first_4_kib_of_each(server, s3, root, client):
    data = manifest_of(7, nbytes=20_000)
    prefix = root.removeprefix(f"s3://{BUCKET}/")
    put = putting(server, client)
    for i in range(1000):
        put(f"{prefix}/step-{i}/manifest.json", data)
    with counting(server.endpoint_url) as counter:
        options = StoreOptions(s3=S3Options(**{**s3, "endpoint_url": counter.url}))
        found = list_checkpoints(root, store=options)
        requests, received = counter.methods, counter.received
    assert states(found) == {f"step-{i}": "committed" for i in range(1000)}
    assert set(requests) == {"GET"}
    assert 1000 < requests["GET"] <= 1002
    assert SUMMARY_NBYTES * 1000 < received < (SUMMARY_NBYTES + 1500) * 1000  # each answer has headers
    seventh = found.checkpoints[0]
    assert (seventh.step, seventh.nbytes, seventh.stored_nbytes) == (7, 7000, 6300)


def putting(server, client):
    """A function that puts an object into the bucket: past HTTP where the server is in this process, to save time."""
    if server.name != "moto":
        return lambda key, data: client.put_object(Bucket=BUCKET, Key=key, Body=data)
    backend = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
    return lambda key, data: backend.put_object(BUCKET, key, data)


async def test_a_server_that_knows_no_ranges_is_left_in_mid_body():
    large = head(200, 10 << 20, ETag='"e"') + bytes(8192)  # and no more of it
    async with RudeServer([saying(large)]) as server:
        options = S3Options(endpoint_url=server.url, access_key_id="k", secret_access_key="s", region="r")
        async with S3Store("bucket", "", options) as store:
            assert await store.get_first("k", 4096) == bytes(4096)
    assert server.requests[0].headers["range"] == "bytes=0-4095"


def test_each_place_is_told_by_what_lies_there():
    root = fresh()
    put_checkpoint(f"{root}/step-1", STATE, step=1, metrics={"loss": 0.5})
    put_checkpoint(f"{root}/final", STATE)
    put_object(f"{root}/large", "manifest.json", manifest_of(3, nbytes=9000))
    put_object(f"{root}/swept", "manifest.json", encode_tombstone([], created=summary_of().created, writer="sweep"))
    put_object(f"{root}/empty", "manifest.json", b"")
    put_object(f"{root}/foreign", "manifest.json", b'{"version": 3, "name": "a browser extension"}')
    put_object(f"{root}/newer", "manifest.json", manifest_of(4).replace(b'"version":1', b'"version":2'))
    put_object(f"{root}/step-9", shard_key(token_hex(16), SAFETENSORS), b"x")
    put_object(f"{root}/runs/a", "manifest.json", manifest_of(5))
    pin(root, 1)
    found = list_checkpoints(root)
    assert states(found) == {
        "step-1": "committed",
        "final": "committed",
        "large": "committed",
        "swept": "swept",
        "empty": "unreadable",
        "foreign": "unreadable",
        "newer": "unreadable",
        "step-9": "no manifest",
        "runs": "no manifest",
    }
    by_name = {listed.name: listed for listed in found.checkpoints}
    assert (by_name["step-1"].metrics, by_name["step-1"].shard_count) == ({"loss": 0.5}, 1)
    assert [listed.name for listed in found.checkpoints if listed.is_pinned] == ["step-1"]
    assert (by_name["final"].step, by_name["step-9"].step, by_name["large"].step) == (None, 9, 3)
    assert "version 2" in by_name["newer"].problems[0]
    assert not by_name["step-9"].problems


def test_a_root_that_is_a_checkpoint_is_listed_with_what_lies_below_it():
    root = fresh()
    put_checkpoint(f"{root}/run", STATE, step=4)
    only = list_checkpoints(f"{root}/run")
    assert [(one.name, one.url, one.step) for one in only.checkpoints] == [("", f"{root}/run", 4)]
    put_checkpoint(f"{root}/run/best", STATE, step=2)
    assert states(list_checkpoints(f"{root}/run")) == {"": "committed", "best": "committed"}
    put_object(f"{root}/values", "manifest.json", manifest_of(1))  # which needs no shards
    assert states(list_checkpoints(f"{root}/values")) == {"": "committed"}


@pytest.mark.parametrize(
    ("file", "state"),
    [(".metadata", "dcp"), ("model-00001-of-00002.safetensors", "safetensors"), ("model.pt", "torch.save")],
)
def test_a_root_of_others_is_told_by_the_names_of_its_files(file, state):
    root = fresh()
    put_object(root, file, b"x")
    assert states(list_checkpoints(root)) == {"": state}
    put_object(f"{root}/sub", "other", b"x")
    assert states(list_checkpoints(root)) == {"sub": "no manifest"}


def test_where_nothing_is_nothing_is_listed(server, store_options):
    assert list_checkpoints(fresh()).checkpoints == ()
    with pytest.raises(BucketNotFoundError):
        list_checkpoints("s3://no-such-bucket/run", store=store_options)


def test_the_newest_come_first_and_names_are_ordered_by_their_numbers():
    root, begin = fresh(), summary_of().created
    for age, name in enumerate(["step-100", "step-9", "b", "step-10"]):
        put_object(f"{root}/{name}", "manifest.json", manifest_of(1, created=begin - timedelta(hours=age)))
    put_object(f"{root}/a", "other", b"x")
    tombstone = encode_tombstone([], created=begin + timedelta(hours=1), writer="sweep")
    put_object(f"{root}/swept", "manifest.json", tombstone)
    assert names(list_checkpoints(root)) == ["step-100", "step-9", "b", "step-10", "swept", "a"]
    assert names(list_checkpoints(root, order="name")) == ["a", "b", "step-9", "step-10", "step-100", "swept"]


def test_only_a_check_tells_what_is_damaged(server):
    root = fresh()
    put_checkpoint(f"{root}/sound", STATE)
    manifest = put_checkpoint(f"{root}/short", STATE)
    put_object(f"{root}/short", manifest.shards[0].key, b"short")
    put_object(f"{root}/altered", "manifest.json", manifest_of(1, nbytes=9000).replace(b"xxx", b"xyx", 1))
    put_object(f"{root}/failed", shard_key(token_hex(16), SAFETENSORS), b"x")
    put_object(f"{root}/cut", "manifest.json", manifest_of(1)[:50])
    glance, run = list_checkpoints(root), CliRunner().invoke(cli, ["ls", root])
    assert states(glance) == {
        "sound": "committed", "short": "committed", "altered": "committed", "failed": "no manifest",
        "cut": "unreadable",
    }  # fmt: skip
    assert (run.exit_code, "damaged" in run.output) == (0, False)
    checked = list_checkpoints(root, check=True)
    assert states(checked) == {
        "sound": "committed", "short": "damaged", "altered": "damaged", "failed": "not committed", "cut": "damaged",
    }  # fmt: skip
    by_name = {listed.name: listed for listed in checked.checkpoints}
    assert "has 5 bytes, not" in by_name["short"].problems[0]
    assert CliRunner().invoke(cli, ["ls", root, "--check"]).exit_code == 1


def test_the_command_prints_lines_and_json():
    root = fresh()
    put_checkpoint(f"{root}/step-2", STATE, step=2, nbytes=3 << 20, stored_nbytes=2048, metrics={"loss": 0.25})
    put_checkpoint(f"{root}/step-1", STATE, step=1)
    pin(root, 2)
    shown = CliRunner().invoke(cli, ["ls", root])
    first, second = shown.stdout.splitlines()
    assert first.split("\t") == [
        "step-2", "2", "2026-01-02 03:04:05+0000", "3.0 MiB", "2.0 KiB", "1", "committed, pinned", "loss=0.25",
    ]  # fmt: skip
    assert second.startswith("step-1\t1\t")
    told = json.loads(CliRunner().invoke(cli, ["ls", root, "--json", "--sort", "name"]).stdout)
    assert told["root"] == root
    assert [one["name"] for one in told["checkpoints"]] == ["step-1", "step-2"]
    assert told["checkpoints"][1] == {
        "name": "step-2", "url": f"{root}/step-2", "state": "committed", "step": 2,
        "created": "2026-01-02T03:04:05+00:00", "writer": "a test", "nbytes": 3 << 20, "stored_nbytes": 2048,
        "shard_count": 1, "entry_count": 1, "metrics": {"loss": 0.25}, "is_pinned": True, "problems": [],
    }  # fmt: skip
    nothing = CliRunner().invoke(cli, ["ls", f"{root}/none"])
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert f"nothing lies at {root}/none" in nothing.stderr
    put_object(f"{root}/runs/a", "x", b"x")
    deeper = CliRunner().invoke(cli, ["ls", f"{root}/runs/"])
    assert (deeper.exit_code, deeper.stdout) == (0, "a\t\t\t\t\t\tno manifest\t\n")
    assert f"look deeper: cloudckpt ls {root}/runs/a" in deeper.stderr


def test_it_fits_a_terminal_of_40_columns_and_sets_no_colour_when_told_not_to(tmp_path):
    root = f"file://{tmp_path}"
    put_checkpoint(f"{root}/an-experiment-with-a-rather-long-name-of-its-own", STATE, step=1000)
    narrow = seen("ls", root, columns=40, NO_COLOR="1")
    assert "committed" in narrow
    assert width(narrow) <= 40
    assert not is_coloured(narrow)
    assert "2026-01-02" in seen("ls", root, columns=120)


@pytest.mark.parametrize("name", ["ls", "inspect", "diff"])
def test_the_commands_help_imports_neither_torch_nor_a_client(name):
    script = (
        f"import sys\nimport cloudckpt.cli.main as m\ntry:\n    m.cli([{name!r}, '--help'])\n"
        "except SystemExit:\n    pass\nassert not {'torch', 'numpy', 'aiobotocore', 'botocore'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
