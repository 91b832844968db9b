"""What the credentials allow, each right tried for real.

Law: async. Whoever calls removes what was put, and ends what was begun.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from awscrt.checksums import crc32c

from cloudckpt.catalog.finding import Finding, not_looked_at, ok, problem, warning
from cloudckpt.errors import PermissionDeniedError, StoreError
from cloudckpt.store.protocols import Store, Upload

OBJECT, BEGUN = "-object", "-begun"
"""Ends of the keys that are put, and that an upload is begun for."""
BODY = b"?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """A right, as S3's policies know it.

    Attributes:
        name: of what is tried for it.
        action: S3's name.
        needed_by: what fails without it; docs/security.md has what each needs.
        lacking: what works less well without it.
    """

    name: str
    action: str
    needed_by: tuple[str, ...]
    lacking: str = ""


_TO_LIST = Right(
    name="right to list",
    action="s3:ListBucket",
    needed_by=("save", "newest_step", "verify", "sweep", "prune", "rebuild"),
    lacking="loads cannot tell what is missing from what is forbidden",
)
_TO_PUT = Right(name="right to put", action="s3:PutObject", needed_by=("save", "sweep", "prune", "rebuild", "rewrap"))
_TO_GET = Right(
    name="right to get",
    action="s3:GetObject",
    needed_by=("save", "load", "open", "newest_step", "verify", "sweep", "prune", "rebuild", "rewrap"),
)
_TO_DELETE = Right(
    name="right to delete",
    action="s3:DeleteObject",
    needed_by=("sweep", "prune"),
    lacking="saves that fail or overwrite leave shards behind",
)
_TO_ABORT = Right(
    name="right to abort uploads",
    action="s3:AbortMultipartUpload",
    needed_by=("sweep",),
    lacking="saves that fail leave uploads behind",
)
_TO_LIST_UPLOADS = Right(
    name="right to list uploads",
    action="s3:ListBucketMultipartUploads",
    needed_by=("sweep",),
    lacking="saves that fail may leave uploads behind",
)
RIGHTS = (_TO_LIST, _TO_PUT, _TO_GET, _TO_DELETE, _TO_ABORT, _TO_LIST_UPLOADS)
"""In the order in which they are tried."""
_TAKE_AN_OBJECT = (_TO_GET, _TO_DELETE, _TO_ABORT)


async def try_rights(store: Store, name: str, begun: list[Upload]) -> list[Finding]:
    """Tries all of `RIGHTS`.

    Args:
        store: rooted anywhere.
        name: begins all keys, and nobody else's.
        begun: takes the uploads that may still be under way.
    """

    async def begin_and_abort() -> None:
        upload = await store.create_upload(name + BEGUN)
        begun.append(upload)
        await store.abort_upload(upload)
        begun.remove(upload)

    async def look_at_uploads() -> None:
        async for _ in store.list_uploads(name):
            return

    requests: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: first_listed(store, name),
        lambda: store.put(name + OBJECT, [memoryview(BODY)], crc32c=crc32c(BODY)),
        lambda: store.get(name + OBJECT),
        lambda: store.delete([name + OBJECT]),
        begin_and_abort,
        look_at_uploads,
    )
    findings: dict[str, Finding] = {}
    for right, request in zip(RIGHTS, requests, strict=True):
        if right in _TAKE_AN_OBJECT and findings[_TO_PUT.name].verdict != "ok":
            findings[right.name] = not_looked_at(right.name, "nothing could be put to try it on")
        else:
            findings[right.name] = await _try(store, right, request, "save")
    return list(findings.values())


async def first_listed(store: Store, prefix: str = "") -> str | None:
    """Some key, if there is any."""
    async for found in store.list_objects(prefix):
        return found.key
    return None


async def try_reading(store: Store) -> list[Finding]:
    """Tries what takes no writing, on what is there; the store may be rooted anywhere."""
    keys: list[str] = []

    async def look() -> None:
        key = await first_listed(store)
        keys.extend([] if key is None else [key])

    findings = {_TO_LIST.name: await _try(store, _TO_LIST, look, "load")}
    if keys:
        findings[_TO_GET.name] = await _try(store, _TO_GET, lambda: store.head(keys[0]), "load")
    else:
        findings[_TO_GET.name] = not_looked_at(_TO_GET.name, "nothing is listed that could be read")
    why = "only reading was asked for"
    return [findings.get(right.name) or not_looked_at(right.name, why) for right in RIGHTS]


async def _try(store: Store, right: Right, request: Callable[[], Awaitable[object]], who: str) -> Finding:
    """What the server says to a request; for those who want to ``who``."""
    try:
        await request()
    except PermissionDeniedError as e:
        allow = f"allow {right.action}" if store.url.startswith("s3://") else "allow it"
        advice = f"{allow}: {', '.join(right.needed_by)} fail without it"
        told = problem if who in right.needed_by else warning
        return told(right.name, str(e), f"{advice}; {right.lacking}" if right.lacking else advice)
    except StoreError as e:
        return problem(right.name, str(e), "")
    return ok(right.name, "allowed")
