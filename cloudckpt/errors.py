"""Every error a caller can catch.

Law: each class survives pickle (DCP sends exceptions across ranks), so no class has an ``__init__`` of
its own, and context travels as notes. The class tells the handler what to do; the message tells the person.
"""

from collections.abc import Iterator


class CheckpointError(Exception):
    """The base of every error that cloudckpt raises on purpose."""


# What stands at a URL.


class CheckpointNotFoundError(CheckpointError):
    """No checkpoint is there, and nothing of one."""


class NotCommittedError(CheckpointNotFoundError):
    """Shards are there but no manifest: the save never committed."""


class CheckpointExistsError(CheckpointError):
    """A committed checkpoint is there already and ``overwrite`` was not asked for. Nothing was written."""


class CheckpointChangedError(CheckpointError):
    """Another save replaced the checkpoint while it was looked at. Nothing was learnt of either; look again."""


class CommitConflictError(CheckpointError):
    """Another save committed to the same URL first. Its checkpoint stands; ours does not exist."""


class CommitUnknownError(CheckpointError):
    """Whether the commit landed could not be learnt before the deadline. The shards were kept."""


# What the bytes say.


class ManifestError(CheckpointError, ValueError):
    """The manifest cannot be trusted; the message lists every problem found in it."""


class UnsupportedVersionError(ManifestError):
    """The manifest is of a format version that this release does not read."""


class IntegrityError(CheckpointError):
    """Bytes read are not the bytes written."""


class ReservedNameError(CheckpointError, ValueError):
    """A name cannot be stored as it is spelled."""


# What the caller asked for.


class UsageError(CheckpointError, ValueError):
    """An option or a combination of options that cannot work."""


class UnsupportedUrlError(UsageError):
    """No store serves this URL."""


class UnstorableError(CheckpointError, TypeError):
    """A value of the state dict that cannot be stored. Nothing of this rank was written."""


class MissingKeyError(CheckpointError, KeyError):
    """The checkpoint has no entry of that name."""

    __str__ = Exception.__str__  # KeyError's shows the repr of the message


class ShapeMismatchError(CheckpointError, ValueError):
    """A shape or an index that does not fit the tensor."""


class TooLargeError(CheckpointError, MemoryError):
    """What was asked for whole does not fit into this process's memory. Nothing of it was fetched."""


class DtypeMismatchError(CheckpointError, TypeError):
    """The dtype of the destination differs from the stored one, and casting was refused."""


class UnsafePickleError(CheckpointError):
    """A bytes item whose unpickling would load a class or function that torch does not hold safe."""


# What extensions ask for.


class UnknownExtensionError(CheckpointError, ValueError):
    """No extension of that name and version is registered."""


class MissingLibraryError(CheckpointError, ImportError):
    """An extension needs a library that is not installed; the message says which."""


class EncryptionKeyError(CheckpointError, ValueError):
    """A key is missing, or is not the one that was encrypted with. Never shows a key."""


# What a save or a load ran into.


class SaveFailedError(CheckpointError):
    """A save failed for a reason that is not ours; the message names rank, host and reason."""


class DeadlineError(CheckpointError, TimeoutError):
    """A save took longer than its ``deadline_s``. It was broken off, and nothing was committed."""


class SaveCancelledError(CheckpointError):
    """A save was told to stop before its commit. Nothing was committed."""


class LoadFailedError(CheckpointError):
    """A load failed for a reason that is not ours; what it was loading into is undefined now."""


# What the ranks told each other.


class RanksFailedError(CheckpointError):
    """Some ranks failed at what all did together, not all for one reason of ours; the message names each and why."""


class RanksLostError(RanksFailedError):
    """Ranks cannot be reached: killed, or hung for longer than the group's timeout. The group is of no more use."""


class BarrierTimeoutError(CheckpointError, TimeoutError):
    """Some ranks did not come to a barrier in time; the message names them. It was passed by no rank."""


# What the store answered.


class StoreError(CheckpointError):
    """The store refused a request, and asking again will not help."""


class ObjectNotFoundError(StoreError):
    """No object has that key."""


class BucketNotFoundError(StoreError):
    """The bucket, or the directory that stands for it, does not exist."""


class CredentialsError(StoreError):
    """No credentials were found, or the store does not accept them."""


class StaleCredentialsError(CredentialsError):
    """The store calls the credentials expired; nothing was carried out. May be asked again: with fresh ones."""


class PermissionDeniedError(StoreError):
    """The credentials are good but do not allow this."""


class PreconditionFailedError(StoreError):
    """A conditional request's condition did not hold, or the store asks to look again (409)."""


class ChecksumRefusedError(StoreError):
    """The store found that the bytes it received do not match their checksum."""


class NotImplementedByStoreError(StoreError):
    """The store does not know this kind of request."""


class ChecksumsNotKnownError(NotImplementedByStoreError):
    """The store refused a request that carried a checksum, which it was not known to know; nothing was carried out.

    May be asked again: without one.
    """


class StoreUnavailableError(StoreError):
    """No usable answer: a timeout, a lost connection, a 5xx. The request may have been carried out.

    Attributes:
        retry_after_s: how long the store asks to be left alone, if it says.
    """

    retry_after_s: float | None = None


class ThrottledError(StoreUnavailableError):
    """The store asks for fewer requests."""


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yields the exceptions in ``error``, looking through (nested) exception groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def unwrap(error: BaseException) -> BaseException:
    """The exception to show for ``error``: itself, or the first of a group, the others in its notes."""
    first, *others = leaves(error)
    for other in others:
        first.add_note(f"meanwhile also: {type(other).__name__}: {other}")
    return first
