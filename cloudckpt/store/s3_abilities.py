"""What a server can do, found out by asking it.

Law: remembered for a server's bucket as long as the process lives; told to people once.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from botocore.exceptions import ClientError

from cloudckpt.errors import ChecksumRefusedError, ChecksumsNotKnownError
from cloudckpt.store.addresses import shown
from cloudckpt.store.s3_errors import code_of, status_of, told_of

log = logging.getLogger(__name__)

_REFUSED_FOR_CHECKSUM = {
    "InvalidArgument",  # Backblaze B2 before July 2025: github.com/boto/s3transfer/issues/327
    "InvalidRequest",
    "NotImplemented",  # Cloudflare R2: github.com/mattermost/mattermost/issues/22221
    "XAmzContentSHA256Mismatch",  # Huawei OBS: github.com/milvus-io/milvus-storage/pull/500
    "UnsupportedOperation",
    "InvalidHeader",
    "MalformedXML",  # for what CompleteMultipartUpload names
    "BadRequest",
    "400",  # from a proxy that gives no code
    "501",
}
_REFUSED_FOR_BATCH = {
    "MissingContentMD5",  # it wants a checksum that botocore has given up
    "InvalidDigest",
    "InvalidRequest",  # Oracle, of another checksum than CRC32C: github.com/activepieces/activepieces/issues/14110
    "InvalidArgument",
    "MalformedXML",
    "MethodNotAllowed",
    "NotImplemented",
    "UnsupportedOperation",
    "400",
    "405",
    "501",
}


class _State(Enum):
    UNKNOWN = 0
    KNOWS = 1
    """It accepted a request with a checksum; from then on a refusal is one."""
    SUSPECTED = 2
    """It refused one, and was not yet asked without."""
    DOES_NOT = 3


class ChecksumWay:
    """How one kind of request is sent to a server: with its checksum, or without."""

    def __init__(self, abilities: "Abilities", what: str) -> None:
        """Knows nothing yet; ``what`` is for the log."""
        self._abilities = abilities
        self._what = what
        self._state = _State.UNKNOWN

    @property
    def is_open(self) -> bool:
        """Whether a request is to carry a checksum."""
        return self._state in {_State.UNKNOWN, _State.KNOWS}

    @contextmanager
    def tried(self, where: str, *, with_checksum: bool, proves: bool = True) -> Iterator[None]:
        """Learns from how a request ends.

        Args:
            where: for messages.
            with_checksum: that it is sent with, by `is_open`.
            proves: whether its success shows that the server knows checksums.

        Raises:
            ChecksumsNotKnownError: the server refused it, and may have done so for its checksum.
        """
        try:
            yield
        except ClientError as e:
            if _is_among(e, _REFUSED_FOR_CHECKSUM) and self._may_be_for_checksum(with_checksum=with_checksum):
                msg = f"{where}: the server may refuse checksums ({code_of(e)}: {_said(e)}); it is asked without next"
                raise ChecksumsNotKnownError(msg) from told_of(e)
            raise
        if with_checksum and proves:
            self._state = _State.KNOWS
        elif not with_checksum and self._state is _State.SUSPECTED:
            self._state = _State.DOES_NOT
            self._abilities.tell(f"refuses checksums of {self._what}; they go without from now on")

    def _may_be_for_checksum(self, *, with_checksum: bool) -> bool:
        if with_checksum:
            if self._state is _State.UNKNOWN:
                self._state = _State.SUSPECTED
            return self._state is not _State.KNOWS
        if self._state is _State.SUSPECTED:
            self._state = _State.UNKNOWN  # it was not for the checksum
        return False


class Abilities:
    """What is known of a server's bucket.

    Attributes:
        objects, parts, wholes: how whole objects, parts, and completions of uploads go.
        deletes_batches: whether DeleteObjects works.
    """

    def __init__(self, identity: str) -> None:
        """Knows nothing yet."""
        self.objects = ChecksumWay(self, "whole objects")
        self.parts = ChecksumWay(self, "parts")
        self.wholes = ChecksumWay(self, "completed uploads")
        self.deletes_batches = True
        self._identity = identity
        self._is_told = False

    def look_at_echo(self, reply: dict[str, Any], sent: str, where: str) -> None:
        """Looks whether the server says which checksum it found, as all do that verify.

        Args:
            reply: to a request with a body and its checksum.
            sent: that checksum.
            where: for messages.

        Raises:
            ChecksumRefusedError: it found another.
        """
        found = reply.get("ChecksumCRC32C")
        if found is None:
            self.tell("ignores checksums")
        elif found != sent:
            msg = f"{where}: the body was damaged on its way: the server found CRC32C {found}, and {sent} was sent"
            raise ChecksumRefusedError(msg)

    def tell(self, what: str) -> None:
        """Warns once that uploads are not verified on arrival."""
        if self._is_told:
            return
        self._is_told = True
        log.warning(
            "%s %s: it does not verify what is uploaded. The checksums in manifests stay, and are verified when a "
            "checkpoint is read; checksum=None stops asking for more",
            self._identity,
            what,
        )

    def falls_back(self, error: ClientError) -> bool:
        """Whether a refused DeleteObjects is to be replaced by one request for each key, from now on."""
        if not _is_among(error, _REFUSED_FOR_BATCH):
            return False
        self.deletes_batches = False
        log.info(
            "%s does not know DeleteObjects (%s); objects are deleted one by one", self._identity, code_of(error)
        )
        return True


_known: dict[str, Abilities] = {}


def abilities_of(endpoint_url: str, bucket: str) -> Abilities:
    """What is known of a server's bucket, the same object for all of the process."""
    identity = f"{endpoint_url}/{bucket}"
    return _known.setdefault(identity, Abilities(identity))


def _is_among(error: ClientError, codes: set[str]) -> bool:
    return (code_of(error) or str(status_of(error))) in codes or status_of(error) == 501


def _said(error: ClientError) -> str:
    return shown(error.response.get("Error", {}).get("Message", ""))
