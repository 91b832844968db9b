"""A checkpoint into another format, object to object.

Law: sync. What makes the files a checkpoint is written last, and only if the source is still what it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from cloudckpt.convert import stock_dcp, torch_file
from cloudckpt.convert.files import Exported, FilePlan, piece_nbytes
from cloudckpt.convert.find import find
from cloudckpt.convert.items import ForeignContents
from cloudckpt.convert.safetensors import SUFFIX
from cloudckpt.convert.write_safetensors import INDEX, MAX_FILE_NBYTES, SINGLE, plan_safetensors
from cloudckpt.convert.write_stock_dcp import plan_stock_dcp
from cloudckpt.convert.write_torch_file import plan_torch_file
from cloudckpt.engine import loop
from cloudckpt.engine.contents import Contents, Located
from cloudckpt.engine.read import ReadOptions, Stats
from cloudckpt.errors import CheckpointChangedError, CheckpointExistsError, UsageError
from cloudckpt.layout import MANIFEST
from cloudckpt.manifest import OpenEntry, TensorEntry
from cloudckpt.selection import Patterns, matching
from cloudckpt.store.protocols import Store
from cloudckpt.store.url import StoreOptions, check_url
from cloudckpt.threads import in_thread
from cloudckpt.transfer.assembly import Advance, Assembler
from cloudckpt.transfer.elements import ElementReads, asks_of, located, segments_of
from cloudckpt.transfer.places import etags, open_both, refuse_inside, removing_on_failure
from cloudckpt.transfer.plain_values import with_plain_values
from cloudckpt.transfer.segments import Segment

Format = Literal["safetensors", "torch", "dcp"]

_READS: dict[str, Any] = {"max_inflight_nbytes": 16 << 20, "max_request_size": 16 << 20, "concurrency": 8}
"""Of one part: several are under way, and each has a budget of its own for what is not received in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written.

    Attributes:
        url: of the file, or of the directory.
        format: see `Format`.
        files: their names and sizes in bytes, in the order of writing.
        entry_count: entries that are in them.
        sent_nbytes: bytes that were sent from here.
        fetched_nbytes: bytes of the source that were fetched for these, opening it excluded.
        copied_nbytes: bytes that the server copied by itself.
    """

    url: str
    format: Format
    files: Mapping[str, int]
    entry_count: int
    sent_nbytes: int
    fetched_nbytes: int
    copied_nbytes: int


class ExportPlan:
    """What an export would write, before anything is written; a context manager.

    Attributes:
        url: of the file, or of the directory.
        format: see `Format`.
        files: their names and sizes in bytes, in the order of writing.
        left_out: keys that are not written because they were not asked for.
    """

    def __init__(
        self,
        url: str,
        to_url: str,
        *,
        to: Format,
        patterns: Patterns = "*",
        tensors_only: bool = False,
        max_file_nbytes: int = MAX_FILE_NBYTES,
        options: ReadOptions | None = None,
        store: StoreOptions | None = None,
        to_store: StoreOptions | None = None,
    ) -> None:
        """Opens the checkpoint and plans; see `export`."""
        self._options = replace(options or ReadOptions(), **_READS)
        self._store, self._to_store = store or StoreOptions(), to_store or store or StoreOptions()
        self.url, self.format = check_url(to_url), to
        source = check_url(url)
        refuse_inside(source, self.url)
        self._place, file_name = _place(self.url, to)
        self._is_directory = file_name is None
        self._contents, self._session = find(source, self._options, self._store)
        try:
            keys = matching(self._contents.entries, patterns)
            opened = {key: self._contents.entry(key) for key in keys}
            entries = {k: e for k, e in opened.items() if not tensors_only or isinstance(e, TensorEntry)}
            _refuse_nothing(entries, self._contents, source)
            if to == "torch":  # which can hold a value, and no pickle in its pickle
                entries = self._session.run(
                    lambda source: with_plain_values(self._contents, source, entries, self._options)
                )
            metadata = dict(self._contents.metadata)
            self._exported = Exported(entries=entries, metadata=metadata, planner_paths=self._contents.planner_paths)
            self._plans = _plans(self._exported, to, file_name, max_file_nbytes, self._contents)
        except BaseException:
            self._session.close()
            raise
        self.left_out = sorted(set(self._contents.entries) - set(entries))
        self.files = {plan.name: sum(piece_nbytes(piece, entries) for piece in plan.pieces) for plan in self._plans}

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def run(self, *, overwrite: bool = False, server_side: bool = True, advance: Advance = lambda _: None) -> Export:
        """Writes; see `export`."""

        async def main() -> Export:
            places = self._session.url, self._store, self._place, self._to_store
            async with open_both(*places) as (source, target):
                return await self._write(
                    source, target, overwrite=overwrite, server_side=server_side, advance=advance
                )

        return loop.run(main)

    async def _write(
        self, source: Store, target: Store, *, overwrite: bool, server_side: bool, advance: Advance
    ) -> Export:
        names = [plan.name for plan in self._plans]
        replaced = await _refuse_mixture(target, names, is_directory=self._is_directory, overwrite=overwrite)
        witnesses = await etags(source, self._witnesses())
        entries, stats = self._exported.entries, Stats()
        found = await located(self._contents, source, asks_of(entries), self._options, stats)
        reads = ElementReads(store=source, entries=entries, found=found, options=self._options, stats=stats)
        assembler = Assembler(target, source, reads, server_side=server_side, advance=advance)

        async def refuse_changed() -> None:
            if await etags(source, list(witnesses)) != witnesses:
                msg = f"{source.url} was changed while it was read; nothing was exported. Export it again"
                raise CheckpointChangedError(msg)

        ours: list[str] = []
        async with removing_on_failure(target, ours):
            if replaced and len(names) > 1:
                await target.delete([names[-1]])  # while the others are of two exports, nothing may join them
            for plan in self._plans:
                segments = await in_thread(_segments, plan, entries, found)
                is_last = plan is self._plans[-1]
                if plan.name not in replaced:
                    ours.append(plan.name)
                await assembler.make(plan.name, segments, before_end=refuse_changed if is_last else None)
                if plan.name in replaced:
                    ours.append(plan.name)
        return Export(
            url=self.url,
            format=self.format,
            files=self.files,
            entry_count=len(entries),
            sent_nbytes=assembler.moved.sent_nbytes,
            fetched_nbytes=stats.bytes_fetched,
            copied_nbytes=assembler.moved.copied_nbytes,
        )

    def _witnesses(self) -> list[str]:
        """Keys of objects that tell whether the source is still what it was."""
        if isinstance(self._contents, ForeignContents):
            return sorted({item.key for item in self._contents.items})
        return [MANIFEST]


def export(
    url: str,
    to_url: str,
    *,
    to: Format,
    patterns: Patterns = "*",
    tensors_only: bool = False,
    max_file_nbytes: int = MAX_FILE_NBYTES,
    overwrite: bool = False,
    server_side: bool = True,
    options: ReadOptions | None = None,
    store: StoreOptions | None = None,
    to_store: StoreOptions | None = None,
    advance: Advance = lambda _: None,
) -> Export:
    """Writes a checkpoint, of any format that `cloudckpt.open` opens, in another format.

    Runs of 5 MiB and more that lie in one piece are copied by the server, where both URLs are of one that knows
    UploadPartCopy; all else is fetched, verified and sent, with at most about 220 MiB of memory. If it fails, what it
    had written is removed, and a file that it was to replace is as it was; of several that it was replacing, the
    index is gone.

    Args:
        url: of the checkpoint.
        to_url: of a file (``.safetensors``; ``.pt``, ``.pth``, ``.bin``, ``.ckpt``) or of a directory (for
            ``safetensors``, as Hugging Face lays it out: one file, or several and their index; for ``dcp``).
        to: the format.
        patterns: of the entries to write.
        tensors_only: leave out all others.
        max_file_nbytes: of tensors in one file of safetensors in a directory.
        overwrite: replace files that are there.
        server_side: let the server copy what it can.
        options: how to read.
        store: how to reach the source.
        to_store: how to reach the target; as the source if not given.
        advance: is told of bytes that are where they belong.

    Raises:
        CheckpointExistsError: files are there already. Nothing was written.
        UnstorableError: the format has no place for some entries. Nothing was written.
        UsageError: the target is inside the source, or no file of that format. Nothing was written.
        CheckpointChangedError: the source was replaced meanwhile.
        IntegrityError, StoreError: bytes could not be had, or not be written.
        CheckpointError: as from `cloudckpt.open`, of the source.
    """
    with ExportPlan(
        url,
        to_url,
        to=to,
        patterns=patterns,
        tensors_only=tensors_only,
        max_file_nbytes=max_file_nbytes,
        options=options,
        store=store,
        to_store=to_store,
    ) as plan:
        return plan.run(overwrite=overwrite, server_side=server_side, advance=advance)


def _plans(
    exported: Exported, to: Format, file_name: str | None, max_file_nbytes: int, contents: Contents
) -> list[FilePlan]:
    if to == "dcp":
        return plan_stock_dcp(exported)
    if to == "torch":
        assert file_name is not None  # noqa: S101 - see `_place`
        return plan_torch_file(exported, file_name)
    order = _places(exported.entries, contents)
    return plan_safetensors(
        exported, file_name=file_name, max_file_nbytes=max_file_nbytes, place_of=order.__getitem__
    )


def _refuse_nothing(entries: Mapping[str, OpenEntry], contents: Contents, where: str) -> None:
    if not entries:
        msg = f"nothing is left to export: of the {len(contents.entries)} entries of {where} none is asked for"
        raise UsageError(msg)


def _places(entries: Mapping[str, OpenEntry], contents: Contents) -> dict[str, tuple[str, int]]:
    """The object that each tensor's first element lies in, and where, as far as one can tell without looking."""
    places = {}
    for key, entry in entries.items():
        if isinstance(entry, TensorEntry) and entry.chunks:
            first = entry.chunks[0]
            of = contents.items[first.frame].key if isinstance(contents, ForeignContents) else str(first.shard)
            places[key] = of, first.start
        else:
            places[key] = "", 0
    return places


