"""The manifest out and back, and everything that can be wrong with one."""

from datetime import UTC, datetime

import msgspec
import pytest
from awscrt.checksums import crc32c
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloudckpt.errors import ManifestError, UnsupportedVersionError
from cloudckpt.layout import shard_key
from cloudckpt.manifest import (
    FORMAT,
    SUMMARY_NBYTES,
    VERSION,
    BytesEntry,
    Chunk,
    Manifest,
    Shard,
    Summary,
    TensorEntry,
    ValueEntry,
    encode,
    encode_tombstone,
    entry_problems,
    find_problems,
    pack,
    parse,
    parse_summary,
    shard_problems,
    unpack,
)

WHERE = "s3://bucket/run/step-7/manifest.json"
KEY = shard_key("0123456789abcdef" * 2, "safetensors")
NAMES = st.text(max_size=20)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 53), 1 << 53) | st.floats(allow_nan=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
PLAIN = PLAIN.filter(lambda v: v not in (float("inf"), float("-inf")))


def finite(value):
    match value:
        case float():
            return value not in (float("inf"), float("-inf"))
        case list():
            return all(map(finite, value))
        case dict():
            return all(map(finite, value.values()))
    return True


def summary(**changes):
    made = Summary(
        format=FORMAT,
        version=VERSION,
        save_id="ab" * 16,
        created=datetime(2026, 11, 24, 1, 2, 3, 4, tzinfo=UTC),
        writer="cloudckpt 0.1.0, torch 2.13.0",
    )
    return msgspec.structs.replace(made, **changes)


def shard(**changes):
    made = Shard(key=KEY, size=1000, crc32c=7, frame_size=64, frame_checksums=pack(range(4)))
    return msgspec.structs.replace(made, **changes)


def small(**changes):
    made = Manifest(
        summary=summary(step=7, nbytes=164, stored_nbytes=1000, shard_count=1, entry_count=3, chunk_count=2),
        metadata={"loss": 0.25, "tags": ["a", None]},
        planner_paths={"model.w": ("model", 0, "w")},
        shards=(shard(),),
        entries={
            "model.w": TensorEntry(
                "F32",
                (8, 4),
                (Chunk((0, 0), (4, 4), 0, 100, 164, 0), Chunk((4, 0), (4, 4), 0, 164, 228, 1)),
            ),
            "rng": BytesEntry(36, 0, 228, 264, 2),
            "epoch": ValueEntry({"n": [1, 2.5, "é😀"]}),
        },
    )
    return msgspec.structs.replace(made, **changes)


def tree_of(manifest):
    """The manifest as untyped JSON, to be made unsound."""
    return msgspec.json.decode(msgspec.json.encode(manifest))


def sealed(tree):
    """The bytes of a manifest that says ``tree``, its checksum right."""
    body = msgspec.json.encode(tree)[:-1]
    return body + b',"crc32c":"%08x"}' % crc32c(body)


SMALL = encode(small())


# Out and back.


def test_a_manifest_comes_back_as_it_was():
    back = parse(SMALL, WHERE)
    assert back == small()
    assert back.planner_paths == {"model.w": ("model", 0, "w")}


def test_planner_paths_that_are_none_stay_none_and_empty_ones_stay_empty():
    assert parse(encode(small(planner_paths=None)), WHERE).planner_paths is None
    assert parse(encode(small(planner_paths={})), WHERE).planner_paths == {}


def test_a_path_of_numbers_and_of_texts_that_look_like_numbers_keeps_both():
    paths = {"a.0": ("a", 0), "a.00": ("a", "0")}
    assert parse(encode(small(planner_paths=paths)), WHERE).planner_paths == paths


@settings(deadline=None)
@given(
    metadata=st.dictionaries(NAMES, PLAIN.filter(finite), max_size=3),
    paths=st.none() | st.dictionaries(NAMES, st.lists(NAMES | st.integers(0, 9), max_size=3).map(tuple), max_size=3),
    values=st.dictionaries(NAMES, PLAIN.filter(finite).map(ValueEntry), max_size=3),
    chunk=st.builds(
        Chunk,
        st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple),
        st.lists(st.integers(0, 1 << 40), max_size=3).map(tuple),
        *[st.integers(0, 1 << 60)] * 4,
    ),
    step=st.none() | st.integers(0, 1 << 60),
)
def test_whatever_a_manifest_holds_comes_back(metadata, paths, values, chunk, step):
    entries = values | {"t": TensorEntry("BF16", (3, 4), (chunk,)), "b": BytesEntry(3, 0, 1, 4, 0)}
    made = small(summary=summary(step=step), metadata=metadata, planner_paths=paths, entries=entries)
    assert parse(encode(made), WHERE) == made


