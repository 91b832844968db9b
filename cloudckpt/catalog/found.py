"""What lies below a root, by checkpoint: shards and uploads that are surely ours, and manifests.

Law: looks, and touches nothing. What is not known to be ours is not seen.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from cloudckpt.layout import MANIFEST, prefix_of_manifest, prefix_of_shard
from cloudckpt.store.protocols import List, Multipart, ObjectInfo, Upload


class Lists(List, Multipart, Protocol):
    """What looking asks of a store."""


@dataclass(slots=True)
class Found:
    """What lies at one checkpoint's place.

    Attributes:
        prefix: of its keys: empty, or ending in ``/``.
        manifest: the object of that name, whatever it is.
        shards: of all attempts; their keys begin with the prefix.
        uploads: to keys of shards.
    """

    prefix: str
    manifest: ObjectInfo | None = None
    shards: list[ObjectInfo] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)

    @property
    def manifest_key(self) -> str:
        """Where its manifest is, or would be."""
        return self.prefix + MANIFEST

    @property
    def keys(self) -> set[str]:
        """Of shards that are there, and of those being uploaded, relative to the prefix."""
        return {*map(self.own_key, self.shards), *map(self.own_key, self.uploads)}

    def own_key(self, thing: ObjectInfo | Upload) -> str:
        """A key relative to the prefix."""
        return thing.key.removeprefix(self.prefix)

    def only(self, keys: Collection[str]) -> "Found":
        """Some of it, by keys relative to the prefix."""
        return Found(
            self.prefix,
            self.manifest,
            [shard for shard in self.shards if self.own_key(shard) in keys],
            [upload for upload in self.uploads if self.own_key(upload) in keys],
        )

    def signs_of_life(self) -> Iterator[datetime | None]:
        """When each was last heard of, by the server's clock; None where it does not tell."""
        yield from (shard.modified for shard in self.shards)
        yield from (upload.started for upload in self.uploads)


async def look(store: Lists, names: Sequence[str] = ()) -> list[Found]:
    """Finds what lies below the store's root, or at places below it of those names and nowhere else."""
    found: dict[str, Found] = {}

    def at(prefix: str) -> Found:
        return found.setdefault(prefix, Found(prefix))

    wanted = [f"{name.strip('/')}/" if name.strip("/") else "" for name in names]
    for place in wanted or [""]:
        async for upload in store.list_uploads(
            place
        ):  # first: one that is completed meanwhile is seen twice, not never
            prefix = prefix_of_shard(upload.key)
            if prefix is not None:
                at(prefix).uploads.append(upload)
        async for info in store.list_objects(place):
            prefix = prefix_of_shard(info.key)
            if prefix is not None:
                at(prefix).shards.append(info)
            elif (prefix := prefix_of_manifest(info.key)) is not None:
                at(prefix).manifest = info
    return [found[prefix] for prefix in sorted(found) if not wanted or prefix in wanted]
