"""What the raw references have in common: one object, sent in our parts and fetched in our ranges.

Law: no checksums, no retries, and one prepared memory that is sent from and received into.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from cloudckpt.cli.bench.figures import Operation
from cloudckpt.cli.bench.workloads import State
from cloudckpt.engine.framing import part_size_for
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.write import WriteOptions

CONCURRENCY = 16


def flat_memory(state: State) -> memoryview:
    """The bytes of a state dict that is one tensor."""
    import torch

    (tensor,) = state.values()
    data: memoryview = tensor.view(torch.uint8).numpy().data
    return data


def bucket_and_key(url: str) -> tuple[str, str]:
    """Where the object of a save to ``url`` is."""
    at = urlsplit(url)
    return at.netloc, f"{at.path.strip('/')}/raw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How one object is cut in requests: as ours is.

    Attributes:
        concurrency: of the save and the load of ours beside it, whose parts and ranges are evened out by it.
        request_size: bytes of each PUT and GET instead.
    """

    concurrency: int = WriteOptions().concurrency
    request_size: int | None = None

    def part_size(self, nbytes: int) -> int:
        """Bytes of a PUT."""
        return self.request_size or part_size_for(nbytes, most=WriteOptions().part_size, ways=self.concurrency)

    def range_size(self, nbytes: int) -> int:
        """Bytes of a GET."""
        return self.request_size or part_size_for(nbytes, most=ReadOptions().max_request_size, ways=self.concurrency)


@dataclass(kw_only=True)
class Raw:
    """What all of them are told.

    Attributes:
        cut: in which requests.
        concurrency: requests under way at a time.
        addressing_style: see `S3Options`.
    """

    is_raw: ClassVar[bool] = True

    cut: Cut = field(default_factory=Cut)
    concurrency: int = CONCURRENCY
    addressing_style: Any = "auto"

    def settings(self) -> dict[str, Any]:
        """See `Contender.settings`."""
        return {"concurrency": self.concurrency, "cut": asdict(self.cut)}

    def prepare(self, operation: Operation, state: State, url: str) -> None:
        """See `Prepares.prepare`."""

    def close(self) -> None:
        """See `Prepares.close`."""

    @property
    def _config(self) -> dict[str, Any]:
        """For botocore: see docs.aws.amazon.com/boto3, Config. Bodies are signed unhashed, as ours are."""
        return {
            "s3": {"addressing_style": self.addressing_style, "payload_signing_enabled": False},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": self.concurrency,
        }
