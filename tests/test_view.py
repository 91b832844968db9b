"""A file over bytes in object storage."""

import io
import threading
import zipfile
from secrets import token_hex

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

import cloudckpt
from cloudckpt import errors
from cloudckpt.dcp import ObjectStoreWriter
from cloudckpt.engine.view import FileView
from cloudckpt.extensions import ZStandard
from cloudckpt.ranges import Range

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Asked:
    """Bytes, and what was asked of them."""

    def __init__(self, data, fails=False):
        self.data, self.fails, self.ranges = data, fails, []

    def __call__(self, at, into):
        if self.fails:
            raise errors.StoreUnavailableError("no answer")
        assert 0 <= at.start < at.stop <= len(self.data)
        assert len(into) == len(at)
        self.ranges.append(at)
        into[:] = self.data[at.start : at.stop]


def view_of(data, max_ahead=8 << 20):
    asked = Asked(data)
    return FileView(asked, len(data), "the file", max_ahead=max_ahead), asked


# What torch's own view of a slice of a file promises: torch's test_utils.py, TestReaderView, as tables. Each file is
# a part of the alphabet: its front, its middle, its back.
PARTS = {"front": ALPHABET[:5], "middle": ALPHABET[10:15], "back": ALPHABET[-5:]}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize(("size", "length"), [(3, 3), (5, 5), (10, 5), (-1, 5), (None, 5), (0, 0)], ids=str)
def test_a_read_gives_what_is_there_and_no_more(part, size, length):
    view, _ = view_of(part)
    assert view.read(size) == part[:length]
    assert view.tell() == length
    assert view.read() == part[length:]
    assert view.read(3) == b""


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize(("size", "length"), [(3, 3), (5, 5), (10, 5), (0, 0)])
def test_readinto_fills_what_it_can(part, size, length):
    view, _ = view_of(part)
    buffer = bytearray(b"#" * size)
    assert view.readinto(buffer) == length
    assert bytes(buffer) == part[:length] + b"#" * (size - length)
    assert view.readinto(bytearray(10)) == 5 - length
    assert view.readinto(bytearray(10)) == 0


@pytest.mark.parametrize(
    ("offset", "whence", "position"),
    [(0, 0, 0), (3, 0, 3), (5, 0, 5), (9, 0, 9), (1, 1, 3), (-2, 1, 0), (8, 1, 10), (0, 2, 5), (-2, 2, 3), (2, 2, 7)],
)
def test_seek_and_tell_count_as_io_defines_it(offset, whence, position):
    view, _ = view_of(PARTS["middle"])
    view.seek(2)
    assert view.seek(offset, whence) == view.tell() == position
    assert view.read(2) == PARTS["middle"][position : position + 2]


@pytest.mark.parametrize(("offset", "whence"), [(-1, 0), (-3, 1), (-6, 2), (0, 3), (0, -1)])
def test_a_seek_before_the_start_or_from_nowhere_is_refused_and_moves_nothing(offset, whence):
    view, _ = view_of(PARTS["middle"])
    view.seek(2)
    with pytest.raises(ValueError):
        view.seek(offset, whence)
    assert view.tell() == 2


def test_it_says_what_it_is():
    view, _ = view_of(ALPHABET)
    assert (view.readable(), view.seekable(), view.writable(), view.closed) == (True, True, False, False)
    assert view.name == "the file"
    with pytest.raises(io.UnsupportedOperation):
        view.write(b"x")
    with pytest.raises(OSError):
        view.fileno()


CLOSED = {
    "read": lambda v: v.read(1), "readinto": lambda v: v.readinto(bytearray(1)), "seek": lambda v: v.seek(0),
    "tell": lambda v: v.tell(), "readable": lambda v: v.readable(), "seekable": lambda v: v.seekable(),
    "readall": lambda v: v.readall(),
}  # fmt: skip


@pytest.mark.parametrize("use", CLOSED.values(), ids=CLOSED)
def test_a_closed_one_is_of_no_use(use):
    view, _ = view_of(ALPHABET)
    with view:
        pass
    with pytest.raises(ValueError, match="closed"):
        use(view)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 300)),
        st.tuples(st.just("readinto"), st.integers(0, 300)),
        st.tuples(st.just("seek"), st.integers(0, 1200)),
        st.tuples(st.just("forward"), st.integers(0, 50)),
        st.tuples(st.just("from_end"), st.integers(-1000, 50)),
    ),
    max_size=30,
)
LONG = bytes(np.random.default_rng(0).integers(0, 256, 1000, np.uint8))


@given(STEPS, st.sampled_from([0, 100, 1 << 20]))
def test_any_use_gives_what_a_file_in_memory_gives(steps, max_ahead):
    view, _ = view_of(LONG, max_ahead)
    model = io.BytesIO(LONG)
    for step, n in steps:
        if step == "read":
            assert view.read(n) == model.read(n)
        elif step == "readinto":
            mine, its = bytearray(n), bytearray(n)
            assert view.readinto(mine) == model.readinto(its)
            assert mine == its
        else:
            whence = {"seek": 0, "forward": 1, "from_end": 2}[step]
            assert view.seek(n, whence) == model.seek(n, whence)
        assert view.tell() == model.tell()


