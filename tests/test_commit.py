"""Committing: absent or complete, whatever is lost on the way."""

import logging
from datetime import UTC, datetime
from secrets import token_hex

import pytest

from cloudckpt.engine import commit
from cloudckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    ChecksumRefusedError,
    CommitConflictError,
    CommitUnknownError,
    CredentialsError,
    IntegrityError,
    ManifestError,
    NotCommittedError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreUnavailableError,
)
from cloudckpt.layout import MANIFEST, is_shard_key, shard_key
from cloudckpt.manifest import Manifest, Shard, Summary, encode, parse
from cloudckpt.store.memory import Bucket, MemoryStore
from cloudckpt.store.protocols import IfAbsent
from cloudckpt.store.s3 import S3Store
from cloudckpt.store.s3_options import S3Options
from cloudckpt.testing import FailingStore, RecordingStore, WrappedStore, fault_proxy, faults
from cloudckpt.tombstone import encode_tombstone

LOST = StoreUnavailableError("no answer")


def make(save_id="ours", shard_keys=(), **more):
    summary = Summary(
        format="cloudckpt", version=1, save_id=save_id, created=datetime.now(UTC), writer="test", **more
    )
    shards = tuple(Shard(key=k, size=1, crc32c=0, frame_size=1 << 20, frame_checksums="") for k in shard_keys)
    return encode(Manifest(summary=summary, metadata={}, planner_paths=None, shards=shards, entries={}))


def fresh():
    return MemoryStore(token_hex(4), bucket=Bucket())


async def put(store, data):
    return await store.put(MANIFEST, [memoryview(data)])


async def commit_ours(store, replaces=None, deadline_s=5.0):
    await commit.commit(store, make(), "ours", replaces=replaces, deadline_s=deadline_s)


async def committed_by(store):
    return parse((await store.get(MANIFEST)).data, "there").summary.save_id


async def test_a_commit_is_one_conditional_put():
    store = RecordingStore(fresh())
    store.identity = token_hex(4)
    await commit_ours(store)
    assert store.requests[0] == ("put", MANIFEST)
    assert await committed_by(store) == "ours"


async def test_whether_conditions_are_honoured_is_asked_once_per_store():
    store = RecordingStore(fresh())
    store.identity = token_hex(4)
    await commit_ours(store)
    assert [method for method, _ in store.requests] == ["put", "put", "put", "delete"]
    probe = store.requests[1][1]
    assert is_shard_key(probe)
    assert [key for _, key in store.requests] == [MANIFEST, probe, probe, probe]
    await store.delete([MANIFEST])
    store.requests.clear()
    await commit_ours(store)
    assert store.requests == [("put", MANIFEST)]


class Unconditional(WrappedStore):
    """A store that ignores conditions."""

    async def put(self, key, body, *, condition=None, crc32c=None):
        return await super().put(key, body, crc32c=crc32c)


async def test_a_store_that_ignores_conditions_is_warned_about(caplog):
    store = Unconditional(fresh())
    store.identity = token_hex(4)
    with caplog.at_level(logging.WARNING):
        await commit_ours(store)
    assert "does not honour conditional writes" in caplog.text


@pytest.mark.parametrize("is_reply_lost", [False, True], ids=["request lost", "reply lost"])
@pytest.mark.parametrize("at", [0, 1, 2])
async def test_a_lost_request_or_reply_ends_in_our_commit(at, is_reply_lost):
    there = fresh()
    store = FailingStore(there, at, LOST, is_reply_lost=is_reply_lost)
    store.identity = token_hex(4)
    await commit_ours(store)
    assert await committed_by(there) == "ours"


async def test_a_lost_reply_is_not_put_again():
    store = FailingStore(fresh(), 0, LOST, is_reply_lost=True)
    commit._probed.add(store.identity)
    await commit_ours(store)
    assert store.requests == [("put", MANIFEST), ("get", MANIFEST)]


class Pruned(WrappedStore):
    """A store in which a commit lands, its reply is lost, and somebody removes it, with shards or without."""

    def __init__(self, store, gone):
        super().__init__(store)
        self._gone = gone

    async def after(self, method, key):
        if method == "put" and self._gone:
            gone, self._gone = self._gone, ()
            await self._store.delete(gone)
            raise LOST


async def test_what_was_committed_and_removed_with_its_shards_is_not_committed_again():
    there = fresh()
    shards = await uploaded(there)
    store = Pruned(there, [MANIFEST, shards[0].key])
    with pytest.raises(CommitConflictError, match=r"1 shards of this save .* are gone"):
        await commit.commit(store, make(), "ours", replaces=None, shard_keys=[s.key for s in shards], deadline_s=5)
    with pytest.raises(CheckpointNotFoundError):
        await commit.read_manifest_blob(there)


