"""No credential, key, password or signed URL is shown: by a log, an error, a repr, or an object in the bucket.

Real saves and loads, and those that fail in each way that has a secret at hand; all that they leave is searched for
every secret in every spelling. What botocore, aiobotocore, aiohttp and torch log at DEBUG is theirs, and shows signed
requests: docs/security.md says so. What they log above that is searched too.
"""

import asyncio
import base64
import functools
import logging
import os
import pickle
import ssl
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt import catalog
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.session import Session
from cloudckpt.engine.write import WriteOptions
from cloudckpt.errors import CheckpointError, EncryptionKeyError, StoreError, UsageError
from cloudckpt.extensions import AesGcm, BytePlane, KeysFromEnvironment, KeysFromFile
from cloudckpt.extensions.aesgcm import DataKey
from cloudckpt.extensions.keys import provider_of
from cloudckpt.store.s3_options import Credentials, S3Options
from cloudckpt.store.url import StoreOptions
from cloudckpt.testing import embedded_server
from conftest import client_of
from rude_server import RudeServer, certificate, error_xml, head, refuse, saying, serve, server_side
from s3_over_http import BOUND_S, CALLS, opened, over, s3_store
from servers import MotoServer

pytestmark = [
    pytest.mark.usefixtures("nothing_from_outside", "no_aws_from_outside"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

ACCESS_KEY_ID = "AKIAXDISTINCTIVE4711"
SECRET_ACCESS_KEY = "wJalr/XUtnFEMI+K7MDENG/bPxRfiCYDISTINCT"
SESSION_TOKEN = "IQoJb3JpZ2luX2VjEDISTINCT//////////wEaCXVzLWVhc3Qt=="
PASSWORD = "p4ssw0rd-Distinct"
USER_AND_PASSWORD = f"someone:{PASSWORD}"
SIGNATURE = "fe5f80f77d5fa3beca038a248ff027d0445342fe2855ddc963176630326f1024"
KEY = bytes(range(160, 192))
OTHER_KEY = bytes(range(200, 232))
KEYS = {"2026": KEY, "2027": OTHER_KEY}

SECRETS = {
    "access key id": ACCESS_KEY_ID.encode(),
    "secret access key": SECRET_ACCESS_KEY.encode(),
    "session token": SESSION_TOKEN.encode(),
    "password": PASSWORD.encode(),
    "user and password": USER_AND_PASSWORD.encode(),
    "signature": SIGNATURE.encode(),
    "key": KEY,
    "other key": OTHER_KEY,
}
CREDENTIALS = {
    "access_key_id": ACCESS_KEY_ID,
    "secret_access_key": SECRET_ACCESS_KEY,
    "session_token": SESSION_TOKEN,
}
PRESIGNED = f"X-Amz-Credential={ACCESS_KEY_ID}%2F20261125&X-Amz-Signature={SIGNATURE}"


# Looking.


def spellings(secret: bytes) -> Iterator[str]:
    """How a secret may be written: as text, with its bytes escaped in several ways, in hex, in base64."""
    text = secret.decode("latin-1")
    yield text
    yield from (repr(secret)[2:-1], repr(list(secret))[1:-1], quote(text, safe=""), quote(secret, safe=""))
    yield from (secret.hex(), secret.hex().upper(), secret.hex(" "))
    yield from (encode(secret).decode().rstrip("=") for encode in (base64.b64encode, base64.urlsafe_b64encode))


def secrets_in(seen: str | bytes) -> list[str]:
    """The names of the secrets that it shows."""
    text = seen.decode("latin-1") if isinstance(seen, bytes) else seen
    return sorted(name for name, secret in SECRETS.items() if any(spelled in text for spelled in spellings(secret)))


@dataclass
class Looked:
    """What a test has looked at, and what it found there."""

    count: int = 0
    found: list[str] = field(default_factory=list)

    def at(self, what: str, *seen: str | bytes) -> None:
        """Looks for secrets."""
        self.count += len(seen)
        self.found += [f"{what} shows the {name}: {text!r:.400}" for text in seen for name in secrets_in(text)]

    def at_log(self, records: list[logging.LogRecord]) -> None:
        """Looks at what was logged."""
        for record in records:
            traced = "" if record.exc_info is None else logging.Formatter().formatException(record.exc_info)
            self.at(f"the log of {record.name}", record.getMessage(), repr(record.args), traced)

    def at_error(self, error: BaseException) -> None:
        """Looks at all that a handler, a log or another rank is shown of an error."""
        self.at("a traceback", "".join(traceback.format_exception(error)))
        if isinstance(error, CheckpointError | CheckpointException):
            self.at("an error pickled", pickle.dumps(error))
        for shown in errors_in(error):
            what = type(shown).__name__
            self.at(what, str(shown), repr(shown), repr(shown.args), *getattr(shown, "__notes__", ()))


def errors_in(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was made of, as far as a traceback shows them."""
    yield error
    inner = list(error.exceptions) if isinstance(error, BaseExceptionGroup) else []
    inner += [failure for failure, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    inner += [e for e in (error.__cause__, None if error.__suppress_context__ else error.__context__) if e]
    for other in inner:
        yield from errors_in(other)


@pytest.fixture
def looked(caplog):
    """What a test looks at; its log is looked at when it ends."""
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "cloudckpt")
    for name in ("botocore", "aiobotocore", "aiohttp", "urllib3", "boto3", "asyncio"):
        caplog.set_level(logging.INFO, name)
    looked = Looked()
    yield looked
    mine_or_loud = [
        r for r in caplog.get_records("call") if r.name.startswith("cloudckpt") or r.levelno >= logging.INFO
    ]
    looked.at_log(mine_or_loud)
    assert looked.count
    assert looked.found == []


@pytest.fixture
def no_aws_from_outside(monkeypatch, tmp_path):
    """No configuration of AWS's but the test's own."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.parametrize("name", SECRETS)
def test_every_spelling_of_a_secret_is_found(name):
    for spelled in spellings(SECRETS[name]):
        assert name in secrets_in(f"before {spelled} after")
        assert name in secrets_in(f"before {spelled} after".encode("latin-1"))
    assert secrets_in("before after") == []


def test_a_secret_is_found_wherever_in_an_error_it_is():
    for place in ("message", "note", "cause", "context", "group", "failures"):
        error: BaseException = StoreError(PASSWORD if place == "message" else "x")
        if place == "note":
            error.add_note(PASSWORD)
        elif place == "cause":
            error.__cause__ = ValueError(PASSWORD)
        elif place == "context":
            error.__context__ = ValueError(PASSWORD)
        elif place == "group":
            error = ExceptionGroup("x", [ValueError(PASSWORD)])
        elif place == "failures":
            error = CheckpointException("x", {0: (ValueError(PASSWORD), traceback.StackSummary())})
        looked = Looked()
        looked.at_error(error)
        assert looked.found, place


LOGGED = {
    "message": {"msg": PASSWORD},
    "argument": {"msg": "%s", "args": (PASSWORD,)},
    "traceback": {"msg": "x", "exc_info": (ValueError, ValueError(PASSWORD), None)},
}


@pytest.mark.parametrize("place", LOGGED)
def test_a_secret_is_found_wherever_in_a_log_it_is(place):
    looked = Looked()
    looked.at_log([logging.makeLogRecord(LOGGED[place])])
    assert looked.found


# What goes well.


@pytest.fixture(scope="module")
def moto():
    server = MotoServer()
    server.start()
    client_of(server).create_bucket(Bucket="bucket")
    yield server
    server.stop()


def s3(url, **more):
    """Options with all the secrets there are."""
    return {"endpoint_url": url, "region": "us-east-1", "addressing_style": "path", **CREDENTIALS, **more}


def state():
    return {"w": torch.arange(3 << 20, dtype=torch.float32), "extra": {"lr": 0.1}, "step": 7}


def save(url, **options):
    dcp.save(state(), storage_writer=ObjectStoreWriter(url, metadata={"run": "a"}, step=7, **options))


def load(url, **options):
    found = {"w": torch.zeros(3 << 20), "extra": {"lr": 0.0}, "step": 0}
    dcp.load(found, storage_reader=ObjectStoreReader(url, **options))
    assert torch.equal(found["w"], state()["w"])


def objects_in(moto):
    """Everything that a reader of the bucket sees."""
    client = client_of(moto)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
        for found in page.get("Contents", ()):
            reply = client.get_object(Bucket="bucket", Key=found["Key"])
            yield found["Key"], reply["Body"].read(), repr({k: v for k, v in reply.items() if k != "Body"})


def test_saves_and_loads_that_go_well_show_no_secret(moto, looked, caplog):
    url, options = "s3://bucket/run/step-7", s3(moto.endpoint_url)
    store = StoreOptions(s3=S3Options(**options))
    encrypted = {"extensions": {"w": [BytePlane(), AesGcm("2026", KEYS)], "*": []}}
    save(url, **options, **encrypted)
    save(url, **options, **encrypted, overwrite=True)
    load(url, **options, keys=KEYS)
    assert catalog.newest_step("s3://bucket/run", store) == 7
    with cloudckpt.open(url, **options, keys=KEYS) as opened:
        assert opened["w"][3:5].tolist() == [3.0, 4.0]
        assert opened.metadata == {"run": "a"}
        looked.at("repr", repr(opened), repr(opened["w"]), repr(opened.metadata), repr(opened.summary))
    catalog.rewrap(url, "2027", KEYS, store=store)
    looked.at("what the catalog tells", repr(catalog.verify(url, deep=True, store=store)))
    looked.at("what the catalog tells", repr(catalog.sweep("s3://bucket/run", grace_s=0, store=store)))
    looked.at("what the catalog tells", repr(catalog.prune("s3://bucket/run", catalog.KeepLast(1), store=store)))
    for key, data, headers in objects_in(moto):
        looked.at(f"the object {key}", key, data, headers)
    assert "saved s3://" in caplog.text
    assert "loaded from s3://" in caplog.text


def test_credentials_and_a_proxys_password_from_the_environment_are_not_shown(moto, looked, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION_TOKEN)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto.endpoint_url)
    monkeypatch.setenv("HTTP_PROXY", f"http://{USER_AND_PASSWORD}@127.0.0.1:{moto.endpoint_url.rpartition(':')[2]}")
    monkeypatch.setenv("NO_PROXY", "")
    options = {"region": "us-east-1", "addressing_style": "path"}
    save("s3://bucket/env/step-7", **options)
    load("s3://bucket/env/step-7", **options)
    for key, data, headers in objects_in(moto):
        looked.at(f"the object {key}", key, data, headers)


def give():
    """A provider of credentials."""
    return Credentials(**CREDENTIALS)


def test_what_is_shown_of_options_and_of_what_they_are_given_to_holds_no_secret(looked):
    s3_options = S3Options(**s3("http://127.0.0.1:1"))
    store = StoreOptions(s3=s3_options)
    provided = S3Options(credentials=functools.partial(Credentials, **CREDENTIALS))
    writing = WriteOptions(extensions=[AesGcm("2026", KEYS)])
    reading = ReadOptions(keys=KEYS)
    shown = [
        s3_options,
        provided,
        give(),
        store,
        writing,
        reading,
        AesGcm("2026", KEYS),
        AesGcm("2026", KEYS.__getitem__),
        AesGcm.with_keys(KEYS),
        AesGcm.with_keys(KEYS)("2026", KEYS),
        provider_of(KEYS),
        DataKey(KEY, "2026", b"wrapped"),
        KeysFromEnvironment(),
        ObjectStoreWriter("s3://bucket/a", store=store, options=writing),
        ObjectStoreReader("s3://bucket/a", store=store, options=reading),
        Session("s3://bucket/a", store),
        s3_store("http://127.0.0.1:1"),
    ]
    for it in shown:
        looked.at(f"the repr of {type(it).__name__}", repr(it), str(it), f"{it}")
    with embedded_server() as server:
        assert server.secret_key not in repr(server) or server.secret_key == "testing"


def test_options_take_their_secrets_along_when_they_are_pickled():
    options = S3Options(**s3("http://127.0.0.1:1"))
    assert pickle.loads(pickle.dumps(options)) == options
    assert secrets_in(pickle.dumps(options)) == ["access key id", "secret access key", "session token"]


def test_a_data_key_cannot_be_pickled():
    with pytest.raises(TypeError):
        pickle.dumps(DataKey.new("2026", provider_of(KEYS)))


# What the caller got wrong.


WRONG_PLACES = [
    f"s3://{ACCESS_KEY_ID}:{quote(SECRET_ACCESS_KEY, safe='')}@bucket/run",
    f"s3://bucket/run?{PRESIGNED}",
    f"s3://bucket/run#{SIGNATURE}",
    f"https://bucket.s3.amazonaws.com/run/manifest.json?{PRESIGNED}",
    f"https://{USER_AND_PASSWORD}@host/run",
]


@pytest.mark.parametrize("url", WRONG_PLACES, ids=range(len(WRONG_PLACES)))
def test_a_url_with_a_secret_in_it_is_refused_without_being_shown(looked, url):
    attempts = [
        lambda: ObjectStoreWriter(url),
        lambda: ObjectStoreReader(url),
        lambda: cloudckpt.open(url),
        lambda: catalog.newest_step(url),
        lambda: ObjectStoreWriter().reset(url),  # what DCP hands on as checkpoint_id; it logs that itself
        lambda: ObjectStoreReader().reset(url),
    ]
    for attempt in attempts:
        with pytest.raises(UsageError) as caught:
            attempt()
        looked.at_error(caught.value)


WRONG_ENDPOINTS = [
    f"http://{USER_AND_PASSWORD}@127.0.0.1:1",
    f"http://{USER_AND_PASSWORD}@not a host!:1",
    f"http://127.0.0.1:1/?{PRESIGNED}",
    f"http://127.0.0.1:1/#{SIGNATURE}",
    f"127.0.0.1:1/{SIGNATURE}",
]


@pytest.mark.parametrize("url", WRONG_ENDPOINTS, ids=range(len(WRONG_ENDPOINTS)))
def test_an_endpoint_with_a_secret_in_it_is_refused_without_being_shown(looked, url):
    with pytest.raises(UsageError) as caught:
        S3Options(endpoint_url=url)
    looked.at_error(caught.value)
    with pytest.raises(UsageError) as caught:
        ObjectStoreWriter("s3://bucket/run", endpoint_url=url)
    looked.at_error(caught.value)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("url", WRONG_ENDPOINTS, ids=range(len(WRONG_ENDPOINTS)))
def test_so_is_one_from_the_environment(looked, monkeypatch, name, url):
    monkeypatch.setenv(name, url)
    with pytest.raises(UsageError) as caught:
        cloudckpt.open("s3://bucket/run", retry_deadline_s=0, **CREDENTIALS)
    looked.at_error(caught.value)


def test_a_file_of_credentials_that_cannot_be_read_is_not_shown(looked, monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    file.write_text(f"[default]\naws_access_key_id = {ACCESS_KEY_ID}\naws_secret_access_key {SECRET_ACCESS_KEY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    with pytest.raises(StoreError) as caught:
        cloudckpt.open("s3://bucket/run", retry_deadline_s=0)
    looked.at_error(caught.value)


class Kms:
    """A key service that tells what it was given; its errors are its own to keep secrets out of."""

    def wrap(self, key_id, data_key):
        raise PermissionError("no")

    def unwrap(self, key_id, wrapped_key):
        raise PermissionError("no")


def tells(key_id):
    raise ValueError(f"the key is {KEY!r}, in hex {KEY.hex()}")


WRONG_KEYS = {
    "another key": {"2026": OTHER_KEY},
    "none of that id": {"2027": KEY},
    "too short": {"2026": KEY[:31] + b""},
    "as text": {"2026": KEY.hex()},
    "a function that tells": tells,
    "a service that refuses": Kms(),
    "none": None,
}


@pytest.mark.parametrize("keys", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_wrong_encryption_key_is_not_shown(moto, looked, keys):
    url, options = f"s3://bucket/wrong-key-{os.urandom(4).hex()}", s3(moto.endpoint_url)
    save(url, **options, extensions=[AesGcm("2026", KEYS)])

    def read():
        with cloudckpt.open(url, **options, keys=keys) as opened:
            assert opened["w"][0] == 0

    attempts = [lambda: load(url, **options, keys=keys), read]
    if keys is not None:
        attempts.append(lambda: catalog.rewrap(url, "2027", keys, store=StoreOptions(s3=S3Options(**options))))
    for attempt in attempts:
        with pytest.raises((EncryptionKeyError, CheckpointException)) as caught:
            attempt()
        looked.at_error(caught.value)


@pytest.mark.parametrize("keys", ["another key", "a function that tells", "too short", "as text"])
def test_nor_is_one_to_save_with(moto, looked, keys):
    url, wrong = f"s3://bucket/wrong-key-{os.urandom(4).hex()}", WRONG_KEYS[keys]
    if keys == "another key":
        save(url, **s3(moto.endpoint_url), extensions=[AesGcm("2026", wrong)])
        looked.at("nothing went wrong", "")
        return
    with pytest.raises(CheckpointException) as caught:
        save(url, **s3(moto.endpoint_url), extensions=[AesGcm("2026", wrong)])
    looked.at_error(caught.value)


def test_keys_that_are_spelled_wrongly_in_the_environment_or_a_file_are_not_shown(looked, monkeypatch, tmp_path):
    spelled = [KEY.hex(), base64.b64encode(KEY).decode() + "!", base64.b64encode(KEY[:31]).decode()]
    for text in spelled:
        monkeypatch.setenv("CLOUDCKPT_KEY_2026", text)
        (tmp_path / "keys.json").write_text(f'{{"2026": "{text}"}}')
        (tmp_path / "not.json").write_text(f'{{"2026": {text}')
        for keys in (
            KeysFromEnvironment(),
            KeysFromFile(tmp_path / "keys.json"),
            KeysFromFile(tmp_path / "not.json"),
        ):
            with pytest.raises(EncryptionKeyError) as caught:
                provider_of(keys).wrap("2026", bytes(32))
            looked.at_error(caught.value)


# What the server, the network or what lies between does.


def signature_echo():
    """As S3 answers a wrong secret key: with what it made the signature of."""
    more = f"<AWSAccessKeyId>{ACCESS_KEY_ID}</AWSAccessKeyId><SignatureProvided>{SIGNATURE}</SignatureProvided>"
    body = error_xml("SignatureDoesNotMatch", more)
    return saying(head(403, len(body), Content_Type="application/xml") + body)


async def close(e):
    await e.close()


async def truncate(e):
    await e.read_body()
    await e.send(head(200, 1000, ETag='"x"') + b"x" * 10)
    await e.close()


async def hang(e):
    await e.hang()


ANSWERS = {
    "a wrong secret key": signature_echo(),
    "a token that expired": refuse(400, "ExpiredToken"),
    "an access key that is not known": refuse(403, "InvalidAccessKeyId"),
    "no rights": refuse(403, "AccessDenied"),
    "a code nobody knows": refuse(418, "Teapot"),
    "no bucket": refuse(404, "NoSuchBucket"),
    "its own trouble": refuse(500, "InternalError"),
    "too many requests": refuse(503, "SlowDown"),
    "a redirect to a signed URL": saying(head(302, 0, Location=f"https://elsewhere.invalid/k?{PRESIGNED}")),
    "a redirect to a URL with a password": saying(head(307, 0, Location=f"http://{USER_AND_PASSWORD}@elsewhere/k")),
    "no answer": close,
    "half an answer": truncate,
    "silence": hang,
    "something else": saying(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a page of HTML": saying(head(200, 20, Content_Type="text/html") + b"<html>Log in</html>\n"),
}
IMPATIENT = {"retry_deadline_s": 0, "connect_timeout_s": 0.5, "read_timeout_s": 0.5, "commit_deadline_s": 0}


def attempts_at(url, **options):
    """A save and a load of each kind, each of which must fail."""
    reading = {k: v for k, v in options.items() if k != "commit_deadline_s"}
    store = StoreOptions(s3=S3Options(**{k: v for k, v in reading.items() if k != "retry_deadline_s"}))
    return {
        "save": lambda: save(url, **options),
        "load": lambda: load(url, **reading),
        "open": lambda: cloudckpt.open(url, **reading),
        "newest_step": lambda: catalog.newest_step(url, store),
    }


async def failed(looked, attempts):
    """Makes attempts in a thread, for the server runs in this one's loop; each must fail, and is looked at."""
    for what, attempt in attempts.items():
        try:
            await asyncio.to_thread(attempt)
        except (CheckpointError, CheckpointException) as e:
            looked.at_error(e)
        else:
            raise AssertionError(f"{what} did not fail")


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_a_server_that_refuses_or_fails_brings_no_secret_to_light(looked, answer):
    async with RudeServer([answer] * 100) as server:
        attempts = attempts_at("s3://bucket/run", **s3(server.url), **IMPATIENT)
        del attempts["newest_step"]  # retries for a minute, and asks what open asks
        await failed(looked, attempts)
        assert any(ACCESS_KEY_ID in r.headers["authorization"] for r in server.requests) or answer is hang
        assert all(r.headers["x-amz-security-token"] == SESSION_TOKEN for r in server.requests)


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
async def test_nor_does_one_that_fails_in_the_middle_of_a_save_or_a_commit(looked, answer):
    for before in (1, 2, 3):  # what is there; the shard; the listing, or the manifest
        async with RudeServer([serve] * before + [answer] * 100) as server:
            save_it = attempts_at("s3://bucket/run", **s3(server.url), **IMPATIENT)["save"]
            await failed(looked, {"save": save_it})


async def test_an_endpoint_that_cannot_be_reached_brings_no_secret_to_light(looked):
    for url in ("http://127.0.0.1:1", "http://nowhere.invalid:1", "https://127.0.0.1:1"):
        attempts = attempts_at("s3://bucket/run", **s3(url), **IMPATIENT)
        del attempts["newest_step"]
        await failed(looked, attempts)


async def test_a_proxy_that_refuses_brings_no_password_to_light(looked, monkeypatch):
    for scheme in ("http", "https"):
        for answer in (saying(head(407, 0, Proxy_Authenticate="Basic")), refuse(502, "x"), close):
            async with RudeServer([answer] * 100) as server:
                monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://{USER_AND_PASSWORD}@127.0.0.1:{server.port}")
                attempts = attempts_at("s3://bucket/run", **s3(f"{scheme}://s3.invalid"), **IMPATIENT)
                del attempts["newest_step"]
                await failed(looked, attempts)
                basic = base64.b64encode(USER_AND_PASSWORD.encode()).decode()
                assert any(basic in r.headers.get("proxy-authorization", "") for r in server.requests)
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://{USER_AND_PASSWORD}@127.0.0.1:1")
        attempts = attempts_at("s3://bucket/run", **s3(f"{scheme}://s3.invalid"), **IMPATIENT)
        del attempts["newest_step"]
        await failed(looked, attempts)


def run_cli(*arguments, **environ):
    """A command in a process of its own, with the secrets in its environment."""
    secrets = {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        "AWS_SESSION_TOKEN": SESSION_TOKEN,
        "CLOUDCKPT_KEY_2026": base64.b64encode(KEY).decode(),
    }
    return subprocess.run(
        [sys.executable, "-c", "from cloudckpt.cli.main import main; main()", *arguments],
        env=os.environ | secrets | environ,
        capture_output=True,
        check=False,
        timeout=120,
    )


def commands_at(url):
    """The commands that look at a place, none of which changes anything."""
    return [
        ("bench", url),
        ("verify", url),
        ("sweep", url),
        ("prune", url, "--keep-last", "1"),
        ("rebuild", url),
    ]


@pytest.mark.parametrize("url", WRONG_PLACES, ids=range(len(WRONG_PLACES)))
def test_the_command_line_says_nothing_of_a_secret_in_a_url(looked, url):
    for arguments in commands_at(url) if url == WRONG_PLACES[0] else [("verify", url)]:
        done = run_cli(*arguments)
        assert done.returncode
        looked.at(f"the command line's {arguments[0]}", done.stdout, done.stderr)


def test_nor_of_one_in_the_environment(looked):
    for arguments in commands_at("s3://bucket/run"):
        done = run_cli(*arguments, AWS_ENDPOINT_URL=WRONG_ENDPOINTS[0])
        assert done.returncode
        looked.at(f"the command line's {arguments[0]}", done.stdout, done.stderr)


def test_nor_of_the_credentials_that_it_works_with(moto, looked):
    url = f"s3://bucket/cli-{os.urandom(4).hex()}"
    save(f"{url}/step-7", **s3(moto.endpoint_url))
    environ = {"AWS_ENDPOINT_URL": moto.endpoint_url, "AWS_REGION": "us-east-1"}
    for arguments in [("verify", f"{url}/step-7", "--deep"), ("sweep", url), ("verify", f"{url}/step-8")]:
        done = run_cli(*arguments, **environ)
        assert (done.returncode == 0) == (arguments[1] != f"{url}/step-8"), done.stderr
        looked.at(f"the command line's {arguments[0]}", done.stdout, done.stderr)


# TLS.


@pytest.fixture(scope="module")
def pems(tmp_path_factory):
    """The server's certificate, and another's."""
    files = [tmp_path_factory.mktemp("tls") / name for name in ("mine.pem", "other.pem")]
    for file in files:
        certificate(file)
    return files


TRUSTED = {
    "nobody's word": lambda _other, _monkeypatch: {},
    "another's, as an option": lambda other, _monkeypatch: {"ca_bundle": str(other)},
    "another's, by AWS_CA_BUNDLE": lambda other, monkeypatch: monkeypatch.setenv("AWS_CA_BUNDLE", str(other)) or {},
}


@pytest.mark.parametrize("trust", TRUSTED.values(), ids=TRUSTED)
@over(CALLS)
async def test_a_server_of_another_authority_is_sent_nothing(pems, monkeypatch, trust, call):
    mine, other = pems
    async with opened(tls=server_side(mine), **trust(other, monkeypatch)) as (server, store):
        with pytest.raises(StoreError, match="certificate was not accepted"):
            await call(store)
        assert server.requests == []


async def test_a_server_whose_certificate_names_another_host_is_sent_nothing(pems):
    mine, _ = pems
    async with RudeServer(tls=server_side(mine), hosts=("127.0.0.2",)) as server:
        async with s3_store(server.url, ca_bundle=str(mine)) as store, asyncio.timeout(BOUND_S):
            with pytest.raises(StoreError, match="certificate was not accepted"):
                await store.get("k")
        assert server.requests == []


async def test_an_authority_that_is_trusted_is_accepted_as_an_option_and_from_the_environment(pems, monkeypatch):
    mine, other = pems
    async with opened(tls=server_side(mine), ca_bundle=str(mine)) as (server, store):
        await store.put("k", [memoryview(b"x")])
        assert len(server.requests) == 1
    monkeypatch.setenv("AWS_CA_BUNDLE", str(mine))
    async with opened(tls=server_side(mine)) as (server, store):
        await store.put("k", [memoryview(b"x")])
        assert len(server.requests) == 1
    async with opened(tls=server_side(mine), ca_bundle=str(other)) as (server, store):  # the option goes first
        with pytest.raises(StoreError, match="certificate was not accepted"):
            await store.put("k", [memoryview(b"x")])
        assert server.requests == []


@pytest.mark.parametrize("value", [False, "", 0])
def test_no_option_turns_verification_off(value):
    with pytest.raises(UsageError, match="ca_bundle"):
        S3Options(ca_bundle=value)


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"])
@pytest.mark.parametrize("value", ["", " ", "False", "0", "/nowhere/ca.pem"])
async def test_nor_does_a_variable_of_the_environment(pems, monkeypatch, name, value):
    mine, _ = pems
    monkeypatch.setenv(name, value)
    async with RudeServer(tls=server_side(mine)) as server:
        with pytest.raises(CheckpointError):
            async with s3_store(server.url) as store, asyncio.timeout(BOUND_S):
                await store.get("k")
        assert server.requests == []


def test_nor_does_any_field_of_the_options_by_its_name():
    names = {name for name in S3Options.__dataclass_fields__ if "verif" in name or "ssl" in name or "tls" in name}
    assert names == set()


async def test_a_save_and_a_load_over_a_certificate_that_is_not_trusted_fail_and_bring_no_secret_to_light(
    pems, looked
):
    mine, _ = pems
    async with RudeServer(tls=server_side(mine)) as server:
        await failed(looked, attempts_at("s3://bucket/run", **s3(server.url), **IMPATIENT))
        assert server.requests == []


def test_the_certificates_of_these_tests_are_what_a_plain_client_refuses_and_accepts(pems):
    mine, other = pems
    assert ssl.create_default_context(cafile=mine).cert_store_stats()["x509_ca"]
    assert Path(mine).read_bytes() != Path(other).read_bytes()