def test_the_same_manifest_is_always_the_same_bytes():
    assert encode(small()) == SMALL
    assert encode(parse(SMALL, WHERE)) == SMALL


def test_the_last_member_is_the_checksum_of_all_bytes_before_it():
    tree = msgspec.json.decode(SMALL)
    assert list(tree)[-1] == "crc32c"
    body, _, _ = SMALL.rpartition(b',"crc32c"')
    assert tree["crc32c"] == f"{crc32c(body):08x}"


@given(st.lists(st.integers(0, (1 << 32) - 1), max_size=20))
def test_packed_numbers_come_back(numbers):
    assert list(unpack(pack(numbers))) == numbers


def test_packed_numbers_are_base64_of_little_endian_words():
    assert pack([1, 0xFFFFFFFF]) == "AQAAAP////8="


def test_a_number_of_more_than_32_bits_is_not_packed():
    with pytest.raises(OverflowError):
        pack([1 << 32])


# The summary.


def test_the_summary_is_read_from_the_first_bytes_alone():
    many = {f"layer.{i}": ValueEntry(i) for i in range(2000)}
    data = encode(small(entries=many))
    assert len(data) > 4 * SUMMARY_NBYTES
    assert parse_summary(data[:SUMMARY_NBYTES], WHERE) == small().summary
    assert parse_summary(data, WHERE) == small().summary


def test_the_largest_summary_lies_within_the_first_bytes():
    most = (1 << 63) - 1
    numbers = dict.fromkeys(("step", "nbytes", "stored_nbytes", "shard_count", "entry_count", "chunk_count"), most)
    large = summary(writer="w" * 2000, is_tombstone=True, **numbers)
    data = encode(small(summary=large, metadata={"notes": "x" * 10_000}))
    assert parse_summary(data[:SUMMARY_NBYTES], WHERE) == large


@settings(deadline=None)
@given(writer=st.text(max_size=40), save_id=st.text(max_size=40))
@example(writer='} "{\\', save_id="}}")
def test_any_text_in_the_summary_is_read_from_the_first_bytes(writer, save_id):
    odd = summary(writer=writer, save_id=save_id)
    assert parse_summary(encode(small(summary=odd))[:SUMMARY_NBYTES], WHERE) == odd


def test_a_tombstone_comes_back_as_one_without_anything_in_it():
    data = encode_tombstone(summary(is_tombstone=True))
    assert parse_summary(data[:SUMMARY_NBYTES], WHERE).is_tombstone
    back = parse(data, WHERE)
    assert back == Manifest(
        summary=summary(is_tombstone=True), metadata={}, planner_paths=None, shards=(), entries={}
    )


def test_a_checkpoint_is_no_tombstone():
    assert not parse_summary(SMALL, WHERE).is_tombstone


# Altered, truncated, strange.


def test_a_manifest_cut_off_at_any_byte_is_refused():
    for n in range(len(SMALL)):
        with pytest.raises(ManifestError, match=r"s3://bucket/run/step-7/manifest\.json"):
            parse(SMALL[:n], WHERE)


def test_a_summary_cut_off_at_any_byte_is_refused():
    end = SMALL.index(b',"metadata":')
    for n in range(end):
        with pytest.raises(ManifestError):
            parse_summary(SMALL[:n], WHERE)
    assert parse_summary(SMALL[:end], WHERE) == small().summary


