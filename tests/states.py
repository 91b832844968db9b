"""What the tests of state dicts share: a model, objects, and their way to a checkpoint and back."""

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from cloudckpt.dcp import ObjectStoreReader, ObjectStoreWriter
from cloudckpt.dcp.state.stateful import Destination, to_save

TENSOR = torch.arange(3.0)


def save(state, url, **more):
    dcp.save(to_save(state, **more), storage_writer=ObjectStoreWriter(url))


def metadata_at(url):
    return ObjectStoreReader(url).read_metadata()


def load(state, url, **more):
    destination = Destination(state, metadata_at(url), **more)
    dcp.load(destination.state_dict, storage_reader=ObjectStoreReader(url))
    destination.finish()
    return state


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            list(a) == list(b)
            and all(type(x) is type(y) for x, y in zip(a, b, strict=True))
            and all(equal(a[key], b[key]) for key in a)
        )
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.b(self.a(x).relu())


def train(model, *optimizers, steps=3):
    losses = []
    for i in range(steps):
        loss = model(torch.linspace(0, 1 + i, 12).reshape(3, 4)).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item().hex())
    return losses


def adamw(*modules):
    return torch.optim.AdamW([p for m in modules for p in m.parameters()], lr=0.1)


class Feed:
    """A data loader that remembers where it was; a fresh one has nothing to say."""

    def __init__(self, state=None):
        self.state = {} if state is None else state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state
