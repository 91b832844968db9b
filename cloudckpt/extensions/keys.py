"""Where the keys of encryption come from, by their ids.

Law: data keys are wrapped under a key that the user holds; no key is ever shown, in a repr, a log or an error. The
one place that reads the environment, for who asks for it.
"""

import json
import os
from base64 import b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from cloudckpt.errors import EncryptionKeyError, MissingLibraryError

KEY_NBYTES = 32


@runtime_checkable
class KeyProvider(Protocol):
    """Wraps and unwraps data keys, as a key management service does: its own keys need never leave it."""

    def wrap(self, key_id: str, data_key: bytes) -> bytes:
        """Encrypts a data key under the key of that id; raises `EncryptionKeyError` if there is none."""
        ...

    def unwrap(self, key_id: str, wrapped_key: bytes) -> bytes:
        """The inverse of `wrap`; raises `EncryptionKeyError` also if that key is not the one it was wrapped under."""
        ...


Keys = KeyProvider | Mapping[str, bytes] | Callable[[str], bytes]
"""A provider; or 32-byte keys by id, as a mapping or as a function, under which data keys are wrapped here."""


def provider_of(keys: Keys) -> KeyProvider:
    """The provider that ``keys`` stands for."""
    if isinstance(keys, KeyProvider):
        return keys
    return LocalKeys(_Given(keys) if isinstance(keys, Mapping) else keys)


@dataclass(frozen=True, slots=True)
class _Given:
    keys: Mapping[str, bytes] = field(repr=False)

    def __call__(self, key_id: str) -> bytes:
        return self.keys[key_id]


@dataclass(frozen=True, slots=True)
class LocalKeys:
    """Wraps data keys in this process, by AES key wrap (RFC 3394), under 32-byte keys.

    Attributes:
        find: gives the key of an id; may raise whatever it likes where there is none.
    """

    find: Callable[[str], bytes] = field(repr=False)

    def wrap(self, key_id: str, data_key: bytes) -> bytes:
        """See `KeyProvider.wrap`."""
        key = self._key(key_id)
        wrapped: bytes = _keywrap().aes_key_wrap(key, data_key)
        return wrapped

    def unwrap(self, key_id: str, wrapped_key: bytes) -> bytes:
        """See `KeyProvider.unwrap`."""
        key, keywrap = self._key(key_id), _keywrap()
        try:
            data_key: bytes = keywrap.aes_key_unwrap(key, wrapped_key)
        except (keywrap.InvalidUnwrap, ValueError):
            msg = f"the key given for id {key_id!r} is another than this was encrypted under, or that is damaged"
            raise EncryptionKeyError(msg) from None
        return data_key

    def _key(self, key_id: str) -> bytes:
        try:
            key = self.find(key_id)
        except EncryptionKeyError:
            raise
        except Exception as e:  # its message may show a key
            msg = f"no key could be had for id {key_id!r} ({type(e).__name__}); provide it in keys="
            raise EncryptionKeyError(msg) from None
        if not isinstance(key, bytes | bytearray) or len(key) != KEY_NBYTES:
            what = f"{len(key)} bytes" if isinstance(key, bytes | bytearray) else type(key).__name__
            msg = f"the key of id {key_id!r} must be {KEY_NBYTES} bytes, not {what}"
            raise EncryptionKeyError(msg)
        return bytes(key)


@dataclass(frozen=True, slots=True)
class KeysFromEnvironment:
    """Keys from environment variables: ``prefix`` and the key's id, holding base64 of 32 bytes."""

    prefix: str = "CLOUDCKPT_KEY_"

    def __call__(self, key_id: str) -> bytes:
        """The key of that id."""
        name = self.prefix + key_id
        text = os.environ.get(name)
        if text is None:
            msg = f"no key of id {key_id!r}: set the environment variable {name} to base64 of {KEY_NBYTES} bytes"
            raise EncryptionKeyError(msg)
        return _decoded(text, f"the environment variable {name}")


@dataclass(frozen=True, slots=True)
class KeysFromFile:
    """Keys from a JSON file of ids and base64 of 32 bytes; read each time, so that new keys are seen."""

    path: str | os.PathLike[str]

    def __call__(self, key_id: str) -> bytes:
        """The key of that id."""
        try:
            with open(self.path, encoding="utf-8") as file:
                keys = json.load(file)
        except (OSError, ValueError) as e:
            msg = f"no key of id {key_id!r}: {os.fspath(self.path)} cannot be read as JSON ({type(e).__name__})"
            raise EncryptionKeyError(msg) from None
        text = keys.get(key_id) if isinstance(keys, dict) else None
        if not isinstance(text, str):
            msg = f"no key of id {key_id!r} in {os.fspath(self.path)}: add it as base64 of {KEY_NBYTES} bytes"
            raise EncryptionKeyError(msg)
        return _decoded(text, f"the key {key_id!r} in {os.fspath(self.path)}")


def _decoded(text: str, what: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except ValueError:
        msg = f"{what} is not base64"
        raise EncryptionKeyError(msg) from None


def _keywrap() -> Any:
    try:
        from cryptography.hazmat.primitives import keywrap
    except ImportError as e:
        raise missing_cryptography() from e
    return keywrap


def missing_cryptography() -> MissingLibraryError:
    """The error for a missing library."""
    return MissingLibraryError("encryption needs a library: pip install 'cloudckpt[crypto]' (cryptography)")
