"""Pickles of others, read without running anything they name.

Law: pure. The only place that unpickles what came from storage without torch. Each name that a pickle may use stands
in a table here, for something that builds plain data; any other is refused before it is looked up.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cloudckpt.convert.pickle_bombs import refuse_bombs
from cloudckpt.dtypes import DTYPES
from cloudckpt.errors import ManifestError, UnsafePickleError

_BY_TORCH_NAME = {dtype.torch: name for name, dtype in DTYPES.items()}
_BROKEN = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    RecursionError,
    OverflowError,
    MemoryError,  # a length that was altered
)
"""What Python's unpickler raises for pickles that are cut, altered or made up."""

Names = Mapping[tuple[str, str], Any]


def load(data: bytes | memoryview, names: Names, where: str, *, is_of_torch_save: bool = False) -> Any:
    """The object that a pickle describes, with stand-ins for all classes.

    Args:
        data: the pickle.
        names: what it may name, by module and name, and what stands for that.
        where: it lies, for errors.
        is_of_torch_save: whether it refers to storages.

    Raises:
        UnsafePickleError: it names something else; nothing of it was run.
        ManifestError: it is no whole pickle, or does not fit together.
    """
    try:
        refuse_bombs(memoryview(data))
        return (_TorchUnpickler if is_of_torch_save else _Unpickler)(io.BytesIO(data), names, where).load()
    except _BROKEN as e:
        msg = f"{where} is not sound: {type(e).__name__}: {e}"
        raise ManifestError(msg) from e


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, names: Names, where: str) -> None:
        super().__init__(file)
        self._names = names
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            msg = (
                f"{self._where} is a pickle that names {module}.{name}, which has no business there: loading it "
                "would run code of whoever wrote it. Nothing of it was run"
            )
            raise UnsafePickleError(msg)
        return self._names[module, name]


class _TorchUnpickler(_Unpickler):
    def persistent_load(self, pid: Any) -> "_Storage":
        kind, of, record, _, _ = pid
        if kind != "storage" or not isinstance(of, _StorageKind) or not isinstance(record, str):
            msg = "it refers to something else than a storage"
            raise pickle.UnpicklingError(msg)
        return _Storage(record, of.dtype)


class _Unchanging:
    """Stands in a table for good: a pickle that gives it a state would change it for all that are read later."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        msg = f"a state for {type(self).__name__}"
        raise TypeError(msg)


class _Function(_Unchanging):
    """Stands for a function, or for a class that is made by a call."""

    __slots__ = ("_made",)

    def __init__(self, made: Callable[..., Any]) -> None:
        self._made = made

    def __call__(self, *args: Any) -> Any:
        return self._made(*args)


class Record:
    """Stands for a class: keeps what instances were made with, and their state."""

    __slots__ = ("args", "state")

    def __init__(self, *args: Any) -> None:
        """Keeps ``args``."""
        self.args = args
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _record(name: str) -> type[Record]:
    return type(name, (Record,), {"__slots__": ()})


DcpMetadata = _record("Metadata")
TensorStorageMetadata = _record("TensorStorageMetadata")
BytesStorageMetadata = _record("BytesStorageMetadata")
ChunkStorageMetadata = _record("ChunkStorageMetadata")
TensorProperties = _record("TensorProperties")
MetadataIndex = _record("MetadataIndex")
StorageInfo = _record("_StorageInfo")


class DtypeName(_Unchanging):
    """Stands for a torch dtype: its name in the manifest."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        """Of that name."""
        self.name = name


_MAX_AXES = 64
_MAX_MEMBERS = 1 << 20


@_Function
def _sizes(items: Iterable[Any] = ()) -> tuple[int, ...]:
    sizes = tuple(items)
    if any(type(n) is not int for n in sizes):
        raise _refusal("sizes that are no numbers")
    return sizes


@_Function
def _text(*parts: Any) -> str:
    if any(not isinstance(part, str | int) for part in parts):
        raise _refusal("a name of something else than texts")
    return "/".join(map(str, parts))


@_Function
def _ordered_dict(items: Iterable[Any] = ()) -> "OrderedDict[Any, Any]":
    pairs = [(key, value) for key, value in items]
    _refuse_bombs_among(key for key, _ in pairs)
    return OrderedDict(pairs)


@_Function
def _set(items: Iterable[Any] = ()) -> set[Any]:
    members = list(items)
    _refuse_bombs_among(members)
    return set(members)


@_Function
def _frozenset(items: Iterable[Any] = ()) -> frozenset[Any]:
    members = list(items)
    _refuse_bombs_among(members)
    return frozenset(members)


@_Function
def _complex(*parts: Any) -> complex:
    if any(not isinstance(part, float | int) for part in parts):
        raise _refusal("a complex number of something else than numbers")
    return complex(*parts)


def _refuse_bombs_among(members: Iterable[Any]) -> None:
    """Raises ValueError where hashing them would visit more values than anybody wrote."""
    count, waiting = 0, list(members)
    while waiting and count < _MAX_MEMBERS:
        count += 1
        member = waiting.pop()
        if isinstance(member, tuple):
            waiting += member
    if waiting:
        raise _refusal("a set of tuples that unfold to too many values")


def _refusal(what: str) -> ValueError:
    return ValueError(what)


_OTHER_DTYPES = (
    "qint8", "quint8", "qint32", "quint4x2", "quint2x4", "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16",
    *(f"{sign}int{n}" for sign in ("", "u") for n in range(1, 8)),
)  # fmt: skip
"""Known to torch and not to us: their tensors are listed, and cannot be read."""

_DTYPE_NAMES: Names = {
    **{("torch", torch_name): DtypeName(name) for torch_name, name in _BY_TORCH_NAME.items()},
    **{("torch", name): DtypeName(name) for name in _OTHER_DTYPES},
}

_METADATA = "torch.distributed.checkpoint.metadata"
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"  # where torch 2.2 and before had some of them

DCP_NAMES: Names = {
    **_DTYPE_NAMES,
    (_METADATA, "Metadata"): DcpMetadata,
    (_METADATA, "TensorStorageMetadata"): TensorStorageMetadata,
    (_METADATA, "BytesStorageMetadata"): BytesStorageMetadata,
    (_METADATA, "ChunkStorageMetadata"): ChunkStorageMetadata,
    (_METADATA, "TensorProperties"): TensorProperties,
    (_OLD_METADATA, "TensorProperties"): TensorProperties,
    (_METADATA, "MetadataIndex"): MetadataIndex,
    (_METADATA, "StorageMeta"): _record("StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"): _record("_MEM_FORMAT_ENCODING"),
    (_OLD_METADATA, "MEM_FORMAT_ENCODING"): _record("MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StorageInfo,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): _record("_StoragePrefix"),
    ("torch", "Size"): _sizes,
    ("torch.serialization", "_get_layout"): _text,
    ("collections", "OrderedDict"): _ordered_dict,
    ("pathlib", "PosixPath"): _text,
    ("pathlib", "PurePosixPath"): _text,
    ("pathlib", "WindowsPath"): _text,
    ("pathlib", "PureWindowsPath"): _text,
    ("pathlib._local", "PosixPath"): _text,  # Python 3.13
    ("pathlib._local", "WindowsPath"): _text,
}
"""What torch's writer puts into ``.metadata``, from torch 2.0 to 2.13."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file of ``torch.save``.

    Attributes:
        record: of its storage, below ``data/``.
        dtype: as the manifest spells it.
        offset: of its first element in the storage.
        shape: elements per axis.
        strides: in elements.
    """

    record: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    __setstate__ = _Unchanging.__setstate__


class _StorageKind(_Unchanging):
    __slots__ = ("dtype",)

    def __init__(self, dtype: str | None) -> None:
        self.dtype = dtype


@dataclass(frozen=True, slots=True)
class _Storage:
    record: str
    dtype: str | None

    __setstate__ = _Unchanging.__setstate__


@_Function
def _tensor_v2(storage: _Storage, *rest: Any) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v2``: offset, size, stride, requires_grad, hooks, flags."""
    if storage.dtype is None or len(rest) < 3:
        raise _refusal("a tensor without a dtype")
    return _tensor(storage.record, storage.dtype, rest[:3], rest[5:])


