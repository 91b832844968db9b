"""Each command needs the rights that docs/security.md writes down, and no others.

On servers that enforce policies: Ceph RGW, which does as AWS does, and moto in a process of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_bytes, token_hex
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt import catalog
from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.errors import CheckpointNotFoundError, PermissionDeniedError, SaveFailedError
from cloudckpt.extensions import AesGcm
from cloudckpt.layout import FRAMES, MANIFEST, shard_key
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions
from cloudckpt.testing import Rot13
from policies import (
    BUCKET,
    GUARDED,
    Guarded,
    Policy,
    documented,
    documented_narrowly,
    documented_setting,
    start_guarded,
)
from servers import available, chosen

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KEYS = {"2026": token_bytes(32), "2027": token_bytes(32)}
N_ELEMENTS = 18 << 18
"""Of four bytes: 18 MiB, which go up in parts."""


@pytest.fixture(scope="module", params=[name for name in chosen() if name in GUARDED])
def guarded(request, tmp_path_factory):
    """A running server that enforces policies, of each kind in ``SERVERS`` that can."""
    missing = available(request.param)
    if missing:
        pytest.fail(f"the server {request.param} was asked for and cannot be started: {missing}")
    running = start_guarded(request.param, tmp_path_factory.mktemp(request.param))
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture
def prefix():
    """A fresh place in the bucket."""
    return token_hex(6)


def state(nbytes=4 * N_ELEMENTS):
    return {"w": torch.arange(nbytes // 4, dtype=torch.float32), "extra": "text"}


def save(url, options, **more):
    dcp.save(state(), storage_writer=ObjectStoreWriter(url, **options, **more))


def save_little(url, options, **more):
    dcp.save(state(4096), storage_writer=ObjectStoreWriter(url, **options, **more))


def load(url, options):
    found = {"w": torch.zeros(N_ELEMENTS), "extra": ""}
    dcp.load(found, storage_reader=ObjectStoreReader(url, **options))
    assert torch.equal(found["w"], state()["w"])


def open_and_slice(url, options):
    with cloudckpt.open(url, **options) as opened:
        assert opened["w"][3:5].tolist() == [3.0, 4.0]


def store(options):
    return StoreOptions(s3=S3Options(**options))


def nothing(_guarded, _root):
    """What a save prepares."""


def saved(guarded, root):
    save(f"{root}/step-7", guarded.options(guarded.owner_keys))


def saved_twice(guarded, root):
    for step in (7, 8):
        save_little(catalog.step_url(root, step), guarded.options(guarded.owner_keys))


def without_manifest(guarded, root):
    saved(guarded, root)
    guarded.owner.delete_object(Bucket=BUCKET, Key=f"{root.removeprefix(f's3://{BUCKET}/')}/step-7/{MANIFEST}")


def left_over(guarded, root):
    """A shard and an upload of an attempt that lost, and a shard of one that never committed."""
    saved(guarded, root)
    at = root.removeprefix(f"s3://{BUCKET}/")
    for step in (7, 8):
        guarded.owner.put_object(Bucket=BUCKET, Key=stray_key(f"{at}/step-{step}"), Body=b"x")
    guarded.owner.create_multipart_upload(Bucket=BUCKET, Key=stray_key(f"{at}/step-7"))


def stray_key(at):
    return f"{at}/{shard_key(token_hex(16), FRAMES)}"


def encrypted(guarded, root):
    save_little(f"{root}/step-7", guarded.options(guarded.owner_keys), extensions=[AesGcm("2026", KEYS)])


def newest_step(root, options):
    assert catalog.newest_step(root, store(options)) == 8


def verify(root, options):
    catalog.verify(f"{root}/step-7", store=store(options))
    catalog.verify(f"{root}/step-7", deep=True, store=store(options))


def sweep(root, options):
    for _ in range(20):  # Ceph RGW says of uploads that they began a moment after they did
        kept = catalog.sweep(root, grace_s=0, dry_run=False, store=store(options)).kept
        if not kept:
            return
    raise AssertionError(kept)


def prune(root, options):
    catalog.prune(root, catalog.KeepLast(1), dry_run=False, grace_s=0, store=store(options))


def rebuild(root, options):
    catalog.rebuild(f"{root}/step-7", store=store(options))


def rewrap(root, options):
    catalog.rewrap(f"{root}/step-7", "2027", KEYS, store=store(options))


def loads(guarded, root):
    guarded.allow_everything()
    load(f"{root}/step-7", guarded.options(guarded.guest_keys))


def is_encrypted_anew(guarded, root):
    guarded.allow_everything()
    keys, options = {"2027": KEYS["2027"]}, guarded.options(guarded.guest_keys)
    with cloudckpt.open(f"{root}/step-7", keys=keys, **options) as opened:
        assert opened["w"][3:5].tolist() == [3.0, 4.0]


def is_the_last_alone(guarded, root):
    names = keys_under(guarded, root.removeprefix(f"s3://{BUCKET}/"))
    assert {name.split("/")[1] for name in names} == {catalog.step_url("s3://b/r", 8).rpartition("/")[2]}


def is_swept(guarded, root):
    at = root.removeprefix(f"s3://{BUCKET}/")
    left = [name for name in keys_under(guarded, at) if name.endswith(FRAMES)]
    assert (left, uploads_under(guarded, at)) == ([], [])
    loads(guarded, root)


def is_as_it_was(_guarded, _root):
    """For a command that only reads, and has asserted what it read."""


def keys_under(guarded, prefix):
    listed = guarded.owner.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")
    return [found["Key"] for found in listed.get("Contents", ())]


def uploads_under(guarded, prefix):
    return guarded.owner.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{prefix}/").get("Uploads", [])


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What the owner prepares under a root, what the guest does there, and what the owner sees then."""

    prepare: Callable[[Guarded, str], None]
    run: Callable[[str, dict[str, Any]], None]
    check: Callable[[Guarded, str], None]


