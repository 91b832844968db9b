"""Memory for what somebody asks for whole.

Law: it is had before anything is fetched, or the error says what did not fit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from cloudckpt.errors import TooLargeError


@contextmanager
def made_for(what: str, nbytes: int) -> Iterator[None]:
    """Around what makes memory, and nothing else.

    Args:
        what: that is to be held, for the message.
        nbytes: that it takes.

    Raises:
        TooLargeError: the memory could not be had, or is more than can be addressed.
    """
    try:
        yield
    except (MemoryError, OverflowError, ValueError) as e:  # the latter two: numpy's of absurd shapes
        raise too_large(what, nbytes) from e


def too_large(what: str, nbytes: int) -> TooLargeError:
    """The error for what does not fit."""
    return TooLargeError(
        f"{what} takes {nbytes} bytes, which this process cannot hold in one piece: read it in slices; and if it "
        "should not be so large, check who wrote the checkpoint"
    )


def buffer_for(what: str, nbytes: int) -> memoryview:
    """Bytes to receive into, which are not touched until something arrives: an absurd number costs nothing.

    Raises:
        TooLargeError: see `made_for`.
    """
    with made_for(what, nbytes):
        return np.empty(nbytes, np.uint8).data
