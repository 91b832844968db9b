"""Who uploads the shards of a rank.

Law: moves what was planned, and knows nothing of plans, ranks or commits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cloudckpt.engine.cancellation import Cancellation
from cloudckpt.engine.deadline import Deadline
from cloudckpt.engine.framing import AnyPlan, Item
from cloudckpt.engine.session import Session
from cloudckpt.engine.sources import Source
from cloudckpt.engine.tracing import Recorder
from cloudckpt.engine.upload import Written
from cloudckpt.engine.write import ShardWriter, WriteOptions
from cloudckpt.store.protocols import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadJob:
    """The shards of one rank, planned, and where they go.

    Attributes:
        session: to the checkpoint's URL.
        options: how to write.
        deadline: of the save.
        cancellation: of the save.
        plans: one for each shard.
        items: of the rank, in the order that the plans number them in.
        sources: of their bytes, likewise.
        recorder: of the save.
    """

    session: Session
    options: WriteOptions
    deadline: Deadline
    cancellation: Cancellation
    plans: Sequence[AnyPlan]
    items: Sequence[Item]
    sources: Sequence[Source]
    recorder: Recorder = field(default_factory=Recorder)


class Uploader(Protocol):
    """Uploads the shards of a rank; for one save at a time."""

    def upload(self, job: UploadJob) -> list[Written]:
        """Uploads all shards, and returns when they are there: what was written of each plan.

        Raises:
            SaveCancelledError, DeadlineError, StoreError: see `ShardWriter.write`; none of them is left.
        """
        ...


class HereUploader:
    """Uploads in this process, on its event-loop threads."""

    def upload(self, job: UploadJob) -> list[Written]:
        """See `Uploader.upload`."""

        async def upload(store: Store) -> list[Written]:
            async with job.deadline.kept(), job.cancellation.kept():
                writer = ShardWriter(store, job.options, job.recorder)
                return await writer.write(job.plans, job.items, job.sources)

        return job.session.run(upload, job.recorder)
