"""Archives of ``torch.save``, pickles and DCP's metadata that lie: nothing that they name is imported or run."""

import io
import pickle
import sys
import warnings
from contextlib import suppress
from functools import cache
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from cloudckpt.convert import pickles
from cloudckpt.errors import CheckpointError
from fuzz.reading import read

NAME = "model.pt"
STATE = {"a": torch.arange(24, dtype=torch.float32).reshape(4, 6), "t": torch.arange(9).reshape(3, 3).t(), "n": 3}
FORBIDDEN = ("import", "exec", "compile", "open", "os.", "subprocess.", "pickle.find_class", "ctypes.", "socket.")


class Ear:
    """Hears what Python does while a pickle is read (audit hooks stay for good, so there is one)."""

    def __init__(self):
        self.is_open = False
        self.heard = []
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        if self.is_open and event.startswith(FORBIDDEN):
            self.heard.append((event, arguments))

    def __enter__(self):
        self.heard, self.is_open = [], True
        return self

    def __exit__(self, *_):
        self.is_open = False


@cache
def ear():
    """The one."""
    return Ear()


@cache
def archive():
    """A file of torch.save."""
    file = io.BytesIO()
    torch.save(STATE, file)
    return file.getvalue()


@cache
def stock():
    """The files of a checkpoint of torch's own writer."""
    with TemporaryDirectory() as at, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(STATE), storage_writer=FileSystemWriter(at, sync_files=False), no_dist=True)
        return {name: _bytes_of(f"{at}/{name}") for name in (".metadata", "__0_0.distcp")}


def _bytes_of(path):
    with open(path, "rb") as file:
        return file.read()


def seeds():
    """Valid inputs."""
    inner = archive()
    start = inner.index(b"\x80\x02")
    plain = {"a": [1, 2.5, (True, None)], "s": {3, 4}, "b": bytearray(b"x")}
    return [
        inner,
        stock()[".metadata"],
        stock()["__0_0.distcp"],
        inner[start : inner.index(b".PK", start) + 1] if b".PK" in inner else inner[start:],
        *(pickle.dumps(plain, protocol) for protocol in range(2, 6)),
        pickle.dumps({"a": print}),
    ]


def check(data):
    """Reads ``data`` as an archive, as a pickle of both kinds, as DCP's metadata and as DCP's items."""
    for names, is_of_torch_save in ((pickles.TORCH_NAMES, True), (pickles.DCP_NAMES, False)):
        check_pickle(data, names, is_of_torch_save=is_of_torch_save)
    found = read({NAME: data}, NAME)
    if data == archive():
        assert np.array_equal(found["a"], STATE["a"])
        assert np.array_equal(found["t"], STATE["t"])
    read(stock() | {".metadata": data})
    read(stock() | {"__0_0.distcp": data})


def check_pickle(data, names, *, is_of_torch_save):
    """Unpickles ``data``."""
    with ear() as heard:
        with suppress(CheckpointError):
            pickles.load(data, names, "here", is_of_torch_save=is_of_torch_save)
    assert not heard.heard, heard.heard
