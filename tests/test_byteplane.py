"""Byte planes: every byte in its place, and back."""

import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.errors import UnknownExtensionError, UsageError
from cloudckpt.extensions import BytePlane, FrameContext
from cloudckpt.extensions.byteplane import join, split


def fresh(nbytes):
    return memoryview(bytearray(nbytes))


def planes_of(data, width):
    return split(memoryview(data), width, fresh)


@pytest.mark.parametrize(
    ("plain", "width", "planes"),
    [
        (b"a1b2c3", 2, [b"abc", b"123"]),
        (b"a1b2c3x", 2, [b"abc", b"123", b"x"]),
        (b"a123b456", 4, [b"ab", b"14", b"25", b"36"]),
        (b"a123b456xyz", 4, [b"ab", b"14", b"25", b"36", b"xyz"]),
        (bytes(range(16)), 8, [bytes([i, i + 8]) for i in range(8)]),
        (b"abc", 4, [b"abc"]),
        (b"abc", 1, [b"abc"]),
        (b"", 2, [b""]),
    ],
)
def test_planes_hold_the_bytes_of_numbers_lowest_first(plain, width, planes):
    assert [bytes(plane) for plane in planes_of(plain, width)] == planes


@given(data=st.binary(max_size=300), width=st.sampled_from([1, 2, 4, 8, 16]))
def test_joining_is_the_inverse_of_splitting(data, width):
    assert bytes(join(memoryview(b"".join(planes_of(data, width))), width, fresh)) == data


@pytest.mark.parametrize(("own", "given_width", "width"), [(2, None, 2), (4, None, 4), (4, 2, 2), (1, 8, 8)])
def test_the_width_is_the_items_unless_one_is_given(own, given_width, width):
    frame = FrameContext(shard="", item="", number=0, index=0, is_last=True, width=own)
    data = os.urandom(64)
    made = BytePlane(given_width).start_shard().transform([memoryview(data)], frame)
    assert b"".join(made) == b"".join(planes_of(data, width))


@pytest.mark.parametrize("width", [0, 3, -2, 32])
def test_a_width_that_no_number_has_is_refused(width):
    with pytest.raises(UsageError, match=str(width)):
        BytePlane(width)


@pytest.mark.parametrize("extension", [BytePlane(), BytePlane(2), BytePlane(16)], ids=str)
def test_the_descriptor_says_the_width_where_one_was_given(extension):
    name, _, version = extension.get_descriptor().partition("/")
    assert name == BytePlane.registry_name()
    assert BytePlane.from_descriptor(version) == extension


@pytest.mark.parametrize("version", ["", "2", "1+width=", "1+width=3", "1+width=02", "1.0", "width=2"])
def test_another_version_is_refused(version):
    with pytest.raises(UnknownExtensionError, match="version"):
        BytePlane.from_descriptor(version)


MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [0, 1, 7, MIB - 1, MIB, MIB + 1, 3 * MIB + 5])
@pytest.mark.parametrize("piece", [1000, MIB, 5 * MIB])
def test_streams_of_any_length_come_back(nbytes, piece):
    class Kept(io.BytesIO):
        def close(self):
            self.data = self.getvalue()
            super().close()

    data, output = os.urandom(nbytes), Kept()
    stream = BytePlane(4).transform_to(output)
    for start in range(0, nbytes, piece):
        assert stream.write(data[start : start + piece]) == len(data[start : start + piece])
    stream.close()
    assert len(output.data) == nbytes
    assert nbytes < 8 or output.data != data
    assert BytePlane(4).transform_from(io.BytesIO(output.data)).read(-1) == data
