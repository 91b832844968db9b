"""Credentials that change while they are used."""

import asyncio
import contextlib
import os
import pickle
import re
import threading
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from aiobotocore.credentials import AioAssumeRoleCredentialFetcher, AioDeferredRefreshableCredentials
from awscrt.checksums import crc32c

from cloudckpt.engine import loop
from cloudckpt.errors import CredentialsError, StaleCredentialsError, UsageError
from cloudckpt.store.protocols import IfAbsent
from cloudckpt.store.retry import RetryingStore, RetryOptions
from cloudckpt.store.s3 import S3Store
from cloudckpt.store.s3_clients import close_kept
from cloudckpt.store.s3_credentials import renews, used_by
from cloudckpt.store.s3_options import Credentials, S3Options
from cloudckpt.store.traffic import Traffic, TrafficOptions
from cloudckpt.testing import embedded_server, fault_proxy, faults
from rude_server import RudeServer, head, refuse, serve

pytestmark = pytest.mark.usefixtures("nothing_from_outside")
MIB = 1 << 20
AT_ONCE = RetryOptions(retry_base_s=0, retry_cap_s=0)
BODY = b"x" * 1000


@dataclass
class Issuer:
    """Gives credentials, and knows which are good: the newest only."""

    lives_s: float | None = None
    calls: int = 0
    current: int = 1
    threads: set = field(default_factory=set)

    def __call__(self):
        self.calls += 1
        self.threads.add(threading.current_thread())
        expires_at = None if self.lives_s is None else datetime.now(UTC) + timedelta(seconds=self.lives_s)
        return key(self.current, expires_at)

    def rotate(self):
        self.current += 1

    def accepts(self, headers):
        named = re.search(r"Credential=key-(\d+)/", headers.get("authorization", ""))
        return named is not None and int(named[1]) == self.current == int(headers["x-amz-security-token"])


def key(number, expires_at=None):
    return Credentials(
        access_key_id=f"key-{number}", secret_access_key="hush", session_token=str(number), expires_at=expires_at
    )


def options(url, **more):
    return S3Options(endpoint_url=url, region="us-east-1", addressing_style="path", **more)


def retrying(store, how=AT_ONCE):
    return RetryingStore(store, how, Traffic(TrafficOptions(), most=64))


def checking(issuer, code="ExpiredToken", rotates_after=()):
    """Answers as a small S3 to who has the current credentials; rotates them after so many good requests."""
    after = list(rotates_after)
    good = 0

    async def answer(e):
        nonlocal good
        if not issuer.accepts(e.request.headers):
            await refuse(400, code)(e)
            return
        await serve(e)
        good += 1
        if good in after:
            issuer.rotate()

    return answer


class CheckingServer(RudeServer):
    """One that goes on to ask for credentials when its script is at its end."""

    def __init__(self, issuer, **how):
        super().__init__()
        self._every = checking(issuer, **how)

    async def _answer(self, reader, writer, connection):
        self._script = [self._every]
        await super()._answer(reader, writer, connection)


@asynccontextmanager
async def opened(issuer, retry=AT_ONCE, provider=None, **how):
    async with CheckingServer(issuer, **how) as server:
        async with S3Store("bucket", "p/", options(server.url, credentials=provider or issuer)) as store:
            async with asyncio.timeout(20):
                yield server, retrying(store, retry)


# What the options say.


def test_credentials_show_no_secret_and_neither_does_what_gives_them():
    shown = Credentials(access_key_id="AK", secret_access_key="hush", session_token="hush")
    assert "hush" not in repr(shown)
    assert "hush" not in repr(S3Options(credentials=partial(print, "hush")))


@pytest.mark.parametrize(
    "more",
    [
        {"access_key_id": "a", "secret_access_key": "b"},
        {"profile": "p"},
        {"is_anonymous": True},
    ],
    ids=lambda m: next(iter(m)),
)
def test_credentials_exclude_others(more):
    with pytest.raises(UsageError, match="one of credentials="):
        S3Options(credentials=Issuer(), **more)


