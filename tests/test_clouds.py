"""Google's and Azure's clouds, and file systems of fsspec: the conformance suite, and what is theirs alone."""

import asyncio
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, fields
from itertools import chain, count, repeat
from pathlib import Path
from secrets import token_hex
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlsplit

import fsspec
import numpy as np
import obstore
import pytest
import s3fs
import torch
import torch.distributed.checkpoint as dcp
from awscrt.checksums import crc32c
from botocore.exceptions import ClientError
from fsspec import AbstractFileSystem
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from google.oauth2.credentials import Credentials
from obstore.store import GCSStore
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloud_servers import (
    PAGE,
    TOKEN,
    Azurite,
    GcsEmulator,
    ServerError,
    chosen_clouds,
    fake_gcs,
    running_cloud,
)
from cloudckpt.catalog import KeepLast, newest_step, prune, sweep, verify
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.engine import commit
from cloudckpt.engine.read import ReadOptions
from cloudckpt.errors import (
    BucketNotFoundError,
    ChecksumRefusedError,
    CredentialsError,
    MissingLibraryError,
    PermissionDeniedError,
    PreconditionFailedError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
    UsageError,
)
from cloudckpt.store.azure import azure_store
from cloudckpt.store.azure_account import account_of
from cloudckpt.store.cloud_credentials import Tokens
from cloudckpt.store.cloud_options import AzureOptions, GcsOptions
from cloudckpt.store.fsspec import fsspec_store
from cloudckpt.store.gcs import gcs_store
from cloudckpt.store.protocols import IfAbsent
from cloudckpt.store.s3_express import DirectoryBucketStore
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions, _sends_again, open_once, open_store, with_overrides
from conftest import client_of
from rude_server import RudeServer, head, saying
from test_store import Conformance

DIRECTORY_BUCKET = "checkpoints--use1-az4--x-s3"
OBJECT = '<LastModified>2026-01-01T00:00:00Z</LastModified><ETag>"e"</ETag><Size>1</Size>'


@pytest.fixture(scope="module")
def server(one_server):
    """What is asked of S3 here does not hang on the kind of server."""
    return one_server


@pytest.fixture(scope="module")
def gcs():
    with fake_gcs() as fake:
        yield fake


def emulators(kind, tmp_path_factory):
    """Yields a running emulator: one that was asked for and is not installed is a failure."""
    if kind.name not in chosen_clouds():
        pytest.skip(f"{kind.name} is left out of CLOUDS")
    try:
        with running_cloud(kind, tmp_path_factory.mktemp(kind.name)) as running:
            yield running
    except ServerError as e:
        pytest.fail(f"{kind.name} was asked for and cannot be started: {e}")


@pytest.fixture(scope="module")
def azurite(tmp_path_factory):
    yield from emulators(Azurite, tmp_path_factory)