@pytest.mark.parametrize("bit", range(8))
def test_a_manifest_with_any_one_bit_flipped_is_refused(bit):
    for i in range(len(SMALL)):
        altered = bytearray(SMALL)
        altered[i] ^= 1 << bit
        with pytest.raises(ManifestError):
            parse(bytes(altered), WHERE)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_manifest_with_bytes_replaced_is_refused(data):
    start = data.draw(st.integers(0, len(SMALL)))
    stop = data.draw(st.integers(start, min(len(SMALL), start + 8)))
    altered = SMALL[:start] + data.draw(st.binary(max_size=8)) + SMALL[stop:]
    if altered != SMALL:
        with pytest.raises(ManifestError):
            parse(altered, WHERE)


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_bytes_that_are_no_manifest_are_refused(data):
    with pytest.raises(ManifestError):
        parse(data, WHERE)
    with pytest.raises(ManifestError):
        parse_summary(data, WHERE)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'"cloudckpt"', id="a text"),
        pytest.param(b"{}", id="an empty object"),
        pytest.param(b'{"summary":7}', id="a summary that is a number"),
        pytest.param(b'{"summary":{"version":"1"}}', id="a version that is a text"),
        pytest.param(b'{"summary":{"version":1.5}}', id="a version that is half a number"),
        pytest.param(b'{"summary":{"version":null}}', id="no version"),
        pytest.param(b'{"a":"\xff"}', id="not UTF-8"),
        pytest.param(b'{"a":"\\ud800"}', id="a lone surrogate"),
        pytest.param(SMALL + b" ", id="a space at its end"),
        pytest.param(SMALL + SMALL, id="twice"),
        pytest.param(b"\xef\xbb\xbf" + SMALL, id="a byte order mark"),
        pytest.param(b"[" * 100_000, id="nested too deep"),
        pytest.param(b'{"summary":' * 100_000, id="objects nested too deep"),
        pytest.param(b'{"metadata":{"a":' + b"[" * 100_000, id="metadata nested too deep"),
    ],
)
def test_what_is_no_manifest_is_refused_as_one(data):
    with pytest.raises(ManifestError):
        parse(data, WHERE)


def test_a_manifest_cut_off_says_so_and_how_long_it_is():
    with pytest.raises(ManifestError, match=r"not a whole manifest \(100 bytes\).*truncated"):
        parse(SMALL[:100], WHERE)


def test_an_altered_manifest_that_still_reads_well_is_told_by_its_checksum():
    with pytest.raises(ManifestError, match=r"1 problem.*\n.*crc32c") as caught:
        parse(SMALL.replace(b'"loss":0.25', b'"loss":0.75'), WHERE)
    assert not isinstance(caught.value, UnsupportedVersionError)


def test_a_manifest_without_a_checksum_is_refused():
    with pytest.raises(ManifestError, match="crc32c"):
        parse(msgspec.json.encode(small()), WHERE)


# Versions.


@pytest.mark.parametrize("version", [0, 2, 99, -1, 1 << 70])
def test_an_unknown_version_is_named_with_the_one_that_is_read(version):
    tree = tree_of(small())
    tree["summary"]["version"] = version
    for read, data in ((parse, sealed(tree)), (parse_summary, sealed(tree)), (parse_summary, sealed(tree)[:400])):
        with pytest.raises(UnsupportedVersionError, match=rf"version {version}; this release reads version 1\b"):
            read(data, WHERE)


def test_a_later_version_of_another_make_is_still_named():
    later = {"summary": {"format": "cloudckpt", "version": 2, "made": "today"}, "items": []}
    for read in (parse, parse_summary):
        with pytest.raises(UnsupportedVersionError, match="version 2"):
            read(sealed(later), WHERE)


def test_a_later_version_of_another_make_is_named_from_its_first_bytes():
    later = {"summary": {"format": "cloudckpt", "version": 2, "made": "today"}, "items": ["x" * 10_000]}
    with pytest.raises(UnsupportedVersionError, match="version 2"):
        parse_summary(sealed(later)[:SUMMARY_NBYTES], WHERE)


def test_another_format_is_refused():
    tree = tree_of(small())
    tree["summary"]["format"] = "other"
    for read in (parse, parse_summary):
        with pytest.raises(ManifestError):
            read(sealed(tree), WHERE)


# Fields that a later release of this version may add.


@pytest.mark.parametrize(
    "add",
    [
        pytest.param(lambda t: t.update(later={"a": [1, {}]}), id="at the top"),
        pytest.param(lambda t: t["summary"].update(later=1), id="in the summary"),
        pytest.param(lambda t: t["shards"][0].update(later={"a": 1}), id="in a shard"),
        pytest.param(lambda t: t["entries"]["model.w"].append("later"), id="in a tensor"),
        pytest.param(lambda t: t["entries"]["model.w"][3][0].append([1]), id="in a chunk"),
        pytest.param(lambda t: t["entries"]["rng"].append(None), id="in a byte string"),
        pytest.param(lambda t: t["entries"]["epoch"].append(None), id="in a value"),
    ],
)
def test_an_unknown_field_is_no_problem(add):
    tree = tree_of(small())
    add(tree)
    assert parse(sealed(tree), WHERE) == small()
    assert parse_summary(sealed(tree), WHERE) == small().summary
    assert find_problems(tree) == []


