"""Memory that a codec uses again and again: touching fresh pages costs more than filling them.

Law: each thread has its own, and what lies in it is good until that thread asks again.
"""

from threading import local

import numpy as np


class Scratch:
    """Grows to what was asked for at most."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._of_thread = local()

    def take(self, nbytes: int) -> memoryview:
        """Memory of this thread, contents undefined."""
        held: memoryview = getattr(self._of_thread, "held", memoryview(bytearray()))
        if len(held) < nbytes:
            held = self._of_thread.held = np.empty(nbytes, np.uint8).data
        return held[:nbytes]
