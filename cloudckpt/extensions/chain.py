"""Extensions one after the other, and which items go through which.

Law: pure but for the codecs' own work. A frame is restored to exactly the size it had, or not at all.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from cloudckpt.errors import IntegrityError, UsageError
from cloudckpt.extensions.aesgcm import AesGcm, DataKey
from cloudckpt.extensions.base import Extension, FrameCodec, FrameContext, FrameTransformExtension
from cloudckpt.extensions.byteplane import BytePlane
from cloudckpt.extensions.scratch import Scratch
from cloudckpt.extensions.streams import StreamCodec
from cloudckpt.extensions.zstd import ZStandard

Extensions = Sequence[Extension] | Mapping[str, Sequence[Extension]]
"""One chain for all items, or chains by pattern of the key (see `Rules`)."""


class ShardChain:
    """The codecs of one shard, first applied first. Safe to use from several threads."""

    def __init__(
        self, descriptors: Sequence[str], codecs: Sequence[FrameCodec], scratch: Scratch | None = None
    ) -> None:
        """Takes one descriptor for each codec, and memory that they may share with those of other shards."""
        self.descriptors = tuple(descriptors)
        self._codecs = tuple(codecs)
        scratch = scratch or Scratch()
        for codec in codecs:
            codec.scratch = scratch

    @property
    def params(self) -> tuple[dict[str, str], ...]:
        """Each codec's `FrameCodec.params`."""
        return tuple(dict(codec.params) for codec in self._codecs)

    def max_stored_size(self, nbytes: int) -> int:
        """How many bytes a frame of ``nbytes`` is stored in, at most."""
        for size, codec in zip(self._sizes(nbytes), self._codecs, strict=False):
            most = codec.max_stored_size(nbytes)
            nbytes = min(nbytes, most) if codec.is_optional and size is not None else most
        return nbytes

    def transform(self, data: memoryview, frame: FrameContext) -> Sequence[memoryview]:
        """The frame's bytes as they are stored, in order, not joined.

        Raises:
            UsageError: an extension makes more of them than could be read back.
        """
        sections: Sequence[memoryview] = [data]
        is_lent = False
        for size, codec, name in zip(self._sizes(len(data)), self._codecs, self.descriptors, strict=False):
            given = _nbytes(sections)
            made = [memoryview(section) for section in codec.transform(sections, frame)]
            if codec.is_optional and size is not None and _nbytes(made) >= given:
                continue
            if _nbytes(made) > codec.max_stored_size(given):
                msg = f"the extension {name} makes {_nbytes(made)} bytes of {given}; more than it may"
                raise UsageError(msg)
            sections, is_lent = made, codec.reuses_memory
        return [memoryview(b"".join(sections))] if is_lent else sections

    def restore(self, stored: memoryview, frame: FrameContext, nbytes: int) -> memoryview:
        """The plain bytes of a frame, good until the same thread restores another.

        Args:
            stored: what `transform` returned, joined.
            frame: which frame it is.
            nbytes: how many plain bytes it has.

        Raises:
            IntegrityError: it is not what was stored; says which extension found out.
        """
        sizes = self._sizes(nbytes)
        limit = self.max_stored_size(nbytes)
        for i in reversed(range(len(self._codecs))):
            codec, size = self._codecs[i], sizes[i]
            if codec.is_optional and size is not None and len(stored) == size:
                continue
            try:
                stored = memoryview(codec.restore(stored, frame, limit=limit if size is None else size))
            except MemoryError:
                raise
            except Exception as e:
                msg = f"{self.descriptors[i]} cannot restore it: {e}"
                raise IntegrityError(msg) from e
            if size is not None and len(stored) != size:
                msg = f"{self.descriptors[i]} restored {len(stored)} bytes where there should be {size}"
                raise IntegrityError(msg)
        if len(stored) != nbytes:
            msg = f"it was restored to {len(stored)} bytes where there should be {nbytes}"
            raise IntegrityError(msg)
        return stored

    def _sizes(self, nbytes: int) -> list[int | None]:
        """What each codec is given, and at last what is stored; None where that depends on the bytes."""
        sizes: list[int | None] = [nbytes]
        for codec in self._codecs:
            before = sizes[-1]
            sizes.append(None if before is None else codec.stored_size(before))
        return sizes


