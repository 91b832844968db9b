"""Saves and loads as OpenTelemetry's own SDK receives them."""

import json
import logging
import sys
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.dcp import Checkpointer, ObjectStoreReader, ObjectStoreWriter, WriterHook
from cloudckpt.engine.telemetry import tell
from cloudckpt.engine.tracing import Outcome, Recorder
from cloudckpt.errors import SaveFailedError
from cloudckpt.testing import fault_proxy, faults
from conftest import BUCKET, s3_of

SECRET = "a-token-that-nobody-may-see"


@pytest.fixture(scope="session")
def collected():
    """What the SDK collects from here on: OpenTelemetry takes one provider in a process."""
    exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider([reader]))
    return exporter, reader


@pytest.fixture
def exporter(collected):
    collected[0].clear()
    return collected[0]


@pytest.fixture
def root():
    return f"memory://{token_hex(6)}/run"


def state(value=1.0):
    return {"w": torch.full((1000,), value), "lr": 0.1}


def spans_of(exporter):
    return {span.name: span for span in exporter.get_finished_spans()}


def counted(collected):
    """The sums and counts so far, by name and attributes."""
    found = {}
    data = collected[1].get_metrics_data()
    for resource in data.resource_metrics if data else ():
        for metric in (m for scope in resource.scope_metrics for m in scope.metrics):
            for point in metric.data.data_points:
                key = metric.name, *sorted(point.attributes.values())
                found[key] = getattr(point, "value", None) or getattr(point, "count", 0)
                found["unit", metric.name] = metric.unit
    return found


class Refusing(WriterHook):
    def pre_commit(self, info):
        raise ValueError(SECRET)


def test_a_save_and_a_load_are_spans_with_their_phases_below_the_callers(exporter, root):
    tracer = trace.get_tracer("training")
    writer, reader = ObjectStoreWriter(f"{root}/step-1"), ObjectStoreReader(f"{root}/step-1")
    with tracer.start_as_current_span("epoch") as epoch:
        dcp.save(state(), storage_writer=writer)
        dcp.load(state(0.0), storage_reader=reader)
    spans = spans_of(exporter)
    assert set(spans) == {
        "epoch",
        "cloudckpt.save",
        *(f"cloudckpt.save.{phase}" for phase in ("plan", "stage", "upload", "commit")),
        "cloudckpt.load",
        *(f"cloudckpt.load.{phase}" for phase in ("plan", "fetch", "place")),
    }
    for kind in ("save", "load"):
        whole = spans[f"cloudckpt.{kind}"]
        assert whole.parent.span_id == epoch.get_span_context().span_id
        assert whole.attributes["cloudckpt.url"] == f"{root}/step-1"
        for name, span in spans.items():
            if name.startswith(f"cloudckpt.{kind}."):
                assert span.parent.span_id == whole.context.span_id
                assert whole.start_time <= span.start_time <= span.end_time <= whole.end_time
    save, load = spans["cloudckpt.save"], spans["cloudckpt.load"]
    assert save.attributes["cloudckpt.stored_size"] == writer.stats.stored_nbytes
    assert load.attributes["cloudckpt.stored_size"] == reader.stats.bytes_fetched
    assert save.attributes["cloudckpt.save_id"] == load.attributes["cloudckpt.save_id"]
    upload = spans["cloudckpt.save.upload"].attributes
    assert (upload["cloudckpt.count"], upload["cloudckpt.size"]) == (1, writer.stats.stored_nbytes)


def test_a_save_behind_training_lies_below_the_span_it_was_asked_for_in(exporter, root):
    tracer = trace.get_tracer("training")
    with Checkpointer(root) as checkpointer:
        with tracer.start_as_current_span("step 1") as step:
            handle = checkpointer.async_save(1, state())
        with tracer.start_as_current_span("step 2"):
            handle.result()
    save = spans_of(exporter)["cloudckpt.save"]
    assert save.parent.span_id == step.get_span_context().span_id
    assert "cloudckpt.save.stage" in spans_of(exporter)


