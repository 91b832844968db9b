"""S3 Express: directory buckets, which list otherwise than all the others.

Law: only listings differ; botocore itself asks such buckets for sessions, at their zone's endpoint.
"""

from collections.abc import AsyncIterator

from cloudckpt.store.protocols import ObjectInfo, Upload
from cloudckpt.store.s3 import S3Store


class DirectoryBucketStore(S3Store):
    """Implements `Store` over a prefix of a directory bucket.

    It lists in no order, and only below a prefix that ends in ``/``:
    docs.aws.amazon.com/AmazonS3/latest/userguide/s3-express-differences.html.
    """

    async def list_objects(self, prefix: str = "") -> AsyncIterator[ObjectInfo]:
        """See `List.list_objects`. All are listed before the first is told."""
        found = [info async for info in S3Store.list_objects(self, _folder(prefix))]
        for info in sorted(found, key=lambda info: info.key):
            if info.key.startswith(prefix):
                yield info

    async def list_names(self, prefix: str = "") -> AsyncIterator[str]:
        """See `List.list_names`."""
        start = prefix.removeprefix(_folder(prefix))
        async for name in S3Store.list_names(self, _folder(prefix)):
            if name.startswith(start):
                yield name.removeprefix(start)

    async def list_uploads(self, prefix: str = "") -> AsyncIterator[Upload]:
        """See `Multipart.list_uploads`."""
        async for upload in S3Store.list_uploads(self, _folder(prefix)):
            if upload.key.startswith(prefix):
                yield upload


def _folder(prefix: str) -> str:
    return prefix[: prefix.rfind("/") + 1]
