"""The benchmark of saves behind training: its arithmetic, its slow server, and each part once, tiny."""

import json
import threading
import time
from http.client import HTTPConnection
from urllib.parse import urlsplit

import click
import pytest
from click.testing import CliRunner

from cloudckpt.cli.bench import async_blocking, async_ranks
from cloudckpt.cli.bench.async_command import command
from cloudckpt.cli.bench.async_contenders import CONTENDERS
from cloudckpt.cli.bench.async_figures import FED, Blocking, Coordination, Spread, Training, claims, rows
from cloudckpt.cli.bench.async_process import in_own_process
from cloudckpt.cli.bench.null_process import KINDS, serving
from cloudckpt.cli.bench.null_server import Line, NullServer, Shape


def blocking(blocked_s, copy_s, *, contender="cloudckpt-thread", threads=2, round_=1):
    return Blocking(
        case="c",
        threads=threads,
        contender=contender,
        round=round_,
        nbytes=1,
        blocked_s=blocked_s,
        copy_s=copy_s,
    )


def training(idle_s, busy_s, *, contender="cloudckpt-thread", blocked_s=0.0, upload_s=10.0):
    return Training(
        contender=contender,
        round=1,
        nbytes=1,
        blocked_s=blocked_s,
        upload_s=upload_s,
        idle_s=idle_s,
        busy_s=busy_s,
        server_cpu_s=1.0,
    )


def coordination(coordination_s, begin_s):
    return Coordination(case="c", round=1, coordination_s=coordination_s, begin_s=begin_s)


def test_a_row_has_the_median_and_the_ends_of_its_rounds_ratios_and_not_a_ratio_of_medians():
    (row,) = rows([blocking(1.0, 1.0), blocking(9.0, 3.0, round_=2), blocking(4.0, 2.0, round_=3)])
    assert row.measures["ratio"] == Spread(median=2.0, least=1.0, greatest=3.0)
    assert row.measures["copy_s"].median == 2.0
    assert row.rounds == 3


def test_each_contender_and_each_number_of_threads_has_a_row_of_its_own():
    found = rows([blocking(1, 1), blocking(1, 1, threads=1), blocking(1, 1, contender="torch-thread")])
    assert [(row.case, row.contender) for row in found] == [
        ("c, 2 threads", "cloudckpt-thread"),
        ("c, 1 thread", "cloudckpt-thread"),
        ("c, 2 threads", "torch-thread"),
    ]


def test_throughput_is_of_all_steps_so_that_one_that_hangs_counts():
    assert training([1.0, 1.0], [1.0, 1.0, 2.0]).ratio == pytest.approx(0.75)


def test_a_save_costs_training_its_copy_and_what_the_upload_slows_it():
    assert training([1.0], [2.0], blocked_s=0.5, upload_s=10.0).lost_s == pytest.approx(5.5)


def test_a_contender_is_held_against_bytes_from_elsewhere_in_the_same_round():
    figures = [training([1.0], [2.0]), training([1.0], [1.25], contender=FED)]
    assert rows(figures)[0].measures["of_fed"].median == pytest.approx(0.625)
    assert "of_fed" not in rows(figures[:1])[0].measures


@pytest.mark.parametrize(("blocked_s", "holds"), [(1.2, True), (1.21, False)])
def test_a_save_may_block_for_one_copy_and_a_fifth(blocked_s, holds):
    (claim,) = claims(rows([blocking(blocked_s, 1.0)]))
    assert claim.holds is holds


@pytest.mark.parametrize(("busy_s", "holds"), [(1.0, True), (1.06, False)])
def test_an_upload_may_take_a_twentieth_of_the_throughput(busy_s, holds):
    (claim,) = claims(rows([training([1.0], [busy_s])]))
    assert claim.holds is holds


@pytest.mark.parametrize(("begin_s", "holds"), [(0.01, True), (0.011, False)])
def test_what_a_save_begins_with_counts_as_coordination(begin_s, holds):
    (claim,) = claims(rows([coordination(0.04, begin_s)]))
    assert claim.holds is holds


