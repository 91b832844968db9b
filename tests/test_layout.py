"""Names out and back."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cloudckpt.errors import ReservedNameError
from cloudckpt.layout import (
    FRAMES,
    MANIFEST,
    SAFETENSORS,
    SHARDS,
    is_own_shard_key,
    is_shard_key,
    item_name,
    key_of_item,
    prefix_of_manifest,
    prefix_of_shard,
    shard_key,
    step_name,
    step_of,
)

TRICKY = st.text(st.sampled_from("@%_,0245F5metada/ é😀\0"), max_size=12)
KEYS = st.one_of(
    st.text(),
    TRICKY,
    st.sampled_from(["", "__metadata__", "%5F%5Fmetadata%5F%5F", "@", "%", "%40", "%25", "%5F", "%2540", "a@0,1"]),
)
OFFSETS = st.none() | st.lists(st.integers(0, 1 << 50), max_size=4).map(tuple)
TOKENS = st.text(st.sampled_from("0123456789abcdef"), min_size=32, max_size=32)
TOKEN = "0123456789abcdef" * 2


@given(KEYS, OFFSETS)
@example("__metadata__", None)
@example("__metadata__", (0,))
@example("", ())
@example("", None)
def test_the_key_and_the_offsets_come_back_from_an_items_name(key, offsets):
    assert key_of_item(item_name(key, offsets)) == (key, offsets)


@given(st.tuples(KEYS, OFFSETS), st.tuples(KEYS, OFFSETS))
@example(("a", (0, 1)), ("a@0,1", None))
@example(("__metadata__", None), ("%5F%5Fmetadata%5F%5F", None))
def test_items_that_differ_have_names_that_differ(a, b):
    assert (item_name(*a) == item_name(*b)) == (a == b)


@given(KEYS, OFFSETS)
@example("__metadata__", None)
def test_no_item_has_the_name_that_safetensors_keeps_for_itself(key, offsets):
    assert item_name(key, offsets) != "__metadata__"


@pytest.mark.parametrize(
    ("key", "offsets", "name"),
    [
        ("layers.0.wq", None, "layers.0.wq"),
        ("layers.0.wq", (128, 0), "layers.0.wq@128,0"),
        ("scalar", (), "scalar@"),
        ("a@b%c", None, "a%40b%25c"),
        ("__metadata__", None, "%5F%5Fmetadata%5F%5F"),
        ("a/../b", None, "a/../b"),
    ],
)
def test_a_name_is_spelled_as_the_format_says(key, offsets, name):
    assert item_name(key, offsets) == name


@pytest.mark.parametrize("key", ["\ud800", "a\udfffb"], ids=["alone", "inside"])
def test_a_key_with_a_lone_surrogate_is_refused_by_name(key):
    with pytest.raises(ReservedNameError, match=r"\\ud"):
        item_name(key, None)


@given(TOKENS, st.sampled_from([SAFETENSORS, FRAMES]))
def test_a_shards_key_is_recognised(token, ext):
    key = shard_key(token, ext)
    assert is_shard_key(key)
    assert key.startswith(SHARDS)
    assert key.endswith(f"/{token}.{ext}")


@given(TOKENS, TOKENS)
def test_tokens_that_differ_make_keys_that_differ(a, b):
    assert (shard_key(a, SAFETENSORS) == shard_key(b, SAFETENSORS)) == (a == b)


def test_shards_spread_over_key_prefixes():
    prefixes = {shard_key(f"{i:032x}", SAFETENSORS).split("/")[1] for i in range(500)}
    assert len(prefixes) > 100


@pytest.mark.parametrize(
    "key",
    [
        "",
        MANIFEST,
        "shards/",
        f"../shards/00/{TOKEN}.safetensors",
        f"shards/../../{TOKEN}.safetensors",
        f"shards/00/../{TOKEN}.safetensors",
        f"shards/../00/{TOKEN}.safetensors",
        f"/shards/00/{TOKEN}.safetensors",
        f"shards//{TOKEN}.safetensors",
        f"shards/00/{TOKEN}.safetensors/../../manifest.json",
        f"shards/00/{TOKEN}.safetensors\n",
        f"shards/00/{TOKEN}.safetensors\0",
        f"shards/00/{TOKEN[1:]}.safetensors",
        f"shards/00/{TOKEN}.bin",
        f"shards/00/{TOKEN.upper()}.safetensors",
        f"shards/0g/{TOKEN}.safetensors",
        f"shards/00/{TOKEN[:-1]}٣.safetensors",
        f"shards\\00\\{TOKEN}.safetensors",
    ],
)
def test_a_key_that_is_not_a_shards_is_not_taken_for_one(key):
    assert not is_shard_key(key)


@given(st.text(max_size=60))
def test_any_other_text_is_not_a_shards_key(text):
    assert not is_shard_key(text)


OWN = shard_key(TOKEN, SAFETENSORS)
FRAMED = shard_key(TOKEN, FRAMES)
OTHER_HASH = OWN.replace(OWN.split("/")[1], f"{int(OWN.split('/')[1], 16) ^ 1:02x}", 1)


@pytest.mark.parametrize(
    ("key", "is_own", "prefix"),
    [
        (OWN, True, ""),
        (FRAMED, True, ""),
        (OTHER_HASH, False, None),
        (f"step-3/{OWN}", False, "step-3/"),
        (f"run/step-3/{FRAMED}", False, "run/step-3/"),
        (f"a//{OWN}", False, "a//"),
        (f"/{OWN}", False, "/"),
        (f"shards/{OWN}", False, "shards/"),
        (f"größe %2F\n/{OWN}", False, "größe %2F\n/"),
        (f"x{OWN}", False, None),
        (f"step-3/{OTHER_HASH}", False, None),
        (OWN.replace("shards", "Shards"), False, None),
        (OWN.removeprefix("shards/"), False, None),
        (OWN.replace("/", "//", 1), False, None),
        (f"{OWN}/", False, None),
        (f"{OWN}.tmp", False, None),
        (f"{OWN}\n", False, None),
        (f"{OWN}/{OWN}", False, f"{OWN}/"),
        (MANIFEST, False, None),
        (SHARDS, False, None),
        ("", False, None),
    ],
)
def test_a_shard_of_ours_is_known_by_its_hash_and_tells_its_place(key, is_own, prefix):
    assert (is_own_shard_key(key), prefix_of_shard(key)) == (is_own, prefix)


@given(TOKENS, st.sampled_from([SAFETENSORS, FRAMES]), st.text(max_size=8).map(lambda text: f"{text}/") | st.just(""))
def test_the_place_comes_back_from_the_key_of_any_shard_in_it(token, ext, prefix):
    assert is_own_shard_key(shard_key(token, ext))
    assert prefix_of_shard(prefix + shard_key(token, ext)) == prefix
    assert prefix_of_manifest(prefix + MANIFEST) == prefix


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        (MANIFEST, ""),
        ("step-3/manifest.json", "step-3/"),
        ("run/step-3/manifest.json", "run/step-3/"),
        ("/manifest.json", "/"),
        ("a//manifest.json", "a//"),
        ("shards/manifest.json", "shards/"),
        ("my-manifest.json", None),
        ("step-3/my-manifest.json", None),
        ("manifest.json/x", None),
        ("manifest.json\n", None),
        ("Manifest.json", None),
        (OWN, None),
        ("", None),
    ],
)
def test_a_manifest_is_known_by_its_name_and_tells_its_place(key, prefix):
    assert prefix_of_manifest(key) == prefix


@given(st.integers(0, 10**18 - 1))
def test_the_step_comes_back_from_its_name(step):
    assert step_of(step_name(step)) == step


@pytest.mark.parametrize(
    "name", ["", "step-", "step", "step--1", "step-1a", "step-1/", "xstep-1", "step-1.5", "step-1\n", "Step-1"]
)
def test_a_name_that_is_no_steps_has_no_step(name):
    assert step_of(name) is None


@pytest.mark.parametrize("name", ["step-007", "step-٣", "step-00"])
def test_a_number_spelled_as_no_step_is_spelled_is_no_step(name):
    assert step_of(name) is None
