"""The benchmark's arithmetic: claims, and requests counted in front of a server."""

import pytest

from cloudckpt.cli.bench import claims
from cloudckpt.cli.bench.counter import RequestParser, counting
from cloudckpt.cli.bench.figures import Ratio, Summary, Traffic
from cloudckpt.cli.bench.null_process import KINDS, serving

REQUESTS = (
    b"PUT /b/k?partNumber=1&uploadId=x HTTP/1.1\r\nContent-Length: 29\r\n\r\nGET / HTTP/1.1\r\n\r\nHEAD / HTTP"
    b"GET /b/k HTTP/1.1\r\nHost: h\r\n\r\n"
    b"POST /b/k?uploads HTTP/1.1\r\ncontent-length: 0\r\n\r\n"
    b"PUT /b/k HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    b"DELETE /b/k HTTP/1.1\r\n\r\n"
)


def ratio(operation, peer, *, speed=1.0, cpu=1.0):
    return Ratio(contender="cloudckpt", peer=peer, operation=operation, speed=speed, cpu=cpu)


def summary(operation="save", wall_s=1.0):
    return Summary(contender="cloudckpt", operation=operation, wall_s=wall_s, cpu_s=1.0, rss_growth=None)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
def test_requests_are_counted_however_they_are_cut(size):
    parser = RequestParser()
    pieces = [REQUESTS[at : at + size] for at in range(0, len(REQUESTS), size)]
    assert [method for piece in pieces for method in parser.feed(piece)] == ["PART", "GET", "POST", "PUT", "DELETE"]


def test_a_body_of_untold_length_does_not_count_as_a_request():
    parser = RequestParser()
    sent = b"PUT /k HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET /k HTTP/1.1\r\n\r\n"
    assert list(parser.feed(sent)) == ["PUT", "GET"]


def test_a_relay_counts_requests_and_the_bytes_of_both_directions(monkeypatch, tmp_path):
    import boto3

    with serving(KINDS["null"]) as address, counting(address.url) as counter:
        for name, value in address.environ.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", endpoint_url=counter.url)
        client.put_object(Bucket="b", Key="k", Body=bytes(100_000))
        assert counter.methods == {"PUT": 1}
        assert 100_000 < counter.sent < 102_000
        counter.reset()
        assert len(client.get_object(Bucket="b", Key="k")["Body"].read()) == 100_000
        assert counter.requests == 1
        assert 100_000 < counter.received < 102_000
        client.close()


@pytest.mark.parametrize(("speed", "holds"), [(6.0, True), (5.99, False)])
def test_a_load_has_to_be_six_times_as_fast_as_fsspec(speed, holds):
    (claim,) = claims.about_peers("w", [ratio("load", "fsspec", speed=speed)])
    assert claim.holds is holds
    assert "at least 6 times as fast as fsspec" in claim.says


@pytest.mark.parametrize(("cpu", "holds"), [(0.5, True), (0.51, False)])
def test_a_save_may_take_half_the_cpu_of_s3torchconnector(cpu, holds):
    (claim,) = claims.about_peers("w", [ratio("save", "s3torchconnector", cpu=cpu)])
    assert claim.holds is holds


def test_a_save_is_held_against_the_fastest_raw_reference():
    ratios = [ratio("save", "raw-sockets", speed=0.8), ratio("save", "raw-boto3", speed=1.4)]
    (claim,) = claims.about_peers("w", ratios)
    assert "raw-sockets" in claim.says
    assert claim.holds is False


def test_each_null_server_has_its_own_bounds_of_cpu():
    ratios = [ratio(op, peer, cpu=0.8) for op in ("save", "load") for peer in ("raw-sockets", "raw-aiobotocore")]
    assert [claim.holds for claim in claims.about_cpu("w", "null", ratios)] == [True, True, True, False]
    assert [claim.holds for claim in claims.about_cpu("w", "null-tls", ratios)] == [True, True]


@pytest.mark.parametrize(("wall_s", "holds"), [(1.17, True), (1.18, False)])
def test_connections_have_to_be_used_by_so_much(wall_s, holds):
    (claim,) = claims.about_connections("w", 1000, [summary(wall_s=wall_s)], concurrency=10, bytes_per_s=100.0)
    assert claim.holds is holds


@pytest.mark.parametrize(("puts", "holds"), [(1, True), (2, True), (3, False)])
def test_parts_are_not_among_the_requests_that_small_tensors_may_take(puts, holds):
    requests = {"PART": 20, "GET": 1, "POST": 2, "PUT": puts}
    traffic = Traffic(
        workload="small", contender="cloudckpt", operation="save", requests=requests, sent=0, received=0
    )
    assert claims.about_small_requests("small", traffic).holds is holds


@pytest.mark.parametrize(("wall_s", "holds"), [(1.9, True), (2.1, False)])
def test_small_tensors_may_take_a_second_more_than_one(wall_s, holds):
    assert claims.about_small_loads("small", summary("load", wall_s), summary("load", 1.0)).holds is holds
