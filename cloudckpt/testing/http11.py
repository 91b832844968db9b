"""As much of HTTP/1.1 as a proxy needs: heads as they came, and where bodies end.

Law: nothing is understood that needs not be, so that what passes stays as it was.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass

_PIECE = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A request's or a reply's head.

    Attributes:
        first: its first line.
        lines: the others, as they came.
        headers: their values by name, in lower case.
    """

    first: str
    lines: tuple[str, ...]
    headers: dict[str, str]

    def encode(self, *, without: Collection[str], more: Mapping[str, str]) -> bytes:
        """Its bytes, without some headers (in lower case) and with others."""
        kept = [line for line in self.lines if line.partition(":")[0].strip().lower() not in without]
        kept += (f"{name}: {value}" for name, value in more.items())
        return "\r\n".join([self.first, *kept, "", ""]).encode("latin-1")


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next head, or None where the connection ended before one began."""
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as e:
        if e.partial:
            raise
        return None
    first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
    split = (line.partition(":") for line in lines)
    return Head(
        first=first, lines=tuple(lines), headers={name.strip().lower(): value.strip() for name, _, value in split}
    )


async def body_of(head: Head, reader: asyncio.StreamReader, *, is_reply: bool) -> AsyncIterator[bytes]:
    """Yields the body's bytes as they lie on the connection, chunk headers included."""
    if "chunked" in head.headers.get("transfer-encoding", "").lower():
        async for piece in _chunks(reader):
            yield piece
        return
    length = head.headers.get("content-length")
    if length is None:
        while is_reply and (piece := await reader.read(_PIECE)):
            yield piece
        return
    left = int(length)
    while left:
        piece = await reader.read(min(left, _PIECE))
        if not piece:
            raise EOFError
        left -= len(piece)
        yield piece


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        line = await reader.readuntil(b"\r\n")
        yield line
        size = int(line.split(b";")[0], 16)
        if size:
            yield await reader.readexactly(size + 2)
            continue
        while line != b"\r\n":
            line = await reader.readuntil(b"\r\n")
            yield line
        return
