"""Encryption: what was encrypted comes back to who has the key, in its place, and nothing else does."""

import io
import os
import pickle
from dataclasses import replace

import pytest

from cloudckpt.errors import EncryptionKeyError, IntegrityError, UnknownExtensionError, UsageError
from cloudckpt.extensions import AesGcm, FrameContext
from cloudckpt.extensions.aesgcm import DataKey
from cloudckpt.extensions.chain import Chain, open_shard
from cloudckpt.extensions.keys import provider_of

KEYS = {"one": bytes(range(32)), "two": bytes(range(100, 132))}
FRAME = FrameContext(shard="a" * 32, item="weight", number=5, index=2, is_last=False, width=2)
PLAIN = b"weights and biases" * 20


def encrypted(data=PLAIN, frame=FRAME):
    chain = Chain((AesGcm("one", KEYS),)).start_shard()
    return chain, memoryview(b"".join(chain.transform(memoryview(data), frame)))


def opened(chain, keys=KEYS):
    return open_shard([AesGcm.with_keys(keys).from_descriptor("1")], chain.descriptors, chain.params)


def test_it_comes_back_and_shows_nothing():
    chain, stored = encrypted()
    assert len(stored) == len(PLAIN) + 16
    assert b"weights" not in bytes(stored)
    assert bytes(opened(chain).restore(stored, FRAME, len(PLAIN))) == PLAIN


def test_params_tell_the_keys_id_and_no_key():
    chain, _ = encrypted()
    (params,) = chain.params
    assert set(params) == {"key_id", "wrapped_key"}
    assert params["key_id"] == "one"


OTHER_PLACES = {
    "another shard": {"shard": "b" * 32},
    "another item": {"item": "weight2"},
    "another number": {"number": 6},
    "another index": {"index": 3},
    "as the last": {"is_last": True},
}


@pytest.mark.parametrize("change", OTHER_PLACES.values(), ids=OTHER_PLACES)
def test_a_frame_is_good_in_its_own_place_only(change):
    chain, stored = encrypted()
    with pytest.raises(IntegrityError, match="not authentic"):
        opened(chain).restore(stored, replace(FRAME, **change), len(PLAIN))


def test_no_two_places_are_authenticated_alike():
    """Where a name ends and a number begins cannot be shifted."""
    chain, stored = encrypted(frame=replace(FRAME, shard="ab", item="c"))
    with pytest.raises(IntegrityError):
        opened(chain).restore(stored, replace(FRAME, shard="a", item="bc"), len(PLAIN))


def test_every_flipped_bit_is_found():
    chain, stored = encrypted(b"short")
    for bit in range(8 * len(stored)):
        damaged = bytearray(stored)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError, match="not authentic"):
            opened(chain).restore(memoryview(bytes(damaged)), FRAME, 5)


@pytest.mark.parametrize("nbytes", [0, 1, 15, 16, 17, len(PLAIN), len(PLAIN) + 15])
def test_a_frame_cut_anywhere_is_refused(nbytes):
    chain, stored = encrypted()
    with pytest.raises(IntegrityError):
        opened(chain).restore(stored[:nbytes], FRAME, len(PLAIN))


def test_what_is_longer_than_its_place_is_not_decrypted():
    chain, stored = encrypted()
    with pytest.raises(IntegrityError, match="there should be"):
        opened(chain).restore(stored, FRAME, len(PLAIN) - 1)


def test_each_shard_has_a_key_of_its_own():
    (one, first), (two, second) = encrypted(), encrypted()
    assert one.params != two.params
    assert bytes(first) != bytes(second)
    with pytest.raises(IntegrityError):
        opened(two).restore(first, FRAME, len(PLAIN))


def test_frames_of_a_shard_have_nonces_of_their_own():
    chain, first = encrypted(bytes(100))
    second = b"".join(chain.transform(memoryview(bytes(100)), replace(FRAME, number=6)))
    assert bytes(first)[:100] != second[:100]


WRONG_KEYS = {
    "another key of that id": {"one": KEYS["two"]},
    "no key of that id": {"two": KEYS["two"]},
    "a short key": {"one": b"short"},
    "a text": {"one": "a" * 32},
    "no keys": {},
}


@pytest.mark.parametrize("keys", WRONG_KEYS.values(), ids=WRONG_KEYS)
def test_a_wrong_or_missing_key_is_told_by_its_id(keys):
    chain, _ = encrypted()
    with pytest.raises(EncryptionKeyError, match="'one'"):
        opened(chain, keys)


@pytest.mark.parametrize("wrapped", ["", "!!", "AAAA", "A" * 56], ids=["none", "no base64", "short", "another"])
def test_a_damaged_wrapped_key_is_refused(wrapped):
    chain, _ = encrypted()
    params = [{"key_id": "one", "wrapped_key": wrapped}]
    with pytest.raises(EncryptionKeyError, match="'one'"):
        open_shard([AesGcm.with_keys(KEYS).from_descriptor("1")], chain.descriptors, params)


def test_a_provider_that_unwraps_to_no_key_is_found_out():
    class Odd:
        def wrap(self, key_id, data_key):
            return data_key[:16]

        def unwrap(self, key_id, wrapped_key):
            return wrapped_key

    chain = Chain((AesGcm("odd", Odd()),)).start_shard()
    with pytest.raises(EncryptionKeyError, match="16 bytes"):
        opened(chain, Odd())


