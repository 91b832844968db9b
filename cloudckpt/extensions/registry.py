"""Extensions by name: from a checkpoint's descriptors back to objects.

Law: pure; nothing is imported because a checkpoint names it.
"""

from collections.abc import Sequence
from typing import Self

from cloudckpt.errors import UnknownExtensionError
from cloudckpt.extensions.aesgcm import AesGcm
from cloudckpt.extensions.base import Extension
from cloudckpt.extensions.byteplane import BytePlane
from cloudckpt.extensions.keys import Keys
from cloudckpt.extensions.zstd import ZStandard


class ExtensionRegistry:
    """Classes of extensions by `Extension.registry_name`; knows cloudckpt's own from the start."""

    def __init__(self) -> None:
        """Holds `ZStandard`, `BytePlane` and `AesGcm`, the last without keys."""
        self.extensions: dict[str, type[Extension]] = {}
        for cls in (ZStandard, BytePlane, AesGcm):
            self.register(cls)

    def register(self, cls: type[Extension]) -> None:
        """Adds a class, in place of one of the same name."""
        self.extensions[cls.registry_name()] = cls

    def with_keys(self, keys: Keys) -> Self:
        """A copy whose `AesGcm` finds its keys in ``keys``."""
        copy = type(self)()
        copy.extensions |= self.extensions
        copy.register(AesGcm.with_keys(keys))
        return copy

    def from_descriptor_list(self, descriptors: Sequence[str]) -> list[Extension]:
        """Makes the extensions that descriptors name, in their order.

        Raises:
            UnknownExtensionError: no class is registered under a name, or it does not know the version.
            MissingLibraryError: a library is needed that is not installed.
        """
        return [self._from_descriptor(descriptor) for descriptor in descriptors]

    def _from_descriptor(self, descriptor: str) -> Extension:
        name, _, version = descriptor.partition("/")
        cls = self.extensions.get(name)
        if cls is None:
            msg = (
                f"no extension named {name!r} is registered, only {', '.join(sorted(self.extensions))}. Register "
                "its class: registry = ExtensionRegistry(); registry.register(...); pass registry="
            )
            raise UnknownExtensionError(msg)
        try:
            return cls.from_descriptor(version)
        except ValueError as e:  # what torch's own raise
            if isinstance(e, UnknownExtensionError):
                raise
            msg = f"{cls.__name__} cannot be made from {descriptor!r}: {e}"
            raise UnknownExtensionError(msg) from e
