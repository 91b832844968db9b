"""The border to DCP: whatever fails behind it comes out as an error of ours that survives pickle.

Law: DCP sends exceptions between ranks; one that cannot be unpickled there leaves all ranks waiting.
"""

import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from cloudckpt.errors import CheckpointError, unwrap


@contextmanager
def border(failure: type[CheckpointError], doing: str) -> Iterator[None]:
    """Turns exceptions into ours, and names the rank and its host where there are several.

    Args:
        failure: the class for exceptions that are not ours.
        doing: what failed, for the message.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:
        shown = unwrap(e)
        prefix = f"{_who()}: " if dist.is_available() and dist.is_initialized() else ""
        if isinstance(shown, CheckpointError):
            mine = type(shown)(prefix + str(shown))
        else:
            mine = failure(f"{prefix}{doing} failed: {type(shown).__name__}: {shown}")
            mine.add_note("".join(traceback.format_exception(shown)))
        for note in getattr(shown, "__notes__", ()):
            mine.add_note(str(note))
        raise mine from e


def _who() -> str:
    return f"rank {dist.get_rank()} on {socket.gethostname()}"
