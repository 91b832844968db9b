"""A process that sends bytes to a null server, and does nothing else.

Law: what it costs is what any upload would cost whoever shares the cores with it and the server.
"""

from contextlib import suppress
from http.client import HTTPConnection
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

_BODY_NBYTES = 16 << 20


class Feeder:
    """Sends as many bytes for each save as it was told once; see `async_contenders.Saves`."""

    def __init__(self, endpoint: str, nbytes: int) -> None:
        """Starts the process.

        Args:
            endpoint: of the server, over http.
            nbytes: for each save.
        """
        context = get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_feed, args=(far, endpoint, nbytes), daemon=True)
        self._process.start()
        far.close()

    def save(self, step: int, state: dict[str, Any]) -> "Feeder":
        """Begins to send."""
        del state
        self._pipe.send(step)
        return self

    def done(self) -> bool:
        """Whether all was sent."""
        return self._pipe.poll()

    def result(self) -> object:
        """Waits until all was sent."""
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join()


def _feed(pipe: "Connection[Any, Any]", endpoint: str, nbytes: int) -> None:
    at = urlsplit(endpoint)
    connection = HTTPConnection(at.hostname or "", at.port)
    body = memoryview(bytearray(_BODY_NBYTES))
    with suppress(EOFError):
        while True:
            step = pipe.recv()
            for start in range(0, nbytes, _BODY_NBYTES):
                connection.request("PUT", "/fed/bytes", body[: min(_BODY_NBYTES, nbytes - start)])
                connection.getresponse().read()
            pipe.send(step)