def test_random_reads_fetch_what_is_asked_for():
    view, asked = view_of(bytes(10 << 20))
    for start in (5 << 20, 100, 9 << 20, 3):
        view.seek(start)
        view.read(10)
    assert asked.ranges == [Range(s, s + 10) for s in (5 << 20, 100, 9 << 20, 3)]


def test_a_reader_that_goes_on_is_read_ahead_of_further_and_further():
    data = bytes(np.random.default_rng(1).integers(0, 256, 20 << 20, np.uint8))
    view, asked = view_of(data, max_ahead=4 << 20)
    found = bytearray()
    while piece := view.read(8192):
        found += piece
    assert found == data
    sizes = [len(r) for r in asked.ranges]
    assert sizes[0] == 8192
    assert sizes[1] == 8192 + (64 << 10)
    assert max(sizes) <= (4 << 20) + 8192
    assert len(sizes) < 20
    assert sum(sizes) == len(data)  # nothing twice


def test_a_jump_ends_the_reading_ahead():
    view, asked = view_of(bytes(10 << 20))
    for _ in range(40):
        view.read(8192)
    asked.ranges.clear()
    view.seek(9 << 20)
    view.read(8192)
    assert asked.ranges == [Range(9 << 20, (9 << 20) + 8192)]


def test_a_large_read_is_fetched_into_the_readers_own_memory():
    view, asked = view_of(bytes(10 << 20), max_ahead=1 << 20)
    buffer = bytearray(3 << 20)
    for _ in range(3):
        assert view.readinto(buffer) == len(buffer)
    assert [len(r) for r in asked.ranges] == [3 << 20] * 3


def test_a_read_that_fails_leaves_the_position_where_it_was():
    view, asked = view_of(ALPHABET)
    view.read(3)
    asked.fails = True
    with pytest.raises(errors.StoreUnavailableError):
        view.read(3)
    asked.fails = False
    assert view.read(3) == ALPHABET[3:6]


def test_an_empty_file_is_read_without_asking():
    view, asked = view_of(b"")
    assert (view.read(), view.read(5), view.readinto(bytearray(3)), view.seek(0, 2)) == (b"", b"", 0, 0)
    assert asked.ranges == []


def saved(**entries):
    url = f"memory://{token_hex(6)}/ckpt"
    extensions = entries.pop("extensions", ())
    dcp.save(entries, storage_writer=ObjectStoreWriter(url, extensions=extensions, frame_size=4096))
    return url


def in_memory(write):
    buffer = io.BytesIO()
    write(buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


@pytest.fixture(scope="module", params=["plain", "compressed"])
def files(request):
    def write_zip(buffer):
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", "first\nsecond\n" * 5000)
            archive.writestr("b.bin", LONG)

    url = saved(
        extra={"step": 7, "name": "x"},
        zipped=in_memory(write_zip),
        text=in_memory(lambda b: b.write("één\nzwei\r\ntrois\n".encode() * 2000)),
        safe=torch.frombuffer(bytearray(safetensors.torch.save({"w": torch.arange(9.0)})), dtype=torch.uint8),
        grid=torch.arange(1000 * 7, dtype=torch.int32).reshape(1000, 7),
        extensions=[ZStandard()] if request.param == "compressed" else (),
    )
    with cloudckpt.open(url) as ckpt:
        yield ckpt


def test_torch_load_reads_it(files):
    with files.open_file("extra.step") as step, files.open_file("extra.name") as name:
        assert torch.load(step, weights_only=True) == 7
        assert torch.load(name, weights_only=True) == "x"


def test_zipfile_reads_it(files):
    with files.open_file("zipped") as file, zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert archive.read("b.bin") == LONG
        with archive.open("a.txt") as text:
            assert next(iter(text)) == b"first\n"


def test_buffered_and_text_readers_read_it(files):
    with io.TextIOWrapper(io.BufferedReader(files.open_file("text")), encoding="utf-8") as text:
        lines = list(text)
        assert len(lines) == 6000
        assert set(lines) == {"één\n", "zwei\n", "trois\n"}
        text.seek(0)
        assert text.readline() == "één\n"


def test_safetensors_reads_it(files):
    with files.open_file("safe") as file:
        assert safetensors.torch.load(file.read())["w"].tolist() == list(range(9))


def test_a_tensors_file_is_its_elements_row_major_wherever_it_is_cut(files):
    data = np.arange(7000, dtype="<i4").tobytes()
    with files.open_file("grid") as file:
        assert file.read() == data
        for start, n in ((0, 1), (3, 6), (27, 29), (13999, 5), (27990, 100)):
            file.seek(start)
            assert file.read(n) == data[start : start + n]


def test_several_threads_may_read_one_file(files):
    data = np.arange(7000, dtype="<i4").tobytes()
    found = []

    def work():
        with files.open_file("grid") as file:
            found.append(file.read() == data and files["grid"][5].tolist() == list(range(35, 42)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_a_file_of_what_is_not_there_is_refused(files):
    with pytest.raises(errors.MissingKeyError, match="did you mean 'grid'"):
        files.open_file("gird")