def test_an_unknown_object_in_the_summary_is_no_problem():
    tree = tree_of(small())
    tree["summary"] = {"later": {"a": 1}} | tree["summary"]
    assert parse(sealed(tree), WHERE) == small()
    assert parse_summary(sealed(tree)[:SUMMARY_NBYTES], WHERE) == small().summary


# Every problem at once.


def test_a_sound_manifest_has_no_problems():
    assert find_problems(tree_of(small())) == []
    assert find_problems(tree_of(small(planner_paths=None))) == []


def test_all_problems_are_told_in_one_error():
    tree = tree_of(small())
    tree["shards"][0]["key"] = "../../secrets"
    tree["entries"]["model.w"][1] = "F33"
    tree["entries"]["rng"][2] = 9
    tree["metadata"] = []
    tree["summary"]["created"] = "yesterday"
    with pytest.raises(ManifestError) as caught:
        parse(sealed(tree)[:-3] + b'x"}', WHERE)
    message = str(caught.value)
    assert "6 problem(s)" in message
    for told in ("'../../secrets'", "'F33'", "shard 9", "metadata: ", "summary: ", "crc32c: ", WHERE):
        assert told in message


def test_a_thousand_problems_are_counted_and_a_hundred_told():
    tree = tree_of(small())
    tree["metadata"] = None
    tree["entries"] = {f"k{i}": ["bytes", 1, 5, 0, 1, 0] for i in range(1000)}
    with pytest.raises(ManifestError, match=r"1001 problem\(s\)") as caught:
        parse(sealed(tree), WHERE)
    assert str(caught.value).count("\n  - ") == 100
    assert "... and 901 more" in str(caught.value)


def set_chunk(field, value):
    def change(tree):
        tree["entries"]["model.w"][3][1][field] = value

    return change


@pytest.mark.parametrize(
    ("change", "place", "told"),
    [
        pytest.param(set_chunk(2, 1), "entries['model.w']: chunks[1]", "shard 1 does not exist", id="shard too high"),
        pytest.param(
            set_chunk(2, -1), "entries['model.w']: chunks[1]", "shard -1 does not exist", id="shard negative"
        ),
        pytest.param(
            set_chunk(4, 1001), "entries['model.w']", "not in its shard of 1000", id="bytes after the shard"
        ),
        pytest.param(set_chunk(3, -1), "entries['model.w']", "not in its shard of 1000", id="bytes before the shard"),
        pytest.param(set_chunk(3, 229), "entries['model.w']", "not in its shard of 1000", id="bytes that end early"),
        pytest.param(set_chunk(4, 227), "entries['model.w']", "cannot hold its 64 bytes", id="too few bytes"),
        pytest.param(
            set_chunk(0, [5, 0]), "entries['model.w']", "outside the tensor's shape (8, 4)", id="rows outside"
        ),
        pytest.param(set_chunk(0, [-1, 0]), "entries['model.w']", "outside the tensor's shape", id="offset negative"),
        pytest.param(set_chunk(1, [-4, -4]), "entries['model.w']", "outside the tensor's shape", id="sizes negative"),
        pytest.param(set_chunk(0, [4]), "entries['model.w']", "has not the tensor's 2 axes", id="an offset too few"),
        pytest.param(set_chunk(1, [4, 4, 1]), "entries['model.w']", "the tensor's 2 axes", id="a size too many"),
        pytest.param(set_chunk(5, 4), "entries['model.w']", "more than its shard has checksums", id="frame too high"),
        pytest.param(
            set_chunk(5, -1), "entries['model.w']", "more than its shard has checksums", id="frame negative"
        ),
        pytest.param(set_chunk(3, "x"), "entries['model.w']", "Expected `int`", id="a byte that is a text"),
        pytest.param(
            lambda t: t["entries"]["model.w"].__setitem__(1, "float32"), "entries['model.w']", "'float32'", id="dtype"
        ),
        pytest.param(
            lambda t: t["entries"]["rng"].__setitem__(2, 3),
            "entries['rng']",
            "shard 3 does not exist",
            id="bytes shard",
        ),
        pytest.param(
            lambda t: t["entries"]["rng"].__setitem__(1, 37),
            "entries['rng']",
            "cannot hold its 37",
            id="bytes length",
        ),
        pytest.param(
            lambda t: t["entries"].__setitem__("rng", ["file", 1]), "entries['rng']", "file", id="a kind unknown"
        ),
        pytest.param(
            lambda t: t["shards"][0].__setitem__("key", f"shards/../../{'a' * 32}.safetensors"),
            "shards[0]",
            "is not one of a shard",
            id="a key that climbs",
        ),
        pytest.param(
            lambda t: t["shards"][0].__setitem__("key", "/etc/passwd"), "shards[0]", "'/etc/passwd'", id="a path"
        ),
        pytest.param(
            lambda t: t["shards"][0].__setitem__("frame_size", 0), "shards[0]", "frame_size 0", id="frame size"
        ),
        pytest.param(lambda t: t["shards"][0].__setitem__("size", -1), "shards[0]", "size -1", id="shard size"),
        pytest.param(
            lambda t: t["shards"][0].__setitem__("frame_checksums", "AAAAA==="), "shards[0]", "base64", id="base64"
        ),
        pytest.param(
            lambda t: t["shards"][0].__setitem__("frame_sizes", "AAAA"), "shards[0]", "32-bit", id="half a number"
        ),
        pytest.param(lambda t: t["shards"][0].pop("key"), "shards[0]", "`key`", id="a shard without a key"),
        pytest.param(lambda t: t.pop("entries"), "entries", "null", id="no entries"),
        pytest.param(lambda t: t.__setitem__("shards", {}), "shards", "object", id="shards that are no list"),
        pytest.param(lambda t: t.__setitem__("planner_paths", {"a": [1.5]}), "planner_paths", "float", id="a path"),
        pytest.param(lambda t: t["summary"].pop("save_id"), "summary", "`save_id`", id="no save id"),
    ],
)
def test_a_problem_is_told_with_its_place(change, place, told):
    tree = tree_of(small())
    change(tree)
    assert [p for p in find_problems(tree) if p.startswith(place) and told in p]


