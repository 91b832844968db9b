"""A file of ``torch.save``, planned.

Law: pure. The state dict comes out nested as it was saved; tensors that shared memory do so no more.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from cloudckpt.convert.files import Elements, Exported, FilePlan, Piece, refuse
from cloudckpt.convert.pickles import _KINDS
from cloudckpt.convert.write_pickle import Call, Global, Storage, dumps, torch_dtype
from cloudckpt.convert.write_torch_zip import archive
from cloudckpt.dtypes import DTYPES
from cloudckpt.errors import UnstorableError
from cloudckpt.manifest import BytesEntry, OpenEntry, PlannerPath, TensorEntry, ValueEntry
from cloudckpt.ranges import strides_of

_STORAGES = {dtype: Global("torch", kind) for kind, dtype in _KINDS.items()}
_UNTYPED = Global("torch.storage", "UntypedStorage")
_TENSOR = Global("torch._utils", "_rebuild_tensor_v2")
_TENSOR_OF_DTYPE = Global("torch._utils", "_rebuild_tensor_v3")
_NO_HOOKS = Call(Global("collections", "OrderedDict"), ())

_KEYS = "cloudckpt:keys"
"""The member of a mapping that keeps its keys where they are not all text, see `dcp.state.nesting.KEYS`."""

_MAX_DEPTH = 100
_MAX_HOLES = 1 << 20
"""A path of a few bytes can ask for a list of more members than there is memory for."""


def plan_torch_file(exported: Exported, name: str) -> list[FilePlan]:
    """Plans a file for ``torch.load(path, weights_only=True)``, with or without ``mmap=True``.

    Tensors are contiguous, on the CPU, and require no gradient. The user's own metadata has no place in it.

    Args:
        exported: see there; members of lists that it lacks become None, as in torch.
        name: of the file.

    Raises:
        UnstorableError: an entry is a byte string, or of a dtype that is not known, or has no place of its own.
    """
    refuse_unknown_dtypes(exported.entries)
    refuse(
        [key for key, entry in exported.entries.items() if isinstance(entry, BytesEntry)],
        "pickled by whoever saved it, which cannot be put into a file of torch.save; leave it out with --only "
        "PATTERN or --tensors-only, or export to dcp, which keeps it as it is",
    )
    leaves: dict[str, Any] = {}
    contents: list[Elements] = []
    sizes: list[int] = []
    for key, entry in exported.entries.items():
        if isinstance(entry, TensorEntry):
            leaves[key] = tensor(entry.dtype, entry.shape, len(contents))
            contents.append(Elements(key))
            sizes.append(tensor_nbytes(entry.dtype, entry.shape))
        elif isinstance(entry, ValueEntry):
            leaves[key] = entry.value
    state_dict = _nested(leaves, exported.planner_paths or {})
    try:
        texts = archive(dumps(state_dict), sizes)
    except UnstorableError:
        for key, leaf in leaves.items():
            pickled(key, leaf)  # which one it is
        raise
    return [FilePlan(name=name, pieces=tuple(_filled(texts, contents, sizes)))]


def refuse_unknown_dtypes(entries: Mapping[str, OpenEntry]) -> None:
    """Raises UnstorableError for tensors that can be listed and not read."""
    unknown = {
        key: entry.dtype
        for key, entry in entries.items()
        if isinstance(entry, TensorEntry) and entry.dtype not in DTYPES
    }
    refuse(list(unknown), f"of a dtype that cannot be read ({', '.join(sorted(set(unknown.values())))})")


def pickled(key: str, value: Any) -> bytes:
    """See `dumps`; errors name the key."""
    try:
        return dumps(value)
    except UnstorableError as e:
        msg = f"{key!r} cannot be pickled, {e}; leave it out with --only PATTERN or --tensors-only"
        raise UnstorableError(msg) from None


def tensor(dtype: str, shape: Sequence[int], record: int) -> Call:
    """A contiguous tensor as torch pickles it, whose storage is that record of the archive."""
    place = (0, tuple(shape), strides_of(tuple(max(n, 1) for n in shape), 1), False, _NO_HOOKS)
    if dtype in _STORAGES:
        return Call(_TENSOR, (Storage(_STORAGES[dtype], record, prod(shape)), *place))
    storage = Storage(_UNTYPED, record, tensor_nbytes(dtype, shape))
    return Call(_TENSOR_OF_DTYPE, (storage, *place, torch_dtype(dtype)))


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Of its elements."""
    return prod(shape) * DTYPES[dtype].itemsize


def _filled(texts: Sequence[bytes], contents: Sequence[Elements], sizes: Sequence[int]) -> Iterator[Piece]:
    for text, content, nbytes in zip(texts[:-1], contents, sizes, strict=True):
        yield text
        if nbytes:
            yield content
    yield texts[-1]


class _Branch(dict[Any, Any]):
    """Members of a mapping by name, or of a list by index; no leaf is one."""

    def takes(self, step: str | int) -> bool:
        """Whether it is, or may yet become, what that is a step into."""
        return (not self or type(step) is type(next(iter(self)))) and not (type(step) is int and step < 0)

    @property
    def is_list(self) -> bool:
        return type(next(iter(self))) is int


def _nested(leaves: Mapping[str, Any], paths: Mapping[str, PlannerPath]) -> Any:
    """What DCP flattened; the leaves by key where there are no paths."""
    top = _Branch()
    branches: list[_Branch] = []
    misplaced = [
        key for key, leaf in leaves.items() if not _place(leaf, ("", *paths.get(key, (key,))), top, branches)
    ]
    refuse(misplaced, "its path in the nested state dict leads through another entry, or nowhere")
    holes = sum(max(branch) + 1 - len(branch) for branch in branches if branch.is_list)
    if holes > _MAX_HOLES:
        msg = f"lists of the nested state dict lack {holes} members; choose entries that lie closer together"
        raise UnstorableError(msg)
    return _settled(top.get("", {}))


def _place(leaf: Any, path: PlannerPath, top: _Branch, branches: list[_Branch]) -> bool:
    """Puts a leaf where its path leads, with the branches on the way; whether there is a place."""
    if len(path) > _MAX_DEPTH:
        return False
    *way, last = path
    at = top
    for step in way:
        if step not in at and at.takes(step):
            branches.append(_Branch())
            at[step] = branches[-1]
        if not isinstance(at.get(step), _Branch):
            return False
        at = at[step]
    if last in at or not at.takes(last):
        return False
    at[last] = leaf
    return True


def _settled(value: Any) -> Any:
    """The mapping or list that a branch is, down to the leaves."""
    if not isinstance(value, _Branch):
        return value
    members = {step: _settled(one) for step, one in value.items()}
    if value.is_list:
        return [members.get(i) for i in range(max(members) + 1)]
    own = _own_keys(members)
    return {own.get(name, name): one for name, one in members.items() if not own or name != _KEYS}


def _own_keys(members: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a mapping by the text that they became, where it keeps them."""
    keys = members.get(_KEYS)
    if not isinstance(keys, list) or not all(isinstance(key, str | int | float | None) for key in keys):
        return {}
    return {str(key): key for key in keys}
