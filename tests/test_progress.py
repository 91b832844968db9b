"""How far saves and loads have come, and what they say of themselves when they are over."""

import io
import logging
import sys
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cloudckpt.dcp import Checkpointer, ObjectStoreReader, ObjectStoreWriter
from cloudckpt.engine.framing import MIN_PART_SIZE
from cloudckpt.extensions import ZStandard
from cloudckpt.progress import LINES_EVERY_S, Lines, show_size
from test_traces import writer_of_a_rank

GIB = 1 << 30


class Seen(list):
    """A function that remembers what it is told."""

    def __call__(self, done, total):
        self.append((done, total))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def root():
    return f"memory://{token_hex(6)}/run"


def state(value=1.0):
    return {"w": torch.full((3 << 20,), value), "v": torch.full((2 << 20,), value), "lr": 0.1}


def is_whole(seen):
    """Whether it never went back, and ended with all."""
    done = [done for done, _ in seen]
    return done == sorted(done) and len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("uploads", ["thread", "process"])
@pytest.mark.parametrize("extensions", [(), {"w": [ZStandard()], "*": []}], ids=["plain", "some frames"])
def test_a_function_is_told_of_each_request_until_all_is_done(tmp_path, uploads, extensions):
    seen, options = Seen(), {"extensions": extensions, "part_size": MIN_PART_SIZE, "max_request_size": 1 << 20}
    with Checkpointer(f"file://{tmp_path}/run", uploads=uploads, progress=seen, **options) as checkpointer:
        saved = checkpointer.async_save(1, state()).result()
        assert is_whole(seen)
        assert 0 <= seen[-1][1] - saved.nbytes < 4096  # headers
        assert len(seen) > 1
        seen.clear()
        assert checkpointer.load(state(0.0)) == 1
        assert is_whole(seen)
        assert seen[-1][1] == checkpointer.last_load.bytes_fetched
        assert len(seen) == checkpointer.last_load.requests > 1


def test_a_function_that_fails_is_not_called_again_and_costs_a_warning(root, caplog):
    calls = []

    def failing(done, total):
        calls.append(done)
        msg = "no notebook"
        raise ValueError(msg)

    writer = ObjectStoreWriter(root, progress=failing, part_size=MIN_PART_SIZE)
    dcp.save(state(), storage_writer=writer)
    assert writer.stats.requests > 2
    assert len(calls) == 1
    assert [r.message for r in caplog.records if r.name == "cloudckpt.progress"] == [
        "progress is not shown any more: ValueError: no notebook"
    ]


def test_only_the_coordinator_shows_it(root):
    seen = Seen()
    writer_of_a_rank(ObjectStoreWriter(f"{root}/a", progress=seen), is_coordinator=False)
    assert seen == []
    writer_of_a_rank(ObjectStoreWriter(f"{root}/b", progress=seen), is_coordinator=True)
    assert is_whole(seen)


def test_on_a_terminal_it_is_a_bar_that_goes_away(root, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    dcp.save(state(), storage_writer=ObjectStoreWriter(f"{root}/[step]", progress=True))
    dcp.load(state(0.0), storage_reader=ObjectStoreReader(f"{root}/[step]", progress=True))
    shown = terminal.getvalue()
    assert f"saving {root}/[step]" in shown
    assert f"loading {root}/[step]" in shown
    assert "20.0/20.0 MiB" in shown
    assert shown.rstrip().endswith("\x1b[2K")  # the line is erased


def test_elsewhere_it_is_a_line_in_the_log_now_and_then(caplog):
    caplog.set_level(logging.INFO)
    now = [100.0]
    lines = Lines("saving s3://b/step-1", clock=lambda: now[0])
    for second in range(1, 41):
        now[0] = 100.0 + second
        lines(second * GIB // 10, 4 * GIB)
    assert LINES_EVERY_S == 10
    assert [r.message for r in caplog.records] == [
        "saving s3://b/step-1: 1.0 GiB of 4.0 GiB (25 %), 102.4 MiB/s, 30 s left",
        "saving s3://b/step-1: 2.0 GiB of 4.0 GiB (50 %), 102.4 MiB/s, 20 s left",
        "saving s3://b/step-1: 3.0 GiB of 4.0 GiB (75 %), 102.4 MiB/s, 10 s left",
    ]


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 40, "5.0 TiB"), (1 << 60, "1024.0 PiB")],
)
def test_sizes_are_shown_as_people_read_them(nbytes, shown):
    assert show_size(nbytes) == shown


def test_a_save_and_a_load_say_in_one_line_each_what_they_did(root, caplog):
    caplog.set_level(logging.INFO, "cloudckpt")
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, state())
        checkpointer.load(state(0.0))
    saved, loaded = [r.message for r in caplog.records if r.levelno == logging.INFO]
    assert saved.startswith(f"saved {root}/step-1: 20.0 MiB (20.0 MiB stored) in 1 shard(s), 3 entries, ")
    assert loaded.startswith(f"loaded from {root}/step-1: 20.0 MiB, 20.0 MiB fetched in 3 request(s), ")
    assert saved.endswith("iB/s")
    assert loaded.endswith("iB/s")


def test_each_save_tells_in_numbers_what_this_rank_did(root):
    with Checkpointer(root, extensions={"w": [ZStandard()], "*": []}) as checkpointer:
        saved = checkpointer.save(1, state())
        behind = checkpointer.async_save(2, state()).result()
        skipped = checkpointer.last_load
    for stats in (saved.stats, behind.stats):
        assert (stats.nbytes, stats.stored_nbytes) == (saved.nbytes, saved.stored_nbytes)
        assert 0 < stats.stored_nbytes < stats.nbytes
        assert stats.requests == 2
        phases = {"plan_s", "stage_s", "transform_s", "upload_s", "commit_s"}
        assert all(getattr(stats, phase) > 0 for phase in phases)
        assert stats.seconds > stats.upload_s
        assert stats.rate == stats.stored_nbytes / stats.upload_s
    assert behind.stats.stage_s >= behind.staging_s * 0.9
    assert skipped is None