async def test_a_manifest_that_is_gone_while_all_shards_are_there_is_put_again():
    there = fresh()
    shards = await uploaded(there)
    store = Pruned(there, [MANIFEST])
    await commit.commit(store, make(), "ours", replaces=None, shard_keys=[s.key for s in shards], deadline_s=5)
    assert await committed_by(there) == "ours"


class Damaging(WrappedStore):
    """A store that keeps the first body with a flipped bit, and says that it refused it."""

    is_first = True

    async def put(self, key, body, *, condition=None, crc32c=None):
        if not self.is_first:
            return await super().put(key, body, condition=condition, crc32c=crc32c)
        self.is_first = False
        data = bytearray(b"".join(body))
        data[-5] ^= 1
        await super().put(key, [memoryview(data)], condition=condition)
        raise ChecksumRefusedError("the body was damaged on its way")


async def test_a_manifest_that_landed_damaged_is_put_again():
    store = Damaging(fresh())
    await commit_ours(store)
    assert await committed_by(store) == "ours"


async def test_a_409_with_nothing_there_is_put_again():
    store = FailingStore(fresh(), 0, PreconditionFailedError("409 ConditionalRequestConflict"))
    commit._probed.add(store.identity)
    await commit_ours(store)
    assert store.requests == [("put", MANIFEST), ("get", MANIFEST), ("put", MANIFEST)]


async def test_another_save_that_came_first_stands():
    store = fresh()
    theirs = make("theirs")
    await put(store, theirs)
    with pytest.raises(CommitConflictError, match="another save committed"):
        await commit_ours(store)
    assert (await store.get(MANIFEST)).data == theirs


async def test_what_cannot_be_learnt_is_said_so():
    class Silent(WrappedStore):
        async def before(self, method, key):
            raise LOST

    with pytest.raises(CommitUnknownError, match="could not be learnt"):
        await commit_ours(Silent(fresh()), deadline_s=0.1)


async def test_a_refusal_is_raised_as_it_is():
    refusal = CredentialsError("expired")
    store = FailingStore(fresh(), 0, refusal)
    with pytest.raises(CredentialsError):
        await commit_ours(store)
    with pytest.raises(ObjectNotFoundError):
        await store.get(MANIFEST)


async def test_a_put_that_never_lands_ends_with_the_deadline():
    class NoPut(WrappedStore):
        async def before(self, method, key):
            if method == "put":
                raise LOST

    with pytest.raises(CommitUnknownError, match="may still land"):
        await commit_ours(NoPut(fresh()), deadline_s=0.1)


async def test_a_put_that_is_always_refused_is_not_committed():
    class Refusing(WrappedStore):
        async def before(self, method, key):
            if method == "put":
                raise PreconditionFailedError("409")

    with pytest.raises(PreconditionFailedError) as e:
        await commit_ours(Refusing(fresh()), deadline_s=0.1)
    assert "not committed" in e.value.__notes__[0]


async def test_prepare_refuses_a_committed_checkpoint_unless_told_to_overwrite():
    store = fresh()
    key = shard_key("0" * 32, "safetensors")
    await put(store, make("old", [key]))
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        await commit.prepare(store, overwrite=False)
    replaced = await commit.prepare(store, overwrite=True)
    assert replaced.shard_keys == (key,)
    assert await commit.prepare(fresh(), overwrite=False) is None


async def test_overwriting_deletes_the_old_shards_after_the_commit():
    store = RecordingStore(fresh())
    commit._probed.add(store.identity)
    key = shard_key("0" * 32, "safetensors")
    await store.put(key, [memoryview(b"x")])
    await put(store, make("old", [key]))
    replaced = await commit.prepare(store, overwrite=True)
    store.requests.clear()
    await commit_ours(store, replaced)
    assert store.requests == [("put", MANIFEST), ("delete", key)]
    assert [o.key async for o in store.list_objects()] == [MANIFEST]


async def test_overwriting_loses_to_a_save_that_replaced_it_meanwhile():
    store = fresh()
    await put(store, make("old"))
    replaced = await commit.prepare(store, overwrite=True)
    await put(store, make("theirs"))
    with pytest.raises(CommitConflictError):
        await commit_ours(store, replaced)
    assert await committed_by(store) == "theirs"


async def test_overwriting_what_was_deleted_meanwhile_commits():
    store = fresh()
    await put(store, make("old"))
    replaced = await commit.prepare(store, overwrite=True)
    await store.delete([MANIFEST])
    await commit_ours(store, replaced)
    assert await committed_by(store) == "ours"


async def test_an_overwrite_with_a_lost_request_is_put_again():
    store = FailingStore(fresh(), 2, LOST)
    commit._probed.add(store.identity)
    await put(store, make("old"))
    replaced = await commit.prepare(store, overwrite=True)
    await commit_ours(store, replaced)
    assert await committed_by(store) == "ours"


