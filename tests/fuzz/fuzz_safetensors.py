"""Files of safetensors that lie, and indices that name what they should not."""

import json
from functools import cache

import numpy as np
import safetensors.numpy

from cloudckpt.convert.safetensors import parse_index
from cloudckpt.errors import CheckpointError
from fuzz.reading import read

NAME = "model.safetensors"
INDEX = "model.safetensors.index.json"
STATE = {"a": np.arange(24, dtype=np.float32).reshape(4, 6), "b": np.arange(5, dtype=np.int8), "e": np.zeros((0, 3))}


@cache
def whole():
    """A file."""
    return safetensors.numpy.save(STATE, {"format": "np"})


def seeds():
    """Valid inputs."""
    index = {"metadata": {"total_size": 101}, "weight_map": dict.fromkeys(STATE, NAME)}
    return [whole(), json.dumps(index).encode()]


def check(data):
    """Reads ``data`` as a file, and as the index of one."""
    found = read({NAME: data}, NAME)
    if not isinstance(found, CheckpointError):
        for value in found.values():
            assert value is None or isinstance(value, CheckpointError) or value.tobytes() in data
    if data == whole():
        assert all(np.array_equal(found[name], STATE[name]) for name in STATE)
    try:
        parse_index(data, "here")
    except CheckpointError:
        return
    read({NAME: whole(), INDEX: data})
