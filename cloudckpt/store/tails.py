"""Which requests are far slower than their peers.

Law: pure but for the clock's readings that it is given.
"""

from collections import deque
from statistics import median

_REMEMBERED = 64
_LEAST_KNOWN = 8
"""Requests that must have been answered before one is called late."""
_REQUEST_NBYTES = 1 << 20
"""Bytes that take about as long as the rest of a request, so that small and large ones can be compared."""
_LEAST_REPEATS = 2


class Tails:
    """What requests of one kind took lately, and how many of them were sent again for being late."""

    def __init__(self, *, factor: float, least_s: float, share: float) -> None:
        """Takes what makes a request late.

        Args:
            factor: times what its peers take, by the median of the last of them.
            least_s: none is late before.
            share: of all requests that may be sent again, beside the first two.
        """
        self._factor = factor
        self._least_s = least_s
        self._share = share
        self._s_per_byte: deque[float] = deque(maxlen=_REMEMBERED)
        self._answered = 0
        self._repeats = 0

    def answered(self, nbytes: int, seconds: float) -> None:
        """Takes note of a request that went well."""
        self._answered += 1
        self._s_per_byte.append(seconds / (nbytes + _REQUEST_NBYTES))

    def repeats(self, nbytes: int, seconds: float) -> bool:
        """Whether a request that is under way for so long is to be sent again, which is taken note of."""
        if seconds < self._least_s or len(self._s_per_byte) < _LEAST_KNOWN:
            return False
        expected_s = median(self._s_per_byte) * (nbytes + _REQUEST_NBYTES)
        if seconds < self._factor * expected_s or self._repeats >= _LEAST_REPEATS + self._share * self._answered:
            return False
        self._repeats += 1
        return True