@pytest.fixture(scope="module")
def gcsfs(tmp_path_factory):
    """gcsfs on the emulator, with a bucket."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks for what the emulator does not know
        import gcsfs

        for running in emulators(GcsEmulator, tmp_path_factory):
            fs = gcsfs.GCSFileSystem(token="anon", endpoint_url=running.endpoint_url, project="test")
            fs.mkdir("bucket")
            yield fs


def options_of(options):
    """As keyword arguments."""
    return {f.name: value for f in fields(options) if (value := getattr(options, f.name)) is not None}


def gcs_options(fake):
    return GcsOptions(gcs_endpoint_url=fake.url, gcs_credentials=Credentials(TOKEN))


def azure_options(server):
    return AzureOptions(
        azure_account=server.access_key,
        azure_key=server.secret_key,
        azure_endpoint_url=f"{server.endpoint_url}/{server.access_key}",
    )


def s3fs_of(s3):
    return s3fs.S3FileSystem(endpoint_url=s3["endpoint_url"], key=s3["access_key_id"], secret=s3["secret_access_key"])


def memory_of_its_own():
    return MemoryFileSystem(global_store=False, skip_instance_cache=True)


@asynccontextmanager
async def on_gcs(fake):
    """A store, without retries."""
    async with gcs_store("bucket", f"{token_hex(6)}/", gcs_options(fake), S3Options(), keeps_client=False) as store:
        yield store


@asynccontextmanager
async def on_azure(azurite, container=None):
    """A store in a new container, without retries."""
    options = azure_options(azurite)
    async with azure_store(
        container or token_hex(6), f"{token_hex(6)}/", options, S3Options(), keeps_client=False
    ) as store:
        await store._ask("PUT", query={"restype": "container"})
        yield store


class TestGcs(Conformance):
    @pytest.fixture
    def opened(self, gcs):
        return lambda: on_gcs(gcs)


class TestAzure(Conformance):
    @pytest.fixture
    def opened(self, azurite):
        return lambda: on_azure(azurite)


class TestFsspecMemory(Conformance):
    lists_uploads = hides_uploads = False

    @pytest.fixture
    def opened(self):
        @asynccontextmanager
        async def make():
            yield fsspec_store("memory://bucket/run", memory_of_its_own())

        return make


class TestFsspecS3(Conformance):
    lists_uploads = False

    @pytest.fixture
    def opened(self, server, s3):
        @asynccontextmanager
        async def make():
            yield fsspec_store(f"s3://checkpoints/{token_hex(6)}", s3fs_of(s3))

        return make


class TestDirectoryBucket(Conformance):
    """A bucket of S3 Express by its name alone: no server here has others."""

    checks_checksums = False

    @pytest.fixture
    def opened(self, server, s3, monkeypatch):
        monkeypatch.setenv("AWS_S3_DISABLE_EXPRESS_SESSION_AUTH", "true")
        client = client_of(server)
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=DIRECTORY_BUCKET)

        @asynccontextmanager
        async def make():
            options = StoreOptions(s3=S3Options(**s3))
            url = f"s3://{DIRECTORY_BUCKET}/{token_hex(6)}"
            async with open_once(url, options, keeps_client=False) as store:
                assert isinstance(store, DirectoryBucketStore)
                yield store

        return make


async def test_a_directory_bucket_is_listed_in_order_though_it_answers_in_none():
    def page(*keys):
        found = "".join(f"<Contents><Key>p/{key}</Key>{OBJECT}</Contents>" for key in keys)
        body = f"<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>{found}</ListBucketResult>".encode()
        return saying(head(200, len(body)) + body)

    async with RudeServer([page("b/2", "a", "b/1", "b/1x"), page("b/2", "b/1x", "b/1")]) as server:
        options = S3Options(endpoint_url=server.url, access_key_id="a", secret_access_key="s", region="us-east-1")
        async with DirectoryBucketStore("bucket", "p/", options) as store:
            assert await keys(store) == ["a", "b/1", "b/1x", "b/2"]
            assert [found.key async for found in store.list_objects("b/1")] == ["b/1", "b/1x"]
        asked = [dict(parse_qsl(urlsplit(request.target).query))["prefix"] for request in server.requests]
        assert asked == ["p/", "p/b/"]  # never one without a slash at its end


async def keys(store):
    return [found.key async for found in store.list_objects()]


@asynccontextmanager
async def opened(place):
    async with open_store(f"{place.root}/{token_hex(4)}", place.store) as store:
        yield store


@dataclass(frozen=True)
class Place:
    """Where checkpoints go in a test, and what the place promises."""

    root: str
    options: dict
    is_conditional: bool = True

    @property
    def store(self):
        return with_overrides(ReadOptions(), None, dict(self.options))[1]


def at_gcs(request):
    fake = request.getfixturevalue("gcs")
    return Place("gs://bucket", options_of(gcs_options(fake)))


def at_azure(request):
    azurite, container = request.getfixturevalue("azurite"), token_hex(6)

    async def create():
        async with on_azure(azurite, container):
            pass

    asyncio.run(create())
    return Place(f"az://{container}", options_of(azure_options(azurite)))


def at_s3fs(request):
    return Place("s3://checkpoints", {"filesystem": s3fs_of(request.getfixturevalue("s3"))})


def at_gcsfs(request):
    return Place("gs://bucket", {"filesystem": request.getfixturevalue("gcsfs")}, is_conditional=False)


def in_memory(request):
    return Place("memory://bucket", {"filesystem": memory_of_its_own()})


def below_a_directory(request):
    inner = memory_of_its_own()
    return Place("dir://run", {"filesystem": DirFileSystem("/bucket", inner)})


def in_a_directory_of_this_machine(request):
    directory = request.getfixturevalue("tmp_path")
    return Place("dir://run", {"filesystem": DirFileSystem(str(directory / "deep"), LocalFileSystem())})


def without_create(request):
    return Place("plain://bucket", {"filesystem": Plain(skip_instance_cache=True)}, is_conditional=False)


class Plain(MemoryFileSystem):
    """A file system that knows no exclusive creation, as most do not."""

    protocol = "plain"
    pipe_file = AbstractFileSystem.pipe_file

    def __init__(self, **more):
        super().__init__(global_store=False, **more)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("plain://"))


fsspec.register_implementation("plain", Plain)
PLACES = [
    at_gcs,
    at_azure,
    at_s3fs,
    at_gcsfs,
    in_memory,
    below_a_directory,
    in_a_directory_of_this_machine,
    without_create,
]


@pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")  # as gcsfs does
@pytest.mark.parametrize("make", PLACES, ids=lambda make: make.__name__)
def test_a_run_is_saved_read_by_the_slice_replaced_and_pruned(make, request, caplog):
    place = make(request)
    root = f"{place.root}/{token_hex(6)}"
    commit._probed.clear()  # each place is asked anew
    large = torch.arange(3 << 20, dtype=torch.float32).reshape(3 << 10, 1 << 10)
    for step in (1, 2, 3):
        save(f"{root}/step-{step}", {"w": large + step, "n": step}, place, part_size=5 << 20)
    with pytest.raises(CheckpointException, match="overwrite=True"):
        save(f"{root}/step-3", {"w": large}, place)
    save(f"{root}/step-3", {"w": large * 2}, place, overwrite=True)
    with cloudckpt.open(f"{root}/step-3", **place.options) as checkpoint:
        assert np.array_equal(checkpoint["w"][100:102], (large[100:102] * 2).numpy())
    assert verify(f"{root}/step-2", store=place.store).is_sound
    pruned = prune(root, KeepLast(1), dry_run=False, grace_s=0, store=place.store)
    assert [step.step for step in pruned.removed] == [2, 1]
    assert newest_step(root, place.store) == 3
    assert sweep(root, grace_s=0, dry_run=False, store=place.store).removed == ()
    warned = [r.message for r in caplog.records if "does not honour conditional writes" in r.getMessage()]
    assert bool(warned) is not place.is_conditional


def save(url, state, place, **more):
    dcp.save(state, storage_writer=ObjectStoreWriter(url, **place.options, **more))


@pytest.mark.parametrize("make", [at_gcs, at_azure, at_s3fs], ids=lambda make: make.__name__)
async def test_of_many_who_put_where_nothing_is_one_wins(make, request):
    place = await asyncio.to_thread(make, request)
    async with opened(place) as store:

        async def put(i):
            try:
                await store.put("k", [memoryview(f"{i}".encode())], condition=IfAbsent())
            except PreconditionFailedError:
                return None
            return f"{i}".encode()

        winners = [data for data in await asyncio.gather(*map(put, range(8))) if data is not None]
        assert winners == [(await store.get("k")).data]


def test_the_fake_answers_a_client_that_is_used_on_the_real_one(gcs):
    """obstore speaks the same interface: what it makes of the fake is what it makes of Google's."""
    store = GCSStore(
        "bucket",
        prefix=token_hex(6),
        config={"base_url": gcs.url, "bearer_token": TOKEN},
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    first = obstore.put(store, "a", b"one", mode="create")
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, "a", b"two", mode="create")
    obstore.put(store, "a", b"two", mode=first)
    with pytest.raises(obstore.exceptions.PreconditionError):
        obstore.put(store, "a", b"three", mode=first)
    assert bytes(obstore.get_range(store, "a", start=1, end=3)) == b"wo"
    data = bytes(range(256)) * (11 << 12)
    obstore.put(store, "d/m", data, use_multipart=True, chunk_size=5 << 20)
    assert bytes(obstore.get(store, "d/m").bytes()) == data
    for i in range(7):
        obstore.put(store, f"d/{i}", b"x")
    listed = [found["path"] for page in obstore.list(store) for found in page]
    assert listed == ["a", *(f"d/{i}" for i in range(7)), "d/m"]
    assert obstore.list_with_delimiter(store)["common_prefixes"] == ["d"]
    obstore.delete(store, "a")


