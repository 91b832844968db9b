"""One open checkpoint, without torch: look inside, read a slice, load some of it.

Law: sync, and safe to use from several threads and after a fork. Whoever wrote the checkpoint, it looks the same.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Self, assert_never

import numpy as np

from cloudckpt.array import Array, ArrayTarget, Target
from cloudckpt.convert.find import find
from cloudckpt.engine.access import Access
from cloudckpt.engine.contents import Ask
from cloudckpt.engine.read import ReadOptions, Stats, Wanted
from cloudckpt.engine.sinks import MemorySink
from cloudckpt.engine.view import FileView
from cloudckpt.errors import DtypeMismatchError, MissingKeyError, ShapeMismatchError, UsageError
from cloudckpt.manifest import BytesEntry, OpenEntry, Summary, TensorEntry, ValueEntry
from cloudckpt.ranges import Range, Region
from cloudckpt.selection import Patterns, Rename, matching, nearest, select
from cloudckpt.store.url import StoreOptions, check_url, with_overrides


def open(  # noqa: A001 - as `zarr.open`, `xarray.open_dataset`
    url: str | os.PathLike[str],
    *,
    options: ReadOptions | None = None,
    store: StoreOptions | None = None,
    **overrides: Any,
) -> "Checkpoint":
    """Opens a committed checkpoint: one GET, of its manifest.

    Checkpoints of others are opened too: torch's own of DCP, safetensors (one file, or the directory of a sharded
    model), and files of ``torch.save``; see `cloudckpt.convert`.

    Args:
        url: of the checkpoint.
        options: how to read.
        store: how to reach the store.
        **overrides: any field of `ReadOptions`, `S3Options`, `RetryOptions` or `TrafficOptions`, by name.

    Raises:
        CheckpointNotFoundError, NotCommittedError: no checkpoint is there.
        ManifestError: its manifest, or what stands for one, is not sound.
        UnsafePickleError: what stands for a manifest would load a class that has no business there.
        EncryptionKeyError, IntegrityError: see `engine.sealing.open_manifest`.
        StoreError: the store refused.
    """
    reading, reaching = with_overrides(options or ReadOptions(), store, overrides)
    return Checkpoint(check_url(os.fspath(url)), reading, reaching)


class Loaded(dict[str, Any]):
    """What was loaded, by name.

    Attributes:
        missing_keys: names that were asked for and that the checkpoint lacks; what they stand for is as it was.
        unexpected_keys: names that the checkpoint has and nobody asked for.
    """

    def __init__(self, found: Mapping[str, Any], missing_keys: list[str], unexpected_keys: list[str]) -> None:
        """Holds ``found``."""
        super().__init__(found)
        self.missing_keys = missing_keys
        self.unexpected_keys = unexpected_keys


class Checkpoint(Mapping[str, "Array | bytes | Any"]):
    """A committed checkpoint: a mapping from keys to lazy arrays, byte strings and plain values.

    A context manager. Reading may go on in several threads at a time, and in a forked process, which opens
    connections of its own. Connections are shared with what else is read from the same place, and outlive it.

    Attributes:
        url: where it is.
    """

    def __init__(self, url: str, options: ReadOptions, store: StoreOptions) -> None:
        """Reads the manifest; call `cloudckpt.open`."""
        self.url = url
        self._access = Access(*find(url, options, store), options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """What is read later raises UsageError."""
        self._access.close()

    @property
    def stats(self) -> Stats:
        """What reading through this object did so far; the manifest is not counted."""
        return self._access.stats

    @property
    def format(self) -> str:
        """What wrote it: ``cloudckpt``, ``dcp``, ``safetensors`` or ``torch.save``."""
        return self._access.contents.format

    @property
    def summary(self) -> Summary | None:
        """When and by whom it was saved, and its sizes; None where the format does not say."""
        return self._access.contents.summary

    @property
    def metadata(self) -> dict[str, Any]:
        """The user's own metadata.

        Raises:
            EncryptionKeyError: it is encrypted, and the checkpoint was opened without keys.
        """
        return dict(self._access.contents.metadata)

    def __len__(self) -> int:
        return len(self._access.contents.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._access.contents.entries)

    def __contains__(self, key: object) -> bool:
        return key in self._access.contents.entries

    def __repr__(self) -> str:
        return f"<Checkpoint {self.url}: {self.format}, {len(self)} entries>"

    def match(self, patterns: Patterns) -> list[str]:
        """The keys that match a pattern, or any of several (``"layers.0.*"``; see `fnmatch`), in their order."""
        return matching(self, patterns)

    def __getitem__(self, key: str) -> "Array | bytes | Any":
        """The entry of that key: a lazy `Array`, or the value itself.

        Raises:
            MissingKeyError: there is none; names those that look like it.
            EncryptionKeyError: it is a value that is encrypted, and the checkpoint was opened without keys.
            TooLargeError: it is a byte string that does not fit into memory; `open_file` reads it piece by piece.
        """
        match self._entry(key):
            case TensorEntry() as entry:
                return Array(self._access, key, entry)
            case BytesEntry():
                with self.open_file(key) as file:
                    return file.readall()
            case ValueEntry(value):
                return value
            case _ as never:
                assert_never(never)

    def open_file(self, key: str) -> FileView:
        """An entry's bytes as a seekable file, fetched as they are read.

        Of a byte string, its own; of a tensor, its elements, row-major and little-endian.

        Raises:
            MissingKeyError: there is no such entry.
            UsageError: it is a plain value, and has no bytes.
        """
        entry = self._entry(key)
        if isinstance(entry, ValueEntry):
            msg = f"{key!r} is a plain value, kept in the manifest; take it with checkpoint[{key!r}]"
            raise UsageError(msg)
        if isinstance(entry, TensorEntry):
            array = Array(self._access, key, entry)
            fetch, nbytes = array.read_bytes, array.nbytes
        else:
            self._access.locate([Ask(key, entry, Region((0,), (entry.nbytes,)))])
            nbytes = self._bytes_entry(key).nbytes

            def fetch(at: Range, into: memoryview) -> None:
                region, sink = Region((at.start,), (len(at),)), MemorySink(into, at.start)
                found = self._bytes_entry(key)
                self._access.read(
                    lambda: [Ask(key, found, region)],
                    lambda located: [Wanted(repr(key), located.read_bytes(key, found, region), sink)],
                )

        return FileView(fetch, nbytes, f"{self.url}[{key!r}]", max_ahead=self._access.options.max_request_size)

    def load(
        self,
        patterns: Patterns = "*",
        *,
        into: Mapping[str, Any] | None = None,
        rename: Rename | None = None,
        strict: bool = True,
    ) -> Loaded:
        """Reads several entries at once.

        Elements are cast as they arrive where a destination's dtype differs, a request at a time; see
        `ReadOptions.cast`. If it fails, what was being loaded into is undefined, unless ``verify="before"``.

        Args:
            patterns: of names; what they leave out is left out on both sides.
            into: numpy arrays or torch tensors by name, such as ``model.state_dict()``: filled in place. Without it
                everything is read into new arrays.
            rename: from a key in the checkpoint to the name that it is loaded under: a mapping, or a function.
            strict: refuse to load if something in ``into`` is missing from the checkpoint, or the other way round.

        Raises:
            MissingKeyError: ``strict``, and the names differ; nothing was fetched.
            ShapeMismatchError, DtypeMismatchError: a destination does not fit; nothing was fetched.
            UsageError: a destination is neither an array nor a tensor; nothing was fetched.
            TooLargeError: a new array does not fit into memory; nothing was fetched.
            IntegrityError, StoreError: the bytes could not be had.
        """
        selection = select(self._access.contents.entries, patterns=patterns, rename=rename, names=into)
        if strict:
            selection.refuse_differences(self.url)
        tensors = {name: key for name, key in selection.keys.items() if isinstance(self._entry(key), TensorEntry)}
        if into is not None and len(tensors) < len(selection.keys):
            name = next(name for name in selection.keys if name not in tensors)
            key = selection.keys[name]
            msg = f"{key!r} is no tensor in the checkpoint; take it with checkpoint[{key!r}], and leave it out here"
            raise UsageError(msg)
        found = into
        if found is None:
            found = {name: Array(self._access, key, self._tensor_entry(key)).empty() for name, key in tensors.items()}
        self._fill(tensors, found)
        everything = {name: found[name] if name in tensors else self[key] for name, key in selection.keys.items()}
        return Loaded(everything, selection.missing, selection.unexpected)

    def to_torch(
        self, patterns: Patterns = "*", *, rename: Rename | None = None, dtype: Any = None, device: Any = "cpu"
    ) -> dict[str, Any]:
        """Reads tensors into new torch tensors; needs torch. Entries that are no tensors are left out.

        Args:
            patterns: see `load`.
            rename: see `load`.
            dtype: for those of floating point; they are cast as they arrive. None keeps the stored one.
            device: where to put them.

        Raises:
            CheckpointError: as from `load`.
            ImportError: torch is not installed.
        """
        selection = select(self._access.contents.entries, patterns=patterns, rename=rename)
        keys = {n: k for n, k in selection.keys.items() if isinstance(self._entry(k), TensorEntry)}
        empty = _torch_targets().empty
        entries = {name: self._tensor_entry(key) for name, key in keys.items()}
        into = {n: empty(keys[n], entry.dtype, entry.shape, dtype, device) for n, entry in entries.items()}
        self._fill(keys, into)
        return into

    def _fill(self, keys: Mapping[str, str], into: Mapping[str, Any]) -> None:
        """Reads tensors into ``into``, by name; ``keys`` says which."""
        arrays = {name: Array(self._access, key, self._tensor_entry(key)) for name, key in keys.items()}
        targets = {name: _target(into[name], array, self._access.options) for name, array in arrays.items()}
        self._access.read(
            lambda: [ask for array in arrays.values() for ask in array.asks()],
            lambda located: [w for name, array in arrays.items() for w in array.wanted(targets[name], located)],
        )

    def _entry(self, key: str) -> OpenEntry:
        if key not in self._access.contents.entries:
            msg = f"{self.url} has no entry {key!r} among its {len(self)}, see keys(); {nearest(key, self.keys())}"
            raise MissingKeyError(msg.removesuffix("; "))
        return self._access.contents.entry(key)

    def _tensor_entry(self, key: str) -> TensorEntry:
        entry = self._entry(key)
        assert isinstance(entry, TensorEntry)  # noqa: S101 - for the type checker
        return entry

    def _bytes_entry(self, key: str) -> BytesEntry:
        entry = self._entry(key)
        assert isinstance(entry, BytesEntry)  # noqa: S101 - for the type checker
        return entry


def _target(value: Any, array: Array, options: ReadOptions) -> Target:
    """The destination as a target, if the array fits into it."""
    if isinstance(value, np.ndarray):
        stored: Any = array.dtype
        target: Target = ArrayTarget(value, stored)
    elif _is_tensor(value):
        stored = _torch_targets().dtype_of(array.dtype_name)
        target = _torch_targets().TensorTarget(value, stored)
    else:
        msg = f"cannot load {array!r} into {type(value).__name__}; give a numpy array or a torch tensor"
        raise UsageError(msg)
    if tuple(value.shape) != array.shape:
        msg = f"{array!r} cannot be loaded into the shape {tuple(value.shape)}"
        raise ShapeMismatchError(msg)
    if value.dtype != stored and not options.cast:
        msg = f"{array!r} cannot be loaded into {value.dtype}, because of cast=False"
        raise DtypeMismatchError(msg)
    return target


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def _torch_targets() -> Any:
    """The one step up the stairs, taken for who asks for torch's tensors."""
    from cloudckpt.dcp import targets

    return targets