def test_a_time_without_a_timezone_is_refused():
    with pytest.raises(UsageError, match="timezone"):
        key(1, datetime(2030, 1, 1))  # noqa: DTZ001 - which is the point


def give():
    return key(1)


def test_options_pickle_and_hash_with_what_gives_their_credentials():
    chosen = S3Options(credentials=give)
    assert pickle.loads(pickle.dumps(chosen)) == chosen
    assert hash(pickle.loads(pickle.dumps(chosen))) == hash(chosen)
    assert hash(S3Options(credentials=Issuer())) is not None  # which has no hash of its own
    assert S3Options(credentials=Issuer(current=1)) != S3Options(credentials=Issuer(current=2))


# Renewed in time.


async def test_they_are_asked_for_once_by_many_requests_in_another_thread():
    async with opened(issuer := Issuer(lives_s=3600)) as (server, store):
        await asyncio.gather(*(store.put(f"k{i}", [memoryview(BODY)]) for i in range(20)))
        assert issuer.calls == 1
        assert threading.current_thread() not in issuer.threads
        assert len(server.requests) == 20


async def test_they_are_asked_for_again_when_their_time_is_nearly_over():
    class Aging(Issuer):
        """Gives first what does not last."""

        def __call__(self):
            self.lives_s = 3600 if self.calls else 0.5
            return super().__call__()

    async with opened(issuer := Aging()) as (_, store):
        while issuer.calls < 2:
            await store.put("k", [memoryview(BODY)])
        for _ in range(5):
            await store.put("k", [memoryview(BODY)])
        assert issuer.calls == 2


async def test_short_lived_ones_are_not_asked_for_with_each_request():
    async with opened(issuer := Issuer(lives_s=120)) as (_, store):  # less than botocore's ten minutes
        for _ in range(10):
            await store.put("k", [memoryview(BODY)])
        assert issuer.calls == 1


async def test_all_event_loops_share_them_and_ask_one_at_a_time():
    class Alone(Issuer):
        """Notices who asks while it is being asked."""

        def __call__(self):
            with contextlib.suppress(threading.BrokenBarrierError):
                two.wait(0.3)
                self.calls += 100
            return super().__call__()

    two = threading.Barrier(2)
    async with CheckingServer(issuer := Alone(lives_s=3600)) as server:
        chosen = options(server.url, credentials=issuer)

        async def put():
            async with S3Store("bucket", "p/", chosen) as store:
                await retrying(store).put("k", [memoryview(BODY)])
                await asyncio.to_thread(all_are_there.wait, 10)

        all_are_there = threading.Barrier(3)
        await asyncio.gather(*(thread.run_from_loop(put) for thread in loop.threads(3)[:3]))
        assert issuer.calls == 1


# Renewed when the server asks.


@pytest.mark.parametrize(
    "code",
    [
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidToken",
        "InvalidTokenId",
        "RequestExpired",
        "InvalidAccessKeyId",
    ],
)
async def test_what_the_server_calls_expired_is_renewed_and_the_request_sent_again(code):
    async with opened(issuer := Issuer(), code=code) as (server, store):
        await store.put("k", [memoryview(BODY)])
        issuer.rotate()
        assert (await store.get("k")).data == BODY
        assert server.asked("/k") == ["PUT", "GET", "GET"]
        assert issuer.calls == 2


async def test_a_head_says_nothing_of_why_and_is_asked_again_too():
    async with opened(issuer := Issuer()) as (_, store):
        await store.put("k", [memoryview(BODY)])
        issuer.rotate()
        assert (await store.head("k")).size == len(BODY)


async def test_many_requests_that_are_refused_ask_once():
    async with opened(issuer := Issuer()) as (server, store):
        await store.put("k", [memoryview(BODY)])
        issuer.rotate()
        await asyncio.gather(*(store.put(f"k{i}", [memoryview(BODY)]) for i in range(30)))
        assert issuer.calls == 2
        assert len(server.requests) <= 1 + 2 * 30