COMMANDS = {
    "save": Command(prepare=nothing, run=lambda r, o: save(f"{r}/step-7", o), check=loads),
    "save with overwrite": Command(
        prepare=saved, run=lambda r, o: save(f"{r}/step-7", o, overwrite=True), check=loads
    ),
    "load": Command(prepare=saved, run=lambda r, o: load(f"{r}/step-7", o), check=is_as_it_was),
    "open": Command(prepare=saved, run=lambda r, o: open_and_slice(f"{r}/step-7", o), check=is_as_it_was),
    "newest_step": Command(prepare=saved_twice, run=newest_step, check=is_as_it_was),
    "verify": Command(prepare=saved, run=verify, check=is_as_it_was),
    "sweep": Command(prepare=left_over, run=sweep, check=is_swept),
    "prune": Command(prepare=saved_twice, run=prune, check=is_the_last_alone),
    "rebuild": Command(prepare=without_manifest, run=rebuild, check=loads),
    "rewrap": Command(prepare=encrypted, run=rewrap, check=is_encrypted_anew),
}
RIGHTS = documented()
CASES = [(name, action) for name, policy in RIGHTS.items() if name in COMMANDS for action in policy.needed()]

OPERATIONS = {
    "s3:AbortMultipartUpload": {"AbortMultipartUpload"},
    "s3:DeleteObject": {"DeleteObject", "DeleteObjects", "could not delete"},
    "s3:GetObject": {"GetObject", "HeadObject"},
    "s3:ListBucket": {"ListObjectsV2", "s3:ListBucket"},
    "s3:ListBucketMultipartUploads": {"ListMultipartUploads"},
    "s3:PutObject": {"PutObject", "CreateMultipartUpload"},
}
"""What an error says of a request that the action would have allowed; one of them."""


def words_of(error):
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def test_every_command_has_its_rights_written_down():
    assert set(RIGHTS) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_rights_written_down_are_enough(guarded, prefix, name):
    command, root = COMMANDS[name], f"s3://{BUCKET}/{prefix}"
    command.prepare(guarded, root)
    guarded.allow(RIGHTS[name].under(prefix))
    command.run(root, guarded.options(guarded.guest_keys))
    command.check(guarded, root)


@pytest.mark.parametrize("name", [name for name, policy in RIGHTS.items() if policy.others()])
def test_those_that_are_needed_are_enough_where_nothing_goes_wrong(guarded, prefix, name):
    command, root = COMMANDS[name], f"s3://{BUCKET}/{prefix}"
    command.prepare(guarded, root)
    guarded.allow(RIGHTS[name].without(*RIGHTS[name].others()).under(prefix))
    command.run(root, guarded.options(guarded.guest_keys))
    command.check(guarded, root)


