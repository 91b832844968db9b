"""What an operation costs the process it runs in.

Law: knows nothing of checkpoints. Memory is read from Linux's /proc; elsewhere it is None.
"""

import os
import re
import resource
from collections.abc import Callable
from time import perf_counter

from cloudckpt.cli.bench.figures import Cost


def cost_of(operation: Callable[[], None]) -> Cost:
    """Runs it, and measures this process meanwhile, all threads."""
    before = resident()
    told = _reset_peak()
    cpu, began = _cpu_s(), perf_counter()
    operation()
    wall_s, cpu_s = perf_counter() - began, _cpu_s() - cpu
    return Cost(wall_s=wall_s, cpu_s=cpu_s, rss_before=before, rss_peak=_status("VmHWM") if told else None)


def resident() -> int | None:
    """Bytes of this process that are in memory now."""
    return _status("VmRSS")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _reset_peak() -> bool:
    """Sets VmHWM back to VmRSS (man 5 proc_pid_clear_refs); says whether it could."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    if not os.path.exists("/proc/self/status"):
        return None
    with open("/proc/self/status", encoding="ascii") as file:
        found = re.search(rf"^{field}:\s+(\d+) kB$", file.read(), re.MULTILINE)
    return int(found[1]) << 10 if found else None