async def test_a_request_whose_answer_is_lost_is_sent_once(gcs):
    async with on_gcs(gcs) as store:
        await store.put("k", [memoryview(b"x")])  # over a connection that is used again
        for request in (
            lambda: store.put("k", [memoryview(b"y")], condition=IfAbsent()),
            lambda: store.get("k"),
            lambda: store.delete(["k"]),
        ):
            gcs.requests.clear()
            gcs.answers = [None]
            with pytest.raises(StoreUnavailableError):
                await request()
            assert len(gcs.requests) == 1


async def test_what_a_cloud_answers_is_told_by_class(gcs):
    async with on_gcs(gcs) as store:
        for status, kind in ((503, ThrottledError), (429, ThrottledError), (500, StoreUnavailableError)):
            gcs.answers = [status]
            with pytest.raises(kind) as e:
                await store.put("k", [memoryview(b"x")])
            assert e.value.retry_after_s == 7
        gcs.answers = [200]
        with pytest.raises(StoreError, match="makes no sense"):
            await store.put("k", [memoryview(b"x")])
        gcs.answers = [200]
        with pytest.raises(StoreError, match="makes no sense"):
            await keys(store)
        gcs.answers = [404]
        with pytest.raises(BucketNotFoundError, match="create it"):
            await keys(store)


