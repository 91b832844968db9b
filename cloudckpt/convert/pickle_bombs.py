"""Pickles of a few bytes that take all memory, or all time, when they are read.

Law: pure. Follows a pickle's opcodes without making what they describe (`pickletools` has their table). What Python's
unpickler does for them it does in C: it can be neither bounded nor interrupted.
"""

import pickletools
from collections.abc import Iterator, Sequence
from pickle import UnpicklingError
from typing import Any, NamedTuple

MAX_DEPTH = 500
"""Tuples in tuples: hashing them takes C's stack, without a limit."""

_SPARE_WEIGHT = 10_000
_DEPTH = 1 << 48
"""A value stands for how many values its hash visits, and for `_DEPTH` times how deep they are nested."""

_ATOM = 1
"""What is no tuple: lists and mappings are not hashed. None stands for a mark."""

_CODES: dict[str, Any] = vars(pickletools)["code2op"]  # which typeshed does not know
_LENGTH_NBYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_LINES = {"INST": 2, "GLOBAL": 2}
"""Of text that follow these opcodes; one follows others."""


class _Opcode(NamedTuple):
    """What an opcode does to the stack.

    Attributes:
        name: as `pickletools` spells it.
        nbytes: that follow it; `pickletools.UP_TO_NEWLINE` and the like where that is told otherwise.
        takes_mark: whether it takes everything down to the topmost mark.
        takes: what it takes of the stack beside that.
        gives: what it puts there.
    """

    name: str
    nbytes: int
    takes_mark: bool
    takes: int
    gives: int


def _table() -> Iterator[tuple[int, _Opcode]]:
    for code, op in _CODES.items():
        before = list(op.stack_before)
        is_marked = pickletools.markobject in before
        takes = before.index(pickletools.markobject) if is_marked else len(before)
        nbytes = 0 if op.arg is None else op.arg.n
        yield ord(code), _Opcode(op.name, nbytes, is_marked, takes, len(op.stack_after))


