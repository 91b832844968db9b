"""Sealed manifests: who has no key learns and changes nothing that is meant to be hidden."""

import json
import os
import re
from contextlib import contextmanager
from dataclasses import replace as with_options

import msgspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from msgspec.structs import replace
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt import catalog
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.sealing import open_manifest, seal
from cloudckpt.errors import (
    CommitConflictError,
    EncryptionKeyError,
    IntegrityError,
    ManifestError,
    UsageError,
)
from cloudckpt.extensions import AesGcm, BytePlane, LocalKeys, ZStandard
from cloudckpt.extensions.aesgcm import DataKey
from cloudckpt.extensions.keys import provider_of
from cloudckpt.manifest import SealedEntry, ValueEntry, encode, parse
from cloudckpt.testing import with_temp_prefix

KEYS = {"old": bytes(range(32)), "new": bytes(range(32, 64))}
SECRET = "the plan for Thursday"


@pytest.fixture
def url(tmp_path):
    return f"file://{tmp_path}/ckpt"


def save(url, extensions, **options):
    state = {"weight": torch.arange(4000).reshape(40, 100).float(), "note": SECRET}
    dcp.save(state, storage_writer=ObjectStoreWriter(url, extensions=extensions, **options))
    return state


def load(url, **options):
    state = {"weight": torch.zeros(40, 100), "note": ""}
    dcp.load(state, storage_reader=ObjectStoreReader(url, **options))
    return state


def path_of(url):
    return f"{url.removeprefix('file://')}/manifest.json"


def read(url):
    with open(path_of(url), "rb") as file:
        return file.read()


def write(url, data):
    with open(path_of(url), "wb") as file:
        file.write(data)


@contextmanager
def failing(error, match):
    """DCP raises its own class, which has ours by rank."""
    with pytest.raises(CheckpointException) as caught:
        yield
    (found, _), *_ = caught.value.failures.values()
    assert isinstance(found, error)
    assert re.search(match, str(found))


def with_value(data):
    """The same manifest with a value inline, sealed."""
    plain = open_manifest(data, "here", ReadOptions(keys=KEYS))
    entries = {**plain.entries, "lr": ValueEntry({"rate": SECRET})}
    made = replace(plain, entries=entries, seal=msgspec.UNSET)
    return seal(made, DataKey.new("old", provider_of(KEYS)))


def test_metadata_and_values_come_back_to_who_has_the_key(url):
    save(url, [AesGcm("old", KEYS)], metadata={"goal": SECRET})
    found = open_manifest(with_value(read(url)), "here", ReadOptions(keys=KEYS))
    assert found.metadata == {"goal": SECRET}
    assert found.entries["lr"] == ValueEntry({"rate": SECRET})


def test_nothing_secret_is_in_any_object(url, tmp_path):
    save(url, [ZStandard(), AesGcm("old", KEYS)], metadata={"goal": SECRET})
    write(url, with_value(read(url)))
    objects = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(objects) == 2
    for data in objects:
        assert SECRET.encode() not in data
        assert KEYS["old"] not in data


def test_who_has_no_key_still_sees_keys_shapes_and_sizes(url):
    save(url, [AesGcm("old", KEYS)], metadata={"goal": SECRET}, step=7)
    ckpt = cloudckpt.open(url)
    assert list(ckpt) == ["weight", "note"]
    assert ckpt["weight"].shape == (40, 100)
    assert ckpt.summary.step == 7
    assert ckpt.summary.nbytes > 16000


def test_who_has_no_key_is_told_which_one_the_metadata_need(url):
    save(url, [AesGcm("old", KEYS)], metadata={"goal": SECRET})
    with pytest.raises(EncryptionKeyError, match=r"'old'.*keys="):
        _ = cloudckpt.open(url).metadata


def test_who_has_no_key_is_told_which_one_a_value_needs(url):
    save(url, [AesGcm("old", KEYS)])
    write(url, with_value(read(url)))
    with pytest.raises(EncryptionKeyError, match=r"'lr'.*'old'.*keys="):
        _ = cloudckpt.open(url)["lr"]
    assert cloudckpt.open(url, keys=KEYS)["lr"] == {"rate": SECRET}
    assert parse(read(url), url).entries["lr"] == SealedEntry()


