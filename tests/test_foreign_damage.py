"""Checkpoints of others, bytes of theirs altered: an error of ours, or what could be read; never anything else."""

import warnings
from secrets import token_hex

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._extension import ZStandard

import cloudckpt
from cloudckpt import errors
from cloudckpt.engine import loop
from cloudckpt.store.url import open_store

STATE = {"a": torch.randn(4, 5), "turned": torch.arange(9).reshape(3, 3).t(), "step": 3}


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    """The objects of a checkpoint of each format, by name."""
    at = tmp_path_factory.mktemp("formats")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(STATE, storage_writer=FileSystemWriter(at / "dcp", sync_files=False), no_dist=True)
        dcp.save(
            STATE,
            storage_writer=FileSystemWriter(at / "zstd", sync_files=False, _extensions=[ZStandard()]),
            no_dist=True,
        )
    (at / "torch").mkdir()
    torch.save(STATE, at / "torch" / "model.pt")
    (at / "safetensors").mkdir()
    safetensors.torch.save_file({"a": STATE["a"]}, at / "safetensors" / "model.safetensors")
    return {kind.name: {file.name: file.read_bytes() for file in kind.iterdir()} for kind in at.iterdir()}


def put(objects):
    url = f"memory://{token_hex(8)}/x"

    async def put_all():
        async with open_store(url) as store:
            for name, data in objects.items():
                await store.put(name, [memoryview(data)])

    loop.run(put_all)
    return url


PLACES = st.one_of(st.floats(0, 1), st.floats(0, 0.01), st.floats(0.99, 1))
EDITS = st.lists(
    st.tuples(PLACES, st.sampled_from(["set", "cut", "insert"]), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("kind", ["dcp", "zstd", "torch", "safetensors"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_was_altered_is_told_or_read(formats, kind, data):
    objects = dict(formats[kind])
    name = data.draw(st.sampled_from(sorted(objects)))
    altered = bytearray(objects[name])
    for place, edit, some in data.draw(EDITS):
        at = int(place * max(0, len(altered) - 1))
        if edit == "set":
            altered[at : at + len(some)] = some
        elif edit == "cut":
            del altered[at : at + len(some)]
        else:
            altered[at:at] = some
    objects[name] = bytes(altered)
    url = put(objects)
    where = f"{url}/{name}" if kind in {"torch", "safetensors"} else url
    try:
        with cloudckpt.open(where, max_inflight_nbytes=32 << 20) as ckpt:
            for key in ckpt:
                read(ckpt, key)
    except errors.CheckpointError:
        pass


def read(ckpt, key):
    try:
        found = ckpt[key]
        if isinstance(found, cloudckpt.Array) and found.size < 1 << 20:
            assert found[...].shape == found.shape
    except errors.CheckpointError:
        pass
