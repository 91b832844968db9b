"""Which requests are far slower than their peers.

Law: pure but for the clock's readings that it is given.
"""

from collections import deque

_REMEMBERED = 64
_LEAST_KNOWN = 8
"""Requests that must have been answered before one is called late."""
_REQUEST_NBYTES = 8 << 20
"""Counted beside the bytes of each request: small ones wait like others on a busy server. So small and large ones
can be compared."""
_TIMES_NINE_OF_TEN = 2
_LEAST_REPEATS = 2


class Tails:
    """What requests of one kind took lately, and how many of them were sent again for being late."""

    def __init__(self, *, factor: float, least_s: float, share: float) -> None:
        """Takes what makes a request late.

        Args:
            factor: times what its peers take, by the median of the last of them; where those differ much, as on a
                server that is busy, it is not late either before twice what nine of ten take.
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
        known = sorted(self._s_per_byte)
        usual = max(self._factor * known[len(known) // 2], _TIMES_NINE_OF_TEN * known[len(known) * 9 // 10])
        if seconds < usual * (nbytes + _REQUEST_NBYTES):
            return False
        if self._repeats >= _LEAST_REPEATS + self._share * self._answered:
            return False
        self._repeats += 1
        return True
