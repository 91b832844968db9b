"""The rights that docs/security.md writes down, and servers that hold a second user to them.

Law: what a user may do is what the documentation says, read from there; nothing is written down twice.
"""

import json
import re
import subprocess
import sys
import urllib.request
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from servers import RgwServer, S3Server

BUCKET = "checkpoints"
_SECURITY = Path(__file__).resolve().parent.parent / "docs" / "security.md"
_BLOCK = re.compile(r"^### (.+)\n(?:(?!#|```).*\n)*```json\n((?:(?!```).*\n)*)```$", re.MULTILINE)
_MINE = "arn:aws:s3:::my-bucket"
_NEEDED = "Needed"
"""Begins the Sid of what a command cannot do without."""

Statement = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Policy:
    """What a user may do: statements as the documentation has them, of actions that are allowed."""

    statements: tuple[Statement, ...]

    def needed(self) -> list[str]:
        """The actions that a command fails without."""
        return sorted(a for s in self.statements if s["Sid"].startswith(_NEEDED) for a in s["Action"])

    def others(self) -> list[str]:
        """The actions that it does without, for worse."""
        return sorted({a for s in self.statements for a in s["Action"]} - set(self.needed()))

    def without(self, *actions: str) -> "Policy":
        """All of it but these actions."""
        left = ({**s, "Action": [a for a in s["Action"] if a not in actions]} for s in self.statements)
        return Policy(tuple(s for s in left if s["Action"]))

    def under(self, prefix: str) -> list[Statement]:
        """Its statements, for the tests' bucket and that prefix of it."""
        spelled = json.dumps(self.statements).replace("run/*", f"{prefix}/*")
        statements: list[Statement] = json.loads(spelled.replace(_MINE, f"arn:aws:s3:::{BUCKET}"))
        return statements


def documented() -> dict[str, Policy]:
    """The policy of each command."""
    found = [(names.split(", "), Policy(tuple(statements))) for names, statements in _blocks("Rights").items()]
    return {name: policy for names, policy in found for name in names}


def documented_narrowly() -> Policy:
    """What stands in place of rights to the bucket, for one prefix of it."""
    return Policy(tuple(_blocks("Narrower rights")["One prefix of a shared bucket"]))


def documented_setting(heading: str) -> Any:
    """A setting of the bucket, for the tests' bucket."""
    return json.loads(json.dumps(_blocks("Bucket settings")[heading]).replace(_MINE, f"arn:aws:s3:::{BUCKET}"))


def _blocks(section: str) -> dict[str, Any]:
    """The JSON below each heading of a section."""
    text = _SECURITY.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return {heading: json.loads(block) for heading, block in _BLOCK.findall(text)}


class Guarded(ABC):
    """A server with an owner, who may do everything, and a guest, who may do what the last `allow` said."""

    hides_what_is_missing: bool
    """Answers 403, as AWS does, to who asks for an object that is not there and may not list the bucket."""
    knows_conditions: bool
    """Of policies, such as of the prefix that is listed."""
    tells_who_may_list: bool
    """Answers 404, as AWS does not, to who asks for an object that is not there and may list, but not read."""
    endpoint_url: str
    owner_keys: tuple[str, str]
    guest_keys: tuple[str, str]

    @abstractmethod
    def allow(self, statements: list[Statement]) -> None:
        """Lets the guest do this, and nothing else."""

    def allow_everything(self) -> None:
        """Lets the guest do everything: what it wrote may be its own, and not the owner's to read."""
        resources = [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"]
        self.allow([{"Sid": "Everything", "Effect": "Allow", "Action": ["s3:*"], "Resource": resources}])

    @abstractmethod
    def stop(self) -> None:
        """Ends it."""

    @property
    def owner(self) -> Any:
        """A boto3 client of the owner's."""
        return self._client("s3", self.owner_keys)

    def options(self, keys: tuple[str, str]) -> dict[str, Any]:
        """Keyword arguments that lead a writer or reader to the server."""
        return {
            "endpoint_url": self.endpoint_url,
            "access_key_id": keys[0],
            "secret_access_key": keys[1],
            "region": "us-east-1",
            "addressing_style": "path",
        }

    def _client(self, service: str, keys: tuple[str, str]) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.endpoint_url,
            aws_access_key_id=keys[0],
            aws_secret_access_key=keys[1],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
        )


class GuardedRgw(Guarded):
    """Ceph RGW, which enforces the policies of buckets as AWS does."""

    hides_what_is_missing = True
    knows_conditions = True
    tells_who_may_list = True

    def __init__(self, workdir: Path) -> None:
        self._server: S3Server = RgwServer(workdir)
        self._server.start()
        self.endpoint_url = self._server.endpoint_url
        self.owner_keys = self._server.access_key, self._server.secret_key
        self.guest_keys = "guest", "guestsecret"
        self.owner.create_bucket(Bucket=BUCKET)

    def allow(self, statements: list[Statement]) -> None:
        guest = {"AWS": ["arn:aws:iam:::user/guest"]}
        policy = {"Version": "2012-10-17", "Statement": [{**s, "Principal": guest} for s in statements]}
        self.owner.put_bucket_policy(Bucket=BUCKET, Policy=json.dumps(policy))

    def stop(self) -> None:
        self._server.stop()


_MOTO = """
import sys
from cloudckpt.testing import embedded_server

with embedded_server("{bucket}") as server:
    print(server.endpoint_url, flush=True)
    sys.stdin.read()
"""


class GuardedMoto(Guarded):
    """moto, in a process of its own, for it enforces policies for all of its process or for nobody.

    It knows neither the rights of a multipart upload's parts nor conditions, and tells of what is missing.
    """

    hides_what_is_missing = False
    knows_conditions = False
    tells_who_may_list = False

    def __init__(self) -> None:
        script = _MOTO.format(bucket=BUCKET)
        self._process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.endpoint_url = self._process.stdout.readline().strip()
        self._iam = self._client("iam", ("any", "any"))
        self.owner_keys, self.guest_keys = (self._make_user(name) for name in ("owner", "guest"))
        self._put_policy("owner", [{"Effect": "Allow", "Action": ["*"], "Resource": "*"}])
        self._iam = self._client("iam", self.owner_keys)
        self._begin_to_enforce()

    def allow(self, statements: list[Statement]) -> None:
        # DeleteObjects is held to what may be done to the bucket, not to each key.
        bucket = f"arn:aws:s3:::{BUCKET}"
        more = [{**s, "Action": ["s3:DeleteObject"], "Resource": bucket} for s in statements]
        deletes = [s for s, of in zip(more, statements, strict=True) if "s3:DeleteObject" in of["Action"]]
        self._put_policy("guest", [*statements, *({**s, "Sid": "DeletesMany"} for s in deletes)])

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _make_user(self, name: str) -> tuple[str, str]:
        self._iam.create_user(UserName=name)
        key = self._iam.create_access_key(UserName=name)["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    def _put_policy(self, user: str, statements: list[Statement]) -> None:
        document = json.dumps({"Version": "2012-10-17", "Statement": statements})
        self._iam.put_user_policy(UserName=user, PolicyName="rights", PolicyDocument=document)

    def _begin_to_enforce(self) -> None:
        url, kind = f"{self.endpoint_url}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(url, data=b"0", headers=kind, method="POST")):
            return


GUARDED = ("moto", "rgw")


def start_guarded(name: str, workdir: Path) -> Guarded:
    """Starts one of `GUARDED`, with its data in ``workdir``. The caller stops it."""
    return GuardedMoto() if name == "moto" else GuardedRgw(workdir)