_OPCODES = dict(_table())
_SPECIAL = frozenset(
    op.name
    for op in _OPCODES.values()
    if op.name in {"MARK", "POP", "DUP", "MEMOIZE", "FROZENSET", "ADDITEMS"}
    or op.name.endswith(("PUT", "GET"))
    or op.name in {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    or op.name.startswith("SETITEM")
)
_PUSHES = {
    code: op.nbytes
    for code, op in _OPCODES.items()
    if op.name not in _SPECIAL and op.nbytes >= 0 and not op.takes_mark and (op.takes, op.gives) == (0, 1)
}
_SHORT = frozenset(
    code for code, op in _OPCODES.items() if op.nbytes == pickletools.TAKEN_FROM_ARGUMENT1 and op.gives
)
_CALLS = frozenset(code for code, op in _OPCODES.items() if op.name in {"REDUCE", "NEWOBJ", "BUILD", "APPEND"})
_TUPLES = {code: op.takes for code, op in _OPCODES.items() if op.name in {"TUPLE1", "TUPLE2", "TUPLE3"}}
_MEMOIZE, _BINGET, _LONG_BINGET, _MARK = b"\x94hj("


def refuse_bombs(data: memoryview) -> None:
    """Raises UnpicklingError for what would take more memory or time than so many bytes can be worth.

    That is: a place in the memo beyond the bytes there are, for the memo is filled up to it; tuples that hold each
    other many times over or are nested deep, for their hash visits all that they unfold to.
    """
    _Following(bytes(data)).run()


class _Following:
    """A pickle on its way through a machine that knows of each value what its hash would cost."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._stack: list[int | None] = []
        self._memo: dict[int, int] = {}
        self._most = _SPARE_WEIGHT + len(data)
        self._left = _SPARE_WEIGHT + 4 * len(data)

    def run(self) -> None:
        """Goes through all of it, in about twice the time that the unpickler takes for itself."""
        data, stack, memo, pushes = self._data, self._stack, self._memo, _PUSHES
        position, end = 0, len(data)
        while position < end:  # what is frequent is done here
            code = data[position]
            if code in pushes:
                position += 1 + pushes[code]
                stack.append(_ATOM)
            elif code == _MEMOIZE and stack:
                position += 1
                memo[len(memo)] = stack[-1] or _ATOM
            elif code == _LONG_BINGET:
                place = int.from_bytes(data[position + 1 : position + 5], "little")
                position += 5
                stack.append(memo.get(place, _ATOM))
            elif code == _BINGET and position + 1 < end:
                stack.append(memo.get(data[position + 1], _ATOM))
                position += 2
            elif code in _CALLS and len(stack) > 1:
                position += 1
                stack.pop()
                stack[-1] = _ATOM
            elif code == _MARK:
                position += 1
                stack.append(None)
            elif code in _SHORT and position + 1 < end:
                position += 2 + data[position + 1]
                stack.append(_ATOM)
            elif code in _TUPLES and len(stack) >= _TUPLES[code]:
                position += 1
                parts = stack[-_TUPLES[code] :]
                stack[-_TUPLES[code] :] = [self._tuple([part or _ATOM for part in parts])]
            else:
                self._position = position
                if not self._next():
                    return
                position = self._position

    def _next(self) -> bool:
        """Follows one opcode; False where the unpickler stops."""
        op = _OPCODES.get(self._data[self._position])
        if op is None or op.name == "STOP":
            return False
        self._position += 1
        argument = self._argument(op)
        if op.name in _SPECIAL:
            self._special(op, argument)
        else:
            self._take(op)
            self._stack.extend([_ATOM] * op.gives)
        return True

    def _argument(self, op: _Opcode) -> bytes:
        start, nbytes = self._position, op.nbytes
        if nbytes in _LENGTH_NBYTES:
            start += _LENGTH_NBYTES[nbytes]
            nbytes = int.from_bytes(self._data[self._position : start], "little")
        stop = start + nbytes
        if nbytes == pickletools.UP_TO_NEWLINE:
            stop = start
            for _ in range(_LINES.get(op.name, 1)):
                stop = self._data.find(b"\n", stop) + 1 or len(self._data) + 1
        if stop > len(self._data):
            msg = "it is cut off"
            raise UnpicklingError(msg)
        self._position = stop
        return self._data[start:stop]

    def _special(self, op: _Opcode, argument: bytes) -> None:
        stack, name = self._stack, op.name
        if name == "MARK":
            stack.append(None)
        elif name == "DUP":
            msg = "it has an opcode DUP, which nobody writes"
            raise UnpicklingError(msg)
        elif name == "POP":
            if stack:
                stack.pop()
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif name.endswith("PUT"):
            self._memo[self._place(op, argument)] = self._top()
        elif name.endswith("GET"):
            stack.append(self._memo.get(self._place(op, argument), _ATOM))
        elif "TUPLE" in name or name == "FROZENSET":
            stack.append(self._tuple(self._take(op)))
        elif name.startswith("SETITEM"):
            self._hash(self._take(op)[-2 if name == "SETITEM" else 0 :: 2])
            stack.append(_ATOM)
        else:
            self._hash(self._take(op))
            stack.append(_ATOM)

    def _place(self, op: _Opcode, argument: bytes) -> int:
        place = int.from_bytes(argument, "little") if op.nbytes > 0 else int(argument)
        if not 0 <= place <= len(self._data):
            msg = f"it has place {place} of its memo, and {len(self._data)} bytes"
            raise UnpicklingError(msg)
        return place

    def _top(self) -> int:
        return (self._stack[-1] if self._stack else None) or _ATOM

    def _take(self, op: _Opcode) -> list[int]:
        """What an opcode takes, in order: down to a mark, or so many."""
        stack = self._stack
        taken: list[int] = []
        if op.takes_mark:
            while stack and (top := stack.pop()) is not None:
                taken.append(top)
            del stack[len(stack) - min(op.takes, len(stack)) :]
        else:
            taken += (stack.pop() or _ATOM for _ in range(min(op.takes, len(stack))))
        taken.reverse()
        return taken

    def _tuple(self, parts: Sequence[int]) -> int:
        weight, depth = 1 + sum(parts), 1
        if weight > len(parts) + 1:  # some of them are tuples
            weight = 1 + sum(part % _DEPTH for part in parts)
            depth = 1 + max(part // _DEPTH for part in parts)
        if depth > MAX_DEPTH or weight > self._most:
            msg = f"it has a tuple that unfolds to {weight} values, {depth} deep"
            raise UnpicklingError(msg)
        return weight + depth * _DEPTH

    def _hash(self, keys: Sequence[int]) -> None:
        self._left -= sum(key % _DEPTH for key in keys)
        if self._left < 0:
            msg = "its keys unfold to more than it has bytes for"
            raise UnpicklingError(msg)
