"""Chains of extensions: any of them, in any order, on any bytes; and in torch's own writer and reader."""

import os
import pickle
import random
import subprocess
import sys
import textwrap
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import _extension
from torch.testing._internal.distributed.checkpoint_utils import Rot13Example

import cloudckpt.dcp.extensions
from cloudckpt.errors import CheckpointError, IntegrityError, UnknownExtensionError, UsageError
from cloudckpt.extensions import AesGcm, BytePlane, ExtensionRegistry, FrameCodec, FrameContext, ZStandard
from cloudckpt.extensions.chain import Chain, Rules, ShardChain, open_shard
from cloudckpt.extensions.scratch import Scratch
from cloudckpt.testing import Rot13, get_test_extension_registry

assert cloudckpt.dcp.extensions  # registers ours as torch's

KEYS = {"k": bytes(range(32))}
EXTENSIONS = {
    "zstd": ZStandard(),
    "zstd 19": ZStandard(19),
    "planes": BytePlane(),
    "planes of 4": BytePlane(4),
    "bytes": BytePlane(1),
    "planes of 16": BytePlane(16),
    "aesgcm": AesGcm("k", KEYS),
    "rot13": Rot13(),
    "torch's zstd": _extension.ZStandard(),
    "torch's rot13": Rot13Example(),
}


def registry_of(*more):
    registry = get_test_extension_registry().with_keys(KEYS)
    for cls in (Rot13Example, *more):
        registry.register(cls)
    return registry


def frame_of(number=0, *, width=1, is_last=True):
    return FrameContext(shard="0" * 32, item="x", number=number, index=number, is_last=is_last, width=width)


def stored_by(chain, data, frame):
    return memoryview(b"".join(chain.transform(memoryview(data), frame)))


def reopened(chain, registry=None):
    registry = registry or registry_of()
    return open_shard(registry.from_descriptor_list(chain.descriptors), chain.descriptors, chain.params)


PLAIN = st.one_of(
    st.binary(max_size=2000),
    st.binary(max_size=20).map(lambda piece: piece * 200),
    st.integers(0, 3000).map(lambda n: random.Random(n).randbytes(n)),
)


@settings(max_examples=300, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(EXTENSIONS)), min_size=1, max_size=4),
    data=PLAIN,
    width=st.sampled_from([1, 2, 4, 8, 16]),
)
def test_any_bytes_come_back_through_any_chain(names, data, width):
    chain = Chain(tuple(EXTENSIONS[name] for name in names)).start_shard()
    frame = frame_of(width=width)
    stored = stored_by(chain, data, frame)
    assert len(stored) <= chain.max_stored_size(len(data))
    assert bytes(reopened(chain).restore(stored, frame, len(data))) == data