def test_a_checkpoint_without_encryption_has_no_seal(url):
    save(url, [BytePlane(), ZStandard()], metadata={"goal": SECRET})
    assert "seal" not in json.loads(read(url))
    assert cloudckpt.open(url, keys=KEYS).metadata == {"goal": SECRET}


def test_a_seal_is_needed_where_it_is_asked_for(url):
    save(url, [ZStandard()])
    with pytest.raises(IntegrityError, match="require_seal"):
        cloudckpt.open(url, keys=KEYS, require_seal=True)
    with failing(IntegrityError, "require_seal"):
        load(url, keys=KEYS, require_seal=True)


def test_a_seal_that_is_needed_cannot_be_checked_without_keys(url):
    save(url, [AesGcm("old", KEYS)])
    with pytest.raises(EncryptionKeyError, match="keys="):
        cloudckpt.open(url, require_seal=True)


def altered(data, change):
    """The manifest with something changed by one who can make its checksum right but has no key."""
    found = parse(data, "here")
    mac = bytes.fromhex(found.seal.mac)
    return encode(change(replace(found, seal=replace(found.seal, mac=""))), mac=lambda _: mac)


def other_shape(found):
    weight = found.entries["weight"]
    return replace(found, entries={**found.entries, "weight": replace(weight, shape=(100, 40))})


ALTERATIONS = {
    "a dtype": lambda m: replace(m, entries={**m.entries, "weight": replace(m.entries["weight"], dtype="I32")}),
    "a shape": other_shape,
    "an entry left out": lambda m: replace(m, entries={"weight": m.entries["weight"]}),
    "the step": lambda m: replace(m, summary=replace(m.summary, step=99)),
    "the save id": lambda m: replace(m, summary=replace(m.summary, save_id="0" * 32)),
    "the metadata": lambda m: replace(m, metadata={"goal": "other"}),
    "the key id of a shard": lambda m: replace(
        m, shards=tuple(replace(s, extension_params=({"key_id": "new"},)) for s in m.shards)
    ),
    "extensions left out": lambda m: replace(m, shards=tuple(replace(s, extensions=()) for s in m.shards)),
}


@pytest.mark.parametrize("change", ALTERATIONS.values(), ids=ALTERATIONS)
def test_a_manifest_altered_without_the_key_is_refused(url, change):
    save(url, [AesGcm("old", KEYS)], metadata={"goal": SECRET}, step=7)
    data = altered(read(url), change)
    parse(data, "here")
    with pytest.raises(IntegrityError, match="not authentic"):
        open_manifest(data, "here", ReadOptions(keys=KEYS))


def test_unchanged_it_is_taken(url):
    """The tests above would pass if nothing was ever taken."""
    save(url, [AesGcm("old", KEYS)], metadata={"goal": SECRET}, step=7)
    data = altered(read(url), lambda m: m)
    assert data == read(url)
    open_manifest(data, "here", ReadOptions(keys=KEYS))


def test_a_seal_put_on_another_manifest_is_refused(url, tmp_path):
    other = f"file://{tmp_path}/other"
    save(url, [AesGcm("old", KEYS)], metadata={"goal": SECRET})
    save(other, [AesGcm("old", KEYS)], metadata={"goal": "peace"})
    theirs = parse(read(other), other).seal
    data = altered(read(url), lambda m: replace(m, seal=replace(theirs, mac="")))
    with pytest.raises(IntegrityError, match="not authentic"):
        open_manifest(data, url, ReadOptions(keys=KEYS))


def test_a_sealed_manifest_without_a_mac_at_its_end_is_refused(url):
    save(url, [AesGcm("old", KEYS)])
    found = parse(read(url), url)
    with pytest.raises(ManifestError, match="MAC"):
        open_manifest(encode(replace(found, seal=replace(found.seal, mac="x"))), url, ReadOptions(keys=KEYS))


def test_a_wrong_key_is_told_before_anything_else_is_fetched(url):
    save(url, [AesGcm("old", KEYS)])
    with pytest.raises(EncryptionKeyError, match="'old'") as caught:
        cloudckpt.open(url, keys={"old": os.urandom(32)})
    assert any(url in note for note in caught.value.__notes__)
    with failing(EncryptionKeyError, "'old'"):
        load(url, keys={"other": os.urandom(32)})


