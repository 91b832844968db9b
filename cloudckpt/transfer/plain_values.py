"""Byte strings that hold a plain value, as torch's DCP keeps numbers, text and tuples.

Law: nothing that was pickled is run; what is no plain value stays the byte string that it is.
"""

from collections.abc import Mapping
from typing import Any

from cloudckpt.convert import pickles
from cloudckpt.convert.torch_zip import TorchZip
from cloudckpt.engine.contents import Contents
from cloudckpt.engine.read import ReadOptions, Stats
from cloudckpt.errors import CheckpointError
from cloudckpt.manifest import BytesEntry, OpenEntry, ValueEntry
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import Store
from cloudckpt.transfer.elements import ElementReads, Source, asks_of, located
from cloudckpt.transfer.segments import Segment

_MAX_NBYTES = 64 << 10
"""Of a pickled value that is looked into."""


async def with_plain_values(
    contents: Contents, store: Store, entries: Mapping[str, OpenEntry], options: ReadOptions
) -> dict[str, OpenEntry]:
    """The entries, with values in place of byte strings that are files of ``torch.save`` of such.

    Raises:
        IntegrityError, StoreError: the bytes could not be had.
    """
    some = {k: e for k, e in entries.items() if isinstance(e, BytesEntry) and e.nbytes <= _MAX_NBYTES}
    found = await located(contents, store, asks_of(some), options, Stats())
    some = {key: entry for key in some if isinstance(entry := contents.entry(key), BytesEntry)}
    data = {key: memoryview(bytearray(entry.nbytes)) for key, entry in some.items()}
    reads = ElementReads(store=store, entries=some, found=found, options=options, stats=Stats())
    await reads.read([(_whole(key, into), into) for key, into in data.items()])
    made = dict(entries)
    for key, text in data.items():
        try:
            value = _value(text, f"{store.url}[{key!r}]")
        except CheckpointError:
            continue
        if _is_plain(value):
            made[key] = ValueEntry(value)
    return made


def _whole(key: str, into: memoryview) -> Segment:
    return Segment(source=Source(key, None), whole=len(into), at=Range(0, len(into)))


def _value(data: memoryview, where: str) -> Any:
    archive = TorchZip(len(data), [(0, data)], where)
    return pickles.load(archive.read("data.pkl"), pickles.TORCH_NAMES, where, is_of_torch_save=True)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) is str and _is_plain(inner) for key, inner in value.items())
    return value is None or type(value) in (bool, int, float, str)
