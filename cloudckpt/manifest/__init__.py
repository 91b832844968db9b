"""The manifest: what a checkpoint is, in one small JSON object.

Law: pure. Parse at the border and report every problem at once; `docs/format.md` leads, this follows.
"""

from cloudckpt.manifest.metrics import MAX_METRIC_NAME_NBYTES, MAX_METRICS, check_metrics
from cloudckpt.manifest.places import overlap_problems
from cloudckpt.manifest.problems import entry_problems, find_problems, frame_problems, shape_problem, shard_problems
from cloudckpt.manifest.structs import (
    FORMAT,
    SUMMARY_NBYTES,
    VERSION,
    BytesEntry,
    Chunk,
    Entry,
    Manifest,
    OpenEntry,
    PlannerPath,
    Seal,
    SealedEntry,
    Shard,
    Summary,
    TensorEntry,
    ValueEntry,
    pack,
    plain_nbytes,
    unpack,
)
from cloudckpt.manifest.text import authenticated, encode, encode_tombstone, parse, parse_summary
from cloudckpt.manifest.tiling import tiling_problem

__all__ = [
    "FORMAT",
    "MAX_METRICS",
    "MAX_METRIC_NAME_NBYTES",
    "SUMMARY_NBYTES",
    "VERSION",
    "BytesEntry",
    "Chunk",
    "Entry",
    "Manifest",
    "OpenEntry",
    "PlannerPath",
    "Seal",
    "SealedEntry",
    "Shard",
    "Summary",
    "TensorEntry",
    "ValueEntry",
    "authenticated",
    "check_metrics",
    "encode",
    "encode_tombstone",
    "entry_problems",
    "find_problems",
    "frame_problems",
    "overlap_problems",
    "pack",
    "parse",
    "parse_summary",
    "plain_nbytes",
    "shape_problem",
    "shard_problems",
    "tiling_problem",
    "unpack",
]
