"""What the elements of a tensor of any size are like.

Law: sync; they are read once, piece by piece, and memory is bounded as `catalog.elements` says.
"""

from collections.abc import Callable
from functools import reduce
from operator import add

from cloudckpt.catalog.elements import Batch, batches, has_numbers, read_batch, spread
from cloudckpt.catalog.numbers import Statistics
from cloudckpt.catalog.witness import witnessed
from cloudckpt.checkpoint import Checkpoint
from cloudckpt.errors import DtypeMismatchError, UsageError
from cloudckpt.manifest import TensorEntry

Report = Callable[[int, int], None]
"""Told of the bytes that are done, and of all that there are to do."""


def statistics(checkpoint: Checkpoint, key: str, *, report: Report | None = None) -> Statistics:
    """Reads a tensor, and tells what its elements are like.

    Args:
        checkpoint: open.
        key: of the tensor.
        report: is told how far it is.

    Raises:
        MissingKeyError: there is no such entry.
        UsageError: it is no tensor; nothing was fetched.
        DtypeMismatchError: numpy does not know its dtype; nothing was fetched.
        CheckpointChangedError, CheckpointNotFoundError: see `witnessed`.
        IntegrityError, StoreError: the bytes could not be had.
    """
    entry = checkpoint._entry(key)
    if not isinstance(entry, TensorEntry):
        msg = f"{key!r} is no tensor, so there are no numbers to tell of"
        raise UsageError(msg)
    if not has_numbers(entry.dtype):
        msg = f"{key!r} has dtype {entry.dtype}, which numpy does not know; load it with torch"
        raise DtypeMismatchError(msg)
    access = checkpoint._access

    def look(batch: Batch) -> Statistics:
        return reduce(add, map(Statistics.of, read_batch(access, batch)))

    found, done = Statistics(), 0
    total = sum(piece.nbytes for batch in batches(access, [key]) for piece in batch)
    with witnessed(checkpoint):
        for batch, part in spread(look, batches(access, [key])):
            found += part
            done += sum(piece.nbytes for piece in batch)
            if report is not None:
                report(done, total)
    return found
