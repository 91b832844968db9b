"""An S3 server in this process.

Law: a real one; what is saved to it is gone when its context ends.
"""

import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedServer:
    """A running S3 server: what to give to `S3Options`, and ``environ`` for other processes."""

    endpoint_url: str
    access_key: str
    secret_key: str

    @property
    def environ(self) -> dict[str, str]:
        """AWS's own environment variables that lead a process to this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }


@contextmanager
def embedded_server(*buckets: str) -> Iterator[EmbeddedServer]:
    """Runs moto's S3 server in a thread of this process, on a free port of 127.0.0.1.

    Needs ``cloudckpt[server]``. What is saved to it is gone when the context ends.

    Args:
        *buckets: made at the start.
    """
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    info = EmbeddedServer(endpoint_url=f"http://{host}:{port}", access_key="testing", secret_key="testing")  # noqa: S106 - moto asks for none
    try:
        for bucket in buckets:
            _put_bucket(f"{info.endpoint_url}/{bucket}")
        yield info
    finally:
        server.stop()


def _put_bucket(url: str) -> None:
    """Makes a bucket on a server that asks for no signature, past any proxy and any AWS configuration."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, method="PUT")):  # noqa: S310 - http to this machine
        return
