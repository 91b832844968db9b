"""The doctor: what is right is called so, what is wrong is named with what to do, and nothing of it stays."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

from cloudckpt.catalog.doctor import doctor
from cloudckpt.catalog.probing import CHECKS, probe
from cloudckpt.catalog.rights import RIGHTS
from cloudckpt.errors import PermissionDeniedError, UnsupportedUrlError
from cloudckpt.store.cloud_options import AzureOptions
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.store.retry import RetryOptions
from cloudckpt.store.s3_options import Credentials, S3Options
from cloudckpt.store.url import StoreOptions
from cloudckpt.testing import RecordingStore, WrappedStore, fault_proxy, faults
from conftest import BUCKET
from policies import documented
from rude_server import RudeServer, head, refuse

COMMAND = str(Path(sys.executable).parent / "cloudckpt")
KEYS = {"access_key_id": "any", "secret_access_key": "any-secret", "region": "us-east-1"}
NAMES = ["URL", "credentials", "endpoint", "bucket", *(r.name for r in RIGHTS), *CHECKS, "clock", "versions"]
LISTING = b"<ListBucketResult><Name>checkpoints</Name><IsTruncated>false</IsTruncated></ListBucketResult>"


def options(endpoint_url, **more):
    s3 = S3Options(**{"endpoint_url": endpoint_url, "addressing_style": "path", **KEYS, **more})
    return StoreOptions(s3=s3, retry=RetryOptions(retry_deadline_s=0))


def verdicts(found):
    return {finding.name: finding.verdict for finding in found}


def worse(found):
    return {finding.name: finding for finding in found if finding.verdict in {"warning", "problem"}}


def left(client, root):
    prefix = root.removeprefix(f"s3://{BUCKET}/")
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    uploads = client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
    return [found["Key"] for found in listed + uploads]


def test_a_server_that_does_what_is_asked_has_no_problem_and_nothing_stays_there(server, client, root, store_options):
    seen = doctor(root, store=store_options)
    assert [finding.name for finding in seen.findings] == NAMES
    assert seen.is_healthy
    told = worse(seen.findings)
    told.pop("latency", None)  # which hangs on the machine
    known = {"moto": {"checksums"}, "localstack": {"conditional writes"}}  # verifies none; deletes unconditionally
    assert set(told) == known.get(server.name, set())
    assert "not looked at" not in verdicts(seen.findings).values()
    assert left(client, root) == []


def test_who_may_not_write_is_told_what_reading_shows(client, root, store_options):
    key = f"{root.removeprefix(f's3://{BUCKET}/')}/step-1/manifest.json"
    client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    seen = doctor(root, read_only=True, store=store_options)
    found = verdicts(seen.findings)
    assert [name for name in NAMES if found[name] == "not looked at"] == [
        *(right.name for right in RIGHTS if right.name not in {"right to list", "right to get"}),
        *(name for name in CHECKS if name != "latency"),
    ]
    assert worse(seen.findings).keys() <= {"latency"}
    assert left(client, root) == [key]


def test_what_is_put_makes_no_directory_beside_the_steps():
    store = RecordingStore(place()[1])
    asyncio.run(probe(store, store, "probe"))
    assert not [key for _, key in store.requests if "/" in key]


def test_files_are_looked_at_and_no_folder_stays(tmp_path):
    seen = doctor(f"file://{tmp_path}/run/deep")
    found = verdicts(seen.findings)
    assert all(found[name] == "ok" for name in [*(right.name for right in RIGHTS), *CHECKS])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_a_problem(tmp_path):
    (tmp_path / "run").touch()
    (told,) = worse(doctor(f"file://{tmp_path}/run/deep").findings).values()
    assert (told.verdict, told.what) == ("problem", f"{tmp_path}/run is no directory")
    assert (tmp_path / "run").is_file()


def test_a_url_that_no_store_serves_is_misuse():
    with pytest.raises(UnsupportedUrlError):
        doctor("nope://bucket/run")


UNREACHABLE = {
    "no account": ("az://container/run", {}, "credentials", "AZURE_STORAGE_ACCOUNT"),
    "nobody listens": ("az://container/run", {"azure_sas_token": "sig=x"}, "endpoint", "no answer"),
    "no arguments": ("reference://run", {}, "URL", "filesystem="),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_another_store_that_cannot_be_reached_is_a_problem_and_is_told_once(case, monkeypatch):
    url, given, name, said = UNREACHABLE[case]
    for variable in [variable for variable in os.environ if variable.startswith("AZURE_")]:
        monkeypatch.delenv(variable)
    account = {"azure_account": "a", "azure_endpoint_url": "http://127.0.0.1:9"} if given else {}
    retry = RetryOptions(retry_deadline_s=0)
    seen = doctor(url, store=StoreOptions(azure=AzureOptions(**given, **account), retry=retry))
    (told,) = worse(seen.findings).values()
    assert (told.name, told.verdict) == (name, "problem")
    assert said in told.what


def test_a_bucket_that_is_not_there_is_told_and_nothing_behind_it_is_looked_at(server, store_options):
    seen = doctor("s3://no-such-bucket/run", store=store_options)
    (told,) = worse(seen.findings).values()
    assert (told.name, told.verdict) == ("bucket", "problem")
    assert "create it" in told.what
    assert verdicts(seen.findings)["right to put"] == "not looked at"


def test_a_name_that_no_bucket_can_have_is_told():
    (told,) = worse(doctor("s3://no!bucket/run", store=options("http://127.0.0.1:9")).findings).values()
    assert (told.name, told.verdict) == ("bucket", "problem")


def test_an_address_where_nothing_listens_is_told():
    (told,) = worse(doctor("s3://bucket/run", store=options("http://127.0.0.1:9")).findings).values()
    assert (told.name, told.verdict) == ("endpoint", "problem")
    assert "AWS_ENDPOINT_URL" in told.advice


REFUSED = {
    "InvalidAccessKeyId": "the access key is not known to the server",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "RequestTimeTooSkewed": "clock differs too much",
}


@pytest.mark.parametrize("code", REFUSED)
def test_keys_that_the_server_refuses_are_told_and_not_shown(code):
    with fault_proxy("http://127.0.0.1:9") as proxy:
        proxy.each(lambda _: faults.answer(403, code))
        seen = doctor("s3://bucket/run", store=options(proxy.url))
        assert len(proxy.requests) == 1
    (told,) = worse(seen.findings).values()
    assert (told.name, told.verdict) == ("credentials", "problem")
    assert REFUSED[code] in told.what
    assert "from options" in told.what
    assert KEYS["secret_access_key"] not in str(seen)


@pytest.fixture
def without_keys(nothing_from_outside, monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")


def test_no_keys_at_all_are_told_without_a_request(without_keys):
    (told,) = worse(doctor("s3://bucket/run").findings).values()
    assert (told.name, told.verdict) == ("credentials", "problem")
    assert "AWS_ACCESS_KEY_ID" in told.what


def test_a_profile_that_is_not_there_is_told(without_keys, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    (told,) = worse(doctor("s3://bucket/run").findings).values()
    assert (told.name, told.verdict) == ("credentials", "problem")
    assert "nobodys" in told.what


def test_keys_in_the_environment_that_have_expired_are_told(without_keys, monkeypatch):
    for name, value in {
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "CREDENTIAL_EXPIRATION": "2020-01-01",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", f"{value}T00:00:00Z" if "-" in value else value)
    (told,) = worse(doctor("s3://bucket/run").findings).values()
    assert (told.name, told.verdict) == ("credentials", "problem")
    assert "expired at 2020-01-01" in told.what
    assert "the environment" in told.what


def listing(**headers):
    async def answer(e):
        await e.read_body()
        await e.send(head(200, len(LISTING), Content_Type="application/xml", **headers) + LISTING)

    return answer


def at(ahead_s):
    return formatdate(time.time() - ahead_s, usegmt=True)


CLOCKS = {"as ours": (0, "ok"), "a minute behind": (60, "warning"), "an hour ahead": (-3600, "problem")}


@pytest.mark.parametrize("name", CLOCKS)
async def test_the_clock_is_held_against_the_servers(nothing_from_outside, name):
    ahead_s, verdict = CLOCKS[name]
    async with RudeServer(script=[listing(Date=at(ahead_s))] * 9) as server:
        seen = await asyncio.to_thread(doctor, "s3://checkpoints/run", read_only=True, store=options(server.url))
    assert verdicts(seen.findings)["clock"] == verdict
    if verdict != "ok":
        (clock,) = [finding for finding in seen.findings if finding.name == "clock"]
        assert ("ahead of" if ahead_s > 0 else "behind") in clock.what
        assert "NTP" in clock.advice


async def test_a_bucket_in_another_region_is_told(nothing_from_outside):
    elsewhere = listing(Date=at(0), x_amz_bucket_region="eu-north-1")
    async with RudeServer(script=[elsewhere] * 9) as server:
        seen = await asyncio.to_thread(doctor, "s3://checkpoints/run", read_only=True, store=options(server.url))
    assert worse(seen.findings)["endpoint"].advice.startswith("set AWS_REGION=eu-north-1")


async def test_what_is_no_s3_server_is_told_and_so_is_one_that_sends_elsewhere(nothing_from_outside):
    for answer in (listing_of(b"<html/>"), refuse(301, "PermanentRedirect", Location="https://elsewhere.invalid/")):
        async with RudeServer(script=[answer]) as server:
            seen = await asyncio.to_thread(doctor, "s3://bucket/run", store=options(server.url))
        (told,) = [finding for finding in worse(seen.findings).values() if finding.verdict == "problem"]
        assert told.name == "endpoint"


def listing_of(body):
    async def answer(e):
        await e.read_body()
        await e.send(head(200, len(body), Date=at(0)) + body)

    return answer


async def test_keys_that_were_fetched_are_told_by_when_they_expire(nothing_from_outside):
    async with RudeServer(script=[listing(Date=at(0))] * 9) as server:
        given = StoreOptions(s3=S3Options(endpoint_url=server.url, addressing_style="path", credentials=fetched))
        seen = await asyncio.to_thread(doctor, "s3://checkpoints/run", read_only=True, store=given)
    (told,) = [finding for finding in seen.findings if finding.name == "credentials"]
    assert told.what == "from credentials=; the server takes them"


def fetched():
    return Credentials(access_key_id="any", secret_access_key="any")


# What a store does otherwise.


class Unconditional(WrappedStore):
    """A store that ignores conditions."""

    async def put(self, key, body, *, condition=None, crc32c=None):
        return await super().put(key, body, crc32c=crc32c)

    async def delete_if(self, key, condition):
        await self._store.delete([key])


class CreatesOnly(WrappedStore):
    """A store that ignores `IfMatch`."""

    async def put(self, key, body, *, condition=None, crc32c=None):
        kept = None if hasattr(condition, "etag") else condition
        return await super().put(key, body, condition=kept, crc32c=crc32c)


class ListsExactKeys(WrappedStore):
    """A store that lists uploads as MinIO does."""

    async def list_uploads(self, prefix=""):
        async for upload in super().list_uploads(prefix):
            if upload.key == prefix or not prefix:
                yield upload


class Unverified(WrappedStore):
    """A store that takes any body."""

    async def put(self, key, body, *, condition=None, crc32c=None):
        return await super().put(key, body, condition=condition)


class Damages(WrappedStore):
    """A store that gives back other bytes."""

    async def get_range(self, key, at, into):
        await super().get_range(key, at, into)
        into[0][0] ^= 1


LACKING = {
    "conditions": (Unconditional, "conditional writes", "problem", "two saves"),
    "replacing": (CreatesOnly, "conditional writes", "warning", "If-Match"),
    "listing of uploads": (ListsExactKeys, "uploads by prefix", "warning", "lifecycle rule"),
    "checksums": (Unverified, "checksums", "warning", "verify --deep"),
    "bytes": (Damages, "multipart upload", "problem", "do not save there"),
}


def place():
    bucket = Bucket()
    return bucket, MemoryStore("any", "place/", bucket)


@pytest.mark.parametrize("name", LACKING)
async def test_what_a_store_lacks_is_told_and_nothing_stays_there(name):
    kind, check, verdict, said = LACKING[name]
    bucket, there = place()
    store = kind(there)
    told = worse(await probe(store, store, "probe"))
    assert (set(told), told[check].verdict) == ({check}, verdict)
    assert said in told[check].what + told[check].advice
    assert (bucket.objects, bucket.uploads) == ({}, {})


class Forbids(WrappedStore):
    """A store that allows all but some requests."""

    def __init__(self, store, *methods):
        super().__init__(store)
        self._methods = methods

    async def before(self, method, key):
        if method in self._methods:
            raise PermissionDeniedError(f"{key}: not allowed ({method})")


FORBIDDEN = {
    "right to list": ("list_objects", "problem"),
    "right to put": ("put", "problem"),
    "right to get": ("get", "problem"),
    "right to delete": ("delete", "warning"),
    "right to abort uploads": ("abort_upload", "warning"),
    "right to list uploads": ("list_uploads", "warning"),
}


@pytest.mark.parametrize("right", FORBIDDEN)
async def test_a_right_that_is_missing_is_told_with_the_commands_that_need_it(right):
    method, verdict = FORBIDDEN[right]
    bucket, there = place()
    store = Forbids(there, method)
    found = await probe(store, store, "probe")
    told = worse(found)[right]
    (needed_by,) = [", ".join(one.needed_by) for one in RIGHTS if one.name == right]
    assert told.verdict == verdict
    assert needed_by in told.advice
    assert bucket.uploads == {}
    is_left = method == "delete"
    assert bool(bucket.objects) == is_left == ("clean-up" in worse(found))


def test_each_right_is_needed_by_the_commands_that_the_documentation_names():
    policies = documented()
    named = {name for right in RIGHTS for name in right.needed_by}
    for right in RIGHTS:
        needing = {name for name in named if right.action in policies[name].needed()}
        assert needing == set(right.needed_by), right.action
    assert {action for policy in policies.values() for action in policy.needed()} == {r.action for r in RIGHTS}


# As a command.


def test_the_command_prints_what_was_found_and_exits_with_1_where_that_is_a_problem(tmp_path):
    done = subprocess.run([COMMAND, "doctor", f"file://{tmp_path}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == NAMES
    (tmp_path / "run").touch()
    asked = [COMMAND, "doctor", "--json", f"file://{tmp_path}/run"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["is_healthy"]) == (1, False)
    assert [finding["name"] for finding in shown["findings"]] == NAMES


def test_what_was_put_is_removed_when_it_is_interrupted(server, client, root):
    with fault_proxy(server.endpoint_url) as proxy:
        environ = {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
        }
        started, there = [], []

        def interrupt():
            there.extend(left(client, root))
            started[0].send_signal(signal.SIGINT)

        interrupted = replace(faults.stall(), then=interrupt)
        proxy.when(lambda request: request.operation == "PutObject", faults.slow_down())  # it is not told of that
        proxy.when(lambda request: request.operation == "UploadPart", interrupted)
        asked = [COMMAND, "doctor", root]
        started.append(subprocess.Popen(asked, env=os.environ | environ, stderr=subprocess.PIPE, text=True))
        _, said = started[0].communicate(timeout=60)
    assert (started[0].returncode, said) == (130, "cloudckpt: interrupted: nothing was changed\n")
    assert there != []
    assert left(client, root) == []
