"""Stand-ins for Google's and Azure's clouds: emulators through the scripts in ``localstack/``, and a fake of our own.

Law: a server that was started is stopped; what a cloud refuses, the fake refuses.
"""

import base64
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from awscrt.checksums import crc32c

from servers import ScriptServer, ServerError

TOKEN = "a-token"
PAGE = 3
"""Keys on a page of the fake's listings."""


def chosen_clouds():
    """The emulators to test against: the words of ``CLOUDS`` in the environment, by default both."""
    return os.environ.get("CLOUDS", "gcs azurite").split()


class GcsEmulator(ScriptServer):
    """gcp-storage-emulator: GCS's JSON interface, without conditions."""

    name = "gcs"
    durable = False
    access_key = secret_key = ""
    n_ports = 1


class Azurite(ScriptServer):
    """Microsoft's own emulator of its blobs, with the account and key that all emulators have."""

    name = "azurite"
    durable = False
    access_key = "devstoreaccount1"
    secret_key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    n_ports = 1


@contextmanager
def running_cloud(kind, workdir):
    """A running emulator; a `ServerError` of one that was asked for says what to install."""
    server = kind(workdir)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Object:
    data: bytes
    generation: int
    etag: str
    modified: datetime


@dataclass
class FakeGcs:
    """Google Cloud Storage's XML interface, as its reference describes it; `url` is where it serves.

    Attributes:
        buckets: those that exist.
        objects: by bucket and key.
        uploads: under way, by id.
        requests: methods and paths that came.
        connections: that were opened.
        damages: bodies that arrive otherwise than they were sent: the checksum found is another.
        answers: statuses to answer next, in place of what was asked for; None cuts the connection.
        is_open: to those who show nobody's token, too.
    """

    url: str = ""
    buckets: set = field(default_factory=lambda: {"bucket"})
    objects: dict = field(default_factory=dict)
    uploads: dict = field(default_factory=dict)
    requests: list = field(default_factory=list)
    connections: int = 0
    damages: int = 0
    answers: list = field(default_factory=list)
    is_open: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    generations: count = field(default_factory=lambda: count(1_760_000_000_000_000))

    def put(self, bucket, key, data, etag):
        made = Object(data, next(self.generations), etag, datetime.now(UTC).replace(microsecond=0))
        self.objects[bucket, key] = made
        return made


class RefusedError(Exception):
    """A status and GCS's code for it."""


