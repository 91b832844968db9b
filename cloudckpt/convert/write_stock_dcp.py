"""A checkpoint of torch's own DCP, planned: files of items as ``torch.save`` writes them, and ``.metadata``.

Law: pure. What torch 2.13's FileSystemWriter leaves behind, as a single rank would have written it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cloudckpt.convert.files import Elements, Exported, FilePlan, Piece
from cloudckpt.convert.stock_dcp import METADATA, SUFFIX
from cloudckpt.convert.write_pickle import Call, Global, Instance, Pairs, dumps, torch_dtype
from cloudckpt.convert.write_torch_file import pickled, refuse_unknown_dtypes, tensor, tensor_nbytes
from cloudckpt.convert.write_torch_zip import archive
from cloudckpt.manifest import BytesEntry, OpenEntry, PlannerPath, TensorEntry, ValueEntry
from cloudckpt.ranges import Region

MAX_FILE_NBYTES = 64 << 30
"""Far below 5 TiB and, in parts of 8 MiB, below 10,000 parts: what S3 takes."""

_VERSION = "1.0.0"  # torch.distributed.checkpoint.filesystem.CURRENT_DCP_VERSION


def _of_metadata(name: str) -> Global:
    return Global("torch.distributed.checkpoint.metadata", name)


_METADATA = _of_metadata("Metadata")
_TENSOR = _of_metadata("TensorStorageMetadata")
_BYTES = _of_metadata("BytesStorageMetadata")
_CHUNK = _of_metadata("ChunkStorageMetadata")
_PROPERTIES = _of_metadata("TensorProperties")
_INDEX = _of_metadata("MetadataIndex")
_STORAGE_META = _of_metadata("StorageMeta")
_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_STRIDED = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
_CONTIGUOUS = Call(_of_metadata("_MEM_FORMAT_ENCODING"), (0,))


def plan_stock_dcp(exported: Exported, *, max_file_nbytes: int = MAX_FILE_NBYTES) -> list[FilePlan]:
    """Plans the files; ``.metadata``, which makes a checkpoint of them, comes last.

    Chunks stay as they are, and so do byte strings, which DCP's reader loads as files of ``torch.save``. The user's
    own metadata has no place in it.

    Args:
        exported: see there.
        max_file_nbytes: a file is not begun to be longer, unless by its only item.

    Raises:
        UnstorableError: an entry is of a dtype that is not known, or a value that cannot be pickled.
    """
    refuse_unknown_dtypes(exported.entries)
    files = _Files(max_file_nbytes)
    for key, entry in exported.entries.items():
        for item in _items(key, entry):
            files.add(key, item)
    state = {
        "state_dict_metadata": Pairs((key, _listed(entry)) for key, entry in exported.entries.items()),
        "planner_data": _paths(exported.entries, exported.planner_paths or {}),
        "storage_data": Pairs((_index(stored), _info(stored)) for stored in files.stored),
        "storage_meta": Instance(
            _STORAGE_META, {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []}
        ),
        "version": _VERSION,
    }
    return [*files.plans(), FilePlan(name=METADATA, pieces=(dumps(Instance(_METADATA, state)),))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """What DCP stores as one.

    Attributes:
        place: of a chunk, its offsets in the tensor; None for all else.
        index: of a chunk, among its tensor's.
        pieces: its bytes.
        nbytes: of all pieces.
    """

    place: tuple[int, ...] | None = None
    index: int | None = None
    pieces: tuple[Piece, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """Where an item is."""

    key: str
    place: tuple[int, ...] | None
    index: int | None
    file: str
    offset: int
    nbytes: int


def _items(key: str, entry: OpenEntry) -> Iterator[_Item]:
    if isinstance(entry, BytesEntry):
        yield _Item(pieces=(Elements(key),) if entry.nbytes else (), nbytes=entry.nbytes)
    elif isinstance(entry, ValueEntry):
        (text,) = archive(pickled(key, entry.value), ())
        yield _Item(pieces=(text,), nbytes=len(text))
    else:
        for i, region in enumerate(_regions(entry)):
            head, tail = _saved(entry.dtype, region.sizes)
            elements = (Elements(key, region),) if region.numel else ()
            nbytes = len(head) + tensor_nbytes(entry.dtype, region.sizes) + len(tail)
            yield _Item(place=region.offsets, index=i, pieces=(head, *elements, tail), nbytes=nbytes)


def _regions(entry: TensorEntry) -> list[Region]:
    """Its chunks, but for empty ones: those may begin where others do, and DCP tells chunks apart by that."""
    regions = [Region(chunk.offsets, chunk.sizes) for chunk in entry.chunks]
    return [region for region in regions if region.numel] or [Region((0,) * len(entry.shape), entry.shape)]


@lru_cache(maxsize=1024)
def _saved(dtype: str, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What stands around the elements of a chunk; it hangs on nothing else, and chunks of a size share it."""
    head, tail = archive(dumps(tensor(dtype, sizes, 0)), (tensor_nbytes(dtype, sizes),))
    return head, tail


class _Files:
    """Items one after another, file by file."""

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._files: list[list[Piece]] = []
        self._nbytes = 0
        self.stored: list[_Stored] = []

    def add(self, key: str, item: _Item) -> None:
        if not self._files or (self._nbytes and self._nbytes + item.nbytes > self._max_nbytes):
            self._files.append([])
            self._nbytes = 0
        file = _file_name(len(self._files) - 1)
        self.stored.append(
            _Stored(key=key, place=item.place, index=item.index, file=file, offset=self._nbytes, nbytes=item.nbytes)
        )
        self._files[-1] += item.pieces
        self._nbytes += item.nbytes

    def plans(self) -> list[FilePlan]:
        return [FilePlan(name=_file_name(n), pieces=tuple(pieces)) for n, pieces in enumerate(self._files)]


def _file_name(n: int) -> str:
    return f"__0_{n}{SUFFIX}"


def _listed(entry: OpenEntry) -> Instance:
    if not isinstance(entry, TensorEntry):
        return Instance(_BYTES)
    chunks = [Instance(_CHUNK, {"offsets": _size(r.offsets), "sizes": _size(r.sizes)}) for r in _regions(entry)]
    properties = Instance(_PROPERTIES, (torch_dtype(entry.dtype), _STRIDED, False, _CONTIGUOUS, False))
    return Instance(_TENSOR, {"properties": properties, "size": _size(entry.shape), "chunks": chunks})


def _index(stored: _Stored) -> Instance:
    place = {} if stored.place is None else {"offset": _size(stored.place)}
    return Instance(_INDEX, {"fqn": stored.key, "index": stored.index, **place})


def _info(stored: _Stored) -> Instance:
    return Instance(_INFO, {"relative_path": stored.file, "offset": stored.offset, "length": stored.nbytes})


def _size(numbers: Sequence[int]) -> Call:
    return Call(_SIZE, (tuple(numbers),))


def _paths(keys: Iterable[str], paths: Mapping[str, PlannerPath]) -> dict[str, PlannerPath]:
    """Where each key stands; at the top of a state dict for DCP are names, whatever is below."""
    return {key: (str(first), *rest) for key in keys for first, *rest in [paths.get(key) or (key,)]}