def test_nothing_is_claimed_of_others():
    assert claims(rows([blocking(9, 1, contender="torch-thread"), training([1], [9], contender="nothing")])) == []


def test_connections_that_share_a_line_wait_for_each_other():
    line = Line(100.0)
    line.spend(0, 10.0)
    assert line.spend(50, 10.0) == pytest.approx(0.45)  # 50 ms of it was free
    assert line.spend(50, 10.0) == pytest.approx(0.95)


def test_all_connections_of_a_server_share_its_line():
    server = NullServer(Shape(total_bytes_per_s=20e6), None)
    threading.Thread(target=server.serve, daemon=True).start()
    at, began = urlsplit(server.url), time.monotonic()
    for _ in range(2):
        connection = HTTPConnection(at.hostname, at.port)
        connection.request("PUT", "/b/k", bytes(2 << 20))
        assert connection.getresponse().read() == b""
        connection.close()
    assert server._line.spend(0, began) > (4 << 20) / 20e6 - 0.06  # what is due by then, however long it took


def fails_at_the_second():
    yield 1
    raise ValueError("in its own process")


def test_what_fails_in_a_process_of_its_own_is_told_with_its_trace():
    found = in_own_process(fails_at_the_second)
    assert next(found) == 1
    with pytest.raises(click.ClickException, match="in its own process"):
        next(found)


def test_a_part_that_there_is_not_is_misuse():
    misused = CliRunner().invoke(command, ["--parts", "async-sleeping"])
    assert misused.exit_code == 2
    assert "no 'async-sleeping'" in misused.output


def test_a_tiny_run_tells_its_figures_rows_and_claims(tmp_path):
    file = tmp_path / "found.json"
    options = ["--parts", "async-training", "--training-size", "32MiB", "--rounds", "1"]
    options += ["--contenders", "cloudckpt-thread", "--json", str(file)]
    ran = CliRunner().invoke(command, options, catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    found = json.loads(file.read_text())
    named = ["bytes from elsewhere", "nothing", "cloudckpt-thread"]
    assert sorted(figure["contender"] for figure in found["figures"]) == sorted(named)
    assert sorted(row["contender"] for row in found["rows"]) == sorted(named)
    assert all(figure["busy_s"] and figure["server_cpu_s"] >= 0 for figure in found["figures"])
    assert len(found["claims"]) == 1
    assert "leaves at least 0.95 of the throughput" in ran.output


def test_each_contender_blocks_for_some_time_and_the_warm_up_is_not_told(monkeypatch):
    contenders = [c for c in CONTENDERS.values() if c.name in {"cloudckpt-thread", "torch-thread-kept"}]
    with serving(KINDS["null"]) as server:
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        options = {"nbytes": 1 << 20, "threads": (2, 1), "rounds": 2, "contenders": contenders, "url": "s3://b/p"}
        found = list(in_own_process(async_blocking.measure, "bf16-128", **options))
    assert [(f.threads, f.round, f.contender) for f in found] == [
        (threads, round_, name)
        for threads in (2, 1)
        for round_, names in (
            (1, ("cloudckpt-thread", "torch-thread-kept")),
            (2, ("torch-thread-kept", "cloudckpt-thread")),
        )
        for name in names
    ]
    assert all(f.nbytes == 1 << 20 and f.blocked_s > 0 and f.copy_s > 0 for f in found)


def test_ranks_tell_what_each_save_after_the_first_took_besides_staging_and_bytes():
    with serving(KINDS["null"]) as server:
        found = list(async_ranks.measure("128 tensors", "here", 2, "s3://bench/async", server.environ))
    assert [(f.case, f.round) for f in found] == [("128 tensors, here", 1), ("128 tensors, here", 2)]
    assert all(f.coordination_s > 0 and f.begin_s > 0 for f in found)
