"""Keys by id: found, or an error that names the id and shows no key."""

import json
import pickle
import subprocess
import sys
import textwrap
from base64 import b64encode

import pytest

from cloudckpt.errors import EncryptionKeyError
from cloudckpt.extensions import KeyProvider, KeysFromEnvironment, KeysFromFile, LocalKeys
from cloudckpt.extensions.keys import provider_of

KEY = bytes(range(200, 232))
TEXT = b64encode(KEY).decode()
DATA_KEY = bytes(range(32))


def find(key_id):
    if key_id == "bad":
        raise RuntimeError(f"the key is {TEXT}")
    return {"k": KEY, "short": KEY[:31], "text": TEXT}[key_id]


class Service:
    """A key management service."""

    def wrap(self, key_id, data_key):
        return bytes(b ^ 0xFF for b in data_key)

    def unwrap(self, key_id, wrapped_key):
        return bytes(b ^ 0xFF for b in wrapped_key)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"k": TEXT, "short": b64encode(KEY[:5]).decode(), "text": "?", "number": 5}))
    return path


@pytest.fixture
def sources(file, monkeypatch):
    monkeypatch.setenv("CLOUDCKPT_KEY_k", TEXT)
    monkeypatch.setenv("CLOUDCKPT_KEY_short", b64encode(KEY[:5]).decode())
    monkeypatch.setenv("CLOUDCKPT_KEY_text", "?")
    monkeypatch.setenv("OTHER_k", TEXT)
    return {
        "mapping": {"k": KEY, "short": KEY[:31], "text": TEXT},
        "function": find,
        "environment": KeysFromEnvironment(),
        "other variables": KeysFromEnvironment("OTHER_"),
        "file": KeysFromFile(file),
        "local": LocalKeys(find),
        "service": Service(),
    }


NAMES = ["mapping", "function", "environment", "other variables", "file", "local", "service"]


@pytest.mark.parametrize("name", NAMES)
def test_a_data_key_is_wrapped_and_unwrapped(sources, name):
    provider = provider_of(sources[name])
    assert isinstance(provider, KeyProvider)
    wrapped = provider.wrap("k", DATA_KEY)
    assert DATA_KEY not in wrapped
    assert provider.unwrap("k", wrapped) == DATA_KEY


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("key_id", ["missing", "short", "text", "bad", "number"])
def test_a_key_that_cannot_be_had_is_named_and_not_shown(sources, name, key_id):
    provider = provider_of(sources[name])
    for attempt in (lambda: provider.wrap(key_id, DATA_KEY), lambda: provider.unwrap(key_id, bytes(40))):
        with pytest.raises(EncryptionKeyError, match=key_id) as caught:
            attempt()
        shown = f"{caught.value!r} {getattr(caught.value, '__notes__', '')} {caught.value.__cause__!r}"
        assert TEXT not in shown
        assert repr(KEY)[3:-2] not in shown
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_file_is_read_each_time(file):
    keys = provider_of(KeysFromFile(file))
    with pytest.raises(EncryptionKeyError, match=rf"'new'.*{file}"):
        keys.wrap("new", DATA_KEY)
    file.write_text(json.dumps({"new": TEXT}))
    keys.wrap("new", DATA_KEY)


@pytest.mark.parametrize("content", ["no json", "[]", None], ids=["no JSON", "an array", "no file"])
def test_a_file_that_has_no_keys_is_named(file, content):
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(EncryptionKeyError, match=r"keys.json"):
        provider_of(KeysFromFile(file)).wrap("k", DATA_KEY)


def test_a_variable_that_is_missing_is_named():
    with pytest.raises(EncryptionKeyError, match="CLOUDCKPT_KEY_gone"):
        provider_of(KeysFromEnvironment()).wrap("gone", DATA_KEY)


def test_a_damaged_wrapped_key_is_refused():
    provider = provider_of({"k": KEY})
    wrapped = bytearray(provider.wrap("k", DATA_KEY))
    for i in range(len(wrapped)):
        wrapped[i] ^= 1
        with pytest.raises(EncryptionKeyError, match="'k'"):
            provider.unwrap("k", bytes(wrapped))
        wrapped[i] ^= 1
    assert provider.unwrap("k", bytes(wrapped)) == DATA_KEY


@pytest.mark.parametrize("keys", [{"k": KEY}, LocalKeys(find), KeysFromEnvironment(), KeysFromFile("x")], ids=str)
def test_no_repr_shows_a_key_and_all_can_be_pickled(keys):
    provider = provider_of(keys)
    assert repr(KEY)[3:-2] not in repr(provider)
    assert type(pickle.loads(pickle.dumps(provider))) is type(provider)


def test_without_the_library_it_says_what_to_install():
    code = """
        import sys
        sys.modules["cryptography"] = None
        from cloudckpt.errors import MissingLibraryError
        from cloudckpt.extensions import AesGcm
        from cloudckpt.extensions.aesgcm import DataKey
        for act in (AesGcm("k", {"k": bytes(32)}).start_shard, lambda: DataKey(bytes(32), "k", b"")):
            try:
                act()
            except MissingLibraryError as e:
                assert "pip install 'cloudckpt[crypto]'" in str(e), e
            else:
                raise SystemExit("went on all the same")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