def test_a_missing_key_keeps_a_save_from_writing_anything(tmp_path, url):
    with failing(EncryptionKeyError, "'lost'"):
        save(url, {"note": [AesGcm("lost", KEYS)]})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_each_save_has_a_manifest_key_of_its_own(url):
    save(url, [AesGcm("old", KEYS)])
    first = parse(read(url), url).seal
    save(url, [AesGcm("old", KEYS)], overwrite=True)
    assert parse(read(url), url).seal.wrapped_key != first.wrapped_key


def test_keys_are_in_no_repr_of_options():
    options = ReadOptions(keys=KEYS)
    assert "keys" not in repr(options)
    assert repr(with_options(options, keys=LocalKeys(KEYS.__getitem__))) == repr(options)


def test_rotation_leaves_a_checkpoint_that_the_new_key_alone_opens(url):
    state = save(url, {"note": [ZStandard(), AesGcm("old", KEYS)], "*": [ZStandard()]}, metadata={"goal": SECRET})
    before = parse(read(url), url)
    catalog.rewrap(url, "new", KEYS)
    found = load(url, keys={"new": KEYS["new"]})
    assert torch.equal(found["weight"], state["weight"])
    assert found["note"] == SECRET
    assert cloudckpt.open(url, keys={"new": KEYS["new"]}).metadata == {"goal": SECRET}
    with failing(EncryptionKeyError, "'new'"):
        load(url, keys={"old": KEYS["old"]})
    after = parse(read(url), url)
    assert [s.crc32c for s in after.shards] == [s.crc32c for s in before.shards]
    assert after.summary.save_id != before.summary.save_id
    assert after.seal.wrapped_key != before.seal.wrapped_key


@pytest.mark.parametrize("known", ["old", "new"])
def test_rotation_without_both_keys_changes_nothing(url, known):
    save(url, [AesGcm("old", KEYS)])
    before = read(url)
    with pytest.raises(EncryptionKeyError):
        catalog.rewrap(url, "new", {known: KEYS[known]})
    assert read(url) == before


def test_what_is_not_encrypted_has_no_keys_to_rotate(url):
    save(url, [ZStandard()])
    with pytest.raises(UsageError, match="encryption"):
        catalog.rewrap(url, "new", KEYS)


def test_an_altered_manifest_is_not_sealed_anew(url):
    save(url, [AesGcm("old", KEYS)])
    data = altered(read(url), other_shape)
    write(url, data)
    with pytest.raises(IntegrityError):
        catalog.rewrap(url, "new", KEYS)
    assert read(url) == data


class Meddling(LocalKeys):
    """Replaces the checkpoint while its keys are being rotated."""

    __slots__ = ()
    meddle = None

    def wrap(self, key_id, data_key):
        meddle, Meddling.meddle = Meddling.meddle, None
        if meddle:
            meddle()
        return super().wrap(key_id, data_key)


def test_rotation_loses_to_a_save_that_came_between(url):
    save(url, [AesGcm("old", KEYS)])
    Meddling.meddle = lambda: save(url, [AesGcm("old", KEYS)], overwrite=True, step=2)
    with pytest.raises(CommitConflictError):
        catalog.rewrap(url, "new", Meddling(KEYS.__getitem__))
    assert cloudckpt.open(url, keys=KEYS).summary.step == 2


def test_a_copied_checkpoint_still_opens(url, tmp_path):
    state = save(url, [AesGcm("old", KEYS)])
    os.rename(tmp_path / "ckpt", tmp_path / "elsewhere")
    found = load(f"file://{tmp_path}/elsewhere", keys=KEYS)
    assert torch.equal(found["weight"], state["weight"])


def test_it_is_sealed_and_rotated_on_a_real_server(root, store_options):
    @with_temp_prefix(root, store_options)
    def case(prefix):
        save(prefix, [AesGcm("old", KEYS)], store=store_options, metadata={"goal": SECRET})
        catalog.rewrap(prefix, "new", KEYS, store=store_options)
        assert load(prefix, store=store_options, keys={"new": KEYS["new"]})["note"] == SECRET

    case()