@_Function
def _tensor_v3(storage: _Storage, *rest: Any) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v3``: as v2, with the dtype in sixth place."""
    return _tensor(storage.record, rest[5].name, rest[:3], rest[6:])


def _tensor(record: str, dtype: str, place: tuple[Any, ...], math: tuple[Any, ...]) -> StoredTensor:
    offset, shape, strides = place[0], tuple(place[1]), tuple(place[2])
    if any(type(n) is not int or not 0 <= n < 1 << 63 for n in (offset, *shape, *strides)):
        raise _refusal("a tensor whose offset, shape or strides are no numbers of 63 bits")
    if len(shape) != len(strides) or len(shape) > _MAX_AXES:
        raise _refusal(f"a tensor of {len(shape)} axes and {len(strides)} strides")
    if any(math):
        raise _refusal("a conjugate or negative view: save tensor.resolve_conj().resolve_neg() instead")
    return StoredTensor(record, dtype, offset, shape, strides)


@_Function
def _parameter(data: StoredTensor, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise _refusal("a parameter that is no tensor")
    return data


@_Function
def _of_type(build: Any, kind: Any, args: Any, _state: Any) -> StoredTensor:
    if kind is not _Parameter or not (build is _tensor_v2 or build is _tensor_v3):
        raise _refusal("a tensor of a class of its own")
    tensor: StoredTensor = build(*args)
    return tensor


_Parameter = _record("Parameter")


@_Function
def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise _refusal("bytes that are encoded otherwise than as latin1")
    return text.encode("latin1")


@_Function
def _bytearray(data: bytes = b"") -> bytearray:
    if not isinstance(data, bytes):  # of a number, it would make that many
        raise _refusal("a byte array of something else than bytes")
    return bytearray(data)


_KINDS = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip

_BUILTINS = {"set": _set, "frozenset": _frozenset, "complex": _complex, "bytearray": _bytearray}

TORCH_NAMES: Names = {
    **_DTYPE_NAMES,
    **{("torch", kind): _StorageKind(dtype) for kind, dtype in _KINDS.items()},
    **{(module, name): made for module in ("builtins", "__builtin__") for name, made in _BUILTINS.items()},
    ("torch.storage", "UntypedStorage"): _StorageKind(None),
    ("torch._utils", "_rebuild_tensor"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch.nn.parameter", "Parameter"): _Parameter,
    ("torch", "Size"): _sizes,
    ("torch", "device"): _text,
    ("torch.serialization", "_get_layout"): _text,
    ("collections", "OrderedDict"): _ordered_dict,
    ("_codecs", "encode"): _encode,
}
"""What a file of tensors, containers and plain values needs."""
