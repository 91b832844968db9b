"""How long a server may be silent inside a body.

Law: a bound beside aiohttp's own clock, which stops where a body's chunks are malformed: the connection is closed
then, and who reads the body is told nothing.
"""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")
_LATER_S = 1
"""Than aiohttp's clock, whose errors say more."""


async def heard(reading: Awaitable[T], silence_s: float | None) -> T:
    """What ``reading`` brings.

    Args:
        reading: the next piece of a body.
        silence_s: how long it may take, but for a second; None for ever.

    Raises:
        TimeoutError: nothing came.
    """
    async with asyncio.timeout(None if silence_s is None else silence_s + _LATER_S):
        return await reading