@contextmanager
def fake_gcs():
    """A running `FakeGcs`."""
    fake = FakeGcs()
    handler = type("Handler", (_Handler,), {"fake": fake})
    with _Server(("127.0.0.1", 0), handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            yield fake
        finally:
            server.shutdown()
            serving.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def setup(self):
        super().setup()
        with self.fake.lock:
            self.fake.connections += 1

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self):
        parts = urlsplit(self.path)
        self.bucket, _, key = parts.path[1:].partition("/")
        self.key = unquote(key)
        self.query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.fake.lock:
            self.fake.requests.append(f"{self.command} {parts.path}")
            try:
                self.answer(body)
            except RefusedError as e:
                status, code = e.args
                self.reply(status, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def answer(self, body):
        if self.fake.answers:
            status = self.fake.answers.pop(0)
            if status is None:
                raise ConnectionError("cut, as the test wants it")
            self.reply(status, headers=[("Retry-After", "7")])
            return
        if self.bucket not in self.fake.buckets:
            raise RefusedError(404, "NoSuchBucket")
        if not self.fake.is_open and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusedError(401, "AuthenticationRequired")
        of_upload = "uploadId" in self.query
        match self.command, self.key:
            case "GET", "":
                self.list_uploads() if "uploads" in self.query else self.list_objects()
            case (("GET" | "HEAD"), _):
                self.get()
            case "POST", _ if "uploads" in self.query:
                upload_id = f"upload-{next(self.fake.generations)}"
                self.fake.uploads[upload_id] = self.bucket, self.key, {}, datetime.now(UTC)
                self.xml("InitiateMultipartUploadResult", f"<UploadId>{upload_id}</UploadId>")
            case "PUT", _ if of_upload:
                self.upload()[int(self.query["partNumber"])] = self.arrived(body)
                self.reply(200, headers=[("ETag", etag_of(body)), *self.hashes(body)])
            case "POST", _ if of_upload:
                self.complete(ET.fromstring(body))
            case "DELETE", _ if of_upload:
                self.upload()
                del self.fake.uploads[self.query["uploadId"]]
                self.reply(204)
            case "PUT", _:
                self.check()
                made = self.fake.put(self.bucket, self.key, self.arrived(body), etag_of(body))
                self.reply(200, headers=[*self.told(made), *self.hashes(body)])
            case "DELETE", _:
                self.find()
                self.check()
                del self.fake.objects[self.bucket, self.key]
                self.reply(204)

    def find(self):
        there = self.fake.objects.get((self.bucket, self.key))
        if there is None:
            raise RefusedError(404, "NoSuchKey")
        return there

    def check(self):
        asked = self.headers.get("x-goog-if-generation-match")
        there = self.fake.objects.get((self.bucket, self.key))
        if asked is not None and int(asked) != (there.generation if there else 0):
            raise RefusedError(412, "PreconditionFailed")

    def arrived(self, body):
        for told in self.headers.get("x-goog-hash", "").split(","):
            if told.startswith("crc32c=") and told != f"crc32c={checksum(body)}":
                raise RefusedError(400, "BadDigest")
        return body

    def hashes(self, body):
        if self.fake.damages:
            self.fake.damages -= 1
            body += b"?"
        return [("x-goog-hash", f"crc32c={checksum(body)}"), ("x-goog-hash", f"md5={etag_of(body)}")]

    def told(self, there):
        modified = format_datetime(there.modified, usegmt=True)
        return [("ETag", there.etag), ("x-goog-generation", str(there.generation)), ("Last-Modified", modified)]

    def get(self):
        there = self.find()
        headers, data, status = [*self.told(there), *self.hashes(there.data)], there.data, 200
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                raise RefusedError(416, "InvalidRange")
            data, status = there.data[int(first) : int(last or len(data)) + 1], 206
            headers.append(("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{len(there.data)}"))
        self.reply(status, data, headers)

    def upload(self):
        there = self.fake.uploads.get(self.query["uploadId"])
        if there is None:
            raise RefusedError(404, "NoSuchUpload")
        return there[2]

    def complete(self, asked):
        parts = self.upload()
        named = [(int(p.findtext("PartNumber")), p.findtext("ETag")) for p in asked.iter("Part")]
        if any(number not in parts or etag_of(parts[number]) != etag for number, etag in named):
            raise RefusedError(400, "InvalidPart")
        if any(len(parts[number]) < 5 << 20 for number, _ in named[:-1]):
            raise RefusedError(400, "EntityTooSmall")
        data = b"".join(parts[number] for number, _ in named)
        made = self.fake.put(self.bucket, self.key, data, f'"not-md5-{len(named)}"')
        del self.fake.uploads[self.query["uploadId"]]
        self.xml("CompleteMultipartUploadResult", f"<ETag>{escape(made.etag)}</ETag>")

    def list_objects(self):
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        after = self.query.get("continuation-token") or self.query.get("start-after", "")
        found = {}
        for (bucket, key), there in sorted(self.fake.objects.items()):
            if bucket == self.bucket and key.startswith(prefix):
                head, is_below, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
                name = prefix + head + delimiter if is_below else key
                if name > after:
                    found[name] = None if is_below else there
        page, rest = list(found.items())[:PAGE], list(found.items())[PAGE:]
        text = f"<Name>{self.bucket}</Name><IsTruncated>{'true' if rest else 'false'}</IsTruncated>"
        text += f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>" if rest else ""
        for name, there in page:
            if there is None:
                text += f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
                continue
            text += (
                f"<Contents><Key>{escape(name)}</Key><Generation>{there.generation}</Generation><MetaGeneration>1"
                f"</MetaGeneration><LastModified>{there.modified:%Y-%m-%dT%H:%M:%S.123Z}</LastModified>"
                f"<ETag>{escape(there.etag)}</ETag><Size>{len(there.data)}</Size></Contents>"
            )
        self.xml("ListBucketResult", text)

    def list_uploads(self):
        prefix, after = (
            self.query.get("prefix", ""),
            (self.query.get("key-marker", ""), self.query.get("upload-id-marker")),
        )
        found = sorted(
            (key, upload_id, started)
            for upload_id, (bucket, key, _, started) in self.fake.uploads.items()
            if bucket == self.bucket and key.startswith(prefix) and (not after[1] or (key, upload_id) > after)
        )
        page, rest = found[:PAGE], found[PAGE:]
        text = f"<IsTruncated>{'true' if rest else 'false'}</IsTruncated>"
        if rest:
            text += f"<NextKeyMarker>{escape(page[-1][0])}</NextKeyMarker>"
            text += f"<NextUploadIdMarker>{page[-1][1]}</NextUploadIdMarker>"
        for key, upload_id, started in page:
            text += f"<Upload><Key>{escape(key)}</Key><UploadId>{upload_id}</UploadId>"
            text += f"<Initiated>{started:%Y-%m-%dT%H:%M:%S.123Z}</Initiated></Upload>"
        self.xml("ListMultipartUploadsResult", text)

    def xml(self, root, text):
        namespace = "http://doc.s3.amazonaws.com/2006-03-01"
        self.reply(200, f"<?xml version='1.0'?><{root} xmlns='{namespace}'>{text}</{root}>".encode())

    def reply(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def checksum(data):
    return base64.b64encode(crc32c(data).to_bytes(4, "big")).decode()


def etag_of(data):
    return f'"{md5(data).hexdigest()}"'


__all__ = ["TOKEN", "Azurite", "FakeGcs", "GcsEmulator", "ServerError", "chosen_clouds", "fake_gcs", "running_cloud"]
