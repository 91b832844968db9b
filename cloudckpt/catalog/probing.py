"""What only trying tells of a place: rights, conditions, checksums, uploads, and how fast it answers.

Law: async. What is put has names of its own, right below the root: a directory would stay on servers that know such.
It is removed again, whatever happens.
"""

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from statistics import median

from awscrt.checksums import crc32c

from cloudckpt.catalog.asking import ask_server
from cloudckpt.catalog.finding import Finding, not_looked_at, ok, problem, warning
from cloudckpt.catalog.rights import BEGUN, BODY, OBJECT, first_listed, try_reading, try_rights
from cloudckpt.engine.loop import shielded
from cloudckpt.errors import (
    ChecksumRefusedError,
    ChecksumsNotKnownError,
    ObjectNotFoundError,
    PermissionDeniedError,
    StoreError,
)
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import Put, Store, Upload

_ASKED, _WRONG, _LARGE = "-asked", "-wrong-checksum", "-large"
_PART_NBYTES = 8 << 20
_TIMES = 5
_SLOW_S = 0.25
"""As long as a round trip to another continent takes."""
CHECKS = ("conditional writes", "checksums", "multipart upload", "uploads by prefix", "latency", "throughput")
"""What is looked at where all is allowed, in this order."""
_CONDITIONS, _CHECKSUMS, _MULTIPART, _BY_PREFIX, _LATENCY, _THROUGHPUT = CHECKS


async def probe_reading(store: Store) -> list[Finding]:
    """Looks at what takes no writing; the store is rooted at what is to be read.

    Raises nothing: what the store refuses is a finding.
    """
    findings = await try_reading(store)
    seen: dict[str, Finding] = {}
    if findings[0].verdict == "ok":
        seen[_LATENCY] = await _latency(("listings", lambda: first_listed(store)))
    return findings + [seen.get(name) or not_looked_at(name, "only reading was asked for") for name in CHECKS]


async def probe(store: Store, once: Put, name: str) -> list[Finding]:
    """Looks at all of it; raises nothing, as `probe_reading`.

    Args:
        store: rooted anywhere.
        once: the same place, where what is asked is asked once.
        name: begins the keys of all that is put, and nobody else's.
    """
    begun: list[Upload] = []
    left: list[Finding] = []
    try:
        findings = await try_rights(store, name, begun)
        lacking = [f.name for f in findings[:4] if f.verdict != "ok"]
        if lacking:
            findings += [not_looked_at(name, f"it takes the {lacking[0]}") for name in CHECKS]
        else:
            findings += [await _conditions(store, name + _ASKED), await _checksums(once, name + _WRONG)]
            multipart, by_prefix, throughput = await _upload(store, name + _LARGE, begun)
            puts = "PUTs", lambda: store.put(name + OBJECT, [memoryview(BODY)])
            latency = await _latency(puts, ("GETs", lambda: store.get(name + OBJECT)))
            findings += [multipart, by_prefix, latency, throughput]
    finally:
        await shielded(lambda: _remove(store, name, begun, left))
    return findings + left


async def _conditions(store: Store, key: str) -> Finding:
    try:
        server = await ask_server(store, key)
    except StoreError as e:
        return problem(_CONDITIONS, str(e), "")
    honours = {
        "create only where nothing is (If-None-Match)": server.honours_puts,
        "replace only what was seen (If-Match)": server.honours_replacements,
        "delete only what was seen (If-Match)": server.honours_deletes,
    }
    lacking = [what for what, is_honoured in honours.items() if not is_honoured]
    if not lacking:
        return ok(_CONDITIONS, "honoured, to create, to replace and to delete")
    what = f"not honoured: {'; '.join(lacking)}"
    if not server.honours_puts:
        advice = (
            "two saves that commit to one URL at the same time are not kept apart, and sweep works only on what it "
            "is told by name: let one job write to a URL, or use a server that knows If-None-Match (docs/security.md)"
        )
        return problem(_CONDITIONS, what, advice)
    advice = "let nothing else write to a URL while a save overwrites, prunes or sweeps there (docs/security.md)"
    return warning(_CONDITIONS, what, advice)


async def _checksums(once: Put, key: str) -> Finding:
    advice = "damage on the way is found when a checkpoint is read, not when it is saved; verify --deep looks for it"
    try:
        await once.put(key, [memoryview(BODY)], crc32c=crc32c(BODY) ^ 1)
    except ChecksumRefusedError:
        return ok(_CHECKSUMS, "verified on arrival: a body with a wrong CRC32C was refused")
    except ChecksumsNotKnownError as e:
        return warning(_CHECKSUMS, str(e), advice)
    except StoreError as e:
        return problem(_CHECKSUMS, str(e), "")
    return warning(_CHECKSUMS, "a body with a wrong CRC32C was accepted: what arrives is not verified", advice)


