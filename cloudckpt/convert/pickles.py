"""Pickles of others, read without running anything they name.

Law: pure. The only place that unpickles what came from storage without torch. Each name that a pickle may use stands
in a table here, for something that builds plain data; any other is refused before it is looked up.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

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
            msg = f"it refers to {pid!r}"
            raise pickle.UnpicklingError(msg)
        return _Storage(record, of.dtype)


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


@dataclass(frozen=True, slots=True)
class DtypeName:
    """Stands for a torch dtype: its name in the manifest."""

    name: str


def _tuple(items: Any = ()) -> tuple[Any, ...]:
    return tuple(items)


def _text(*parts: Any) -> str:
    return "/".join(map(str, parts))


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
    ("torch", "Size"): _tuple,
    ("torch.serialization", "_get_layout"): _text,
    ("collections", "OrderedDict"): OrderedDict,
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


@dataclass(frozen=True, slots=True)
class _StorageKind:
    dtype: str | None


@dataclass(frozen=True, slots=True)
class _Storage:
    record: str
    dtype: str | None


def _tensor_v2(storage: _Storage, *rest: Any) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v2``: offset, size, stride, requires_grad, hooks, flags."""
    if storage.dtype is None or len(rest) < 3:
        msg = "a tensor without a dtype"
        raise ValueError(msg)
    return _tensor(storage.record, storage.dtype, rest[:3], rest[5:])


def _tensor_v3(storage: _Storage, *rest: Any) -> StoredTensor:
    """``torch._utils._rebuild_tensor_v3``: as v2, with the dtype in sixth place."""
    return _tensor(storage.record, rest[5].name, rest[:3], rest[6:])


def _tensor(record: str, dtype: str, place: tuple[Any, ...], math: tuple[Any, ...]) -> StoredTensor:
    offset, shape, strides = place[0], tuple(place[1]), tuple(place[2])
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)) or len(shape) != len(strides):
        msg = f"a tensor of offset {offset}, shape {shape} and strides {strides}"
        raise ValueError(msg)
    if any(math):
        msg = f"a tensor that is a view {math[0]}: save tensor.resolve_conj().resolve_neg() instead"
        raise ValueError(msg)
    return StoredTensor(record, dtype, offset, shape, strides)


def _parameter(data: StoredTensor, *_: Any) -> StoredTensor:
    return data


def _of_type(build: Any, kind: Any, args: Any, _state: Any) -> StoredTensor:
    if kind is not _Parameter or build not in {_tensor_v2, _tensor_v3}:
        msg = "a tensor of a class of its own"
        raise ValueError(msg)
    tensor: StoredTensor = build(*args)
    return tensor


_Parameter = _record("Parameter")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        msg = f"bytes that are encoded as {encoding!r}"
        raise ValueError(msg)
    return text.encode("latin1")


def _bytearray(data: bytes = b"") -> bytearray:
    if not isinstance(data, bytes):  # of a number, it would make that many
        _refuse_argument(data)
    return bytearray(data)


def _refuse_argument(value: Any) -> NoReturn:
    msg = f"an argument {value!r}"
    raise ValueError(msg)


_KINDS = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip

_BUILTINS = {"set": set, "frozenset": frozenset, "complex": complex, "bytearray": _bytearray}

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
    ("torch", "Size"): _tuple,
    ("torch", "device"): _text,
    ("torch.serialization", "_get_layout"): _text,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
}
"""What a file of tensors, containers and plain values needs."""
