"""Policies: what is kept, that it stays kept, and the metrics that they go by."""

import logging
import pickle
import re
import time
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from awscrt.checksums import crc32c
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.catalog import AllOf, AnyOf, Combines, CommittedStep, KeepBest, KeepEvery, KeepLast
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.errors import ManifestError, UsageError
from cloudckpt.manifest import (
    FORMAT,
    MAX_METRIC_NAME_NBYTES,
    MAX_METRICS,
    SUMMARY_NBYTES,
    VERSION,
    Manifest,
    Summary,
    check_metrics,
    encode,
    parse,
    parse_summary,
)

START = datetime(2026, 11, 25, 12, tzinfo=UTC)
DOCS = Path(__file__).resolve().parent.parent / "docs" / "retention.md"


def summary(**changes):
    made = Summary(format=FORMAT, version=VERSION, save_id="ab" * 16, created=START, writer="a test")
    return msgspec.structs.replace(made, **changes)


def step(number, at_s=0.0, **metrics):
    made = summary(step=number, created=START + timedelta(seconds=at_s), metrics=metrics)
    return CommittedStep(step=number, summary=made)


def kept(policy, *steps):
    """The numbers of those that it keeps, newest first."""
    newest_first = sorted(steps, key=lambda one: -one.step)
    kept_steps = list(policy.keep(newest_first))
    assert set(kept_steps) <= set(steps)
    return sorted((one.step for one in kept_steps), reverse=True)


def test_the_last_are_kept():
    assert kept(KeepLast(2), step(1), step(10), step(9)) == [10, 9]
    assert kept(KeepLast(5), step(1)) == [1]


def test_multiples_are_kept():
    assert kept(KeepEvery(steps=10), *map(step, (0, 5, 10, 15, 20))) == [20, 10, 0]


def test_of_each_window_of_time_the_step_that_was_committed_first_is_kept():
    steps = [step(1, 0), step(2, 1800), step(3, 3599), step(4, 3600), step(5, 7000), step(6, 12_000)]
    assert kept(KeepEvery(seconds=3600), *steps) == [6, 4, 1]
    assert kept(KeepEvery(seconds=0.5), *steps) == [6, 5, 4, 3, 2, 1]
    assert kept(KeepEvery(seconds=3600), step(1, -10), step(2, 10), step(3, 20)) == [2, 1], "full hours part them"


def test_the_first_is_so_by_its_commit_and_not_by_its_number():
    assert kept(KeepEvery(seconds=3600), step(7, 10), step(3, 20)) == [7]
    assert kept(KeepEvery(seconds=3600), step(7, 10), step(3, 10)) == [3]


def test_a_time_is_the_same_in_every_zone_and_utc_without_one(monkeypatch):
    monkeypatch.setenv("TZ", "UTC-9")
    time.tzset()
    east = summary(created=START.astimezone(timezone(timedelta(hours=9))) + timedelta(seconds=5))
    without = summary(created=START.replace(tzinfo=None) + timedelta(seconds=4))
    steps = [CommittedStep(step=1, summary=east), CommittedStep(step=2, summary=without), step(3, 6)]
    kept_there = kept(KeepEvery(seconds=60), *steps)
    monkeypatch.undo()
    time.tzset()
    assert kept_there == [2]