@dataclass(frozen=True, slots=True)
class Chain:
    """Extensions in the order in which they are applied; none for plain shards."""

    extensions: tuple[Extension, ...] = ()

    def start_shard(self, scratch: Scratch | None = None) -> ShardChain:
        """The chain at work on a new shard, with memory to share. May ask a key service.

        Raises:
            EncryptionKeyError: a key is missing.
        """
        codecs = [
            e.start_shard() if isinstance(e, FrameTransformExtension) else _streamed(e) for e in self.extensions
        ]
        return ShardChain([e.get_descriptor() for e in self.extensions], codecs, scratch)


class Rules:
    """Which items go through which extensions."""

    def __init__(self, extensions: Extensions) -> None:
        """Takes one chain for all keys, or patterns as `fnmatch.fnmatchcase` reads them.

        A key goes by the first pattern that it matches; one that matches none is stored plain.

        Raises:
            UsageError: something that is no extension.
        """
        given = extensions if isinstance(extensions, Mapping) else {"*": extensions}
        self._chains = [(pattern, Chain(tuple(chain))) for pattern, chain in given.items()]
        for _, chain in self._chains:
            _check(chain)

    @property
    def chains(self) -> list[Chain]:
        """All of them, in their order."""
        return [chain for _, chain in self._chains]

    def new_data_key(self) -> DataKey | None:
        """A data key for the manifest, under the first key that something is encrypted under; None if nothing is.

        Raises:
            EncryptionKeyError: that key is missing.
        """
        found = [e for _, chain in self._chains for e in chain.extensions if isinstance(e, AesGcm)]
        return found[0].new_data_key() if found else None

    def chain_for(self, key: str) -> Chain:
        """The chain of that key's items."""
        return next((chain for pattern, chain in self._chains if fnmatchcase(key, pattern)), Chain())

    def group(self, keys: Sequence[str]) -> list[tuple[Chain, list[int]]]:
        """Indices of ``keys`` by the chain that they go through, in its order; keys that go plain are one group."""
        groups: dict[int, tuple[Chain, list[int]]] = {}
        for i, key in enumerate(keys):
            chain = self.chain_for(key)
            groups.setdefault(id(chain) if chain.extensions else 0, (chain, []))[1].append(i)
        return list(groups.values())


def open_shard(
    extensions: Sequence[Extension],
    descriptors: Sequence[str],
    params: Sequence[Mapping[str, str]],
    scratch: Scratch | None = None,
) -> ShardChain:
    """The chain that a shard was written with.

    Args:
        extensions: made from the descriptors.
        descriptors: from the manifest, in the order in which they were applied.
        params: each codec's, from the manifest; none at all where none has some.
        scratch: memory that it may share with other shards.

    Raises:
        EncryptionKeyError: a key is missing or wrong.
    """
    codecs: list[FrameCodec] = []
    for i, extension in enumerate(extensions):
        if isinstance(extension, FrameTransformExtension):
            codecs.append(extension.open_shard(params[i] if i < len(params) else {}))
        else:
            codecs.append(_streamed(extension))
    return ShardChain(descriptors, codecs, scratch)


def _streamed(extension: Extension) -> FrameCodec:
    return StreamCodec(extension)  # type: ignore[arg-type]


def _check(chain: Chain) -> None:
    for extension in chain.extensions:
        for method in ("get_descriptor", "transform_to", "transform_from"):
            if isinstance(extension, type) or not callable(getattr(extension, method, None)):
                msg = f"extensions= holds {extension!r}, which is no object with {method}(); see cloudckpt.extensions"
                raise UsageError(msg)
    for i, extension in enumerate(chain.extensions):
        after = [e.get_descriptor() for e in chain.extensions[i + 1 :] if isinstance(e, ZStandard | BytePlane)]
        if isinstance(extension, AesGcm) and after:
            warnings.warn(
                f"{', '.join(after)} after encryption gains nothing: what is encrypted does not compress",
                stacklevel=5,
            )


def _nbytes(sections: Sequence[memoryview]) -> int:
    return sum(len(section) for section in sections)
