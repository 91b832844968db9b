"""The benchmark as a whole, on its own server, small."""

import json

from click.testing import CliRunner

from cloudckpt.cli.bench import command
from cloudckpt.cli.bench.raw import Cut


def test_a_url_and_a_server_of_its_own_are_misuse():
    misused = CliRunner().invoke(command, ["s3://b/p", "--server", "null"])
    assert misused.exit_code == 2
    assert "not both" in misused.output


def test_what_cannot_be_measured_on_a_null_server_is_refused():
    misused = CliRunner().invoke(command, ["--server", "null", "--workloads", "adam"])
    assert misused.exit_code == 2
    assert "no 'adam'" in misused.output


def test_a_run_on_the_null_server_measures_counts_and_draws(tmp_path):
    found, chart = tmp_path / "found.json", tmp_path / "chart.png"
    options = ["--server", "null", "--contenders", "cloudckpt,raw-sockets", "--rounds", "1", "--size", "80MiB"]
    ran = CliRunner().invoke(command, [*options, "--json", str(found), "--chart", str(chart)], catch_exceptions=False)
    assert ran.exit_code == 0
    assert "client CPU at most 1.6 of raw-sockets's" in ran.output
    workload = json.loads(found.read_text())["workloads"]["bf16-128"]
    assert {(s["contender"], s["operation"]) for s in workload["summaries"]} == {
        (name, operation) for name in ("cloudckpt", "raw-sockets") for operation in ("save", "load")
    }
    (saved,) = [t for t in workload["traffic"] if (t["contender"], t["operation"]) == ("raw-sockets", "save")]
    assert saved["requests"] == {"PART": -(-(80 << 20) // Cut().part_size(80 << 20)), "POST": 2}
    assert 80 << 20 < saved["sent"] < 81 << 20
    assert chart.read_bytes().startswith(b"\x89PNG")
