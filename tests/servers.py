"""S3 servers for tests: moto in this process, the others through the scripts in ``localstack/``.

Law: a server that was started is stopped, at the latest when this process exits; processes end by id, never by name.
"""

import atexit
import contextlib
import os
import secrets
import socket
import subprocess
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

T = TypeVar("T")

SCRIPTS = Path(__file__).resolve().parent.parent / "localstack"

# Below the ports that Linux hands out to clients (32768 and up), so no connection of a test can sit on one of ours.
PORTS = range(20000, 32000)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What a client needs to know of a running server."""

    name: str
    endpoint_url: str
    access_key: str
    secret_key: str


class S3Server(ABC):
    """A server that can be started, stopped and crashed, any number of times."""

    name: ClassVar[str]
    durable: ClassVar[bool]
    """Whether what it acknowledged is there again after `kill9` and `start`."""
    access_key: str
    secret_key: str

    @property
    @abstractmethod
    def endpoint_url(self) -> str:
        """Where it serves: the same after a restart, except for moto. Raises RuntimeError before the first start."""

    @property
    def info(self) -> ServerInfo:
        """The four things a client needs."""
        return ServerInfo(
            name=self.name, endpoint_url=self.endpoint_url, access_key=self.access_key, secret_key=self.secret_key
        )

    @abstractmethod
    def start(self) -> None:
        """Returns when it serves requests. A durable server resumes on its data."""

    @abstractmethod
    def stop(self) -> None:
        """Returns when nothing of it runs any more. May be called again, and without a start."""

    @abstractmethod
    def kill9(self) -> None:
        """Ends it as a crash would, with SIGKILL to all of its processes."""

    def restart(self) -> None:
        """Stops and starts."""
        self.stop()
        self.start()


class MotoServer(S3Server):
    """moto in this process. It cannot crash alone, so `kill9` is `stop`."""

    name = "moto"
    durable = False

    def __init__(self) -> None:
        self._running = ExitStack()
        self._endpoint_url: str | None = None
        self.access_key = self.secret_key = ""  # known after the start

    @property
    def endpoint_url(self) -> str:
        return _started(self._endpoint_url, self.name)

    def start(self) -> None:
        from cloudckpt.testing import embedded_server

        self.stop()
        server = self._running.enter_context(embedded_server())
        self._endpoint_url = server.endpoint_url
        self.access_key, self.secret_key = server.access_key, server.secret_key
        atexit.register(self.stop)

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self._running.close()

    def kill9(self) -> None:
        self.stop()


class ScriptServer(S3Server):
    """A server of its own processes, through ``localstack/<name>.sh``, with its data in one directory."""

    n_ports: ClassVar[int]
    """How many ports it takes, one after another from the first."""

    def __init__(self, workdir: Path) -> None:
        self._dir = workdir.resolve()
        self._port: int | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{_started(self._port, self.name)}"

    def start(self) -> None:
        atexit.register(self.stop)
        attempts = 1 if self._port else 2  # a port found free may be taken by the time the server binds it
        for attempt in range(1, attempts + 1):
            port = self._port or find_free_ports(self.n_ports)
            try:
                self._run("start", str(port), environ=self._environ(port))
            except BaseException as error:  # an interrupted start may have left its server behind
                self.stop()
                if attempt == attempts or not isinstance(error, ServerError):
                    raise
            else:
                self._port = port
                return

    def stop(self) -> None:
        self._run("stop")
        atexit.unregister(self.stop)

    def kill9(self) -> None:
        self._run("kill9")
        atexit.unregister(self.stop)

    def _environ(self, port: int) -> dict[str, str]:
        return {"AK": self.access_key, "SK": self.secret_key}

    def _run(self, verb: str, *args: str, environ: dict[str, str] | None = None) -> None:
        _run_script(self.name, verb, str(self._dir), *args, environ=environ)


class SeaweedServer(ScriptServer):
    """SeaweedFS: durable, fast to start, without root."""

    name = "seaweedfs"
    durable = True
    access_key = "testing"
    secret_key = "testingsecret"
    n_ports = 8


class LocalStackServer(ScriptServer):
    """LocalStack: closest to AWS's checksum rules; all in memory."""

    name = "localstack"
    durable = False
    access_key = secret_key = "test"
    n_ports = 1


class RgwServer(ScriptServer):
    """Ceph RGW, over http and https at once. Needs root."""

    name = "rgw"
    durable = True
    access_key = "testing"
    secret_key = "testingsecret"
    n_ports = 12

    @property
    def tls_endpoint_url(self) -> str:
        """The same gateway over https; its certificate is its own authority: see `ca_file`."""
        return f"https://127.0.0.1:{_started(self._port, self.name) + 11}"

    @property
    def ca_file(self) -> Path:
        """What a client of `tls_endpoint_url` must trust."""
        return self._dir / "ca.pem"

    def _environ(self, port: int) -> dict[str, str]:
        return super()._environ(port) | {"TLS_PORT": str(port + 11)}


SERVERS: dict[str, type[SeaweedServer | LocalStackServer | RgwServer]] = {
    server.name: server for server in (SeaweedServer, LocalStackServer, RgwServer)
}


class ServerError(Exception):
    """A script in ``localstack/`` failed; the message is what it said."""


def chosen() -> list[str]:
    """The servers to test against: the words of ``SERVERS`` in the environment, by default moto and SeaweedFS."""
    return os.environ.get("SERVERS", "moto seaweedfs").split()


def available(name: str) -> str | None:
    """None when `start_server` can start it; otherwise a sentence that says why not and what to run."""
    if name == "moto":
        try:
            import moto.server  # noqa: F401
        except ImportError:
            return "moto's server is not installed; run pip install 'moto[server]'"
        return None
    if name not in SERVERS:
        return f"no server is called {name}; there are moto {' '.join(SERVERS)}"
    try:
        _run_script(name, "check")
    except ServerError as error:
        return str(error)
    return None


def start_server(name: str, workdir: Path) -> S3Server:
    """Starts ``moto`` or one of `SERVERS`, with its data in ``workdir``. The caller stops it, else the exit does."""
    server: S3Server = MotoServer() if name == "moto" else SERVERS[name](workdir)
    server.start()
    return server


def find_free_ports(count: int) -> int:
    """The first of ``count`` consecutive ports that are free on 127.0.0.1 now."""
    for _ in range(200):
        first = PORTS.start + secrets.randbelow(len(PORTS) - count)
        with ExitStack() as bound, contextlib.suppress(OSError):
            for port in range(first, first + count):
                sock = bound.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                sock.bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"no {count} consecutive free ports in {PORTS}")


def _started(value: T | None, name: str) -> T:
    if value is None:
        raise RuntimeError(f"{name} has not been started")
    return value


def _run_script(name: str, verb: str, *args: str, environ: dict[str, str] | None = None) -> None:
    """Raises: ServerError, with what the script wrote to stderr."""
    done = subprocess.run(
        [SCRIPTS / f"{name}.sh", verb, *args],
        env=os.environ | (environ or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ServerError(done.stderr.strip())
