"""The null server as a process of its own, under a certificate of its own where it speaks TLS.

Law: it ends with the context it was started for, however that ends: the pipe between them closes with the parent.
"""

import contextlib
import datetime as dt
import os
import ssl
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from cloudckpt.cli.bench.null_server import CLOUD, NullServer, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A null server that can be asked for.

    Attributes:
        shape: of the network before it.
        is_tls: whether it is reached over https.
    """

    shape: Shape = field(default_factory=Shape)
    is_tls: bool = False


KINDS = {"null": Kind(), "null-tls": Kind(is_tls=True), "cloud": Kind(shape=CLOUD)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a null server listens.

    Attributes:
        url: its endpoint.
        ca_file: the certificate to trust, or None over http.
        pid: of its process.
    """

    url: str
    ca_file: str | None
    pid: int

    @property
    def environ(self) -> dict[str, str]:
        """The variables of AWS that lead there, with credentials that nobody looks at."""
        found = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": "null",
            "AWS_SECRET_ACCESS_KEY": "null",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        return found if self.ca_file is None else found | {"AWS_CA_BUNDLE": self.ca_file}


@contextlib.contextmanager
def serving(kind: Kind) -> Iterator[Address]:
    """Starts a server, and ends it with the context."""
    context = get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=_serve, args=(far, kind), daemon=True)
    process.start()
    far.close()
    try:
        yield near.recv()
    finally:
        near.close()
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(pipe: "Connection[Any, Any]", kind: Kind) -> None:
    with tempfile.TemporaryDirectory(prefix="null-server-") as folder:
        pem = make_certificate(folder) if kind.is_tls else None
        tls = None
        if pem is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(pem)
        server = NullServer(kind.shape, tls)
        threading.Thread(target=server.serve, daemon=True).start()
        with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
            pipe.send(Address(url=server.url, ca_file=pem, pid=os.getpid()))
            pipe.recv()  # nothing ever comes but the end
    os._exit(0)


def make_certificate(folder: str) -> str:
    """Makes a key and a certificate for 127.0.0.1 that is good for a day, and returns the file with both."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder(
        issuer_name=name,
        subject_name=name,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - dt.timedelta(minutes=5),
        not_valid_after=now + dt.timedelta(days=1),
    )
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    path = os.path.join(folder, "null.pem")
    with open(path, "wb") as file:
        file.write(certificate.public_bytes(serialization.Encoding.PEM))
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
    return path
