"""What S3 and its client can answer, in our words.

Law: decided by error code, status or class, never by message text.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from cloudckpt.errors import (
    BucketNotFoundError,
    CheckpointError,
    ChecksumRefusedError,
    CredentialsError,
    NotImplementedByStoreError,
    ObjectNotFoundError,
    PermissionDeniedError,
    PreconditionFailedError,
    StaleCredentialsError,
    StoreError,
    StoreUnavailableError,
    ThrottledError,
    UsageError,
)
from cloudckpt.store.addresses import shown
from cloudckpt.store.s3_http import UnfitReplyError

_BY_CODE: dict[str, tuple[type[StoreError], str]] = {
    "NoSuchBucket": (BucketNotFoundError, "no such bucket; create it, or check the URL and the endpoint"),
    "NoSuchKey": (ObjectNotFoundError, "no such object"),
    "NoSuchUpload": (ObjectNotFoundError, "no such multipart upload"),
    "InvalidAccessKeyId": (StaleCredentialsError, "the access key is not known to the server"),
    "SignatureDoesNotMatch": (CredentialsError, "the secret key does not belong to the access key"),
    "InvalidToken": (StaleCredentialsError, "the session token is not valid"),
    "InvalidTokenId": (StaleCredentialsError, "the session token is not valid"),
    "ExpiredToken": (StaleCredentialsError, "the credentials have expired"),
    "ExpiredTokenException": (StaleCredentialsError, "the credentials have expired"),
    "RequestExpired": (StaleCredentialsError, "the credentials have expired"),
    "RequestTimeTooSkewed": (CredentialsError, "this machine's clock differs too much from the server's"),
    "AccessDenied": (PermissionDeniedError, "the credentials do not allow this request"),
    "PreconditionFailed": (PreconditionFailedError, "the condition of the request does not hold"),
    "ConditionalRequestConflict": (PreconditionFailedError, "another write to the same key is under way"),
    "BadDigest": (ChecksumRefusedError, "the body was damaged on its way"),
    "XAmzContentChecksumMismatch": (ChecksumRefusedError, "the body was damaged on its way"),
    "InvalidRange": (StoreError, "the object is shorter than the range asked for"),
    "NotImplemented": (NotImplementedByStoreError, "the server does not know this kind of request"),
    "RequestTimeout": (StoreUnavailableError, "the server waited too long for the body"),
    "SlowDown": (ThrottledError, "the server asks for fewer requests"),
    "SlowDownRead": (ThrottledError, "the server asks for fewer requests"),
    "SlowDownWrite": (ThrottledError, "the server asks for fewer requests"),
    "Throttling": (ThrottledError, "the server asks for fewer requests"),
    "ThrottlingException": (ThrottledError, "the server asks for fewer requests"),
    "RequestLimitExceeded": (ThrottledError, "the server asks for fewer requests"),
    "ServiceUnavailable": (ThrottledError, "the server is overloaded"),
    "InternalError": (StoreUnavailableError, "the server had an error of its own"),
    "OperationAborted": (StoreUnavailableError, "another operation is under way; ask again"),
}

_BY_STATUS: dict[int, tuple[type[StoreError], str]] = {
    403: (PermissionDeniedError, "the credentials do not allow this request"),
    404: (ObjectNotFoundError, "no such object"),
    409: (PreconditionFailedError, "another write to the same key is under way"),
    412: (PreconditionFailedError, "the condition of the request does not hold"),
    429: (ThrottledError, "the server asks for fewer requests"),
    503: (ThrottledError, "the server is overloaded"),
}

_OF_OBJECTS = {"GetObject", "HeadObject"}

_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.SSOError,
)
_UNREACHABLE = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    aiohttp.ClientError,
    OSError,
)


class ForeignError(Exception):
    """What botocore or aiohttp raised, by name and text: the object itself holds the request, and its signature."""


def told_of(error: Exception) -> ForeignError:
    """An error of theirs as the cause of one of ours."""
    return ForeignError(f"{type(error).__name__}: {shown(error)}").with_traceback(error.__traceback__)


@contextmanager
def translated(where: str, ignore: Collection[str] = ()) -> Iterator[None]:
    """Turns what the client raises into the `StoreError` that says what to do.

    Args:
        where: the object or bucket, for the message.
        ignore: error codes that are as good as success.
    """
    try:
        yield
    except CheckpointError:
        raise
    except boto.ClientError as e:
        code = code_of(e)
        if code not in ignore:
            raise _of_reply(e, code, where) from told_of(e)
    except (boto.BotoCoreError, UnfitReplyError, *_UNREACHABLE) as e:
        raise _of_client(e, where) from told_of(e)
    except KeyError as e:
        msg = f"{where}: the server's answer lacks {e}; it may not speak S3"
        raise StoreError(msg) from told_of(e)
    except (ResponseParserError, ValueError) as e:
        msg = f"{where}: the server's answer makes no sense ({type(e).__name__}); it may not speak S3"
        raise StoreError(msg) from told_of(e)


def _of_client(error: Exception, where: str) -> CheckpointError:
    told = shown(error)
    match error:
        case (UnfitReplyError() as unfit) | boto.HTTPClientError(kwargs={"error": UnfitReplyError() as unfit}):
            return StoreError(f"{where}: {unfit}")
        case _ if isinstance(error, _NO_CREDENTIALS):
            return CredentialsError(
                f"{where}: no usable credentials ({told}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
                "AWS_PROFILE, pass access_key_id= and secret_access_key= or credentials=, or give the machine a role"
            )
        case boto.ProfileNotFound():
            return CredentialsError(f"{where}: {told}")
        case boto.SSLError():
            return StoreError(
                f"{where}: the server's certificate was not accepted ({told}); pass ca_bundle= or set AWS_CA_BUNDLE"
            )
        case boto.ParamValidationError():
            return UsageError(f"{where}: {told}")
        case _ if isinstance(error, _UNREACHABLE):
            return StoreUnavailableError(f"{where}: no answer ({type(error).__name__}: {told})")
        case _:
            return StoreError(f"{where}: {told}")


def code_of(error: boto.ClientError) -> str:
    """The code of the error that the server answered; mostly its status where it gave none."""
    return str(error.response.get("Error", {}).get("Code") or "")


def status_of(error: boto.ClientError) -> int:
    """The status of the reply, 0 if unknown."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def kind_of(code: str) -> type[StoreError]:
    """The class of an error that a reply tells within its body."""
    return _BY_CODE.get(code, (StoreError, ""))[0]


def _of_reply(error: boto.ClientError, code: str, where: str) -> StoreError:
    status = status_of(error)
    kind, meaning = _BY_CODE.get(code) or _BY_STATUS.get(status) or (None, "")
    if kind is None:
        kind = StoreUnavailableError if status >= 500 else StoreError
        meaning = shown(error.response.get("Error", {}).get("Message", ""))
    told = kind(f"{where}: {meaning} ({error.operation_name}: {code or 'no code'}, HTTP {status})")
    if isinstance(told, PermissionDeniedError) and error.operation_name in _OF_OBJECTS:
        told.add_note(
            "S3 answers like this also where there is no such object, to who may not list the bucket: allow "
            "s3:ListBucket on it to tell the two apart (docs/security.md)"
        )
    if isinstance(told, StoreUnavailableError):
        told.retry_after_s = _retry_after_s(error)
    return told


def _retry_after_s(error: boto.ClientError) -> float | None:
    """Seconds, or a date: RFC 9110, 10.2.3."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    asked = str(headers.get("retry-after", ""))
    try:
        seconds = float(asked) if asked[:1].isdigit() else _seconds_until(asked)
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _seconds_until(date: str) -> float:
    return (parsedate_to_datetime(date).replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()