def test_what_is_no_object_has_one_problem():
    assert find_problems([1]) == ["the top level is list, not an object"]


def test_an_unsound_shard_does_not_hide_what_is_wrong_elsewhere():
    tree = tree_of(small())
    tree["shards"][0] = 7
    tree["entries"]["rng"][2] = 3
    problems = find_problems(tree)
    assert len(problems) == 2
    assert problems[0].startswith("shards[0]")
    assert "shard 3" in problems[1]


@given(st.integers(0, 12), st.integers(1, 64), st.integers(0, 64 * 12))
def test_an_entry_has_as_many_frames_as_its_shard_has_checksums(count, frame_size, nbytes):
    there = shard(frame_size=frame_size, frame_checksums=pack(range(count)), size=nbytes)
    needed = -(-nbytes // frame_size)
    problems = entry_problems(BytesEntry(nbytes, 0, 0, nbytes, 0), (there,))
    assert bool(problems) == (needed > count)


def test_a_shard_by_itself_is_sound():
    assert shard_problems(shard()) == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"key": f"shards/../../{'a' * 32}.safetensors"}, id="a key that climbs"),
        pytest.param({"frame_size": 0}, id="frames of no size"),
        pytest.param({"frame_checksums": "AAAAA"}, id="checksums that are no base64"),
    ],
)
def test_an_unsound_shard_is_refused_although_the_checksum_is_right(change):
    with pytest.raises(ManifestError, match=r"shards\[0\]"):
        parse(encode(small(shards=(shard(**change),))), WHERE)


# Size.


def test_a_million_chunks_take_at_most_128_mib():
    shards = 512
    chunk_nbytes = 128 * 16384 * 2
    entries = {
        f"model.layers.{e}.feed_forward.w1.weight": TensorEntry(
            "BF16",
            (128_000, 16384),
            tuple(
                Chunk((c * 128, 0), (128, 16384), n % shards, at, at + chunk_nbytes, n // shards)
                for c, n in enumerate(range(e * 1000, e * 1000 + 1000))
                for at in [400_000_000_000 + n // shards * chunk_nbytes]
            ),
        )
        for e in range(1000)
    }
    packed = pack([0xDEADBEEF] * (1_000_000 // shards + 1))
    made = small(
        shards=tuple(shard(key=shard_key(f"{i:032x}", "safetensors"), frame_checksums=packed) for i in range(shards)),
        entries=entries,
    )
    assert len(encode(made)) <= 128 << 20
