"""Blocking work beside an event loop."""

import asyncio
import subprocess
import sys
import threading

import pytest

from cloudckpt.threads import DaemonExecutor, in_thread


async def test_a_cancelled_caller_waits_until_the_work_has_ended():
    began, go_on, ended = threading.Event(), threading.Event(), []

    def work():
        began.set()
        go_on.wait(10)
        ended.append(True)

    task = asyncio.ensure_future(in_thread(work))
    await asyncio.get_running_loop().run_in_executor(None, began.wait, 10)
    task.cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()  # a second time
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


async def test_what_the_work_returns_or_raises_is_the_callers():
    assert await in_thread(pow, 2, 5) == 32
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0)


def test_an_executor_gives_results_and_errors():
    executor = DaemonExecutor(2)
    assert executor.submit(pow, 2, 3).result(10) == 8
    with pytest.raises(ZeroDivisionError):
        executor.submit(lambda: 1 // 0).result(10)


def test_an_async_save_that_a_script_ends_with_is_committed(tmp_path):
    script = f"""
import warnings; warnings.simplefilter("ignore")
import torch, torch.distributed.checkpoint as dcp
from cloudckpt.dcp import ObjectStoreWriter
dcp.async_save({{"a": torch.ones(1000)}}, storage_writer=ObjectStoreWriter("file://{tmp_path}/x"))
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "x" / "manifest.json").exists()


def test_a_save_that_a_signal_handler_ends_is_not_committed_behind_its_back():
    script = """
import asyncio, signal, time
from cloudckpt.engine import loop
def stop(*_): raise TimeoutError("watchdog")
signal.signal(signal.SIGALRM, stop)
signal.setitimer(signal.ITIMER_REAL, 0.5)
seen = []
async def work():
    try:
        await asyncio.sleep(60)
    finally:
        seen.append("cleaned up")
try:
    loop.run(work)
except TimeoutError:
    assert seen == ["cleaned up"], seen
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
