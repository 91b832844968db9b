"""Memory that codecs use again and again: touching fresh pages costs more than filling them.

Law: each thread has its own, twice: what a codec makes of what lies in the one lies in the other.
"""

from threading import local

import numpy as np


class Scratch:
    """Two buffers for each thread, taken in turns, each as large as was asked for at most."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._of_thread = local()

    def take(self, nbytes: int) -> memoryview:
        """Memory of this thread, contents undefined; good until the thread has asked twice more."""
        held: list[memoryview] = getattr(self._of_thread, "held", None) or [memoryview(bytearray())] * 2
        held.reverse()
        if len(held[0]) < nbytes:
            held[0] = np.empty(nbytes, np.uint8).data
        self._of_thread.held = held
        return held[0][:nbytes]