async def test_what_gcs_says_that_it_found_is_held_against_what_was_sent(gcs):
    async with on_gcs(gcs) as store:
        data = bytes(100)
        gcs.damages = 1
        with pytest.raises(ChecksumRefusedError):
            await store.put("k", [memoryview(data)], crc32c=crc32c(data))
        upload = await store.create_upload("m")
        gcs.damages = 1
        with pytest.raises(ChecksumRefusedError):
            await store.put_part(upload, 1, 0, [memoryview(data)], crc32c=crc32c(data))
        part = await store.put_part(upload, 1, 0, [memoryview(data)], crc32c=crc32c(data))
        gcs.damages = 1
        with pytest.raises(StoreError, match="put together wrongly") as e:
            await store.complete_upload(upload, [part], crc32c=crc32c(data))
        assert not isinstance(e.value, ChecksumRefusedError)  # which would be asked again


async def test_a_listing_of_uploads_goes_on_after_a_full_page(gcs):
    async with on_gcs(gcs) as store:
        uploads = [await store.create_upload(f"{i}") for i in range(PAGE + 1)]
        assert [u.upload_id async for u in store.list_uploads()] == [u.upload_id for u in uploads]


async def test_azures_listings_go_on_after_a_full_page(azurite):
    async with on_azure(azurite) as store:
        for i in range(5):
            await store.put(f"{i}", [])
        pages = [page async for page in store._pages("", {"maxresults": "2"})]
        named = [[blob.findtext("Name")[-1] for blob in page.iter("Blob")] for page in pages]
        assert named == [["0", "1"], ["2", "3"], ["4"]]


ODD = "a b%20+ü&=?#~'(1)"


@pytest.mark.parametrize("cloud", ["gcs", "azurite"])
async def test_keys_are_spelled_as_they_are(cloud, request):
    on = {"gcs": on_gcs, "azurite": on_azure}[cloud]
    async with on(request.getfixturevalue(cloud)) as store:
        key = f"{ODD}/{ODD}"
        await store.put(key, [memoryview(b"x")])
        assert (await store.get(key)).data == b"x"
        assert [found.key async for found in store.list_objects(ODD)] == [key]
        assert [name async for name in store.list_names(ODD[:4])] == [ODD[4:]]
        upload = await store.create_upload(f"{key}-large")
        part = await store.put_part(upload, 1, 0, [memoryview(b"y")], crc32c=crc32c(b"y"))
        assert [found.key async for found in store.list_uploads(ODD)] == [upload.key]
        await store.complete_upload(upload, [part], crc32c=crc32c(b"y"))
        await store.delete([key, upload.key])
        assert [found async for found in store.list_objects()] == []


