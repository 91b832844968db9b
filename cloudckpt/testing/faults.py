"""What can go wrong with a request to an S3 server, for a `FaultProxy` to do.

Law: says what happens, and does nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What goes wrong with one request; made by the functions of this module.

    Attributes:
        name: for records.
        is_passed_on: whether the server gets the request.
        first: called in the proxy's thread before the request is passed on.
        then: called in the proxy's thread when the server has answered.
        delay_s: before the request is passed on.
        bytes_per_s: the speed of both bodies.
        cuts_request: the client's connection is reset when half of the request's body was read.
        flips: a bit in the middle of the request's body, or of the reply's where the request has none.
        reply: sent in place of the server's: status, and S3's error code (none: an empty body).
        reply_share: of the reply's body that is sent before ``ending``; 0: not even its head.
        ending: what becomes of the connection after that.
    """

    name: str
    is_passed_on: bool = True
    first: Callable[[], None] | None = None
    then: Callable[[], None] | None = None
    delay_s: float = 0
    bytes_per_s: float | None = None
    cuts_request: bool = False
    flips: bool = False
    reply: tuple[int, str] | None = None
    reply_share: float = 1
    ending: Literal["reset", "close", "stall"] | None = None


def drop() -> Fault:
    """The connection is reset before the server gets the request."""
    return Fault(name="drop", is_passed_on=False, reply_share=0, ending="reset")


def lose_reply() -> Fault:
    """The server carries the request out; the connection is reset without a byte of the answer."""
    return Fault(name="lost reply", reply_share=0, ending="reset")


def reset_request() -> Fault:
    """The connection is reset in the middle of the request's body; the server gets nothing."""
    return Fault(name="reset in request", is_passed_on=False, cuts_request=True, reply_share=0, ending="reset")


def reset_reply() -> Fault:
    """The connection is reset in the middle of the reply's body."""
    return Fault(name="reset in reply", reply_share=0.5, ending="reset")


def truncate() -> Fault:
    """The connection is closed, as if all were well, in the middle of the reply's body."""
    return Fault(name="truncated", reply_share=0.5, ending="close")


def flip() -> Fault:
    """A bit is flipped in the middle of the request's body, or of the reply's where the request has none."""
    return Fault(name="flip", flips=True)


def delay(seconds: float) -> Fault:
    """The request is passed on so much later."""
    return Fault(name="delay", delay_s=seconds)


def stall() -> Fault:
    """The server carries the request out, and not a byte of its answer comes; the connection stays open."""
    return Fault(name="stall", reply_share=0, ending="stall")


def stall_reply() -> Fault:
    """Half of the reply's body comes, and the connection stays open."""
    return Fault(name="stall in reply", reply_share=0.5, ending="stall")


def throttle(bytes_per_s: float) -> Fault:
    """Both bodies pass at that speed."""
    return Fault(name="throttle", bytes_per_s=bytes_per_s)


def answer(status: int, code: str, *, is_carried_out: bool = False) -> Fault:
    """An S3 error in place of the server's answer, such as ``answer(503, "SlowDown")``.

    Args:
        status: of the reply; 200 for an error that comes in the body of a success, as S3's CompleteMultipartUpload
            may answer.
        code: S3's; empty for a reply without a body.
        is_carried_out: whether the server gets the request.
    """
    name = f"{status} {code}".strip() + (" after the act" if is_carried_out else "")
    return Fault(name=name, is_passed_on=is_carried_out, reply=(status, code))


def slow_down() -> Fault:
    """S3 asks for fewer requests."""
    return answer(503, "SlowDown")


def expired() -> Fault:
    """The credentials have expired."""
    return answer(400, "ExpiredToken")


def conflict() -> Fault:
    """409: another conditional write to the key is under way; S3 asks to try again."""
    return answer(409, "ConditionalRequestConflict")


def call(action: Callable[[], None], *, is_carried_out: bool) -> Fault:
    """Something else happens before the server gets the request, or when it has answered, such as a SIGKILL.

    Args:
        action: called in the proxy's thread, which waits for it.
        is_carried_out: call it when the server has answered; the answer is passed on, unless the client is gone.
    """
    if is_carried_out:
        return Fault(name="call after", then=action)
    return Fault(name="call before", first=action)
