"""Runs a harness under atheris: ``python -m fuzz manifest -max_total_time=60``, from ``tests``.

Law: what a harness checks is its own, and the tests check the same; here it is only run.
"""

import logging
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import atheris

_LIMITS = ["-rss_limit_mb=4096", "-malloc_limit_mb=2048", "-timeout=20", "-max_len=65536"]


def main(name, *arguments):
    """Runs one harness, from its own seeds, in a directory of its own."""
    with atheris.instrument_imports(include=["cloudckpt"]):
        harness = import_module(f"fuzz.fuzz_{name}")
    with tempfile.TemporaryDirectory() as corpus:
        for i, seed in enumerate(harness.seeds()):
            Path(corpus, f"seed-{i}").write_bytes(seed)
        logging.disable()
        found = os.environ.get("FUZZ_FOUND", ".")
        atheris.Setup([sys.argv[0], corpus, f"-artifact_prefix={found}/{name}-", *_LIMITS, *arguments], harness.check)
        atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