@settings(max_examples=300, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(EXTENSIONS)), min_size=1, max_size=3),
    data=PLAIN.filter(len),
    damage=st.sampled_from(["flip", "cut", "append"]),
    at=st.integers(0, 10**6),
)
def test_whatever_is_done_to_a_frame_it_is_an_error_of_ours_or_has_its_length(names, data, damage, at):
    chain = Chain(tuple(EXTENSIONS[name] for name in names)).start_shard()
    stored = bytearray(stored_by(chain, data, frame_of(width=2)))
    if damage == "flip":
        stored[at // 8 % len(stored)] ^= 1 << at % 8
    elif damage == "cut":
        del stored[at % len(stored) :]
    else:
        stored += os.urandom(1 + at % 20)
    must_fail = names[-1] == "aesgcm"
    with pytest.raises(IntegrityError) if must_fail else nullcontext():
        try:
            found = reopened(chain).restore(memoryview(bytes(stored)), frame_of(width=2), len(data))
        except IntegrityError:
            if must_fail:
                raise
        else:
            assert len(found) == len(data)


def test_a_frame_that_would_not_shrink_is_stored_as_it_is_in_a_chain_too():
    noise = os.urandom(10_001)
    chain = Chain((BytePlane(), ZStandard(), AesGcm("k", KEYS))).start_shard()
    stored = stored_by(chain, noise, frame_of(width=2))
    assert len(stored) == len(noise) + 16
    assert bytes(reopened(chain).restore(stored, frame_of(width=2), len(noise))) == noise


@pytest.mark.parametrize("data", [os.urandom(9999), bytes(9999)], ids=["noise", "zeros"])
@pytest.mark.parametrize(
    "names",
    [
        ("planes", "zstd", "planes of 4"),
        ("zstd", "zstd", "zstd"),
        ("planes", "planes of 4", "planes", "zstd"),
        ("planes of 4", "bytes", "planes of 4"),
    ],
)
def test_codecs_that_share_memory_do_not_disturb_each_other(names, data):
    scratch = Scratch()
    chains = [Chain(tuple(EXTENSIONS[name] for name in names)).start_shard(scratch) for _ in range(2)]
    kept = [
        chain.transform(memoryview(d), frame_of(width=2)) for chain, d in zip(chains, (data, data[::-1]), strict=True)
    ]
    for chain, stored, plain in zip(chains, kept, (data, data[::-1]), strict=True):
        found = chain.restore(memoryview(b"".join(stored)), frame_of(width=2), len(data))
        assert bytes(found) == plain


def test_the_shards_of_a_load_share_memory():
    written = Chain((BytePlane(), ZStandard())).start_shard()
    stored, nbytes = stored_by(written, bytes(1 << 20), frame_of(width=2)), 1 << 20
    scratch = Scratch()
    chains = [open_shard([BytePlane(), ZStandard()], written.descriptors, [], scratch) for _ in range(40)]
    tracemalloc.start()
    try:
        for chain in chains:
            assert len(chain.restore(stored, frame_of(width=2), nbytes)) == nbytes
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 5 * nbytes


class Vain(FrameCodec):
    """A compressor that gains just nothing."""

    is_optional = True

    def transform(self, sections, frame):
        return [b"".join(sections)[::-1]]

    def restore(self, stored, frame, *, limit):
        raise AssertionError("a frame as long as the plain one was left as it is")


def test_a_compressed_frame_as_long_as_the_plain_one_is_not_kept():
    chain = ShardChain(["vain/1"], [Vain()])
    stored = b"".join(chain.transform(memoryview(b"abc"), frame_of()))
    assert bytes(chain.restore(memoryview(stored), frame_of(), 3)) == b"abc"


def test_planes_are_whole_although_their_memory_is_used_again():
    chain = Chain((BytePlane(),)).start_shard()
    data = [os.urandom(5000) for _ in range(3)]
    kept = [chain.transform(memoryview(d), frame_of(width=4)) for d in data]
    for plain, stored in zip(data, kept, strict=True):
        assert bytes(chain.restore(memoryview(b"".join(stored)), frame_of(width=4), 5000)) == plain


def test_skipped_compression_after_planes_does_not_lend_their_memory_out():
    chain = Chain((BytePlane(), ZStandard())).start_shard()
    data = [os.urandom(5000) for _ in range(3)]
    kept = [chain.transform(memoryview(d), frame_of(width=4)) for d in data]
    for plain, stored in zip(data, kept, strict=True):
        assert bytes(chain.restore(memoryview(b"".join(stored)), frame_of(width=4), 5000)) == plain


def test_several_threads_share_a_chain():
    chain = Chain((BytePlane(), ZStandard(), AesGcm("k", KEYS))).start_shard()
    frames = [frame_of(i, width=2) for i in range(200)]
    data = [random.Random(i).randbytes(i * 37) + bytes(i * 50) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(lambda d, f: stored_by(chain, d, f), data, frames))
        again = reopened(chain)
        found = list(pool.map(lambda s, f, d: bytes(again.restore(s, f, len(d))), stored, frames, data))
    assert found == data


class Greedy(Rot13):
    """Makes far more of a frame than may be read back."""

    def transform_to(self, output):
        output.write(bytes(1 << 20))
        return super().transform_to(output)


def test_an_extension_that_makes_too_much_of_a_frame_is_refused_on_saving():
    chain = Chain((Greedy(),)).start_shard()
    with pytest.raises(UsageError, match=r"stream.rot13@cloudckpt/1 makes"):
        chain.transform(memoryview(b"abc"), frame_of())


def test_rot13_turns_letters_alone():
    chain = Chain((Rot13(),)).start_shard()
    assert bytes(stored_by(chain, b"Hello, 1 World!", frame_of())) == b"Uryyb, 1 Jbeyq!"


# Rules.


def test_the_first_pattern_that_fits_decides():
    planes, packed = [BytePlane()], [ZStandard()]
    rules = Rules({"optim.*.exp_avg": planes, "optim.*": packed, "plain": [], "mode?": planes})
    assert rules.chain_for("optim.0.exp_avg").extensions == (BytePlane(),)
    assert rules.chain_for("optim.0.step").extensions == (ZStandard(),)
    assert rules.chain_for("model").extensions == (BytePlane(),)
    assert rules.chain_for("plain").extensions == ()
    assert rules.chain_for("anything").extensions == ()
    assert rules.chain_for("OPTIM.0").extensions == ()


def test_keys_are_grouped_by_chain_and_what_is_plain_is_one_group():
    rules = Rules({"a*": [ZStandard()], "b*": [], "c*": [ZStandard()]})
    groups = rules.group(["a1", "b1", "x", "c1", "a2", "b2"])
    assert [chosen for _, chosen in groups] == [[0, 4], [1, 2, 5], [3]]
    assert [bool(chain.extensions) for chain, _ in groups] == [True, False, True]


@pytest.mark.parametrize(
    "wrong", [ZStandard, "zstd", 7, object()], ids=["a class", "a name", "a number", "an object"]
)
def test_what_is_no_extension_is_refused(wrong):
    with pytest.raises(UsageError, match="extensions="):
        Rules([wrong])


@pytest.mark.parametrize("late", [ZStandard(), BytePlane()], ids=["zstd", "planes"])
def test_compressing_what_is_encrypted_is_warned_of(late):
    with pytest.warns(UserWarning, match=f"{late.get_descriptor()}.*encrypt"):
        Rules([AesGcm("k", KEYS), late])


@pytest.mark.parametrize("chain", [[BytePlane(), ZStandard(), AesGcm("k", KEYS)], [ZStandard()], []])
def test_chains_in_their_order_are_not_warned_of(chain):
    Rules(chain)  # warnings are errors here


# The registry.


@pytest.mark.parametrize(
    "descriptor",
    [
        "stream.lzma/1",
        "stream.zstd/2",
        "stream.byteplane/1+width=3",
        "stream.byteplane/2",
        "stream.aesgcm/2",
        "",
        "/1",
    ],
)
def test_a_descriptor_that_is_not_known_is_named(descriptor):
    with pytest.raises(UnknownExtensionError, match=descriptor.partition("/")[0] or "''") as caught:
        ExtensionRegistry().from_descriptor_list(["stream.byteplane/1", descriptor])
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, CheckpointError)