async def _upload(store: Store, key: str, begun: list[Upload]) -> tuple[Finding, Finding, Finding]:
    """One upload of one part: as a whole, as others see it while it is under way, and how fast its bytes go."""
    by_prefix = not_looked_at(_BY_PREFIX, f"see {_MULTIPART}")
    body = memoryview(os.urandom(_PART_NBYTES))
    checksum, back = crc32c(body), memoryview(bytearray(_PART_NBYTES))
    try:
        upload = await store.create_upload(key)
        begun.append(upload)
        by_prefix = await _by_prefix(store, upload)
        started = time.monotonic()
        part = await store.put_part(upload, 1, 0, [body], crc32c=checksum)
        put_s = time.monotonic() - started
        await store.complete_upload(upload, [part], crc32c=checksum)
        begun.remove(upload)
        started = time.monotonic()
        await store.get_range(key, Range(0, _PART_NBYTES), [back])
        get_s = time.monotonic() - started
    except StoreError as e:
        return problem(_MULTIPART, str(e), ""), by_prefix, not_looked_at(_THROUGHPUT, f"see {_MULTIPART}")
    if crc32c(back) != checksum:
        advice = "do not save there: look at proxies on the way, and at the server's disks"
        multipart = problem(_MULTIPART, "the bytes that were read are not those that were written", advice)
    else:
        multipart = ok(_MULTIPART, "a part was put, the upload completed, and read back as it was")
    speeds = f"PUT {_mib_per_s(put_s)}, GET {_mib_per_s(get_s)}, one request of 8 MiB each"
    return multipart, by_prefix, ok(_THROUGHPUT, speeds)


async def _by_prefix(store: Store, upload: Upload) -> Finding:
    try:
        is_listed = any([found.upload_id == upload.upload_id async for found in store.list_uploads(upload.key[:-1])])
    except PermissionDeniedError:
        return not_looked_at(_BY_PREFIX, "it takes the right to list uploads")
    except StoreError as e:
        return problem(_BY_PREFIX, str(e), "")
    if is_listed:
        return ok(_BY_PREFIX, "listed while they are under way")
    advice = "sweep does not find what failed saves leave: set up a lifecycle rule for uploads (docs/security.md)"
    return warning(_BY_PREFIX, "an upload that is under way is not listed by the beginning of its key", advice)


async def _latency(*kinds: tuple[str, Callable[[], Awaitable[object]]]) -> Finding:
    """Of small requests of some kinds, one after the other."""
    medians: dict[str, float] = {}
    try:
        for kind, request in kinds:
            medians[kind] = await _median_s(request)
    except StoreError as e:
        return problem(_LATENCY, str(e), "")
    what = ", ".join(f"{kind} {seconds * 1000:.1f} ms" for kind, seconds in medians.items())
    what += f" (median of {_TIMES})"
    if max(medians.values()) < _SLOW_S:
        return ok(_LATENCY, what)
    return warning(_LATENCY, what, "use a bucket in this machine's region, or a server that is nearer")


async def _median_s(request: Callable[[], Awaitable[object]]) -> float:
    times = []
    for _ in range(_TIMES):
        started = time.monotonic()
        await request()
        times.append(time.monotonic() - started)
    return median(times)


def _mib_per_s(seconds: float) -> str:
    return f"{_PART_NBYTES / (1 << 20) / max(seconds, 1e-6):.0f} MiB/s"


async def _remove(store: Store, name: str, begun: Sequence[Upload], left: list[Finding]) -> None:
    """Removes everything, and tells what could not be; also an upload whose beginning was interrupted."""
    uploads = {upload.upload_id: upload for upload in begun}
    with suppress(StoreError):
        uploads |= {upload.upload_id: upload async for upload in store.list_uploads(name)}
    ends = [partial(_end, store, upload) for upload in uploads.values()]
    keys = [name + end for end in (OBJECT, BEGUN, _ASKED, _WRONG, _LARGE)]
    for removal in (*ends, partial(store.delete, keys)):
        try:
            await removal()
        except ObjectNotFoundError:
            continue
        except StoreError as e:
            what = f"{store.url}/{name}-* may lie there still: {e}"
            left.append(warning("clean-up", what, "remove what is there by hand"))


async def _end(store: Store, upload: Upload) -> None:
    """Aborts an upload; where that is not allowed, completes it, for an object can be deleted."""
    try:
        await store.abort_upload(upload)
    except PermissionDeniedError:
        part = await store.put_part(upload, 1, 0, [memoryview(BODY)], crc32c=crc32c(BODY))
        await store.complete_upload(upload, [part], crc32c=crc32c(BODY))