@pytest.mark.parametrize(("name", "action"), CASES, ids=[f"{n}-{a}" for n, a in CASES])
def test_without_one_of_those_that_are_needed_it_fails_and_says_what_could_not_be_done(guarded, prefix, name, action):
    command, root = COMMANDS[name], f"s3://{BUCKET}/{prefix}"
    command.prepare(guarded, root)
    guarded.allow(RIGHTS[name].without(action).under(prefix))
    if (name, action) == ("save", "s3:GetObject") and guarded.tells_who_may_list:
        command.run(root, guarded.options(guarded.guest_keys))
        return
    with pytest.raises((PermissionDeniedError, dcp.api.CheckpointException)) as caught:
        command.run(root, guarded.options(guarded.guest_keys))
    (error,) = ours(caught.value)
    said = words_of(error)
    assert f"{BUCKET}/{prefix}" in said
    assert any(operation in said for operation in OPERATIONS[action]), said


def ours(error):
    """The error itself, or those of all ranks that DCP wraps."""
    failures = error.failures.values() if isinstance(error, dcp.api.CheckpointException) else [(error, None)]
    found = [failure for failure, _ in failures]
    assert all(isinstance(failure, PermissionDeniedError) for failure in found), found
    return found


def test_a_save_that_may_not_list_is_told_why_a_manifest_that_is_missing_looks_forbidden(guarded, prefix):
    if not guarded.hides_what_is_missing:
        pytest.skip("tells of what is missing to everybody")
    guarded.allow(RIGHTS["save"].without("s3:ListBucket").under(prefix))
    with pytest.raises(dcp.api.CheckpointException) as caught:
        save(f"s3://{BUCKET}/{prefix}/step-7", guarded.options(guarded.guest_keys))
    (error,) = ours(caught.value)
    assert "s3:ListBucket" in words_of(error)


def test_a_load_that_may_not_list_cannot_tell_missing_from_forbidden_and_says_so(guarded, prefix):
    if not guarded.hides_what_is_missing:
        pytest.skip("tells of what is missing to everybody")
    url, options = f"s3://{BUCKET}/{prefix}/none", guarded.options(guarded.guest_keys)
    guarded.allow(RIGHTS["open"].under(prefix))
    with pytest.raises(CheckpointNotFoundError):
        cloudckpt.open(url, **options)
    guarded.allow(RIGHTS["open"].without("s3:ListBucket").under(prefix))
    with pytest.raises(PermissionDeniedError) as caught:
        cloudckpt.open(url, **options)
    assert "s3:ListBucket" in words_of(caught.value)


def test_rights_for_one_run_open_no_other(guarded, prefix):
    other = f"s3://{BUCKET}/{token_hex(6)}/step-7"
    save_little(other, guarded.options(guarded.owner_keys))
    guarded.allow(RIGHTS["save"].under(prefix))
    options = guarded.options(guarded.guest_keys)
    with pytest.raises(PermissionDeniedError):
        cloudckpt.open(other, **options)
    with pytest.raises(dcp.api.CheckpointException) as caught:
        save_little(other, options, overwrite=True)
    ours(caught.value)


DRY = {
    "sweep": (left_over, lambda r, o: catalog.sweep(r, grace_s=0, store=store(o))),
    "prune": (saved_twice, lambda r, o: catalog.prune(r, catalog.KeepLast(1), store=store(o))),
    "rebuild": (without_manifest, lambda r, o: catalog.rebuild(f"{r}/step-7", dry_run=True, store=store(o))),
}


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_needs_no_right_to_change_anything(guarded, prefix, name):
    prepare, run = DRY[name]
    root = f"s3://{BUCKET}/{prefix}"
    prepare(guarded, root)
    before = keys_under(guarded, prefix)
    changing = {"s3:AbortMultipartUpload", "s3:DeleteObject", "s3:PutObject"} & set(RIGHTS[name].needed())
    assert changing
    guarded.allow(RIGHTS[name].without(*changing).under(prefix))
    run(root, guarded.options(guarded.guest_keys))
    assert keys_under(guarded, prefix) == before


@pytest.mark.parametrize("name", ["save", "newest_step", "sweep", "prune", "rebuild"])
def test_rights_to_list_one_prefix_are_enough(guarded, prefix, name):
    if not guarded.knows_conditions:
        pytest.skip("does not know conditions of policies")
    command, root = COMMANDS[name], f"s3://{BUCKET}/{prefix}"
    command.prepare(guarded, root)
    others = tuple(s for s in RIGHTS[name].statements if not s["Sid"].endswith("OnTheBucket"))
    guarded.allow(Policy((*others, *documented_narrowly().statements)).under(prefix))
    command.run(root, guarded.options(guarded.guest_keys))
    with pytest.raises(PermissionDeniedError):
        catalog.newest_step(f"s3://{BUCKET}/{token_hex(6)}", store(guarded.options(guarded.guest_keys)))
    command.check(guarded, root)