def _place(url: str, to: Format) -> tuple[str, str | None]:
    """The directory, and the name of the one file where it is one."""
    if to not in get_args(Format):
        msg = f"to={to!r} must be one of {', '.join(map(repr, get_args(Format)))}"
        raise UsageError(msg)
    parent, _, name = url.rpartition("/")
    suffixes: tuple[str, ...] = {"safetensors": (SUFFIX,), "torch": torch_file.SUFFIXES}.get(to, ())
    if name.endswith(suffixes):
        check_url(parent)
        return parent, name
    if to == "torch":
        msg = f"{url} is no name for a file of torch.save: let it end with one of {', '.join(suffixes)}"
        raise UsageError(msg)
    return url, None


def _segments(plan: FilePlan, entries: Mapping[str, OpenEntry], found: Located) -> list[Segment]:
    return [segment for piece in plan.pieces for segment in segments_of(piece, entries, found)]


async def _refuse_mixture(
    target: Store, names: Sequence[str], *, is_directory: bool, overwrite: bool
) -> frozenset[str]:
    """Refuses, before anything is written, what is there already; returns those of ``names`` that are replaced."""
    markers = [n for n in (MANIFEST, stock_dcp.METADATA, INDEX, SINGLE) if n not in names] if is_directory else []
    there = await etags(target, [*names, *markers])
    strange = [name for name in markers if there[name]]
    if strange:
        msg = f"{target.url} holds another checkpoint ({', '.join(strange)}): give a directory of its own"
        raise CheckpointExistsError(msg)
    known = [name for name in names if there[name]]
    if known and not overwrite:
        msg = f"{target.url}/{known[0]} is there already; give another URL, or overwrite it"
        raise CheckpointExistsError(msg)
    return frozenset(known)