async def test_a_conditional_put_is_sent_again_for_it_was_not_carried_out():
    async with opened(issuer := Issuer()) as (server, store):
        await store.put("other", [memoryview(BODY)])
        issuer.rotate()
        await store.put("k", [memoryview(BODY)], condition=IfAbsent(), crc32c=crc32c(BODY))
        assert server.objects["/bucket/p/k"] == BODY
        assert server.asked("/k") == ["PUT", "PUT"]


async def test_without_retries_the_error_says_that_it_may_be_asked_again():
    impatient = RetryOptions(retry_deadline_s=0)
    async with opened(issuer := Issuer(), impatient) as (_, store):
        await store.put("k", [memoryview(BODY)])
        issuer.rotate()
        with pytest.raises(StaleCredentialsError, match="ExpiredToken"):
            await store.get("k")
        assert (await store.get("k")).data == BODY


async def test_fresh_ones_that_are_refused_too_end_with_the_deadline():
    class Unknown(Issuer):
        def accepts(self, headers):
            self.rotate()  # what it gives is never good
            return False

    how = RetryOptions(retry_base_s=0.001, retry_cap_s=0.001, retry_deadline_s=0.2)
    async with opened(Unknown(), how) as (_, store):
        with pytest.raises(StaleCredentialsError):
            await store.get("k")


# Not to be had.


async def test_the_same_again_is_an_error_at_once():
    def same():
        return key(1)

    async with opened(issuer := Issuer(), provider=same) as (server, store):
        await store.put("k", [memoryview(BODY)])
        issuer.rotate()
        with pytest.raises(CredentialsError, match="gave the same again") as e:
            await store.put("k", [memoryview(BODY)])
        assert type(e.value) is CredentialsError
        assert len(server.requests) == 2


async def test_ones_that_have_expired_are_an_error_before_anything_is_sent():
    async with opened(Issuer(), provider=lambda: key(1, datetime.now(UTC) - timedelta(hours=1))) as (server, store):
        with pytest.raises(CredentialsError, match="gave some that expired at"):
            await store.get("k")
        assert server.requests == []


async def test_what_their_function_raises_is_told():
    def broken():
        raise OSError("the vault is sealed")

    async with opened(Issuer(), provider=broken) as (server, store):
        with pytest.raises(CredentialsError, match="OSError: the vault is sealed") as e:
            await store.get("k")
        assert isinstance(e.value.__cause__, OSError)
        assert server.requests == []


async def test_what_is_no_credentials_is_told():
    async with opened(Issuer(), provider=lambda: ("key", "secret")) as (_, store):
        with pytest.raises(CredentialsError, match="tuple"):
            await store.get("k")


async def test_ones_given_by_hand_fail_at_once_with_what_to_do():
    async with CheckingServer(Issuer(current=2)) as server:
        by_hand = options(server.url, access_key_id="key-1", secret_access_key="hush", session_token="1")
        async with S3Store("bucket", "p/", by_hand) as store:
            with pytest.raises(CredentialsError, match=r"pass|needs credentials=") as e:
                await retrying(store).get("k")
        assert type(e.value) is CredentialsError
        assert "hush" not in str(e.value)
        assert len(server.requests) == 1


# What AWS's own configuration gives.


