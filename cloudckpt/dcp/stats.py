"""What a save did on a rank, in numbers.

Law: computes; measures nothing.
"""

from dataclasses import dataclass
from typing import Self

from cloudckpt.engine.tracing import COMMIT, PLAN, STAGE, TRANSFORM, UPLOAD, Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStats:
    """What a save did on this rank.

    Attributes:
        seconds: from its beginning to the end of this rank's part in it: of the commit, or of its upload.
        plan_s: seconds of planning, other ranks' included where they were waited for.
        stage_s: seconds of threads that copied bytes to where they were sent from, and checksummed them, added up.
        transform_s: seconds of threads that took frames through extensions, added up.
        upload_s: seconds from the first request's beginning to the last one's end.
        commit_s: seconds of making the manifest and putting it; 0 on ranks that do not.
        nbytes: of this rank's items, as the user knows them.
        stored_nbytes: of this rank's shards.
        requests: that uploaded: of parts and whole shards, and of beginning and ending uploads in parts.
        retries: requests that were made again.
    """

    seconds: float = 0.0
    plan_s: float = 0.0
    stage_s: float = 0.0
    transform_s: float = 0.0
    upload_s: float = 0.0
    commit_s: float = 0.0
    nbytes: int = 0
    stored_nbytes: int = 0
    requests: int = 0
    retries: int = 0

    @property
    def rate(self) -> float:
        """Stored bytes in a second of the upload."""
        return self.stored_nbytes / self.upload_s if self.upload_s else 0.0

    @classmethod
    def of(cls, recorder: Recorder, *, nbytes: int, stored_nbytes: int, seconds: float) -> Self:
        """The numbers of what was recorded."""
        return cls(
            seconds=seconds,
            plan_s=recorder.tally(PLAN).seconds,
            stage_s=recorder.tally(STAGE).seconds,
            transform_s=recorder.tally(TRANSFORM).seconds,
            upload_s=recorder.tally(UPLOAD).span_s,
            commit_s=recorder.tally(COMMIT).seconds,
            nbytes=nbytes,
            stored_nbytes=stored_nbytes,
            requests=recorder.tally(UPLOAD).count,
            retries=recorder.retries,
        )
