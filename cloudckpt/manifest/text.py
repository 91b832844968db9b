"""The manifest as bytes, out and back.

Law: pure. Parse at the border and report every problem at once.
"""

import json
import math
import re
from collections.abc import Callable
from typing import NoReturn

import msgspec
from awscrt.checksums import crc32c

from cloudckpt.errors import ManifestError, UnsupportedVersionError
from cloudckpt.manifest.problems import find_problems, shard_problems
from cloudckpt.manifest.structs import SUMMARY_NBYTES, VERSION, Manifest, Summary

_TAIL = re.compile(rb',"crc32c":"([0-9a-f]{8})"}')
_TAIL_NBYTES = len(b',"crc32c":"00000000"}')
_SEALED_TAIL = re.compile(rb',"mac":"([0-9a-f]{32})"},"crc32c":"[0-9a-f]{8}"}')
_SEALED_TAIL_NBYTES = len(b',"mac":""}') + 32 + _TAIL_NBYTES
_MAX_PROBLEMS = 100
_HEAD = b'{"summary":'
_UNREADABLE = (ValueError, RecursionError)

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Manifest)


def encode(manifest: Manifest, mac: Callable[[bytes], bytes] | None = None) -> bytes:
    """The manifest's bytes: JSON whose last member is the CRC32C of all bytes before it.

    Args:
        manifest: what it says.
        mac: makes the 16 bytes that authenticate what comes before them; if, and only if, it has a seal.
    """
    body = _encoder.encode(manifest)[:-1]
    if mac is not None:
        head = body.removesuffix(b',"mac":""}')
        body = head + b',"mac":"%s"}' % mac(head).hex().encode()
    return body + b',"crc32c":"%08x"}' % crc32c(body)


def authenticated(data: bytes) -> tuple[memoryview, bytes]:
    """The bytes that a sealed manifest's MAC covers, and the MAC.

    Raises:
        ManifestError: it does not end as a sealed one does.
    """
    tail = _SEALED_TAIL.fullmatch(data[-_SEALED_TAIL_NBYTES:])
    if tail is None:
        msg = "the manifest does not end in its MAC"
        raise ManifestError(msg)
    return memoryview(data)[:-_SEALED_TAIL_NBYTES], bytes.fromhex(tail[1].decode())


def encode_tombstone(summary: Summary) -> bytes:
    """The bytes of a tombstone."""
    return encode(Manifest(summary=summary, metadata={}, planner_paths=None, shards=(), entries={}))


def parse(data: bytes, where: str) -> Manifest:
    """Reads a manifest that came from storage.

    Args:
        data: the whole object.
        where: its URL, for the error.

    Raises:
        UnsupportedVersionError: of a version this release does not know.
        ManifestError: truncated, altered or malformed; lists every problem.
    """
    try:
        manifest = _decoder.decode(data)
    except _UNREADABLE as e:
        _refuse(data, where, e)
    if manifest.summary.version != VERSION:
        raise _unsupported(manifest.summary.version, where)
    if not _checksum_matches(data) or not _is_sound(manifest):
        _refuse(data, where, None)
    if parse_summary(data[:SUMMARY_NBYTES], where) != manifest.summary:
        msg = f"{where} has two summaries: listings would show another checkpoint than this"
        raise ManifestError(msg)
    return manifest


def _is_sound(manifest: Manifest) -> bool:
    """Whether its shards are; entries are looked at when they are asked for."""
    keys = {shard.key for shard in manifest.shards}
    return len(keys) == len(manifest.shards) and not any(map(shard_problems, manifest.shards))


def parse_summary(head: bytes, where: str) -> Summary:
    """Reads the summary from a manifest's first `SUMMARY_NBYTES` (or from more of it).

    Raises:
        ManifestError, UnsupportedVersionError: as `parse`.
    """
    try:
        if not head.startswith(_HEAD):
            msg = f"it does not begin with {_HEAD.decode()}"
            raise ValueError(msg)
        raw, _ = json.JSONDecoder().raw_decode(head[len(_HEAD) :].decode(errors="ignore").lstrip())
        version = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise _unsupported(version, where)
        summary = msgspec.convert(raw, Summary)
        if not all(map(math.isfinite, summary.metrics.values())):  # Python's JSON has words for these
            msg = f"summary: its metrics {summary.metrics} are not finite numbers"
            raise ValueError(msg)
    except UnsupportedVersionError:
        raise
    except _UNREADABLE as e:
        _refuse(head, where, e)
    if summary.version != VERSION:
        raise _unsupported(summary.version, where)
    return summary


def _checksum_matches(data: bytes) -> bool:
    tail = _TAIL.fullmatch(data[-_TAIL_NBYTES:])
    return tail is not None and int(tail[1], 16) == crc32c(data[:-_TAIL_NBYTES])


def _unsupported(version: object, where: str) -> UnsupportedVersionError:
    return UnsupportedVersionError(
        f"{where} is of format version {version}; this release reads version {VERSION}. "
        "Read it with a newer cloudckpt (pip install --upgrade cloudckpt)."
    )


def _refuse(data: bytes, where: str, first: Exception | None) -> NoReturn:
    """Raises with every problem that an untyped pass over ``data`` finds."""
    try:
        tree = msgspec.json.decode(data)
    except _UNREADABLE as e:
        msg = f"{where} is not a whole manifest ({len(data)} bytes): {e}. It was truncated or is no manifest."
        raise ManifestError(msg) from e
    summary = tree.get("summary") if isinstance(tree, dict) else None
    version = summary.get("version") if isinstance(summary, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise _unsupported(version, where)
    problems = find_problems(tree)
    if not _checksum_matches(data):
        problems.append("crc32c: the checksum at its end does not match: the object was altered")
    if first is not None and not problems:
        problems.append(str(first))
    shown = problems[:_MAX_PROBLEMS]
    more = f"\n  ... and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    listing = "".join(f"\n  - {p}" for p in shown)
    raise ManifestError(f"{where} is not a sound manifest; {len(problems)} problem(s):{listing}{more}")