def test_reads_of_one_checkpoint_share_a_connection(gcs):
    place = Place("gs://bucket", options_of(gcs_options(gcs)))
    url = f"{place.root}/{token_hex(6)}"
    save(url, {"w": torch.arange(64)}, place)
    before = gcs.connections
    with cloudckpt.open(url, **place.options) as checkpoint:
        for i in range(5):
            assert checkpoint["w"][i : i + 1].tolist() == [i]
    assert gcs.connections - before <= 1


# Bad input.


@pytest.mark.parametrize(
    ("url", "options", "told"),
    [
        ("gs://bucket/run", {"gcs_credentials": Credentials("wrong")}, (CredentialsError, "not accepted")),
        ("gs://bucket/run", {"is_anonymous": True}, (CredentialsError, "not accepted")),
        ("gs://bucket/run", {}, (CredentialsError, "gcloud auth.*gcs_credentials=")),
        ("gs://nowhere/run", {"gcs_credentials": Credentials(TOKEN)}, (BucketNotFoundError, "create it")),
        ("az://bucket/run", {}, (CredentialsError, "azure_account=")),
        ("az://bucket/run", {"azure_account": "a", "azure_key": "no base64!"}, (CredentialsError, "no access key")),
        (
            "memory://b/run",
            {"filesystem": DirFileSystem("/b", MemoryFileSystem())},
            (UsageError, "dir://.*memory://"),
        ),
        ("reference://run", {}, (UsageError, "pass filesystem=")),
    ],
    ids=["token", "anonymous", "no google", "no bucket", "no account", "no key", "other scheme", "no arguments"],
)
def test_what_cannot_be_reached_is_told_at_once_with_what_to_do(gcs, nothing_of_clouds, url, options, told):
    where = {"gcs_endpoint_url": gcs.url} if url.startswith("gs://") else {}
    kind, match = told
    with pytest.raises(kind, match=match):
        cloudckpt.open(url, **options, **where)