async def test_a_tombstone_reads_as_absent_and_is_replaced():
    store = fresh()
    await put(store, tombstone())
    with pytest.raises(CheckpointNotFoundError):
        await commit.read_manifest_blob(store)
    await commit_ours(store, await commit.prepare(store, overwrite=False))
    assert await committed_by(store) == "ours"


def tombstone(*swept):
    return encode_tombstone(swept, created=datetime.now(UTC), writer="a sweep")


SWEPT, OTHER = (shard_key(digit * 32, "safetensors") for digit in "12")


@pytest.mark.parametrize("has_seen_one", [False, True], ids=["put after it began", "put before and put anew"])
async def test_a_coordinator_whose_shards_were_swept_loses_to_the_tombstone(has_seen_one):
    store = fresh()
    if has_seen_one:
        await put(store, tombstone())
    replaced = await commit.prepare(store, overwrite=False)
    await put(store, tombstone(SWEPT))
    with pytest.raises(CommitConflictError, match="were swept as leftovers"):
        await commit.commit(store, make(), "ours", replaces=replaced, shard_keys=[OTHER, SWEPT], deadline_s=5)
    with pytest.raises(CheckpointNotFoundError):
        await commit.read_manifest_blob(store)


async def test_a_tombstone_for_another_attempt_is_replaced_by_a_commit():
    store = fresh()
    await put(store, tombstone(SWEPT))
    await commit.commit(store, make(), "ours", replaces=None, shard_keys=[OTHER], deadline_s=5)
    assert await committed_by(store) == "ours"


async def test_a_tombstone_that_does_not_say_what_was_swept_is_not_replaced():
    store = fresh()
    summary = parse(tombstone(), "t").summary
    await put(store, encode(Manifest(summary=summary, metadata={}, planner_paths=None, shards=(), entries={})))
    with pytest.raises(ManifestError, match="does not say what was swept"):
        await commit.commit(store, make(), "ours", replaces=None, shard_keys=[OTHER], deadline_s=5)


async def uploaded(store):
    keys = [shard_key(digit * 32, "safetensors") for digit in "34"]
    return [commit.Uploaded(key, 3, await store.put(key, [memoryview(b"abc")])) for key in keys]


async def test_shards_that_are_as_they_were_uploaded_may_be_committed():
    store = RecordingStore(fresh())
    shards = await uploaded(store)
    store.requests.clear()
    await commit.check(store, shards)
    assert store.requests == [("list_objects", "shards/")]


@pytest.mark.parametrize(
    ("data", "problem"),
    [(None, "is gone"), (b"abcd", "has 4 bytes and not the 3"), (b"abd", "is another object")],
    ids=["gone", "longer", "another"],
)
async def test_a_shard_that_is_not_as_it_was_uploaded_is_not_committed(data, problem):
    store = fresh()
    first, second = await uploaded(store)
    if data is None:
        await store.delete([second.key])
    else:
        await store.put(second.key, [memoryview(data)])
    with pytest.raises(IntegrityError, match=problem) as e:
        await commit.check(store, [first, second])
    assert second.key in str(e.value)


async def test_nothing_and_never_committed_are_told_apart():
    store = fresh()
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint at") as e:
        await commit.read_manifest_blob(store)
    assert not isinstance(e.value, NotCommittedError)
    await store.put(shard_key("0" * 32, "safetensors"), [memoryview(b"x")])
    with pytest.raises(NotCommittedError, match="never committed"):
        await commit.read_manifest_blob(store)


async def test_an_object_that_is_no_manifest_is_refused():
    store = fresh()
    await put(store, b"<html>")
    with pytest.raises(ManifestError):
        await commit.read_manifest_blob(store)


async def test_no_layer_sends_a_request_twice(server, s3):
    """Counted at the server, with the answer of every request lost after it was carried out."""
    key = token_hex(6)
    for condition in (None, IfAbsent()):
        with fault_proxy(server.endpoint_url) as proxy:
            proxy.each(lambda _: faults.lose_reply())
            async with S3Store("checkpoints", "", S3Options(**{**s3, "endpoint_url": proxy.url})) as store:
                with pytest.raises(StoreUnavailableError):
                    await store.put(key + str(condition), [memoryview(b"x")], condition=condition)
            assert [r.method for r in proxy.requests] == ["PUT"]


async def test_a_commit_whose_reply_is_lost_on_the_wire_stands(server, s3):
    prefix = f"{token_hex(6)}/"
    with fault_proxy(server.endpoint_url) as proxy:
        proxy.when(lambda r: r.method == "PUT", faults.lose_reply())
        async with S3Store("checkpoints", prefix, S3Options(**{**s3, "endpoint_url": proxy.url})) as store:
            commit._probed.add(store.identity)
            await commit_ours(store)
            assert await committed_by(store) == "ours"
        assert [r.method for r in proxy.requests] == ["PUT", "GET", "GET"]