@pytest.fixture
def configured(monkeypatch, tmp_path):
    """Nothing is configured but a credentials file, which is given back."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return file


def write(file, number, profile="default"):
    file.write_text(
        f"[{profile}]\naws_access_key_id = key-{number}\naws_secret_access_key = hush\naws_session_token = {number}\n"
    )


@pytest.mark.parametrize("profile", [None, "training"])
async def test_a_credentials_file_that_was_written_anew_is_read_again(configured, profile):
    write(configured, 1, profile or "default")
    async with CheckingServer(issuer := Issuer()) as server:
        async with S3Store("bucket", "p/", options(server.url, profile=profile)) as s3:
            store = retrying(s3)
            await store.put("k", [memoryview(BODY)])
            issuer.rotate()
            write(configured, 2, profile or "default")
            assert (await store.get("k")).data == BODY
            assert server.asked("/k") == ["PUT", "GET", "GET"]


async def test_one_that_was_not_written_anew_is_an_error_at_once(configured):
    write(configured, 1)
    async with CheckingServer(issuer := Issuer()) as server:
        async with S3Store("bucket", "p/", options(server.url)) as s3:
            store = retrying(s3)
            await store.put("k", [memoryview(BODY)])
            issuer.rotate()
            with pytest.raises(CredentialsError, match="no others yet") as e:
                await store.get("k")
            assert type(e.value) is CredentialsError
            assert len(server.requests) == 2


async def test_variables_that_changed_are_read_again(configured, monkeypatch):
    def set_to(number):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"key-{number}")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
        monkeypatch.setenv("AWS_SESSION_TOKEN", str(number))

    set_to(1)
    async with CheckingServer(issuer := Issuer()) as server:
        async with S3Store("bucket", "p/", options(server.url)) as s3:
            store = retrying(s3)
            await store.put("k", [memoryview(BODY)])
            issuer.rotate()
            set_to(2)
            assert (await store.get("k")).data == BODY


async def test_a_process_that_gives_them_is_run_again(configured, tmp_path):
    times = tmp_path / "times"
    times.write_text("")
    expires = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    script = tmp_path / "give"
    script.write_text(
        "#!/bin/sh\n"
        f"echo x >> {times}\n"
        f"n=$(wc -l < {times})\n"
        'printf \'{"Version": 1, "AccessKeyId": "key-%d", "SecretAccessKey": "hush", '
        f'"SessionToken": "%d", "Expiration": "{expires}"}}\' $n $n\n'
    )
    script.chmod(0o700)
    config = tmp_path / "none"
    config.write_text(f"[default]\ncredential_process = {script}\n")
    async with CheckingServer(issuer := Issuer()) as server:
        async with S3Store("bucket", "p/", options(server.url)) as s3:
            store = retrying(s3)
            await store.put("k", [memoryview(BODY)])
            issuer.rotate()
            assert (await store.get("k")).data == BODY
            assert times.read_text() == "x\n" * 2


async def test_an_assumed_role_is_assumed_again_where_the_bucket_is(configured, monkeypatch, tmp_path):
    write(configured, 0, "base")
    (tmp_path / "none").write_text("[profile role]\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = base\n")

    class RoleServer(CheckingServer):
        """STS too, which gives what the issuer does."""

        async def _answer(self, reader, writer, connection):
            self._script = [self._either]
            await RudeServer._answer(self, reader, writer, connection)

        async def _either(self, e):
            if e.request.target != "/":
                await self._every(e)
                return
            await e.read_body()
            given = issuer()
            xml = (
                "<AssumeRoleResponse><AssumeRoleResult><Credentials>"
                f"<AccessKeyId>{given.access_key_id}</AccessKeyId><SecretAccessKey>hush</SecretAccessKey>"
                f"<SessionToken>{given.session_token}</SessionToken><Expiration>2100-01-01T00:00:00Z</Expiration>"
                "</Credentials></AssumeRoleResult></AssumeRoleResponse>"
            ).encode()
            await e.send(head(200, len(xml)) + xml)

    async with RoleServer(issuer := Issuer()) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
        chosen = replace(options(server.url, profile="role"), region="eu-west-1")
        async with S3Store("bucket", "p/", chosen) as s3:
            store = retrying(s3)
            await store.put("k", [memoryview(BODY)])
            issuer.rotate()
            assert (await store.get("k")).data == BODY
        assumed = [request.headers["authorization"] for request in server.requests if request.target == "/"]
        assert [signed.split("/")[2] for signed in assumed] == ["eu-west-1"] * 2


async def test_an_assumed_role_is_assumed_again_although_its_credentials_are_kept():
    class Role(AioAssumeRoleCredentialFetcher):
        assumed = 0

        async def _get_credentials(self):
            self.assumed += 1
            keys = {"AccessKeyId": f"key-{self.assumed}", "SecretAccessKey": "hush", "SessionToken": "t"}
            return {"Credentials": {**keys, "Expiration": datetime.now(UTC) + timedelta(hours=1)}}

    role = Role(client_creator=None, source_credentials=None, role_arn="arn:aws:iam::1:role/r")
    credentials = AioDeferredRefreshableCredentials(role.fetch_credentials, "assume-role")
    await credentials.get_frozen_credentials()
    used = used_by(credentials)
    assert renews(credentials, used)
    assert (await credentials.get_frozen_credentials()).access_key == "key-2"
    assert renews(credentials, used)  # asked for by a request that had waited long
    assert (await credentials.get_frozen_credentials()).access_key == "key-2"


async def test_a_request_signed_before_they_were_renewed_in_time_has_nothing_renewed():
    asked = 0

    async def fetch():
        nonlocal asked
        asked += 1
        expiry = (datetime.now(UTC) + timedelta(hours=asked - 0.99)).isoformat()
        return {"access_key": f"key-{asked}", "secret_key": "hush", "token": "t", "expiry_time": expiry}

    credentials = AioDeferredRefreshableCredentials(fetch, "assume-role")
    await credentials.get_frozen_credentials()
    used = used_by(credentials)
    assert (await credentials.get_frozen_credentials()).access_key == "key-2"
    assert renews(credentials, used)
    assert (await credentials.get_frozen_credentials()).access_key == "key-2"


async def test_a_role_that_comes_out_the_same_is_not_renewed_without_end():
    async def same():
        expiry = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        return {"access_key": "key-1", "secret_key": "hush", "token": "t", "expiry_time": expiry}

    credentials = AioDeferredRefreshableCredentials(same, "assume-role")
    await credentials.get_frozen_credentials()
    assert renews(credentials, used_by(credentials))
    await credentials.get_frozen_credentials()
    assert not renews(credentials, used_by(credentials))


# A save that outlives them.


@contextmanager
def rotating(issuer, *after):
    """moto behind a proxy that asks for the current credentials, and rotates them after so many good requests."""
    after, good, lock = set(after), 0, threading.Lock()

    def script(request):
        nonlocal good
        with lock:
            if not issuer.accepts(request.headers):
                return faults.expired()
            good += 1
            if good in after:
                issuer.rotate()
            return None

    with embedded_server("checkpoints") as server, fault_proxy(server.endpoint_url) as proxy:
        proxy.each(script)
        yield proxy


def test_a_save_that_outlives_three_rotations_lands_whole():
    import torch
    import torch.distributed.checkpoint as dcp

    from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter

    state = {f"w{i}": torch.randn(4 * MIB) for i in range(4)}  # 64 MiB
    issuer = Issuer(lives_s=3600)
    url = "s3://checkpoints/run"
    with rotating(issuer, 3, 6, 9) as proxy:
        how = {"credentials": issuer, "endpoint_url": proxy.url, "addressing_style": "path", "region": "us-east-1"}
        at_once = {"retry_base_s": 0.01, "retry_cap_s": 0.01}
        try:
            dcp.save(
                state,
                storage_writer=ObjectStoreWriter(url, part_size=8 * MIB, concurrency=4, **how, **at_once),
                no_dist=True,
            )
            assert issuer.current == 4
            assert issuer.calls <= 4  # the first, and one for each rotation
            sent = [(r.key, r.query) for r in proxy.requests if r.operation == "UploadPart" and r.status == 200]
            assert len(sent) == len(set(sent)) == 8
            refused = [r for r in proxy.requests if r.fault is not None]
            assert 3 <= len(refused) <= 3 * 5
            loaded = {name: torch.zeros(4 * MIB) for name in state}
            dcp.load(loaded, storage_reader=ObjectStoreReader(url, **how, **at_once), no_dist=True)
            assert all(torch.equal(loaded[name], state[name]) for name in state)
        finally:
            loop.run_on_each(close_kept)