@pytest.fixture
def nothing_of_clouds(monkeypatch, tmp_path):
    """No credentials but the test's own, and no machine of Google's to be asked for some."""
    for name in [name for name in os.environ if name.startswith(("GOOGLE_", "AZURE_", "STORAGE_EMULATOR"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")


@pytest.mark.parametrize("wrong", [{"azure_key": Azurite.secret_key[4:]}, {"azure_sas_token": "sv=2022-11-02&sig=x"}])
def test_azure_credentials_that_are_wrong_are_told_as_such(azurite, wrong):
    where = {"azure_account": azurite.access_key, "azure_endpoint_url": azure_options(azurite).azure_endpoint_url}
    with pytest.raises((CredentialsError, PermissionDeniedError)) as e:
        cloudckpt.open("az://bucket/run", **where, **wrong)
    assert next(iter(wrong.values())) not in str(e.value)
    with pytest.raises(BucketNotFoundError, match="create it"):
        cloudckpt.open("az://no-such-container/run", **options_of(azure_options(azurite)))


def test_a_cloud_without_its_library_says_what_to_install():
    code = """
        import sys
        sys.modules["google"] = sys.modules["azure"] = None
        import cloudckpt
        for url in ("gs://bucket/run", "az://bucket/run"):
            try:
                cloudckpt.open(url, azure_account="a")
            except cloudckpt.errors.MissingLibraryError as e:
                print(e)
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert re.search(r"\[gcs\].*\n.*\[azure\]", told.stdout)


def test_how_azure_is_asked_comes_from_its_variables_too(nothing_of_clouds, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "acc")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "?sv=1&sig=x")
    account = account_of(AzureOptions(), is_anonymous=False)
    assert account.endpoint_url == "https://acc.blob.core.windows.net"
    url, headers = asyncio.run(account.signed("GET", "https://h/c?comp=list", {}))
    assert (url, "Authorization" in headers) == ("https://h/c?comp=list&sv=1&sig=x", False)
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a2V5")  # a key is preferred, as Azure's own tools do
    _, headers = asyncio.run(account_of(AzureOptions(), is_anonymous=False).signed("GET", "https://h/c", {}))
    assert headers["Authorization"].startswith("SharedKey acc:")
    given = AzureOptions(
        azure_credential=SimpleNamespace(get_token=lambda scope: SimpleNamespace(token="t", expires_on=9e9))
    )
    _, headers = asyncio.run(account_of(given, is_anonymous=False).signed("GET", "https://h/c", {}))
    assert headers["Authorization"] == "Bearer t"
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT")
    told = "DefaultEndpointsProtocol=http;AccountName=dev;AccountKey=a2V5;BlobEndpoint=http://127.0.0.1:1/dev;"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", told)
    account = account_of(AzureOptions(), is_anonymous=True)
    assert (account.name, account.endpoint_url, account.key) == ("dev", "http://127.0.0.1:1/dev", None)
    account = account_of(AzureOptions(azure_account="other", azure_key="a2V5"), is_anonymous=False)
    assert account.endpoint_url == "https://other.blob.core.windows.net"


def test_azures_variables_are_of_one_account(nothing_of_clouds, monkeypatch):
    signed = "BlobEndpoint=https://acc.blob.core.windows.net/;SharedAccessSignature=sv=1&sig=x"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", signed)  # as the portal gives it
    account = account_of(AzureOptions(), is_anonymous=False)
    assert (account.name, account.endpoint_url) == ("acc", "https://acc.blob.core.windows.net/")
    assert account.sas_token == "sv=1&sig=x"
    account = account_of(AzureOptions(azure_account="other"), is_anonymous=True)
    assert account.endpoint_url == "https://other.blob.core.windows.net"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "BlobEndpoint=https://files.example.com;AccountKey=a2V5")
    account = account_of(AzureOptions(azure_account="other"), is_anonymous=True)
    assert account.endpoint_url == "https://other.blob.core.windows.net"
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=acc;AccountKey=a2V5")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "mine")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sig=mine")
    account = account_of(AzureOptions(), is_anonymous=False)
    assert (account.name, account.key, account.sas_token) == ("mine", None, "sig=mine")
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    with pytest.raises(MissingLibraryError):  # an identity is asked for, and nothing is shown to others
        account_of(AzureOptions(azure_account="theirs"), is_anonymous=False)


ADDRESSES = {
    "gs://bucket/run": ("STORAGE_EMULATOR_HOST", "http://user:top-secret@127.0.0.1:9"),
    "az://bucket/run": ("AZURE_STORAGE_CONNECTION_STRING", "BlobEndpoint=http://[top-secret;AccountKey=a2V5"),
}


@pytest.mark.parametrize("url", ADDRESSES)
def test_a_variable_that_holds_no_address_is_named_and_not_shown(nothing_of_clouds, url, monkeypatch):
    variable, value = ADDRESSES[url]
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=variable) as e:
        cloudckpt.open(url)
    assert "top-secret" not in str(e.value)


def test_a_signature_stands_in_no_message(unused_tcp_port):
    told = {"azure_account": "a", "azure_endpoint_url": f"http://127.0.0.1:{unused_tcp_port}", "retry_deadline_s": 0}
    with pytest.raises(StoreUnavailableError) as e:
        cloudckpt.open("az://bucket/run", azure_sas_token=f"sv=1&sig={(secret := token_hex(8))}", **told)
    assert secret not in "".join(traceback.format_exception(e.value))


def test_only_where_etags_stay_the_same_a_late_request_is_sent_a_second_time():
    mine = StoreOptions(filesystem=memory_of_its_own())
    asked = [(url, StoreOptions()) for url in ("s3://b/r", f"s3://{DIRECTORY_BUCKET}/r", "gs://b/r", "az://b/r")]
    assert [_sends_again(*each) for each in [*asked, ("s3://b/r", mine)]] == [True, False, False, False, False]


async def test_a_token_is_asked_for_once_and_again_before_it_ends():
    ends = chain([time.time() + 100], repeat(time.time() + 10_000))
    given, both = count(), threading.Barrier(2)

    def fetch():
        try:
            both.wait(0.05)  # for another who asks at the same time: none does
        except threading.BrokenBarrierError:
            both.reset()
        return f"t{next(given)}", next(ends)

    tokens = Tokens(fetch)
    assert await tokens.token() == "t0"
    assert set(await asyncio.gather(*(tokens.token() for _ in range(8)))) == {"t1"}


def test_options_never_show_a_secret():
    secrets = AzureOptions(azure_key="hush"), AzureOptions(azure_sas_token="hush"), GcsOptions(gcs_credentials="hush")
    assert "hush" not in repr(secrets)
    with pytest.raises(UsageError, match="one of"):
        AzureOptions(azure_key="a", azure_sas_token="b")


def test_options_go_to_other_processes(s3):
    options = StoreOptions(filesystem=s3fs_of(s3), gcs=GcsOptions(gcs_credentials=Credentials(TOKEN)))
    there = pickle.loads(pickle.dumps(options))
    assert there.filesystem == options.filesystem
    assert there.gcs.gcs_credentials.token == TOKEN


def test_a_checkpoint_is_read_in_a_forked_process_and_on_in_its_parent(gcs):
    place = Place("gs://bucket", options_of(gcs_options(gcs)))
    url = f"{place.root}/{token_hex(6)}"
    save(url, {"w": torch.arange(64)}, place)
    with cloudckpt.open(url, **place.options) as checkpoint:
        for _ in range(2):
            assert checkpoint["w"][3:5].tolist() == [3, 4]
            child = multiprocessing.get_context("fork").Process(target=lambda: checkpoint["w"][5:6])
            child.start()
            child.join()
            assert child.exitcode == 0


async def test_a_refusal_that_a_file_system_tells_in_other_words_is_one():
    class Refusing(MemoryFileSystem):
        def pipe_file(self, path, value, mode="overwrite", **more):
            reply = {"Error": {"Code": "PreconditionFailed"}, "ResponseMetadata": {"HTTPStatusCode": 412}}
            raise OSError(22, "it does not hold") from ClientError(reply, "PutObject")  # as s3fs, of some servers

    store = fsspec_store("memory://bucket/run", Refusing(global_store=False, skip_instance_cache=True))
    with pytest.raises(PreconditionFailedError):
        await store.put("k", [memoryview(b"x")], condition=IfAbsent())


async def test_a_file_system_that_fails_inside_a_file_fails_the_upload():
    class Failing(MemoryFileSystem):
        def open(self, *args, **more):
            file = super().open(*args, **more)
            file.write = lost
            return file

    def lost(data):
        raise ConnectionError("lost")

    store = fsspec_store("memory://bucket/run", Failing(global_store=False, skip_instance_cache=True))
    upload = await store.create_upload("m")
    with pytest.raises(StoreError) as e:
        await store.put_part(upload, 1, 0, [memoryview(b"x")], crc32c=crc32c(b"x"))
    assert not isinstance(e.value, StoreUnavailableError)  # which would be asked again


def test_the_code_of_the_page_about_stores_runs_from_top_to_bottom(gcs, azurite, monkeypatch, capsys):
    async def create():
        with suppress(StoreError):
            async with on_azure(azurite, "container"):
                pass

    asyncio.run(create())
    monkeypatch.setattr(gcs, "is_open", True)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.url)
    told = {"AccountName": azurite.access_key, "AccountKey": azurite.secret_key}
    told["BlobEndpoint"] = azure_options(azurite).azure_endpoint_url
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", ";".join("=".join(pair) for pair in told.items()))
    page = Path(cloudckpt.__file__).parents[1] / "docs" / "stores.md"
    names = {"__name__": "docs"}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    assert capsys.readouterr().out.splitlines()[-1] == "[6. 7. 8.]"
