"""Manifests of encrypted checkpoints: what is inline is encrypted, and all of it is authenticated.

Law: pure but for a key service's work. A sealed manifest that is not authentic is never used by who holds its key.
"""

from base64 import b64decode, b64encode
from typing import Any

import msgspec

from cloudckpt.engine.read import ReadOptions
from cloudckpt.errors import EncryptionKeyError, IntegrityError
from cloudckpt.extensions.aesgcm import DataKey
from cloudckpt.extensions.keys import provider_of
from cloudckpt.manifest import Entry, Manifest, Seal, SealedEntry, ValueEntry, authenticated, encode, parse

_VALUES, _MAC = 0, 1
"""What is encrypted under a manifest's data key is numbered, so that no nonce repeats."""

_AAD = b"cloudckpt values 1"


class _Values(msgspec.Struct, frozen=True):
    metadata: dict[str, Any]
    values: dict[str, Any]


def seal(manifest: Manifest, key: DataKey) -> bytes:
    """The bytes of a manifest with its inline values encrypted, and a MAC.

    Args:
        manifest: with nothing hidden yet.
        key: made for this manifest; is not used again.
    """
    values = {name: entry.value for name, entry in manifest.entries.items() if isinstance(entry, ValueEntry)}
    hidden = msgspec.json.encode(_Values(manifest.metadata, values))
    encrypted = key.encrypt(_VALUES, hidden, _AAD + manifest.summary.save_id.encode())
    entries: dict[str, Entry] = {
        name: SealedEntry() if isinstance(entry, ValueEntry) else entry for name, entry in manifest.entries.items()
    }
    sealed = msgspec.structs.replace(
        manifest,
        metadata={},
        entries=entries,
        seal=Seal(**key.params, values=b64encode(encrypted).decode()),
    )
    return encode(sealed, mac=lambda head: key.encrypt(_MAC, b"", head))


def open_manifest(data: bytes, where: str, options: ReadOptions) -> Manifest:
    """Reads a manifest that came from storage; proves it authentic and decrypts what is inline, if keys are given.

    Without keys a sealed one is taken as it stands, with its inline values missing.

    Args:
        data: the whole object.
        where: its URL, for errors.
        options: ``keys`` and ``require_seal`` are asked for.

    Raises:
        ManifestError: see `manifest.parse`.
        EncryptionKeyError: keys were given, and its key is not among them or is wrong.
        IntegrityError: it is not authentic; or it is not sealed, and has to be.
    """
    manifest = parse(data, where)
    if manifest.seal is msgspec.UNSET:
        if options.require_seal:
            msg = (
                f"{where} was saved without encryption, or what encrypted it was taken away; require_seal refuses it"
            )
            raise IntegrityError(msg)
        return manifest
    if options.keys is None:
        if options.require_seal:
            raise missing_key(manifest, where)
        return manifest
    return _unseal(data, where, manifest, manifest.seal, options)


def _unseal(data: bytes, where: str, manifest: Manifest, its: Seal, options: ReadOptions) -> Manifest:
    provider = None if options.keys is None else provider_of(options.keys)
    try:
        key = DataKey.open({"key_id": its.key_id, "wrapped_key": its.wrapped_key}, provider)
    except EncryptionKeyError as e:
        e.add_note(f"needed for the manifest of {where}; nothing else was fetched")
        raise
    head, mac = authenticated(data)
    try:
        key.decrypt(_MAC, mac, head)
        hidden = key.decrypt(_VALUES, b64decode(its.values), _AAD + manifest.summary.save_id.encode())
    except ValueError as e:
        msg = f"{where} is not authentic: it was altered by somebody without its key. Do not load from it"
        raise IntegrityError(msg) from e
    plain = msgspec.json.decode(hidden, type=_Values)
    entries: dict[str, Entry] = {
        name: ValueEntry(plain.values[name]) if isinstance(entry, SealedEntry) else entry
        for name, entry in manifest.entries.items()
    }
    return msgspec.structs.replace(manifest, metadata=plain.metadata, entries=entries)


def missing_key(manifest: Manifest, what: str) -> EncryptionKeyError:
    """The error for who asks for something encrypted in a manifest that was opened without keys."""
    key_id = "" if manifest.seal is msgspec.UNSET else manifest.seal.key_id
    return EncryptionKeyError(f"{what} is encrypted under the key of id {key_id!r}: pass keys= that have it")
