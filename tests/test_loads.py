"""What a load tells that fails before it reads, and a reader that is sent elsewhere in the middle of one."""

import pickle
from secrets import token_hex

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from cloudckpt.dcp import Checkpointer, ObjectStoreReader, ObjectStoreWriter
from cloudckpt.errors import ShapeMismatchError, UsageError


@pytest.fixture
def root():
    return f"memory://{token_hex(6)}/run"


def test_other_shapes_are_refused_all_at_once_by_key_and_both_shapes(root):
    held = {"a": torch.ones(3, 4), "b": {"c": torch.ones(5)}, "d": torch.ones(2)}
    with Checkpointer(root) as checkpointer:
        checkpointer.save(1, {"a": torch.zeros(4, 3), "b": {"c": torch.zeros(6)}, "d": torch.zeros(2)})
        with pytest.raises(ShapeMismatchError) as caught:
            checkpointer.load(held)
    assert "'a' is (4, 3) in the checkpoint and (3, 4) here; 'b.c' is (6,) in the checkpoint and (5,)" in str(
        caught.value
    )
    assert "'d'" not in str(caught.value)
    assert held["d"].tolist() == [1, 1]


def test_a_reader_between_its_metadata_and_its_data_goes_elsewhere_without_the_load(root):
    dcp.save({"w": torch.arange(4)}, storage_writer=ObjectStoreWriter(root))
    reader = ObjectStoreReader(root)
    metadata = reader.read_metadata()
    sent = pickle.loads(pickle.dumps(reader))
    planner, found = DefaultLoadPlanner(), {"w": torch.zeros(4, dtype=torch.int64)}
    planner.set_up_planner(found, metadata, is_coordinator=True)
    plan = planner.create_local_plan()
    with pytest.raises(UsageError, match="without read_metadata"):
        sent.read_data(plan, planner)
    sent.read_metadata()
    sent.read_data(plan, planner).wait()
    assert found["w"].tolist() == [0, 1, 2, 3]
    reader.read_data(plan, planner).wait()
