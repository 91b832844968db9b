"""What tests share: a server of each chosen kind, and a fresh prefix on it for each test."""

import subprocess
import sys
import warnings
from pathlib import Path
from secrets import token_hex

import boto3
import pytest
from botocore.config import Config

from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions
from servers import available, chosen, start_server

BUCKET = "checkpoints"


@pytest.fixture(scope="session", params=chosen())
def server(request, tmp_path_factory):
    """A running S3 server; the tests that use it run once for each kind in ``SERVERS``."""
    yield from running(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def one_server(tmp_path_factory):
    """A running S3 server of the first kind, for what is long and does not hang on the kind of server.

    A module makes it its ``server`` by a fixture of that name.
    """
    yield from running(chosen()[0], tmp_path_factory)


def running(name, tmp_path_factory):
    """Starts a server, and stops it after."""
    missing = available(name)
    if missing:
        pytest.fail(f"the server {name} was asked for and cannot be started: {missing}")
    started = start_server(name, tmp_path_factory.mktemp(name))
    try:
        client_of(started).create_bucket(Bucket=BUCKET)
        yield started
    finally:
        started.stop()


def client_of(server):
    """A plain boto3 client, to look at a server from outside."""
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 5}),
    )


@pytest.fixture
def client(server):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return client_of(server)


@pytest.fixture
def s3(server):
    """Keyword arguments that lead a writer or reader to the server."""
    return s3_of(server)


def s3_of(server):
    """See `s3`."""
    return {
        "endpoint_url": server.endpoint_url,
        "access_key_id": server.access_key,
        "secret_access_key": server.secret_key,
        "region": "us-east-1",
        "addressing_style": "path",
    }


@pytest.fixture
def store_options(s3):
    return StoreOptions(s3=S3Options(**s3))


@pytest.fixture
def root():
    """A fresh URL on the server."""
    return f"s3://{BUCKET}/{token_hex(6)}"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The URL of a checkpoint that two ranks saved, sharded in every way; see `sharded_save`."""
    url = f"file://{tmp_path_factory.mktemp('saved')}/run/step-3"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*command, str(Path(__file__).parent / "sharded_save.py"), url], check=True, capture_output=True)
    return url


@pytest.fixture
def nothing_from_outside(monkeypatch):
    """No proxies and no certificate authorities but the test's own."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
