"""Encryption: AES-256-GCM (NIST SP 800-38D), a key of its own for each shard.

Law: a nonce is a count under a data key that encrypts nothing else, so none repeats; where a frame stands is
authenticated with it, so none can be moved, cut off or replayed.
"""

import io
import json
import os
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, ClassVar, Self, cast

from cloudckpt.errors import CheckpointError, EncryptionKeyError, IntegrityError, UnknownExtensionError, UsageError
from cloudckpt.extensions.base import Buffer, FrameCodec, FrameContext, FrameTransformExtension
from cloudckpt.extensions.keys import KEY_NBYTES, KeyProvider, Keys, missing_cryptography, provider_of

TAG_NBYTES = 16
_SEGMENT_NBYTES = 1 << 20
"""Plain bytes that a stream encrypts together."""

_MAX_HEADER_NBYTES = 1 << 16
_FRAME, _STREAM = b"cloudckpt frame 1", b"cloudckpt stream 1"


class DataKey:
    """A random key that encrypts the frames of one shard, and what is kept of it.

    Attributes:
        params: ``key_id``, and ``wrapped_key``: the key encrypted under the key of that id, in base64.
    """

    __slots__ = ("_aead", "_key", "params")

    def __init__(self, key: bytes, key_id: str, wrapped_key: bytes) -> None:
        """Call `new` or `open`."""
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as e:
            raise missing_cryptography() from e
        if len(key) != KEY_NBYTES:
            msg = f"the key provider unwrapped {len(key)} bytes for id {key_id!r}, not {KEY_NBYTES}"
            raise EncryptionKeyError(msg)
        self._key = key
        self._aead = AESGCM(key)
        self.params = {"key_id": key_id, "wrapped_key": b64encode(wrapped_key).decode()}

    @classmethod
    def new(cls, key_id: str, provider: KeyProvider) -> Self:
        """Makes one; raises `EncryptionKeyError` if the key to wrap it under is missing."""
        key = os.urandom(KEY_NBYTES)
        return cls(key, key_id, _asked(key_id, lambda: provider.wrap(key_id, key)))

    @classmethod
    def open(cls, params: Mapping[str, str], provider: KeyProvider | None) -> Self:
        """The one with these `params`; raises `EncryptionKeyError` if its key is missing or wrong."""
        key_id = params.get("key_id", "")
        if provider is None:
            msg = f"this is encrypted under the key of id {key_id!r}: pass keys= that have it"
            raise EncryptionKeyError(msg)
        try:
            wrapped = b64decode(params.get("wrapped_key", ""), validate=True)
        except ValueError:
            msg = f"the wrapped key under id {key_id!r} is not base64: the manifest is damaged"
            raise EncryptionKeyError(msg) from None
        return cls(_asked(key_id, lambda: provider.unwrap(key_id, wrapped)), key_id, wrapped)

    def rewrapped(self, key_id: str, provider: KeyProvider) -> Self:
        """The same key, wrapped under another."""
        return type(self)(self._key, key_id, _asked(key_id, lambda: provider.wrap(key_id, self._key)))

    def encrypt(self, number: int, data: Buffer, aad: Buffer) -> bytes:
        """Encrypts; the tag comes last.

        Args:
            number: of what is encrypted; never the same twice.
            data: plain.
            aad: authenticated with it, and needed again.
        """
        return self._aead.encrypt(_nonce(number), data, aad)

    def decrypt(self, number: int, data: Buffer, aad: Buffer) -> bytes:
        """The inverse of `encrypt`.

        Raises:
            ValueError: it is not what was encrypted under that number and with that ``aad``.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return self._aead.decrypt(_nonce(number), data, aad)
        except InvalidTag:
            msg = "it is not authentic: altered, or of another place"
            raise ValueError(msg) from None

    def __repr__(self) -> str:
        return f"<DataKey under {self.params['key_id']!r}>"

    def __reduce__(self) -> Any:
        msg = "a data key is not to be pickled"
        raise TypeError(msg)


def _asked(key_id: str, ask: Callable[[], bytes]) -> bytes:
    try:
        return ask()
    except CheckpointError:
        raise
    except Exception as e:
        msg = f"the key provider failed for id {key_id!r}: {type(e).__name__}: {e}"
        raise EncryptionKeyError(msg) from e


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


@dataclass(frozen=True, slots=True)
class AesGcm(FrameTransformExtension):
    """Encrypts with AES-256-GCM, needs ``cloudckpt[crypto]``. Put it last: what is encrypted does not compress.

    Each shard gets a random key of its own, kept in the manifest encrypted under the key of ``key_id``. Names,
    dtypes, shapes and sizes stay readable, and how well a frame compressed shows in its size.

    Attributes:
        key_id: names the key, for who will read it.
        keys: where keys are to be had; a `KeyProvider`, or 32-byte keys by id as a mapping or a function.
    """

    key_id: str
    keys: Keys | None = field(default=None, repr=False, compare=False)

    reading_keys: ClassVar[Keys | None] = None

    def __post_init__(self) -> None:
        given: object = self.key_id
        if not isinstance(given, str):  # which may be the keys, and is not shown
            msg = f"AesGcm(key_id, keys) takes a key's name first, and got a {type(given).__name__}"
            raise UsageError(msg)
        if self.keys is None and self.key_id:
            msg = f"AesGcm({self.key_id!r}) needs keys=: a KeyProvider, a mapping or a function of key ids"
            raise UsageError(msg)

    @classmethod
    def with_keys(cls, keys: Keys) -> "type[AesGcm]":
        """A class to register for reading, whose instances find their keys in ``keys``."""
        return type("AesGcm", (cls,), {"__slots__": (), "__module__": __name__, "reading_keys": keys})

    @staticmethod
    def registry_name() -> str:
        """``stream.aesgcm``."""
        return "stream.aesgcm"

    @classmethod
    def from_descriptor(cls, version: str) -> "AesGcm":
        """See `Extension.from_descriptor`."""
        if version != "1":
            msg = f"{cls.registry_name()}/{version} is of a version that this release does not know"
            raise UnknownExtensionError(msg)
        return AesGcm("", cls.reading_keys)

    def get_descriptor(self) -> str:
        """See `Extension.get_descriptor`."""
        return f"{self.registry_name()}/1"

    def new_data_key(self) -> DataKey:
        """A data key wrapped under `key_id`; raises `EncryptionKeyError` if that is missing."""
        if self.keys is None or not self.key_id:
            msg = "this AesGcm was made to read; to write, give a key: AesGcm(key_id, keys)"
            raise UsageError(msg)
        return DataKey.new(self.key_id, provider_of(self.keys))

    def open_data_key(self, params: Mapping[str, str]) -> DataKey:
        """The data key with these `DataKey.params`; raises `EncryptionKeyError` if its key is missing or wrong."""
        return DataKey.open(params, None if self.keys is None else provider_of(self.keys))

    def start_shard(self) -> FrameCodec:
        """See `FrameTransformExtension.start_shard`."""
        return AesGcmCodec(self.new_data_key())

    def open_shard(self, params: Mapping[str, str]) -> FrameCodec:
        """See `FrameTransformExtension.open_shard`."""
        return AesGcmCodec(self.open_data_key(params))

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """See `StreamTransformExtension.transform_to`: each stream has a data key, which it begins with."""
        return cast(IO[bytes], _Writer(output, self.new_data_key()))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:  # noqa: A002 - DCP's name
        """See `StreamTransformExtension.transform_from`."""
        return cast(IO[bytes], _Reader(input, self))


class AesGcmCodec(FrameCodec):
    """Encryption at work on the frames of a shard."""

    def __init__(self, key: DataKey) -> None:
        """Encrypts with ``key``."""
        self._key = key
        self.params = key.params

    def stored_size(self, nbytes: int) -> int:
        """See `FrameCodec.stored_size`."""
        return nbytes + TAG_NBYTES

    def transform(self, sections: Sequence[memoryview], frame: FrameContext) -> Sequence[Buffer]:
        """See `FrameCodec.transform`."""
        plain = sections[0] if len(sections) == 1 else b"".join(sections)
        return [self._key.encrypt(frame.number, plain, _place(frame))]

    def restore(self, stored: memoryview, frame: FrameContext, *, limit: int) -> Buffer:
        """See `FrameCodec.restore`."""
        if not TAG_NBYTES <= len(stored) <= limit + TAG_NBYTES:
            msg = f"it has {len(stored)} bytes, of which {TAG_NBYTES} are the tag, and there should be {limit}"
            raise ValueError(msg)
        return self._key.decrypt(frame.number, stored, _place(frame))


def _place(frame: FrameContext) -> bytes:
    """What is authenticated beside a frame: not the URL, so that a checkpoint can be copied."""
    item = frame.item.encode()
    numbers = frame.number.to_bytes(8, "big"), frame.index.to_bytes(8, "big"), bytes([frame.is_last])
    return b"".join((_FRAME, frame.shard.encode(), len(item).to_bytes(4, "big"), item, *numbers))


class _Writer(io.RawIOBase):
    def __init__(self, output: IO[bytes], key: DataKey) -> None:
        header = json.dumps(key.params).encode()
        output.write(len(header).to_bytes(4, "little") + header)
        self._output = output
        self._key = key
        self._number = 0
        self._waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer) -> int:  # type: ignore[override]
        self._waiting += data
        while len(self._waiting) > _SEGMENT_NBYTES:  # the last is kept back, for it is marked
            self._send(is_last=False)
        return memoryview(data).nbytes

    def close(self) -> None:
        if not self.closed:
            self._send(is_last=True)
            self._output.close()
        super().close()

    def _send(self, *, is_last: bool) -> None:
        segment = bytes(self._waiting[:_SEGMENT_NBYTES])
        del self._waiting[:_SEGMENT_NBYTES]
        self._output.write(self._key.encrypt(self._number, segment, _STREAM + bytes([is_last])))
        self._number += 1


class _Reader(io.RawIOBase):
    def __init__(self, source: IO[bytes], extension: AesGcm) -> None:
        self._source = source
        self._key = extension.open_data_key(_read_header(source))
        self._number = 0
        self._next = _read(source, _SEGMENT_NBYTES + TAG_NBYTES)
        self._plain = memoryview(b"")
        self._is_done = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:  # type: ignore[override]
        into = memoryview(buffer)
        while not len(self._plain) and not self._is_done:
            self._advance()
        count = min(len(into), len(self._plain))
        into[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def _advance(self) -> None:
        segment, self._next = self._next, _read(self._source, _SEGMENT_NBYTES + TAG_NBYTES)
        self._is_done = not self._next
        try:
            plain = self._key.decrypt(self._number, segment, _STREAM + bytes([self._is_done]))
        except ValueError as e:
            msg = f"segment {self._number} of an encrypted stream cannot be decrypted, or the stream is cut off: {e}"
            raise IntegrityError(msg) from e
        self._number += 1
        self._plain = memoryview(plain)


def _read_header(source: IO[bytes]) -> dict[str, str]:
    length = int.from_bytes(_read(source, 4), "little")
    try:
        params = json.loads(_read(source, length)) if length <= _MAX_HEADER_NBYTES else None
    except ValueError:
        params = None
    if not isinstance(params, dict) or not all(isinstance(value, str) for value in params.values()):
        msg = "an encrypted stream does not begin with its key: it is damaged or was not encrypted"
        raise IntegrityError(msg)
    return params


def _read(source: IO[bytes], nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes and (more := source.read(nbytes - len(data))):
        data += more
    return bytes(data)
