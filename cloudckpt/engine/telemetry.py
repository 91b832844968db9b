"""Saves and loads as OpenTelemetry's spans and metrics, where ``opentelemetry-api`` is installed.

Law: tells what was recorded once it is over, so that nothing waits for it and nothing fails for it. Names things by
their URLs, which hold no credentials, and errors by their classes.
"""

import logging
import time
from typing import Any

from cloudckpt.engine.tracing import COMMIT, FETCH, PLACE, PLAN, RESTORE, STAGE, TRANSFORM, UPLOAD, Outcome, Recorder

log = logging.getLogger(__name__)

_NAME = "cloudckpt"
_CHILDREN = (PLAN, STAGE, TRANSFORM, UPLOAD, COMMIT, FETCH, RESTORE, PLACE)
_MOVED = {"save": UPLOAD, "load": FETCH}


def current_context() -> object:
    """What spans of the caller's are current here; None where there is no OpenTelemetry."""
    try:
        from opentelemetry import context
    except ImportError:
        return None
    return context.get_current()


def tell(recorder: Recorder, outcome: Outcome) -> None:
    """Makes a span of a save or a load that is over, with one for each of its phases, and counts it.

    Args:
        recorder: of it; its ``context`` is from `current_context`, where it was asked for.
        outcome: what became of it.
    """
    try:
        from opentelemetry import metrics, trace
    except ImportError:
        return
    try:
        ended = time.time()
        _trace(trace, recorder, outcome, ended)
        _count(metrics.get_meter(_NAME), recorder, outcome, ended)
    except Exception as e:
        log.warning(
            "OpenTelemetry was not told of the %s of %s: %s: %s", outcome.kind, outcome.url, type(e).__name__, e
        )


def _trace(trace: Any, recorder: Recorder, outcome: Outcome, ended: float) -> None:
    tracer = trace.get_tracer(_NAME)
    attributes = {
        "cloudckpt.url": outcome.url,
        "cloudckpt.rank": outcome.rank,
        "cloudckpt.world_size": outcome.world_size,
        "cloudckpt.size": outcome.nbytes,
        "cloudckpt.stored_size": outcome.stored_nbytes,
        "cloudckpt.retries": recorder.retries,
    }
    if outcome.save_id:
        attributes["cloudckpt.save_id"] = outcome.save_id
    span = tracer.start_span(
        f"cloudckpt.{outcome.kind}",
        context=recorder.context,
        attributes=attributes,
        start_time=_nanos(recorder.began),
    )
    inside = trace.set_span_in_context(span, recorder.context)
    for what in _CHILDREN:
        tally = recorder.tally(what)
        if tally.count:
            tracer.start_span(
                f"cloudckpt.{outcome.kind}.{what}",
                context=inside,
                attributes={
                    "cloudckpt.count": tally.count,
                    "cloudckpt.size": tally.nbytes,
                    "cloudckpt.busy_seconds": tally.seconds,
                },
                start_time=_nanos(tally.began),
            ).end(_nanos(tally.ended))
    if outcome.error:
        span.set_attribute("error.type", outcome.error)
        span.set_status(trace.Status(trace.StatusCode.ERROR, outcome.error))
    span.end(_nanos(ended))


def _count(meter: Any, recorder: Recorder, outcome: Outcome, ended: float) -> None:
    of = {"cloudckpt.operation": outcome.kind}
    moved = recorder.tally(_MOVED[outcome.kind])
    failed = of | {"error.type": outcome.error}
    seconds = meter.create_histogram(f"{_NAME}.duration", unit="s", description="Of saves and loads, on each rank.")
    seconds.record(ended - recorder.began, failed if outcome.error else of)
    io = meter.create_counter(f"{_NAME}.io", unit="By", description="Bytes of checkpoints uploaded or fetched.")
    io.add(moved.nbytes, of)
    requests = meter.create_counter(f"{_NAME}.requests", unit="{request}", description="That uploaded or fetched.")
    requests.add(moved.count, of)
    retries = meter.create_counter(f"{_NAME}.retries", unit="{retry}", description="Requests that were made again.")
    retries.add(recorder.retries, of)
    failures = meter.create_counter(f"{_NAME}.failures", unit="{failure}", description="Saves and loads that failed.")
    if outcome.error:
        failures.add(1, failed)


def _nanos(seconds: float) -> int:
    return round(seconds * 1e9)
