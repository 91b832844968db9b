"""What users run around the commit: in order, and what happens when one fails."""

import pickle
from datetime import UTC, datetime

import pytest

from cloudckpt.dcp.hooks import CommitInfo, WriterHook, check_hooks, run_post_commit, run_pre_commit
from cloudckpt.errors import IntegrityError, SaveFailedError, UsageError


def info():
    return CommitInfo(
        url="memory://b/run/step-1",
        step=1,
        metadata={"loss": 0.5},
        save_id="s",
        created=datetime(2026, 1, 1, tzinfo=UTC),
        nbytes=10,
        stored_nbytes=12,
        shard_count=1,
        entry_count=2,
    )


class Noting:
    def __init__(self, name, seen, fails=None):
        self.name, self.seen, self.fails = name, seen, fails

    def pre_commit(self, info):
        self.seen.append((self.name, "pre", info.step))
        if self.fails is not None:
            raise self.fails

    def post_commit(self, info):
        self.seen.append((self.name, "post", info.step))
        if self.fails is not None:
            raise self.fails


def test_hooks_run_in_order():
    seen = []
    hooks = [Noting("a", seen), Noting("b", seen)]
    run_pre_commit(hooks, info())
    assert run_post_commit(hooks, info()) == []
    assert seen == [("a", "pre", 1), ("b", "pre", 1), ("a", "post", 1), ("b", "post", 1)]


def test_the_first_that_fails_before_the_commit_stops_it_and_those_behind_it():
    seen = []
    hooks = [Noting("a", seen), Noting("b", seen, ValueError("loss is nan")), Noting("c", seen)]
    with pytest.raises(
        SaveFailedError, match=r"Noting stopped the commit of memory://b/run/step-1: ValueError: loss"
    ):
        run_pre_commit(hooks, info())
    assert [name for name, _, _ in seen] == ["a", "b"]


def test_an_error_of_ours_keeps_its_class_and_says_which_hook():
    with pytest.raises(IntegrityError, match="too small") as e:
        run_pre_commit([Noting("a", [], IntegrityError("too small"))], info())
    assert "the hook Noting" in pickle.loads(pickle.dumps(e.value)).__notes__[0]


def test_all_run_after_the_commit_and_those_that_failed_are_reported():
    seen = []
    hooks = [Noting("a", seen, OSError("no network")), Noting("b", seen), Noting("c", seen, IntegrityError("bad"))]
    failures = run_post_commit(hooks, info())
    assert [name for name, _, _ in seen] == ["a", "b", "c"]
    assert [str(failure) for failure in failures] == [
        "the hook Noting failed after the commit: OSError: no network",
        "the hook Noting failed after the commit: IntegrityError: bad",
    ]


@pytest.mark.parametrize("run", [run_pre_commit, run_post_commit])
def test_an_interrupt_is_nobodys_failure(run):
    with pytest.raises(KeyboardInterrupt):
        run([Noting("a", [], KeyboardInterrupt())], info())


def test_a_hook_derived_from_the_protocol_needs_only_one_method():
    class AfterOnly(WriterHook):
        def __init__(self):
            self.steps = []

        def post_commit(self, info):
            self.steps.append(info.step)

    hook = AfterOnly()
    (checked,) = check_hooks([hook])
    run_pre_commit([checked], info())
    run_post_commit([checked], info())
    assert hook.steps == [1]


def test_what_cannot_be_run_is_refused_before_it_is_needed():
    class Half:
        def pre_commit(self, info):
            pass

    class Async:
        async def pre_commit(self, info):
            pass

        def post_commit(self, info):
            pass

    with pytest.raises(UsageError, match=r"Half has no post_commit.*Async.pre_commit is async"):
        check_hooks([Half(), Async()])


def test_what_hooks_are_told_cannot_be_changed():
    with pytest.raises(AttributeError):
        info().step = 2
