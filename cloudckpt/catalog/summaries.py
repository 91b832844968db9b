"""The summaries of manifests, and nothing else of them.

Law: one request for the first 4 KiB where the size is known.
"""

from cloudckpt.errors import ObjectNotFoundError, StoreError
from cloudckpt.manifest import SUMMARY_NBYTES, Summary, parse_summary
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import Get


async def read_summary(store: Get, key: str, size: int, where: str) -> Summary:
    """Reads a manifest's summary.

    Args:
        store: it lies in.
        key: of the manifest.
        size: of the object, as it was listed.
        where: it lies, for errors.

    Raises:
        ManifestError, UnsupportedVersionError: see `manifest.parse_summary`.
        ObjectNotFoundError: it is not there any more.
        StoreError: it could not be read.
    """
    head = bytearray(min(size, SUMMARY_NBYTES))
    try:
        if head:
            await store.get_range(key, Range(0, len(head)), [memoryview(head)])
    except StoreError as e:
        if isinstance(e, ObjectNotFoundError) or type(e) is not StoreError:
            raise
        head = bytearray((await store.get(key)).data)  # it is another since, and shorter
    return parse_summary(bytes(head), where)