def test_bytes_requests_and_failures_are_counted(collected, exporter, root):
    before = counted(collected)
    writer, reader = ObjectStoreWriter(f"{root}/step-1"), ObjectStoreReader(f"{root}/step-1")
    dcp.save(state(), storage_writer=writer)
    dcp.load(state(0.0), storage_reader=reader)
    with pytest.raises(CheckpointException):
        dcp.save(state(), storage_writer=ObjectStoreWriter(f"{root}/step-2", hooks=[Refusing()]))
    with pytest.raises(CheckpointException):
        dcp.load(state(0.0), storage_reader=ObjectStoreReader(f"{root}/step-3"))
    after = counted(collected)

    def grew(*key):
        return after.get(key, 0) - before.get(key, 0)

    assert grew("cloudckpt.io", "save") == 2 * writer.stats.stored_nbytes
    assert grew("cloudckpt.io", "load") == reader.stats.bytes_fetched
    assert grew("cloudckpt.requests", "save") == 2 * writer.stats.requests
    assert grew("cloudckpt.requests", "load") == reader.stats.requests
    assert grew("cloudckpt.duration", "save") == grew("cloudckpt.duration", "load") == 1
    for kind, error in (("save", "SaveFailedError"), ("load", "CheckpointNotFoundError")):
        assert grew("cloudckpt.failures", *sorted((kind, error))) == 1
        assert grew("cloudckpt.duration", *sorted((kind, error))) == 1
    units = {
        name: after["unit", f"cloudckpt.{name}"] for name in ("duration", "io", "requests", "failures", "retries")
    }
    assert units == {
        "duration": "s",
        "io": "By",
        "requests": "{request}",
        "failures": "{failure}",
        "retries": "{retry}",
    }


def test_a_failure_is_told_by_its_class_alone_and_once(collected, exporter, root):
    before = counted(collected)
    with Checkpointer(root, hooks=[Refusing()]) as checkpointer:
        with pytest.raises(SaveFailedError, match=SECRET):
            checkpointer.save(1, state())
    (failed,) = [span for span in exporter.get_finished_spans() if span.name == "cloudckpt.save"]
    assert failed.attributes["error.type"] == "SaveFailedError"
    assert not failed.status.is_ok
    assert all(SECRET not in json.dumps(json.loads(span.to_json())) for span in exporter.get_finished_spans())
    key = ("cloudckpt.failures", "SaveFailedError", "save")
    assert counted(collected)[key] - before.get(key, 0) == 1


def test_requests_that_are_made_again_are_counted(collected, exporter, one_server):
    before = counted(collected)
    url = f"s3://{BUCKET}/{token_hex(6)}"
    with fault_proxy(one_server.endpoint_url) as proxy:
        options = s3_of(one_server) | {"endpoint_url": proxy.url, "retry_base_s": 0}
        writer, reader = ObjectStoreWriter(url, **options), ObjectStoreReader(url, **options)
        proxy.when(lambda r: r.method == "PUT" and "shards" in r.key, faults.slow_down(), times=2)
        dcp.save(state(), storage_writer=writer)
        proxy.when(lambda r: r.operation == "GetObject" and "shards" in r.key, faults.slow_down(), times=3)
        dcp.load(state(0.0), storage_reader=reader)
    after = counted(collected)
    assert (writer.stats.retries, reader.stats.retries) == (2, 3)
    assert after["cloudckpt.retries", "save"] - before.get(("cloudckpt.retries", "save"), 0) == 2
    assert after["cloudckpt.retries", "load"] - before.get(("cloudckpt.retries", "load"), 0) == 3


def test_without_opentelemetry_all_goes_as_it_does(exporter, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    dcp.save(state(), storage_writer=ObjectStoreWriter(f"{root}/step-1"))
    found = state(0.0)
    dcp.load(found, storage_reader=ObjectStoreReader(f"{root}/step-1"))
    assert torch.equal(found["w"], state()["w"])
    assert spans_of(exporter) == {}


def test_what_fails_in_opentelemetry_is_a_warning(collected, caplog):
    tell(Recorder(context=object()), Outcome(kind="save", url="s3://b/step-1"))
    assert [(r.levelno, r.message.split(":")[0]) for r in caplog.records] == [
        (logging.WARNING, "OpenTelemetry was not told of the save of s3")
    ]
