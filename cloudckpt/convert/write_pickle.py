"""Pickles of classes and functions that are not here.

Law: pure. Nothing that a pickle names is imported: it is spelled, and whoever reads the pickle looks it up. What is
written are the opcodes that torch's restricted unpickler knows, those of protocol 2.
"""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from cloudckpt.convert.pickles import DtypeName
from cloudckpt.dtypes import DTYPES
from cloudckpt.errors import UnstorableError


@dataclass(frozen=True, slots=True)
class Global:
    """A class or a function."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """What a function or a class makes of ``args``."""

    function: Global
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance of a class, made without a call and given ``state``, as objects are pickled by themselves."""

    of: Global
    state: Any = None


@dataclass(frozen=True, slots=True)
class Pairs:
    """A dict of what need not be at hand at once, nor be a key in Python."""

    items: Iterable[tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage of torch's.

    Attributes:
        kind: its class.
        record: its number in the archive.
        size: elements, of a class for one dtype; bytes, of the class for any.
    """

    kind: Global
    record: int
    size: int


@cache
def torch_dtype(name: str) -> Global:
    """The dtype of torch, by the name that the manifest has for it."""
    return Global("torch", DTYPES[name].torch if name in DTYPES else name)


def dumps(value: Any) -> bytes:
    """The pickle of plain values, containers of them, and the classes above.

    Raises:
        UnstorableError: it is, or has in it, something else, or is nested too deep.
    """
    pickler = _Pickler()
    try:
        pickler.save(value)
    except RecursionError as e:
        msg = "it is nested too deep"
        raise UnstorableError(msg) from e
    pickler.text += pickle.STOP
    return bytes(pickler.text)


_BYTE = range(1 << 8)
_INT = range(-(1 << 31), 1 << 31)
_TUPLES = (pickle.EMPTY_TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)


class _Pickler:
    """Numbers names and texts when they are first written, and refers to them afterwards; nothing else."""

    def __init__(self) -> None:
        self.text = bytearray(pickle.PROTO + b"\2")
        self._known: dict[str | Global, bytes] = {}

    def save(self, value: Any) -> None:
        write = _WRITERS.get(type(value))
        if write is None:
            msg = f"{type(value).__name__} is no plain value"
            raise UnstorableError(msg)
        write(self, value)

    def _constant(self, value: bool | None) -> None:  # noqa: FBT001
        self.text += {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]

    def _int(self, value: int) -> None:
        if value in _BYTE:
            self.text += pickle.BININT1 + struct.pack("B", value)
        elif value in _INT:
            self.text += pickle.BININT + struct.pack("<i", value)
        else:
            digits = pickle.encode_long(value)
            if len(digits) not in _BYTE:
                msg = "a number is too large"
                raise UnstorableError(msg)
            self.text += pickle.LONG1 + bytes((len(digits),)) + digits

    def _float(self, value: float) -> None:
        self.text += pickle.BINFLOAT + struct.pack(">d", value)

    def _str(self, value: str) -> None:
        if value in self._known:
            self.text += self._known[value]
            return
        data = value.encode("utf-8", "surrogatepass")
        self.text += pickle.BINUNICODE + struct.pack("<I", len(data)) + data
        self._number(value)

    def _global(self, it: Global) -> None:
        if it in self._known:
            self.text += self._known[it]
            return
        self.text += pickle.GLOBAL + f"{it.module}\n{it.name}\n".encode()
        self._number(it)

    def _number(self, it: str | Global) -> None:
        """Numbers what was just written, to refer to it from now on."""
        number = len(self._known)
        if number in _BYTE:
            self.text += pickle.BINPUT + bytes((number,))
            self._known[it] = pickle.BINGET + bytes((number,))
        else:
            self.text += pickle.LONG_BINPUT + struct.pack("<I", number)
            self._known[it] = pickle.LONG_BINGET + struct.pack("<I", number)

    def _tuple(self, values: tuple[Any, ...]) -> None:
        is_small = len(values) < len(_TUPLES)
        self.text += b"" if is_small else pickle.MARK
        self._all(values)
        self.text += _TUPLES[len(values)] if is_small else pickle.TUPLE

    def _list(self, values: list[Any]) -> None:
        self.text += pickle.EMPTY_LIST + pickle.MARK
        self._all(values)
        self.text += pickle.APPENDS

    def _dict(self, values: dict[Any, Any]) -> None:
        self._pairs(Pairs(values.items()))

    def _pairs(self, pairs: Pairs) -> None:
        self.text += pickle.EMPTY_DICT + pickle.MARK
        for key, value in pairs.items:
            self.save(key)
            self.save(value)
        self.text += pickle.SETITEMS

    def _call(self, call: Call) -> None:
        self.save(call.function)
        self.save(call.args)
        self.text += pickle.REDUCE

    def _instance(self, instance: Instance) -> None:
        self.save(instance.of)
        self.text += pickle.EMPTY_TUPLE + pickle.NEWOBJ
        if instance.state is not None:
            self.save(instance.state)
            self.text += pickle.BUILD

    def _storage(self, storage: Storage) -> None:
        self.save(("storage", storage.kind, str(storage.record), "cpu", storage.size))
        self.text += pickle.BINPERSID

    def _all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.save(value)


def _as_call(module: str, name: str, args: Callable[[Any], tuple[Any, ...]]) -> Callable[[_Pickler, Any], None]:
    """Writes what has no opcode as what a function makes."""
    function = Global(module, name)
    return lambda pickler, value: pickler.save(Call(function, args(value)))


_WRITERS: dict[type, Callable[[_Pickler, Any], None]] = {
    type(None): _Pickler._constant,
    bool: _Pickler._constant,
    int: _Pickler._int,
    float: _Pickler._float,
    complex: _as_call("builtins", "complex", lambda value: (value.real, value.imag)),
    str: _Pickler._str,
    bytes: _as_call("_codecs", "encode", lambda value: (value.decode("latin1"), "latin1")),
    bytearray: _as_call("builtins", "bytearray", lambda value: (bytes(value),)),
    tuple: _Pickler._tuple,
    list: _Pickler._list,
    dict: _Pickler._dict,
    Pairs: _Pickler._pairs,
    OrderedDict: _as_call("collections", "OrderedDict", lambda value: ([*map(list, value.items())],)),
    set: _as_call("builtins", "set", lambda value: (list(value),)),
    frozenset: _as_call("builtins", "frozenset", lambda value: (list(value),)),
    DtypeName: lambda pickler, value: pickler.save(torch_dtype(value.name)),
    Global: _Pickler._global,
    Call: _Pickler._call,
    Instance: _Pickler._instance,
    Storage: _Pickler._storage,
}
