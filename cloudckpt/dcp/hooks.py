"""What users run around the commit.

Law: in order, on the coordinator. Before the commit a failure stops it; after it the checkpoint stands, whatever
fails.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol, Self

from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.errors import CheckpointError, SaveFailedError, UsageError
from cloudckpt.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitInfo:
    """A checkpoint about to be committed, or just committed.

    Attributes:
        url: of the checkpoint.
        step: the training step, where the writer was told.
        metadata: the user's own, as the manifest keeps it.
        save_id: of this commit.
        created: when its manifest was made, by the coordinator's clock.
        nbytes: bytes of all items as the user knows them.
        stored_nbytes: bytes of all shards.
        shard_count: data objects.
        entry_count: keys of the state dict.
    """

    url: str
    step: int | None
    metadata: Mapping[str, Any]
    save_id: str
    created: datetime
    nbytes: int
    stored_nbytes: int
    shard_count: int
    entry_count: int

    @classmethod
    def of(cls, made: Manifest, url: str) -> Self:
        """What a manifest says."""
        summary = made.summary
        return cls(
            url=url,
            step=summary.step,
            metadata=made.metadata,
            save_id=summary.save_id,
            created=summary.created,
            nbytes=summary.nbytes,
            stored_nbytes=summary.stored_nbytes,
            shard_count=summary.shard_count,
            entry_count=summary.entry_count,
        )


class WriterHook(Protocol):
    """Told of every commit, on the coordinator alone.

    A class that names this one as its base needs only the method that it is interested in. Both run in the thread
    that saves, a background one for an async save, and the save waits for them.
    """

    def pre_commit(self, info: CommitInfo) -> None:
        """All shards are uploaded and the manifest is not. What this raises stops the save: nothing is committed."""

    def post_commit(self, info: CommitInfo) -> None:
        """The checkpoint is committed. What this raises is reported, and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookFailure:
    """A hook that failed after the commit.

    Attributes:
        hook: its class.
        error: what it raised.
    """

    hook: str
    error: BaseException

    def __str__(self) -> str:
        return f"the hook {self.hook} failed after the commit: {type(self.error).__name__}: {self.error}"


def check_hooks(hooks: Sequence[WriterHook]) -> tuple[WriterHook, ...]:
    """The hooks, if each can be run.

    Raises:
        UsageError: one lacks a method, or has an async one, whose work would never be done.
    """
    problems = [problem for hook in hooks for problem in _problems(hook)]
    if problems:
        raise UsageError("; ".join(problems))
    return tuple(hooks)


def run_pre_commit(hooks: Sequence[WriterHook], info: CommitInfo) -> None:
    """Runs them in order until one fails.

    Raises:
        CheckpointError: what a hook raised, with a note that says which one; SaveFailedError for foreign exceptions.
    """
    for hook in hooks:
        try:
            hook.pre_commit(info)
        except CheckpointError as e:
            e.add_note(f"raised by the hook {_name(hook)} before the commit of {info.url}: nothing was committed")
            raise
        except Exception as e:
            msg = (
                f"the hook {_name(hook)} stopped the commit of {info.url}: {type(e).__name__}: {e}; nothing was "
                "committed"
            )
            raise SaveFailedError(msg) from e


def run_post_commit(hooks: Sequence[WriterHook], info: CommitInfo) -> list[HookFailure]:
    """Runs all of them in order, whichever fail; returns those that did, for the caller to report."""
    failures = []
    for hook in hooks:
        try:
            hook.post_commit(info)
        except (Exception, CheckpointException, SystemExit) as e:
            failures.append(HookFailure(hook=_name(hook), error=e))
    return failures


def _problems(hook: object) -> Iterator[str]:
    for name in ("pre_commit", "post_commit"):
        method = getattr(hook, name, None)
        if not callable(method):
            yield f"the hook {_name(hook)} has no {name}(info); derive it from WriterHook to inherit one"
        elif inspect.iscoroutinefunction(method):
            yield f"{_name(hook)}.{name} is async and would never run; make it a plain function"


def _name(hook: object) -> str:
    return hook.__name__ if isinstance(hook, type) else type(hook).__name__