@given(
    st.sampled_from([1.0, 60.0, 3600.0, 86_400.0]),
    st.lists(st.floats(0, 10_000), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_what_one_of_time_kept_once_stays_as_steps_come_and_go(seconds, pauses, last):
    def windows(steps):
        return {int(one.summary.created.timestamp() // seconds) for one in steps}

    policy = KeepEvery(seconds=seconds)
    made, there, ever, at_s = [], [], set(), 0.0
    for number, pause in enumerate(pauses):
        at_s += pause
        made.append(step(number, at_s))
        there.append(made[-1])
        ever |= set(kept(policy, *there))
        stays = set(kept(policy | KeepLast(last), *there))
        there = [one for one in there if one.step in stays]
        assert ever <= stays
    assert windows(made) == windows(there)
    assert ever == set(kept(policy, *made))


MEASURED = [step(1, loss=3.0), step(2, loss=1.0), step(3), step(4, loss=2.0), step(5, loss=1.0), step(6, other=0.0)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        pytest.param(KeepBest("loss", 1), [5], id="of two that are equal the newer"),
        pytest.param(KeepBest("loss", 2), [5, 2], id="the lowest"),
        pytest.param(KeepBest("loss", 2, "max"), [4, 1], id="the highest"),
        pytest.param(KeepBest("loss", 3, mode="max"), [5, 4, 1], id="the highest, and the newer of two"),
        pytest.param(KeepBest("loss", 9), [5, 4, 2, 1], id="none without it"),
        pytest.param(KeepBest("accuracy", 3), [], id="none where none has it"),
    ],
)
def test_the_best_by_a_metric_are_kept(policy, expected):
    assert kept(policy, *MEASURED) == expected


def test_a_metric_that_is_no_number_is_never_best():
    odd = [step(1, loss=float("nan")), step(2, loss=float("-inf")), step(3, loss=float("inf")), step(4, loss=7.0)]
    for mode in ("min", "max"):
        assert kept(KeepBest("loss", 3, mode), *odd) == [4]


class KeepOdd(Combines):
    """As a user would write one."""

    def keep(self, steps):
        return [found for found in steps if found.step % 2]


class KeepFirst:
    """One that does not inherit anything."""

    def keep(self, steps):
        return iter(steps[-1:])


STEPS = [step(n, loss=float(n)) for n in range(1, 9)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        pytest.param(KeepLast(2) | KeepEvery(steps=4), [8, 7, 4], id="either"),
        pytest.param(KeepLast(3) & KeepEvery(steps=4), [8], id="both"),
        pytest.param(KeepLast(1) | KeepBest("loss", 1) | KeepEvery(steps=4), [8, 4, 1], id="any of three"),
        pytest.param(KeepLast(3) & KeepOdd() | KeepBest("loss", 1), [7, 1], id="and binds stronger"),
        pytest.param(KeepOdd() & KeepLast(4), [7, 5], id="a policy of the user's"),
        pytest.param(KeepLast(1) | KeepFirst(), [8, 1], id="one that inherits nothing, on the right"),
        pytest.param(KeepFirst() | KeepLast(1), [8, 1], id="one that inherits nothing, on the left"),
        pytest.param(KeepFirst() & KeepOdd(), [1], id="both, on the left"),
        pytest.param(AnyOf((KeepFirst(), KeepFirst())), [1], id="spelled out"),
        pytest.param(AllOf((KeepLast(3), KeepOdd(), KeepLast(2))), [7], id="all of three"),
    ],
)
def test_policies_are_combined(policy, expected):
    assert kept(policy, *STEPS) == expected


def test_a_policy_is_not_combined_with_something_else():
    for other in (3, None, "KeepLast(3)"):
        with pytest.raises(TypeError):
            KeepLast(1) | other
        with pytest.raises(TypeError):
            other & KeepLast(1)


def test_policies_say_what_they_are_are_equal_by_what_they_say_and_go_to_other_processes():
    policy = KeepLast(3) | KeepEvery(seconds=60) & KeepBest("loss", 2, "max")
    assert repr(policy) == (
        "AnyOf(policies=(KeepLast(n=3), AllOf(policies=(KeepEvery(steps=None, seconds=60), "
        "KeepBest(metric='loss', n=2, mode='max')))))"
    )
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert len({policy, KeepLast(3) | KeepEvery(seconds=60) & KeepBest("loss", 2, "max")}) == 1


@pytest.mark.parametrize(
    ("make", "word"),
    [
        pytest.param(lambda: KeepLast(0), "at least 1", id="last: none"),
        pytest.param(lambda: KeepLast(-1), "at least 1", id="last: fewer than none"),
        pytest.param(lambda: KeepLast(2.0), "whole", id="last: a float"),
        pytest.param(lambda: KeepLast("3"), "whole", id="last: a text"),
        pytest.param(lambda: KeepLast(True), "whole", id="last: a bool"),
        pytest.param(KeepEvery, "either", id="every: nothing"),
        pytest.param(lambda: KeepEvery(steps=2, seconds=3), "join", id="every: both"),
        pytest.param(lambda: KeepEvery(steps=0), "at least 1", id="every: 0 steps"),
        pytest.param(lambda: KeepEvery(seconds=0), "above 0", id="every: 0 seconds"),
        pytest.param(lambda: KeepEvery(seconds=float("nan")), "above 0", id="every: no number"),
        pytest.param(lambda: KeepEvery(seconds=float("inf")), "above 0", id="every: forever"),
        pytest.param(lambda: KeepEvery(seconds="1h"), "above 0", id="every: a text"),
        pytest.param(lambda: KeepEvery(seconds=timedelta(hours=1)), "seconds", id="every: a timedelta"),
        pytest.param(lambda: KeepBest("", 1), "name", id="best: no name"),
        pytest.param(lambda: KeepBest(3, 1), "name", id="best: a number for a name"),
        pytest.param(lambda: KeepBest("loss", 0), "at least 1", id="best: none"),
        pytest.param(lambda: KeepBest("loss", 1, "lowest"), "'min'", id="best: another mode"),
    ],
)
def test_an_argument_that_cannot_be_is_refused(make, word):
    with pytest.raises(UsageError, match=word):
        make()


# Metrics.


def encoded(metrics):
    made = summary(metrics=metrics)
    return encode(Manifest(summary=made, metadata={}, planner_paths=None, shards=(), entries={}))


def test_metrics_come_back_from_a_manifest_and_from_its_first_bytes():
    metrics = check_metrics({"loss": 0.25, "tokens": 10**12, "val/acc é": -0.0, "np": np.float64(1.5)})
    assert metrics == {"loss": 0.25, "tokens": 1e12, "val/acc é": 0.0, "np": 1.5}
    assert {type(value) for value in metrics.values()} == {float}
    data = encoded(metrics)
    assert parse(data, "there").summary.metrics == metrics
    assert parse_summary(data[:SUMMARY_NBYTES], "there").metrics == metrics


def test_no_metrics_are_none():
    assert check_metrics(None) == check_metrics({}) == summary().metrics == {}


def test_a_manifest_from_before_there_were_metrics_has_none():
    tree = msgspec.json.decode(encoded({}))
    del tree["summary"]["metrics"], tree["crc32c"]
    body = msgspec.json.encode(tree)[:-1]
    data = body + b',"crc32c":"%08x"}' % crc32c(body)
    assert b"metrics" not in data
    assert parse(data, "there").summary == parse_summary(data, "there") == summary()


def test_the_most_and_longest_metrics_that_are_taken_leave_the_summary_within_its_first_bytes():
    longest, most = -2.2250738585072014e-308, (1 << 63) - 1
    name = "\x00" * (MAX_METRIC_NAME_NBYTES // 6 - 1)
    metrics = check_metrics(
        {f"{name}{i:0{MAX_METRIC_NAME_NBYTES - 6 * len(name)}}": longest for i in range(MAX_METRICS)}
    )
    numbers = dict.fromkeys(("step", "nbytes", "stored_nbytes", "shard_count", "entry_count", "chunk_count"), most)
    large = summary(writer="w" * 500, metrics=metrics, is_tombstone=False, **numbers)
    data = encode(Manifest(summary=large, metadata={"x": "y" * 9000}, planner_paths=None, shards=(), entries={}))
    assert parse_summary(data[:SUMMARY_NBYTES], "there") == large
    assert len(msgspec.json.encode(metrics)) > 2900


@pytest.mark.parametrize(
    ("metrics", "word"),
    [
        pytest.param({"ok": True}, "bool", id="a bool"),
        pytest.param({"loss": torch.tensor(0.5)}, r"Tensor.*value\.item\(\)", id="a tensor"),
        pytest.param({"loss": np.float32(0.5)}, r"float32.*value\.item\(\)", id="a float of numpy's"),
        pytest.param({"loss": "0.5"}, "str, and not a float", id="a text"),
        pytest.param({"loss": None}, "NoneType", id="nothing"),
        pytest.param({"loss": 10**400}, "too large", id="an int that is too large"),
        pytest.param({3: 0.5}, "name 3", id="a name that is a number"),
        pytest.param({"": 0.5}, "name ''", id="a name that is empty"),
        pytest.param({"\ud800": 0.5}, "Unicode", id="a name that is not Unicode"),
        pytest.param({"n" * (MAX_METRIC_NAME_NBYTES + 1): 0.5}, "shorten", id="a long name"),
        pytest.param({"\n" * 33: 0.5}, "66 bytes", id="a name that is long as JSON spells it"),
        pytest.param({f"m{i}": 0.5 for i in range(MAX_METRICS + 1)}, "metadata=", id="too many"),
        pytest.param([("loss", 0.5)], "by name", id="no mapping"),
    ],
)
def test_metrics_that_cannot_be_kept_are_refused(metrics, word):
    with pytest.raises(UsageError, match=word):
        check_metrics(metrics)


def test_a_loss_that_diverged_is_left_out_and_told_and_fails_nothing(caplog):
    diverged = {"loss": float("nan"), "norm": float("inf"), "lr": 0.1}
    with caplog.at_level(logging.WARNING, "cloudckpt"):
        assert check_metrics(diverged) == {"lr": 0.1}
    assert [re.search(r"metric '(\w+)' is (\w+)", record.getMessage()).groups() for record in caplog.records] == [
        ("loss", "nan"), ("norm", "inf"),
    ]  # fmt: skip


@pytest.mark.parametrize("spelled", [b"NaN", b"-Infinity", b"1e999", b"true", b'"1"', b"null", b"1" + b"0" * 400])
def test_a_metric_that_is_no_finite_number_is_refused_in_a_manifest(spelled):
    head = encoded({"loss": 0.5}).partition(b',"crc32c"')[0].replace(b'"loss":0.5', b'"loss":' + spelled)
    data = head + b',"crc32c":"%08x"}' % crc32c(head)
    assert spelled in data
    for read in (parse, parse_summary):
        with pytest.raises(ManifestError):
            read(data, "there")


# The page.


def test_the_examples_of_the_page_run(tmp_path):
    root = f"file://{tmp_path}/run"
    for number in range(1, 8):
        dcp.save({"w": torch.ones(4)}, storage_writer=ObjectStoreWriter(f"{root}/step-{number}", step=number))
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    assert len(blocks) > 2
    for block in blocks:
        exec(block.replace("s3://bucket/run", root), names)