@pytest.mark.parametrize("heading", ["A lifecycle rule for uploads", "A lifecycle rule for old versions"])
def test_a_bucket_takes_the_settings_that_are_written_down(guarded, heading):
    rules = documented_setting(heading)
    guarded.owner.put_bucket_lifecycle_configuration(Bucket=BUCKET, LifecycleConfiguration=rules)
    found = guarded.owner.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    guarded.owner.delete_bucket_lifecycle(Bucket=BUCKET)
    assert [rule["ID"] for rule in found] == [rule["ID"] for rule in rules["Rules"]]


def test_the_policy_for_manifests_is_of_conditions_that_all_our_manifests_carry(guarded, prefix):
    (deny,) = documented_setting("A policy for manifests")["Statement"]
    assert (deny["Effect"], deny["Action"]) == ("Deny", "s3:PutObject")
    assert deny["Condition"] == {"Null": {"s3:if-none-match": "true", "s3:if-match": "true"}}
    if guarded.hides_what_is_missing:  # Ceph RGW, which does not know these: as docs/security.md says
        guarded.allow([*RIGHTS["save"].under(prefix), {k: v for k, v in deny.items() if k != "Principal"}])
        with pytest.raises(dcp.api.CheckpointException) as caught:
            save_little(f"s3://{BUCKET}/{prefix}/step-7", guarded.options(guarded.guest_keys))
        ours(caught.value)


# What the rights to clean up are for.


class Breaks(Rot13):
    """Fails once an upload is under way."""

    def __init__(self, guarded, prefix):
        self._guarded, self._prefix = guarded, prefix
        self._streams = 0

    def transform_to(self, output):
        self._streams += 1
        if self._streams == 6:  # the first parts are sent by then, or soon
            while not uploads_under(self._guarded, self._prefix):
                pass
            raise OSError("the disk is full")
        return super().transform_to(output)


def break_a_save(guarded, prefix):
    """A save that fails while its upload is under way; its own failure is what it raises."""
    options = guarded.options(guarded.guest_keys)
    extensions = [Breaks(guarded, prefix)]
    with pytest.raises(dcp.api.CheckpointException) as caught:
        save(
            f"s3://{BUCKET}/{prefix}/step-7",
            options,
            extensions=extensions,
            part_size=5 << 20,
            frame_size=1 << 20,
            transform_threads=1,
        )
    ((failure, _),) = caught.value.failures.values()
    assert isinstance(failure, SaveFailedError)
    assert "the disk is full" in str(failure)


def test_a_save_that_fails_removes_what_it_uploaded(guarded, prefix, caplog):
    guarded.allow(RIGHTS["save"].under(prefix))
    break_a_save(guarded, prefix)
    assert not uploads_under(guarded, prefix)
    assert not keys_under(guarded, prefix)
    assert not [r for r in caplog.records if r.name.startswith("cloudckpt")]


LEFT = {
    "s3:AbortMultipartUpload": "could not abort a multipart upload, its parts stay until they are swept",
    "s3:DeleteObject": "could not remove shards of a failed save, they stay until they are swept",
    "s3:ListBucketMultipartUploads": "could not look for uploads of a failed save, they stay until they are swept",
}


@pytest.mark.parametrize("action", LEFT)
def test_a_save_that_fails_and_may_not_clean_up_says_what_it_left(guarded, prefix, caplog, action):
    guarded.allow(RIGHTS["save"].without(action).under(prefix))
    break_a_save(guarded, prefix)
    assert LEFT[action] in caplog.text
    assert bool(uploads_under(guarded, prefix)) == (action == "s3:AbortMultipartUpload")


def test_every_right_to_clean_up_is_used(guarded):
    assert RIGHTS["save"].others() == sorted(LEFT)


def test_an_overwrite_that_may_not_delete_commits_and_says_that_the_old_shards_stay(guarded, prefix, caplog):
    root = f"s3://{BUCKET}/{prefix}"
    saved(guarded, root)
    before = {name for name in keys_under(guarded, prefix) if MANIFEST not in name}
    guarded.allow(RIGHTS["save with overwrite"].without("s3:DeleteObject").under(prefix))
    save(f"{root}/step-7", guarded.options(guarded.guest_keys), overwrite=True)
    assert "the shards it replaced could not be deleted" in caplog.text
    assert before < set(keys_under(guarded, prefix))
    loads(guarded, root)
