"""What stands at a URL: a checkpoint of ours, or of others.

Law: fetches what tells the formats apart and what each keeps for a manifest; parsing is done off the event loop.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from urllib.parse import urlsplit

from cloudckpt.convert import safetensors, stock_dcp, torch_file
from cloudckpt.convert.items import ForeignContents
from cloudckpt.convert.safetensors import Header
from cloudckpt.convert.torch_zip import TorchZip
from cloudckpt.engine.commit import find_manifest_blob, read_manifest_blob
from cloudckpt.engine.contents import Contents
from cloudckpt.engine.read import ReadOptions
from cloudckpt.engine.regions import Locator
from cloudckpt.engine.sealing import open_manifest
from cloudckpt.engine.session import Session
from cloudckpt.errors import (
    CheckpointNotFoundError,
    IntegrityError,
    NotCommittedError,
    ObjectNotFoundError,
)
from cloudckpt.ranges import Range
from cloudckpt.store.protocols import Get, GetRange, ObjectInfo, Store
from cloudckpt.store.url import StoreOptions
from cloudckpt.threads import in_thread

_HEAD_NBYTES = 32 << 10
"""Of a safetensors file: most headers fit in."""

_TAIL_NBYTES = 64 << 10
_MAX_TAIL_NBYTES = 64 << 20
"""Of a file of ``torch.save``: its directory takes about 100 bytes for each tensor."""

_CONCURRENCY = 16
"""Files whose headers are fetched at a time."""

_LISTED = 1000
"""Names that are looked at in a directory: a page of a listing."""


def find(url: str, options: ReadOptions, store: StoreOptions) -> tuple[Contents, Session]:
    """Opens what stands at a URL.

    Returns:
        The contents, and the store that their keys are relative to, which the caller closes.

    Raises:
        As `cloudckpt.open`.
    """
    for root, look in _places(url, options):
        session = Session(root, store)
        try:
            contents = look(session)
        except BaseException:
            session.close()
            raise
        if contents is not None:
            return contents, session
        session.close()
    raise AssertionError(url)  # the last place raises where nothing is


def manifest_contents(data: bytes, url: str, options: ReadOptions) -> Contents:
    """The contents of a checkpoint of ours, from its manifest; raises as `engine.sealing.open_manifest`."""
    return Locator(open_manifest(data, url, options), options)


def _places(url: str, options: ReadOptions) -> Iterator[tuple[str, Callable[[Session], Contents | None]]]:
    """Where to look, and how: beside a file's name first, where the URL may be one's."""
    parent, _, name = url.rpartition("/")
    has_parent = urlsplit(parent).netloc or urlsplit(parent).path.strip("/")
    if url.endswith((safetensors.SUFFIX, *torch_file.SUFFIXES)) and has_parent:
        yield parent, lambda session: _of_file(session, parent, name, options)
    yield url, lambda session: _of_directory(session, url, options)


def _of_file(session: Session, parent: str, name: str, options: ReadOptions) -> Contents | None:
    async def head(store: Store) -> ObjectInfo | None:
        with suppress(ObjectNotFoundError):
            return await store.head(name)
        return None

    info = session.run(head)
    if info is None:
        return None
    _refuse_unsealed(options, f"{parent}/{name}")
    if name.endswith(safetensors.SUFFIX):
        return _safetensors(session, {name: info.size}, None, f"{parent}/{name}")
    return _torch_file(session, info, f"{parent}/{name}")


def _of_directory(session: Session, url: str, options: ReadOptions) -> Contents:
    blob = session.run(find_manifest_blob)
    if blob is not None:
        return manifest_contents(blob.data, url, options)
    found = _of_others(session, url, options)
    if found is not None:
        return found
    session.run(read_manifest_blob)  # which says what is there instead
    raise CheckpointNotFoundError(url)


def _of_others(session: Session, url: str, options: ReadOptions) -> Contents | None:
    with suppress(ObjectNotFoundError):
        data = session.run(lambda store: _get(store, stock_dcp.METADATA))
        _refuse_unsealed(options, url)
        return stock_dcp.parse(data, f"{url}/{stock_dcp.METADATA}", options)
    sizes = session.run(_list_files)
    indices = [name for name in sizes if name.endswith(safetensors.INDEX_SUFFIX)]
    files = [name for name in sizes if name.endswith(safetensors.SUFFIX)]
    if any(name.endswith(stock_dcp.SUFFIX) for name in sizes):
        msg = (
            f"{url} was never finished: there are files of DCP but no {stock_dcp.METADATA}. The save that wrote "
            "them is still under way, or it failed; load an earlier checkpoint"
        )
        raise NotCommittedError(msg)
    if len(indices) == 1:
        _refuse_unsealed(options, url)
        data = session.run(lambda store: _get(store, indices[0]))
        weights = safetensors.parse_index(data, f"{url}/{indices[0]}")
        return _safetensors(session, {name: sizes.get(name) for name in weights.values()}, weights, url)
    if len(files) == 1 and not indices:
        _refuse_unsealed(options, url)
        return _safetensors(session, {files[0]: sizes[files[0]]}, None, f"{url}/{files[0]}")
    if files:
        msg = (
            f"{url} has several files of safetensors and not one index: give the URL of one, such as {url}/{files[0]}"
        )
        raise CheckpointNotFoundError(msg)
    return None


async def _list_files(store: Store) -> dict[str, int]:
    """Sizes of the first files of a directory, by name."""
    sizes: dict[str, int] = {}
    count = 0
    async for found in store.list_objects():
        count += 1
        if "/" not in found.key:
            sizes[found.key] = found.size
        if count == _LISTED:
            break
    return sizes


async def _get(store: Get, key: str) -> bytes:
    return (await store.get(key)).data


def _safetensors(
    session: Session, sizes: Mapping[str, int | None], weights: Mapping[str, str] | None, where: str
) -> ForeignContents:
    async def read_all(store: Store) -> dict[str, Header]:
        slots = asyncio.Semaphore(_CONCURRENCY)

        async def read_one(name: str, size: int | None) -> Header:
            async with slots:
                size = await _size_of(store, name, where) if size is None else size
                return await read_safetensors_header(store, name, size, f"{where} ({name})")

        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(read_one(name, size)) for name, size in sizes.items()}
        return {name: task.result() for name, task in tasks.items()}

    return safetensors.contents_of(session.run(read_all), weights, where)


async def _size_of(store: Get, name: str, where: str) -> int:
    try:
        return (await store.head(name)).size
    except ObjectNotFoundError as e:
        e.add_note(f"the index of {where} names it")
        raise


async def read_safetensors_header(store: GetRange, key: str, size: int, where: str) -> Header:
    """Reads the header of a file of safetensors: in one request, unless it is large.

    Args:
        store: it lies in.
        key: of the object.
        size: of the object.
        where: it lies, for errors.

    Raises:
        ManifestError: it is none, or contradicts itself.
        StoreError: it could not be read.
    """
    head = await _get_range(store, key, Range(0, min(size, _HEAD_NBYTES)))
    at = safetensors.header_range(head, size, where)
    if at.stop > len(head):
        head += await _get_range(store, key, Range(len(head), at.stop))
    return await in_thread(safetensors.parse_header, memoryview(head)[at.start : at.stop], size, where)


def _torch_file(session: Session, info: ObjectInfo, where: str) -> ForeignContents:
    nbytes = min(info.size, _TAIL_NBYTES)
    while True:
        start = info.size - nbytes
        tail = _fetch(session, info.key, Range(start, info.size))
        pieces = [(start, memoryview(tail))]
        try:
            archive = TorchZip(info.size, pieces, where)
            break
        except IntegrityError as e:
            if nbytes >= min(info.size, _MAX_TAIL_NBYTES):
                e.add_note(
                    "files that torch.save wrote before torch 1.6 are no archives: load and save it with torch"
                )
                raise
            nbytes = min(info.size, 16 * nbytes)  # its directory may begin before what was fetched
    for name in ("data.pkl", "byteorder"):
        if name in archive.records:
            at = archive.extent(name)
            data = _fetch(session, info.key, at)
            pieces.append((at.start, memoryview(data)))
    archive = TorchZip(info.size, pieces, where)
    return torch_file.contents_of(info.key, archive, where)


def _fetch(session: Session, key: str, at: Range) -> bytes:
    return session.run(lambda store: _get_range(store, key, at))


async def _get_range(store: GetRange, key: str, at: Range) -> bytes:
    data = bytearray(len(at))
    if data:
        await store.get_range(key, at, [memoryview(data)])
    return bytes(data)


def _refuse_unsealed(options: ReadOptions, where: str) -> None:
    if options.require_seal:
        msg = f"{where} is not a checkpoint of cloudckpt, so it has no seal; require_seal refuses it"
        raise IntegrityError(msg)
