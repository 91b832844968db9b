"""One save of a writer, from its beginning to its end, and what is told of it then.

Law: is told of once: what became of a save on this rank is known when its part in it is over.
"""

import time
from dataclasses import dataclass

from cloudckpt.dcp.hooks import CommitInfo, HookFailure
from cloudckpt.dcp.stats import SaveStats
from cloudckpt.engine import telemetry
from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.engine.commit import Replaced, Uploaded
from cloudckpt.engine.deadline import Deadline
from cloudckpt.engine.session import Session
from cloudckpt.engine.traces import leave_trace
from cloudckpt.engine.tracing import Outcome, Recorder
from cloudckpt.extensions.aesgcm import DataKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A checkpoint that exists from now on.

    Attributes:
        info: what there is.
        hook_failures: of the hooks that failed after the commit.
    """

    info: CommitInfo
    hook_failures: tuple[HookFailure, ...]


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a commit takes."""

    manifest: bytes
    uploaded: list[Uploaded]
    info: CommitInfo


@dataclass(slots=True, kw_only=True)
class Attempt:
    """Where a save goes, whatever the writer is told meanwhile, what it replaces there, and what it wrote.

    Attributes:
        trace: URL below which a trace is left; None for none.
        rank: this one, in the whole job.
        world_size: ranks of the job.
        is_coordinator: whether this rank commits.
    """

    session: Session
    deadline: Deadline
    cancellation: Cancellation
    recorder: Recorder
    trace: str | None
    rank: int
    world_size: int
    is_coordinator: bool
    replaces: Replaced | None = None
    key: DataKey | None = None
    shard_keys: tuple[str, ...] = ()
    prepared: Prepared | None = None
    nbytes: int = 0
    stored_nbytes: int = 0
    is_told: bool = False

    def stats(self) -> SaveStats:
        """What it did until now."""
        seconds = time.time() - self.recorder.began
        return SaveStats.of(
            self.recorder, nbytes=self.nbytes, stored_nbytes=self.stored_nbytes, seconds=max(0.0, seconds)
        )

    def end(self, error: BaseException | None = None) -> None:
        """Tells whoever wants to know that this rank's part is over, and of what it failed, if it did."""
        if self.is_told:
            return
        self.is_told = True
        outcome = Outcome(
            kind="save",
            url=self.session.url,
            rank=self.rank,
            world_size=self.world_size,
            nbytes=self.nbytes,
            stored_nbytes=self.stored_nbytes,
            save_id="" if self.prepared is None else self.prepared.info.save_id,
            error="" if error is None else type(error).__name__,
        )
        telemetry.tell(self.recorder, outcome)
        if self.trace is not None:
            leave_trace(self.trace, self.recorder, outcome, self.session.options)
