"""The machine that measured, and the versions it measured with."""

import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a figure depends on, apart from the server."""

    cpu: str
    cores: int
    memory_nbytes: int
    system: str
    python: str
    versions: dict[str, str]


def describe(distributions: Iterable[str]) -> Machine:
    """This machine, and the versions of those distributions."""
    affinity = getattr(os, "sched_getaffinity", None)
    return Machine(
        cpu=_cpu_model(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        memory_nbytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: _version(name) for name in sorted(distributions)},
    )


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"^model name\s*: (.*)$", file.read(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed as a distribution"