def test_torchs_own_errors_become_ours():
    registry = registry_of(_extension.ZStandard)
    with pytest.raises(UnknownExtensionError, match=r"stream.zstd/9"):
        registry.from_descriptor_list(["stream.zstd/9"])


def test_descriptors_make_what_was_described():
    wanted = [ZStandard(), BytePlane(), BytePlane(8)]
    found = ExtensionRegistry().from_descriptor_list([e.get_descriptor() for e in wanted])
    assert found == wanted


def test_a_registry_with_keys_is_a_copy():
    registry = get_test_extension_registry()
    with_keys = registry.with_keys(KEYS)
    assert with_keys.from_descriptor_list(["stream.rot13@cloudckpt/1"])
    assert registry.from_descriptor_list(["stream.aesgcm/1"])[0].keys is None
    assert with_keys.from_descriptor_list(["stream.aesgcm/1"])[0].keys is KEYS


@pytest.mark.parametrize("thing", [BytePlane(2), ZStandard(), AesGcm("k", KEYS), ExtensionRegistry()])
def test_extensions_can_be_pickled(thing):
    again = pickle.loads(pickle.dumps(thing))
    assert type(again) is type(thing)


def test_importing_extensions_imports_none_of_their_libraries():
    code = """
        import sys
        import cloudckpt.extensions
        assert not {"torch", "zstandard", "pyzstd", "cryptography"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


# In torch's own writer and reader.


@pytest.mark.parametrize("name", ["zstd", "planes of 4", "aesgcm", "rot13"])
def test_each_works_in_torchs_own_writer_and_reader(name, tmp_path):
    state = {"a": torch.arange(300_000).float(), "b": {"text": "Hello", "n": 7}}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=[EXTENSIONS[name]]))
    found = {"a": torch.zeros(300_000), "b": {"text": "", "n": 0}}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path, _extension_registry=registry_of()))
    assert torch.equal(found["a"], state["a"])
    assert found["b"] == state["b"]


def test_torchs_own_reader_reads_our_zstd_without_us(tmp_path):
    state = {"a": torch.arange(300_000).float()}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, _extensions=[ZStandard()]))
    found = {"a": torch.zeros(300_000)}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path))
    assert torch.equal(found["a"], state["a"])


def test_planes_without_a_width_tell_torchs_user_what_to_give(tmp_path):
    with pytest.raises(UsageError, match=r"BytePlane\(width=2\)"):
        BytePlane().transform_to(None)
    with pytest.raises(UsageError, match=r"BytePlane\(width=2\)"):
        BytePlane().transform_from(None)
