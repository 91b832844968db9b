"""The bucket: is it there, and leave it as it was found.

Law: nothing here is measured.
"""

import asyncio
from urllib.parse import urlsplit

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession

from cloudckpt.errors import BucketNotFoundError, StoreUnavailableError
from cloudckpt.store.retry import RetryOptions
from cloudckpt.store.s3_options import S3Options
from cloudckpt.store.url import StoreOptions, open_store


class Place:
    """Somewhere under which checkpoints are put and removed."""

    def __init__(self, url: str, addressing_style: str) -> None:
        """Takes s3://bucket/prefix."""
        self._url = url
        s3 = S3Options(addressing_style=addressing_style)  # type: ignore[arg-type]
        self.store = StoreOptions(s3=s3)
        self._impatient = StoreOptions(s3=s3, retry=RetryOptions(retry_deadline_s=3))
        self._style = addressing_style

    def check(self, *, create_bucket: bool) -> None:
        """Looks whether the bucket can be listed.

        Raises:
            StoreError: it cannot; notes say what to do.
        """
        try:
            try:
                asyncio.run(self._look())
            except BucketNotFoundError:
                if not create_bucket:
                    raise
                asyncio.run(self._create())
                asyncio.run(self._look())
        except StoreUnavailableError as e:
            e.add_note("is the server running, and does AWS_ENDPOINT_URL lead to it?")
            e.add_note("`make bench` starts one and measures against it; by hand: localstack/seaweedfs.sh start")
            raise
        except BucketNotFoundError as e:
            e.add_note("--create-bucket creates it")
            raise

    def remove(self, name: str = "") -> None:
        """Removes all objects and multipart uploads under a name, or under the whole place."""
        asyncio.run(self._remove(f"{self._url}/{name}".rstrip("/")))

    async def _look(self) -> None:
        async with open_store(self._url, self._impatient) as store:
            async for _ in store.list_objects():
                return

    async def _create(self) -> None:
        session = AioSession()
        region = session.get_config_variable("region") or "us-east-1"
        config = AioConfig(s3={"addressing_style": self._style})
        where = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        async with session.create_client("s3", region_name=region, config=config) as client:
            await client.create_bucket(Bucket=urlsplit(self._url).netloc, **where)

    async def _remove(self, url: str) -> None:
        async with open_store(url, self.store) as store:
            await store.delete([found.key async for found in store.list_objects()])
            for upload in [found async for found in store.list_uploads()]:
                await store.abort_upload(upload)