def test_a_provider_that_fails_is_told_with_the_keys_id():
    class Denied:
        def wrap(self, key_id, data_key):
            raise ConnectionError("access denied")

        unwrap = wrap

    with pytest.raises(EncryptionKeyError, match=r"'odd'.*access denied"):
        Chain((AesGcm("odd", Denied()),)).start_shard()
    chain, _ = encrypted()
    with pytest.raises(EncryptionKeyError, match=r"'one'.*access denied"):
        opened(chain, Denied())


def test_without_keys_it_says_what_to_pass():
    chain, _ = encrypted()
    with pytest.raises(EncryptionKeyError, match=r"'one'.*keys="):
        open_shard([AesGcm.from_descriptor("1")], chain.descriptors, chain.params)


def test_one_that_was_made_to_read_does_not_write():
    with pytest.raises(UsageError, match="AesGcm"):
        AesGcm.with_keys(KEYS).from_descriptor("1").start_shard()


def test_one_without_keys_is_refused_when_it_is_made():
    with pytest.raises(UsageError, match=r"takes a key's name first, and got a dict$"):
        AesGcm({"k": bytes(32)}, "k")
    with pytest.raises(UsageError, match=r"keys="):
        AesGcm("one")


def test_another_version_is_refused():
    with pytest.raises(UnknownExtensionError, match=r"stream\.aesgcm/2"):
        AesGcm.from_descriptor("2")


def test_no_repr_or_pickle_of_a_data_key_shows_it():
    key = DataKey.new("one", provider_of(KEYS))
    assert repr(key) == "<DataKey under 'one'>"
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(key)
    assert repr(AesGcm("one", KEYS)) == "AesGcm(key_id='one')"
    assert "\\x" not in repr(AesGcm.with_keys(KEYS).from_descriptor("1"))


def test_one_pickled_still_encrypts():
    again = pickle.loads(pickle.dumps(AesGcm("one", KEYS)))
    chain = Chain((again,)).start_shard()
    stored = b"".join(chain.transform(memoryview(PLAIN), FRAME))
    assert bytes(opened(chain).restore(memoryview(stored), FRAME, len(PLAIN))) == PLAIN


def test_a_rewrapped_data_key_is_the_same_under_another_id():
    key = DataKey.new("one", provider_of(KEYS))
    again = key.rewrapped("two", provider_of(KEYS))
    assert again.params["key_id"] == "two"
    only_new = provider_of({"two": KEYS["two"]})
    assert DataKey.open(again.params, only_new).decrypt(1, key.encrypt(1, b"x", b""), b"") == b"x"
    with pytest.raises(EncryptionKeyError):
        DataKey.open(again.params, provider_of({"one": KEYS["one"]}))


# Streams.

MIB = 1 << 20


class Kept(io.BytesIO):
    def close(self):
        self.data = self.getvalue()
        super().close()


def stream_of(data, piece=300_000):
    output = Kept()
    stream = AesGcm("one", KEYS).transform_to(output)
    for start in range(0, len(data), piece):
        assert stream.write(data[start : start + piece]) == len(data[start : start + piece])
    stream.close()
    return output.data


def read(stored, keys=KEYS):
    return AesGcm.with_keys(keys).from_descriptor("1").transform_from(io.BytesIO(stored)).read(-1)


@pytest.mark.parametrize("nbytes", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB])
def test_streams_of_any_length_come_back(nbytes):
    data = os.urandom(nbytes)
    assert read(stream_of(data)) == data


def header_nbytes(stored):
    return 4 + int.from_bytes(stored[:4], "little")


@pytest.mark.parametrize("segments", [0, 1, 2])
@pytest.mark.parametrize("more", [0, 1, 16, 17])
def test_a_stream_cut_anywhere_is_an_error(segments, more):
    stored = stream_of(bytes(3 * MIB))
    cut = header_nbytes(stored) + segments * (MIB + 16) + more
    with pytest.raises(IntegrityError):
        read(stored[:cut])


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 20])
def test_a_stream_cut_in_its_header_is_an_error(cut):
    with pytest.raises(IntegrityError, match="begin"):
        read(stream_of(b"abc")[:cut])


def test_a_header_that_claims_too_much_is_not_read():
    with pytest.raises(IntegrityError, match="begin"):
        read((1 << 31).to_bytes(4, "little") + b"{}")


def test_segments_cannot_be_swapped_or_repeated():
    stored = stream_of(bytes(3 * MIB))
    start, size = header_nbytes(stored), MIB + 16
    head, *parts = stored[:start], *(stored[start + i * size : start + (i + 1) * size] for i in range(3))
    for order in ((1, 0, 2), (0, 0, 1, 2), (0, 2, 1), (0, 2)):
        with pytest.raises(IntegrityError):
            read(head + b"".join(parts[i] for i in order))


def test_a_flipped_bit_in_a_stream_is_found():
    stored = bytearray(stream_of(b"some data"))
    stored[-20] ^= 1
    with pytest.raises(IntegrityError, match="segment 0"):
        read(bytes(stored))


def test_a_stream_needs_its_key():
    with pytest.raises(EncryptionKeyError, match="'one'"):
        read(stream_of(b"abc"), {"two": KEYS["two"]})
